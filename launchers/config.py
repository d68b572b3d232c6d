"""Configs of the jobs that join several rooms. Torch-free."""

from __future__ import annotations

from pathlib import Path

from model_zoo.frozen.config import LatentCodecConfig, TextEncoderConfig
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from configs.base import Config
from model_zoo.config import ScheduleConfig


class SampleConfig(Config):
    """Prompts -> tokens -> latents -> mp4."""

    zoo: Path
    out: Path  # folder of the mp4 files
    lm: str = "lm"  # zoo references
    tokenizer: str = "tokenizer"
    diffusion: str = "diffusion"
    lm_text: TextEncoderConfig
    diffusion_text: TextEncoderConfig
    codec: LatentCodecConfig
    schedule: ScheduleConfig = ScheduleConfig()
    prompts: tuple[str, ...] = ()
    num_latent_frames: PositiveInt = 13
    fps: PositiveFloat = 8.0
    motion_score: NonNegativeFloat = 0.1
    guidance: NonNegativeFloat = 7.5  # of the language model; 0 or 1 = off
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0  # 0 = off; not together with top_p
    top_p: float = Field(default=0.0, ge=0.0, le=1.0)  # 0 = off
    steps: PositiveInt = 50  # of the diffusion sampler
    seed: NonNegativeInt = 42
    device: str = "auto"

    @field_validator("prompts")
    @classmethod
    def _no_empty_prompt(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i} is empty; say what the video shows")
        return prompts


class EvaluateConfig(Config):
    """Losses with the right and with wrong conditions, on a sample of the data set."""

    zoo: Path
    data: Path
    out: Path  # the JSON file of results
    lm: str = "lm"
    tokenizer: str = "tokenizer"
    diffusion: str = "diffusion"
    schedule: ScheduleConfig = ScheduleConfig()
    lm_text_column: str
    diffusion_text_column: str
    prefix_frames: PositiveInt
    samples: PositiveInt = 32
    seeds: PositiveInt = 5  # each draws other clips, wrong partners, noise and timesteps
    device: str = "auto"
