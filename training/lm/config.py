"""Config of the language model's training. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, ValidationInfo, model_validator

from landiff.configs.base import Config, ConfigError, refuse_values
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import LMConfig
from landiff.training.config import LoopConfig, OptimConfig

# sections in which a checkpoint may not differ from its run
MUST_MATCH = ("model", "precision", "vocab_multiple", "head_multiple")


class ParallelConfig(Config):
    """How one copy of the model is spread; whatever ranks are left over hold further copies (data parallel)."""

    tensor: PositiveInt = 1  # ranks that share each layer's matrices
    pipeline: PositiveInt = 1  # stages of whole layers
    sequence: bool = (
        False  # also share the activations between the layers' matrices; needs tensor > 1
    )
    distributed_optimizer: bool = False  # share the optimizer's state over the data-parallel copies
    overlap: bool = (
        False  # reduce gradients (and gather parameters) while the backward (forward) still runs
    )

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            refuse_values(
                info,
                [
                    "sequence = true shares activations among tensor ranks, and tensor is 1; raise it "
                    "or set "
                    "sequence = false"
                ],
            )
        return self


class LMTrainConfig(Config):
    """`landiff train lm`: Megatron-core GPT over semantic tokens (specification §4)."""

    run: Path  # run folder
    zoo: Path
    data: DataConfig  # data.micro_batch_size samples are packed end to end into one row
    loop: LoopConfig
    optim: OptimConfig
    model: LMConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: Literal["fp32", "bf16"] = (
        "bf16"  # of weights and activations; the optimizer's are float32
    )
    recompute: bool = False  # keep one activation per layer, compute the rest again in the backward
    layers: Literal["local", "te"] = (
        "local"  # whose linear layers and norms: Megatron's own, or Transformer Engine's
    )
    tokens_column: str = "tokens"
    tokenizer: str | None = (
        None  # zoo name of the one that must have made the tokens; none = look at sizes alone
    )
    text_column: str  # e.g. text-minilm
    text_dropout: float = Field(
        default=0.1, ge=0, le=1
    )  # of a sample's whole text, for guidance (§4.3)
    row_multiple: PositiveInt = 8  # a packed row is padded to a multiple of it
    vocab_multiple: PositiveInt = (
        128  # the vocabulary too; padded ids are masked in logits and loss
    )
    head_multiple: PositiveInt = (
        1  # the heads too, with heads of zeros; only where parallel.tensor doesn't divide them
    )
    init_from: str | None = None  # zoo name of an LM to start from; none = fresh weights

    @property
    def columns(self) -> tuple[str, str]:
        return self.tokens_column, self.text_column

    @model_validator(mode="after")
    def _layers_divide(self, info: ValidationInfo) -> LMTrainConfig:
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        problems = []
        if self.model.num_heads % tensor and self.head_multiple % tensor:
            problems.append(
                f"model.num_heads = {self.model.num_heads} is not a multiple of parallel.tensor = "
                f"{tensor}; "
                f"{nearest_divisors(self.model.num_heads, tensor)}, or head_multiple = {tensor} "
                "adds heads of zeros"
            )
        for name, value in (
            ("model.ffn_size", self.model.ffn_size),
            ("vocab_multiple", self.vocab_multiple),
        ):
            if value % tensor:
                problems.append(
                    f"{name} = {value} is not a multiple of parallel.tensor = {tensor}; "
                    f"{nearest_divisors(value, tensor)}"
                )
        if self.model.num_layers % pipeline:
            problems.append(
                f"model.num_layers = {self.model.num_layers} is not a multiple of "
                f"parallel.pipeline = {pipeline}; "
                f"{nearest_divisors(self.model.num_layers, pipeline)}"
            )
        refuse_values(info, problems)
        return self


def nearest_divisors(number: int, asked: int) -> str:
    """The way out of a layout that does not divide: what does, on both sides of what was asked for."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    near = [
        max((d for d in divisors if d < asked), default=1),
        min((d for d in divisors if d > asked), default=number),
    ]
    return f"the nearest that divide it: {' and '.join(map(str, sorted(set(near))))}"


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model on `world_size` ranks.

    Raises ConfigError where they do not divide, with numbers that do.
    """
    ranks = parallel.tensor * parallel.pipeline
    if world_size % ranks:
        below = world_size // ranks * ranks
        near = [below, below + ranks] if below else [ranks]
        raise ConfigError(
            f"parallel.tensor * parallel.pipeline = {parallel.tensor} * {parallel.pipeline} does "
            "not divide the "
            f"{world_size} launched ranks; launch a multiple of {ranks} or lower one of them; the "
            "nearest numbers "
            f"of ranks that do: {' or '.join(map(str, near))}"
        )
    return world_size // ranks
