"""Configs of the jobs that join several rooms. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from landiff.configs.base import Config
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.model_zoo.config import ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.frozen.config import CodecConfig, TextConfig


class ShardsJobConfig(ShardsConfig):
    """`landiff shards`: what is cut, which decides the bytes of the shards, and where they go, which does not."""

    data: Path

    @property
    def content(self) -> ShardsConfig:
        return ShardsConfig.model_validate(self.model_dump(exclude={"data"}))


class SampleConfig(Config):
    """Prompts -> tokens -> latents -> mp4."""

    zoo: Path
    out: Path  # folder of the mp4 files
    lm: str = "lm"  # zoo references
    tokenizer: str = "tokenizer"
    diffusion: str = "diffusion"
    lm_text: TextConfig
    diffusion_text: TextConfig
    codec: CodecConfig
    schedule: ScheduleConfig = ScheduleConfig()
    prompts: tuple[str, ...] = ()
    num_latent_frames: PositiveInt = 13
    fps: PositiveFloat = 8.0
    motion_score: NonNegativeFloat | None = None  # None: 0.1
    tokens: TokenSamplingConfig = TokenSamplingConfig()
    steps: PositiveInt = 50  # of the diffusion sampler
    guidance: NonNegativeFloat = (
        6.0  # of the diffusion model: the scale moves between 1 and 1 + guidance
    )
    clean_frames: NonNegativeInt = 7  # latents that a chunk of a long video keeps of the one before
    seed: NonNegativeInt = 42
    # fp32: the weights as they are. bf16: as the release samples (§4.5, §5.11); norms, head and quantiser stay float32
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @field_validator("prompts")
    @classmethod
    def _no_empty_prompt(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i} is empty; say what the video shows")
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ValueError(
                    f"prompt {i}, {prompt!a}, is not valid UTF-8 text; check the encoding of the terminal or file"
                )
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
