"""Config of the semantic tokenizer's training. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from landiff.configs.base import Config
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import TokenizerConfig
from landiff.training.config import LoopConfig, OptimConfig

COLUMN = "features"  # what it is trained on


class TokenizerTrainConfig(Config):
    """`landiff train tokenizer`."""

    run: Path  # run folder
    data: DataConfig
    loop: LoopConfig
    optim: OptimConfig
    model: TokenizerConfig = TokenizerConfig()
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # bf16: autocast; parameters and the quantiser stay float32
    )
    recompute: bool = False  # activations in backward instead of keeping them

    @property
    def columns(self) -> tuple[str, ...]:
        return (COLUMN,)
