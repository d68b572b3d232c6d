"""The smallest real diffusion trainer: a config, a zoo, and samples as functions of their index."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import landiff.model_zoo.tokenizer  # noqa: F401 - slow to import: once for all forked ranks
from landiff.configs import load
from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.model_zoo import keyed_random, registry
from landiff.model_zoo.config import DiffusionConfig, TokenizerConfig
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.distributed import World
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw
from tests.training import mixed
from tests.training.mixed import write_mixed
from tests.training.toy import META

MODEL = {
    "transformer": {
        "latent_channels": 48,
        "latent_frames": 3,
        "latent_height": 4,
        "latent_width": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "time_embed_dim": 16,
        "text_length": 3,
        "text_dim": 6,
    },
    "control_layers": 1,
    "semantic": {
        "feature_channels": 6,
        "base_channels": 32,
        "channel_multipliers": [1, 1],
        "num_res_blocks": 1,
        "out_channels": 8,
    },
}
TOKENIZER = TokenizerConfig(
    feature_channels=6,
    grid_height=2,
    grid_width=2,
    hidden_size=32,
    num_heads=2,
    num_layers=1,
    token_size=16,
    codebook_size=16,
    codebook_dim=4,
    iframe_tokens=3,
    pframe_tokens=1,
    segment_frames=3,
)
NUM_CLIPS = 8


def config(folder: Path, phase: str = "main", **changes: Any) -> DiffusionTrainConfig:
    """A config of `phase`; `changes` are dotted keys with __ for the dot: zero__stage=3."""
    data: dict[str, Any] = {
        "run": str(folder / "run"),
        "zoo": str(folder / "zoo"),
        "phase": phase,
        "data": {"manifest": str(folder), "global_batch_size": 4, "micro_batch_size": 2},
        "loop": {"steps": 100, "seed": 3},
        "optim": {"lr": 3e-3, "warmup_steps": 2, "clip_grad": 0.5},
        "model": MODEL,
        "precision": "fp32",
        "zero": {"stage": 1, "parameter_persistence_threshold": 0},
        "text_column": "text-tiny",
        "prefix": {"frames": 1, "probability": 0.3},
    }
    if phase == "control":
        data |= {"init_from": "main", "tokenizer": "tokenizer"}
    return load(
        DiffusionTrainConfig,
        data,
        [f"{key.replace('__', '.')}={value}" for key, value in changes.items()],
    )


def make_zoo(folder: Path) -> None:
    """A main transformer that has left its zero start, and a tokenizer with a random codebook."""
    model = DiffusionConfig.model_validate(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        main, tokenizer = (
            registry.build_module("transformer", model.transformer),
            registry.build_module("tokenizer", TOKENIZER),
        )
        state = {
            name: tensor + 0.05 * torch.randn_like(tensor)
            for name, tensor in main.state_dict().items()
        }
        registry.export(folder / "zoo", "main", "transformer", model.transformer, state, {})
        state = tokenizer.state_dict()
        for name in state:
            if name.endswith("codebook.embed"):
                state[name] = torch.randn_like(state[name])
            if name.endswith("initted"):
                state[name] = torch.ones_like(state[name])
        registry.export(folder / "zoo", "tokenizer", "tokenizer", TOKENIZER, state, {})


def sample(index: int, global_batch_size: int) -> Sample:
    """The sample at place `index` of the stream: clip `index` modulo the few there are."""
    clip = index % NUM_CLIPS
    draw = keyed_random.generator(0, "clip", clip)
    return Sample(
        f"{clip:04d}",
        index // NUM_CLIPS,
        index,
        index % global_batch_size,
        META,
        {
            "latents": torch.randn(3, 48, 4, 4, generator=draw).to(torch.bfloat16),
            "text-tiny": torch.randn(3, 6, generator=draw).to(torch.bfloat16),
            "tokens": torch.randint(0, 16, (5,), generator=draw).to(torch.uint16),
        },
    )


KEYS = [*keys_of(0, NUM_CLIPS // 2), *keys_of(1, NUM_CLIPS // 2)]  # of the clips on disk


def write_data(data: Path, bad: str = "", source: str = "raw") -> None:
    """A data set of `NUM_CLIPS` such clips on disk, in two shards.

    The latent of clip `bad` is not finite.
    """

    def meta(key: str) -> dict[str, object]:
        return {"source": f"{source} {key}", "source_sha256": f"{source} {key}"}

    def value(column: str, key: str) -> torch.Tensor:
        found = sample(KEYS.index(key), 4).tensors[column]
        return found * math.nan if column == "latents" and key == bad else found

    write_raw(data, [NUM_CLIPS // 2, NUM_CLIPS - NUM_CLIPS // 2], source, meta)
    for column, shape in (("latents", [3, 48, 4, 4]), ("text-tiny", [3, 6]), ("tokens", [5])):
        write_column(data, column, value=partial(value, column))
        manifest = read_manifest(data)
        entered = manifest.columns[column].model_copy(update={"shape": shape})
        write_manifest(
            data, manifest.model_copy(update={"columns": {**manifest.columns, column: entered}})
        )


def batch(config: DiffusionTrainConfig, step: int, world: World | None = None) -> Batch:
    """This rank's share of global batch `step`; without a world, all of it."""
    sizes = batch_sizes(config.data_phases)
    size, micro = sizes.at(step).global_batch_size, sizes.at(step).micro_batch_size
    first = sizes.samples_before(step)
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    samples = []
    for position in range(rank, size, ranks):
        samples.append(replace(sample(first + position, size), position=position))
    return Batch(
        step, size, tuple(tuple(samples[i : i + micro]) for i in range(0, len(samples), micro))
    )


def write_mixed_data(folder: Path, bad: str = "") -> Path:
    """Images and videos in two sizes with the columns of both phases; `bad` is not finite."""
    columns = {
        "latents": mixed.latents(48),
        "text-tiny": mixed.text(3, 6),
        "tokens": mixed.tokens(TokenLayout.of(TOKENIZER)),
    }
    write_mixed(folder, columns, bad)
    manifest = read_manifest(folder)
    text = manifest.columns["text-tiny"].model_copy(update={"shape": [3, 6]})
    changed = {**manifest.columns, "text-tiny": text}
    write_manifest(folder, manifest.model_copy(update={"columns": changed}))
    return folder
