"""Config of the tokenizer trainer. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from landiff.configs.base import Config
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.config import (
    PARENT_DESCRIPTION,
    EmaConfig,
    LoopConfig,
    OptimConfig,
    TrainConfig,
)
from landiff.training.observe.config import TrackerConfig
from landiff.training.phases import PHASES_DESCRIPTION, PhaseConfig

COLUMN = "features"  # the column it trains on


class AlarmConfig(Config):
    """Limits beyond which a metric of the codebook is reported, when a step is logged."""

    from_step: NonNegativeInt = Field(
        default=200,
        description=(
            "Steps with quantization before the first alarm. A new codebook often looks like a "
            "collapsing one."
        ),
    )
    min_used_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description=(
            "Minimum number of codes used in a global batch, as a fraction of the number that the "
            "batch could use."
        ),
    )
    min_perplexity: float = Field(
        default=4.0,
        ge=1,
        description=(
            "Minimum perplexity of the codes of a global batch. A perplexity of 1 means a single "
            "code."
        ),
    )
    max_dead_fraction: float = Field(
        default=0.5, ge=0, le=1, description="Maximum fraction of dead codes in the codebook."
    )
    max_commitment_ratio: PositiveFloat = Field(
        default=10.0,
        description="Maximum commitment loss, as a multiple of the reconstruction loss.",
    )


class TokenizerTrainConfig(TrainConfig):
    """`landiff train tokenizer`: the semantic tokenizer on vision features."""

    run: Path = Field(description="Run folder: checkpoints, metrics and logs.")
    parent: Path | None = Field(default=None, description=PARENT_DESCRIPTION)
    zoo: Path = Field(default=Path("zoo"), description="Zoo in which `init_from` is looked up.")
    data: DataConfig = Field(description="Data folder with the `features` column, and batch sizes.")
    loop: LoopConfig = Field(description="Length of training, logging, validation and checkpoints.")
    optim: OptimConfig = Field(description="AdamW and its learning rate.")
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights. null: none."
    )
    trackers: tuple[TrackerConfig, ...] = Field(
        default=(),
        description="Experiment trackers that get the metrics in addition to TensorBoard.",
    )
    phases: tuple[PhaseConfig, ...] = Field(default=(), description=PHASES_DESCRIPTION)
    model: TokenizerConfig = Field(default=TokenizerConfig(), description="Sizes of the tokenizer.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description=(
            "Precision of the forward and backward passes. `bf16` is autocast: parameters and the "
            "quantizer stay in float32."
        ),
    )
    quantize_from_step: NonNegativeInt = Field(
        default=0,
        description=(
            "Step at which quantization starts. Until then the decoder receives unquantized "
            "latents, projected to the width of a code vector and back. k-means then starts from "
            "informative latents, which prevents a collapse of the codebook."
        ),
    )
    alarms: AlarmConfig | None = Field(
        default=AlarmConfig(),
        description="Alarms for codebook usage and commitment loss. null: none.",
    )
    recompute: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass instead of storing them. Saves memory and "
            "takes more time."
        ),
    )

    compile_blocks: bool = Field(
        default=False,
        description=(
            "Compile the blocks of encoder and decoder with torch.compile, which needs a compiler. "
            "Faster on CUDA, but the start takes minutes longer. Results differ by rounding."
        ),
    )
    init_from: str | None = Field(
        default=None,
        description=(
            "Zoo entry of a tokenizer to start from, with its codebook and feature statistics. "
            "null: random initialization."
        ),
    )

    def clip_tokens(self, shape: ClipShape) -> int:
        """Cells and latent tokens of a clip, or of a segment of a longer one."""
        frames = min(shape.latent_frames, self.model.segment_frames)
        rows, columns = shape.grid
        latents = self.model.iframe_tokens + (frames - 1) * self.model.pframe_tokens
        return frames * rows * columns + latents

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the loader reads."""
        return (COLUMN,)
