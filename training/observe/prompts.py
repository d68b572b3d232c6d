"""Text states of `preview_prompts`: encoded once, before training, and kept in the run folder.

Rank 0 encodes them on the CPU, since the device holds the model that is trained. Later starts of
the run read the file, unless prompts or encoder have changed.

Shape letters (docs/glossary.md): L text rows, D width of text states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from landiff.configs.files import atomic_file
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.samples import Sample
from landiff.model_zoo import frozen
from landiff.model_zoo.frozen.config import TextConfig
from landiff.training.checkpoint.run_folder import PROMPTS
from landiff.training.distributed import World

MOTION_SCORE = 0.1  # as in sampling, if none is given
KEY = "made_from"  # in the header of the file


def prompt_states(
    run: Path, prompts: Sequence[str], encoder: TextConfig, world: World | None
) -> list[Tensor]:
    """Text states of each prompt, bfloat16 [L, D] on the CPU. Collective.

    world: None if one process trains alone.
    """
    path = run / PROMPTS
    key = json.dumps([list(prompts), encoder.model_dump(mode="json")], sort_keys=True)
    is_first = world is None or world.rank == 0
    if is_first and _key_of(path) != key:
        _write(path, prompts, encoder, key)
    if world is not None:
        world.barrier()
    states = load_file(path)
    return [states[str(number)].clone() for number in range(len(prompts))]  # the file is mapped


def _key_of(path: Path) -> str:
    """Prompts and encoder that a file was made from, empty if there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY, "")
    except (OSError, SafetensorError):
        return ""


@torch.no_grad()
def _write(path: Path, prompts: Sequence[str], encoder: TextConfig, key: str) -> None:
    """Encode the prompts and write the file."""
    encode = frozen.build(encoder, torch.device("cpu"))
    states = {}
    for number, prompt in enumerate(prompts):  # alone, so that other prompts do not matter
        states_1LD, length_1 = encode([prompt])
        states[str(number)] = states_1LD[0, : int(length_1)].bfloat16().contiguous()
    with atomic_file(path) as file:
        file.write(save(states, metadata={KEY: key}))


def prompt_sample(number: int, prompt: str, tensors: Mapping[str, Tensor]) -> Sample:
    """A prompt in the form of a clip, for code that samples from the conditions of clips."""
    meta = RawSample(
        key=f"prompt_{number}",
        caption=prompt,
        source="preview_prompts",
        source_sha256="",
        start_s=0.0,
        fps=8.0,
        num_frames=1,
        height=1,
        width=1,
        motion_score=MOTION_SCORE,
        video_sha256="",
    )
    return Sample(meta.key, 0, number, number, meta, dict(tensors))
