"""Generates the videos of `landiff sample` with models from the zoo and frozen encoders."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from landiff.data_pipeline.video.codec import write_mp4
from landiff.launchers.config import SampleConfig
from landiff.launchers.progress import ProgressLine
from landiff.launchers.results.loading import ModelLoader
from landiff.launchers.results.preview import log_videos
from landiff.model_zoo import frozen
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.sample.generate import Models, generate
from landiff.model_zoo.sample.latents import SamplerOptions
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.training.checkpoint.run_folder import TENSORBOARD

SEED_STEP = 1000  # between the seeds of two prompts
MAX_SLUG = 40  # characters of a prompt in the name of its mp4 file
MAX_TAG = 60  # characters of a prompt in its TensorBoard tag


def load_models(config: SampleConfig, device: torch.device) -> Models:
    """The models and encoders of `config` on `device`, with progress."""
    loader = ModelLoader("sample loads", 6, config.zoo, device)
    lm = loader.lm(config.lm)
    tokenizer = loader.tokenizer(config.tokenizer)
    diffusion = loader.diffusion(config.diffusion)
    lm_text = loader.load(config.lm_text.kind, lambda: frozen.build(config.lm_text, device))
    diffusion_text = loader.load(
        config.diffusion_text.kind, lambda: frozen.build(config.diffusion_text, device)
    )
    codec = loader.load(config.codec.kind, lambda: frozen.build(config.codec, device))
    if config.precision == "bf16":
        lm = lm.to_inference(torch.bfloat16)
        tokenizer = tokenizer.bfloat16()
        diffusion = diffusion.bfloat16()
    return Models(
        lm=lm,
        tokenizer=tokenizer,
        diffusion=diffusion,
        schedule=NoiseSchedule(config.schedule),
        lm_text=lm_text,
        diffusion_text=diffusion_text,
        codec=codec,
    )


def sample_videos(config: SampleConfig) -> list[str]:
    """Writes one mp4 for each prompt into `config.out`. Returns the file names.

    Prompt i has the seed `config.seed` + 1000 i.
    """
    models = load_models(config, pick_device(config.device))
    config.out.mkdir(parents=True, exist_ok=True)
    seeds = [config.seed + SEED_STEP * i for i in range(len(config.prompts))]
    videos_THWC = generate_videos(models, config, seeds)
    names = []
    for number, (prompt, video_THWC) in enumerate(zip(config.prompts, videos_THWC, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:MAX_SLUG] or "prompt"
        path = config.out / f"{number:02d}-{slug}-seed{seeds[number]}.mp4"
        write_mp4(path, video_THWC.numpy(), config.fps)
        events = config.out.parent / "runs" / "sample" / TENSORBOARD
        log_videos(events, 0, {f"sample/{number:02d} {prompt[:MAX_TAG]}": video_THWC}, config.fps)
        print(f"sample: {path}")
        names.append(path.name)
    return names


def generate_videos(models: Models, config: SampleConfig, seeds: list[int]) -> list[Tensor]:
    """One uint8 video [T, H, W, 3] for each prompt, on the CPU."""
    lines: dict[str, ProgressLine] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in lines:
            lines[what] = ProgressLine(f"sample {what}")
        lines[what](done, total)

    sampler = SamplerOptions(num_steps=config.steps, guidance=config.guidance)
    # Videos whose end the language model predicts differ in length, so they are generated alone.
    batch_size = 1 if config.tokens.predict_end else len(config.prompts)
    videos_THWC: list[Tensor] = []
    for first in range(0, len(config.prompts), batch_size):
        batch = slice(first, first + batch_size)
        generated = generate(
            models,
            prompts=config.prompts[batch],
            num_latent_frames=config.num_latent_frames,
            tokens=config.tokens,
            sampler=sampler,
            seeds=seeds[batch],
            motion_score=config.motion_score,
            clean_frames=config.clean_frames,
            progress=progress,
        )
        videos_THWC.extend(generated.frames_BTHWC.cpu())
    return videos_THWC
