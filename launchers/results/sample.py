"""`landiff sample`: joins the zoo, the frozen encoders and the video writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from landiff.data_pipeline.video.codec import write_mp4
from landiff.launchers.config import SampleConfig
from landiff.launchers.progress import Progress
from landiff.launchers.results.preview import log_videos
from landiff.model_zoo import frozen, registry
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.sample.generate import Models, generate
from landiff.model_zoo.sample.latents import SamplerOptions
from landiff.model_zoo.schedule import NoiseSchedule


def load_models(config: SampleConfig, device: torch.device) -> Models:
    """The models and encoders of `config` on `device`, with a line of progress for each."""
    zoo, encoders = config.zoo, (config.lm_text, config.diffusion_text, config.codec)
    parts = [
        partial(load_part, zoo, getattr(config, kind), kind, device)
        for kind in ("lm", "tokenizer", "diffusion")
    ]
    parts += [partial(frozen.build, encoder, device) for encoder in encoders]
    names = [config.lm, config.tokenizer, config.diffusion, *(encoder.kind for encoder in encoders)]
    lm, tokenizer, diffusion, lm_text, diffusion_text, codec = load_all(
        "sample loads", names, parts
    )
    if config.precision == "bf16":
        lm, tokenizer, diffusion = (
            lm.to_inference(torch.bfloat16),
            tokenizer.bfloat16(),
            diffusion.bfloat16(),
        )
    return Models(
        lm=lm,
        tokenizer=tokenizer,
        diffusion=diffusion,
        schedule=NoiseSchedule(config.schedule),
        lm_text=lm_text,
        diffusion_text=diffusion_text,
        codec=codec,
    )


def load_part(zoo: Path, reference: str, kind: str, device: torch.device) -> torch.nn.Module:
    """The model that a zoo reference names, on `device`."""
    return registry.load_model(registry.resolve(zoo, reference, kind), device)


def load_all(title: str, names: Sequence[str], loads: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of all `loads`, one after the other; the line of progress says which one is being loaded."""
    progress = Progress(title, "models", every_s=0.0)
    results = []
    for number, (name, load) in enumerate(zip(names, loads, strict=True)):
        progress(number, len(loads), name)
        results.append(load())
    progress(len(loads), len(loads))
    return results


def sample_videos(config: SampleConfig) -> list[str]:
    """Write one mp4 per prompt into `config.out`; returns their names. Prompt i has the seed `config.seed` + 1000 i."""
    models = load_models(config, pick_device(config.device))
    config.out.mkdir(parents=True, exist_ok=True)
    bars: dict[str, Progress] = {}

    def progress(what: str, done: int, total: int) -> None:
        bars.setdefault(what, Progress(f"sample {what}"))(done, total)

    count = len(config.prompts)
    seeds = [config.seed + 1000 * i for i in range(count)]
    sampler = SamplerOptions(num_steps=config.steps, guidance=config.guidance)
    per_pass = (
        1 if config.tokens.predict_end else count
    )  # videos that end where they like are made one by one
    videos: list[torch.Tensor] = []
    for first in range(0, count, per_pass):
        some = slice(first, first + per_pass)
        generated = generate(
            models,
            config.prompts[some],
            config.num_latent_frames,
            config.tokens,
            sampler,
            seeds=seeds[some],
            motion_score=config.motion_score,
            clean_frames=config.clean_frames,
            progress=progress,
        )
        videos += generated.frames_BTHWC.cpu()
    names = []
    for number, (prompt, frames) in enumerate(zip(config.prompts, videos, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
        path = config.out / f"{number:02d}-{slug}-seed{seeds[number]}.mp4"
        write_mp4(path, frames.numpy(), config.fps)
        log_videos(
            config.out.parent / "runs" / "sample" / "tensorboard",
            0,
            {f"sample/{number:02d} {prompt[:60]}": frames},
            config.fps,
        )
        print(f"sample: {path}")
        names.append(path.name)
    return names
