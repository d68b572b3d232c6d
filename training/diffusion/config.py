"""Config of the diffusion trainer. Torch-free.

One trainer, two phases (specification §5.4):

* `main` pretrains the main transformer alone;
* `control` freezes it and trains the control branch with its semantic condition. Its start is a zoo entry
  of kind "transformer", whose first layers the control branch copies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, model_validator

from landiff.configs.base import Config, refuse_values
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import DiffusionConfig, ScheduleConfig
from landiff.model_zoo.frozen.config import CodecConfig
from landiff.training.config import LoopConfig, OptimConfig

# sections in which a checkpoint may not differ from its run
MUST_MATCH = ("model", "schedule", "phase")

STAGE_ZERO = (
    "zero.stage = 0 is refused: in bf16 DeepSpeed's unpartitioned optimizer takes a step on zero gradients "
    "before training starts (Adam counts from 1 and one full weight decay is applied), and in fp32 it reports "
    "no gradient norm; zero.stage = 1 does the same work right, on one rank too"
)


class ZeroConfig(Config):
    """What DeepSpeed partitions over the ranks, and the sizes of its buckets (in elements)."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="1: optimizer states; 2: and gradients; 3: and parameters. 0 is refused",
    )
    reduce_bucket_size: PositiveInt = 500_000_000
    allgather_bucket_size: PositiveInt = 500_000_000
    overlap_communication: bool = False
    # stage 3 only
    parameter_persistence_threshold: NonNegativeInt = 100_000  # smaller parameters are kept whole
    prefetch_bucket_size: NonNegativeInt = 50_000_000
    max_live_parameters: PositiveInt = 1_000_000_000

    @model_validator(mode="after")
    def _partitioned(self, info: ValidationInfo) -> ZeroConfig:
        if self.stage == 0:
            refuse_values(info, [STAGE_ZERO])
        return self


class PrefixConfig(Config):
    """Streaming: the first latent frames of some samples stay clean, the loss is over the rest (§5.6)."""

    frames: PositiveInt = 7  # K of the 13
    probability: float = Field(default=0.0, ge=0.0, le=1.0)  # of a sample to have a prefix


class DiffusionTrainConfig(Config):
    """`python -m landiff.training.diffusion`."""

    run: Path  # run folder
    zoo: Path  # where `init_from` and `tokenizer` are looked up
    phase: Literal["main", "control"]
    data: DataConfig
    loop: LoopConfig
    optim: OptimConfig
    model: DiffusionConfig
    schedule: ScheduleConfig = ScheduleConfig()
    zero: ZeroConfig = ZeroConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    init_from: str | None = None  # zoo reference of kind "transformer": the start of either phase
    tokenizer: str | None = (
        None  # zoo reference; decodes `tokens` to the features of the condition (control)
    )
    latents_column: str = "latents"
    tokens_column: str = "tokens"
    text_column: str  # padded text states, e.g. text-t5-v1.1 or text-minilm-padded
    text_dropout: float = Field(default=0.1, ge=0.0, le=1.0)  # a sample's text states become zeros
    prefix: PrefixConfig = PrefixConfig()
    recompute: bool = False  # activation checkpointing: less memory, about a third more time
    preview_codec: CodecConfig | None = (
        None  # decodes sampled latents for TensorBoard; None = no preview
    )
    preview_steps: PositiveInt = 20  # of the sampler

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> DiffusionTrainConfig:
        problems = []
        if self.phase == "control":
            for name, what in (
                ("init_from", "the frozen main transformer"),
                ("tokenizer", "the semantic tokenizer"),
            ):
                if getattr(self, name) is None:
                    problems.append(f"phase = control needs {name}, the zoo reference of {what}")
        if self.prefix.probability and self.prefix.frames >= self.model.transformer.latent_frames:
            problems.append(
                f"prefix.frames = {self.prefix.frames} leaves nothing to learn of "
                f"model.transformer.latent_frames = {self.model.transformer.latent_frames}; lower it"
            )
        refuse_values(info, problems)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the loader reads."""
        columns = (self.latents_column, self.text_column)
        return (*columns, self.tokens_column) if self.phase == "control" else columns
