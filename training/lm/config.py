"""Config of the language model trainer. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, model_validator

from landiff.configs.base import Config, refuse_values
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import LMConfig, ScheduleConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.frozen.config import CodecConfig, TextConfig
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.config import (
    PARENT_DESCRIPTION,
    EmaConfig,
    LoopConfig,
    LoRAConfig,
    OptimConfig,
    TrainConfig,
)
from landiff.training.float8.requirements import MULTIPLE
from landiff.training.observe.config import TrackerConfig
from landiff.training.phases import PHASES_DESCRIPTION, PhaseConfig

CHUNKS = 2
"""Chunks of a packed row that a context-parallel rank computes, see `RowPart` in layers.py."""


class ParallelConfig(Config):
    """Parallel layout of one copy of the model. The other ranks hold further copies."""

    tensor: PositiveInt = Field(
        default=1,
        description=(
            "Tensor-parallel size: ranks over which the matrices of each layer are sharded."
        ),
    )
    pipeline: PositiveInt = Field(
        default=1, description="Number of pipeline stages, over which the layers are divided."
    )
    virtual_pipeline: PositiveInt = Field(
        default=1,
        description=(
            "Chunks of layers per pipeline stage (interleaved schedule). Divides the pipeline "
            "bubble by this number and multiplies communication between stages by it. Needs "
            "`pipeline` > 1, and a multiple of `pipeline` rows per rank and step."
        ),
    )
    context: PositiveInt = Field(
        default=1,
        description=(
            "Context-parallel size: ranks over which each packed row is split. Use it for long "
            "videos whose activations do not fit in memory, or if there are more GPUs than rows in "
            "a batch."
        ),
    )
    sequence: bool = Field(
        default=False,
        description=(
            "Sequence parallelism: also shard the activations between the matrices over the "
            "tensor-parallel ranks. Needs `tensor` > 1."
        ),
    )
    distributed_optimizer: bool = Field(
        default=False,
        description="Shard the optimizer state over the data-parallel ranks.",
    )
    overlap: bool = Field(
        default=False,
        description=(
            "Reduce gradients during the backward pass, and with `distributed_optimizer` gather "
            "parameters during the forward pass."
        ),
    )

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> ParallelConfig:
        problems = []
        if self.sequence and self.tensor == 1:
            problems.append(
                "sequence = true divides activations among tensor ranks, and tensor is 1; raise it "
                "or set sequence = false"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            problems.append(
                f"virtual_pipeline = {self.virtual_pipeline} divides the layers of each pipeline "
                "stage, and pipeline is 1; raise it or set virtual_pipeline = 1"
            )
        refuse_values(info, problems)
        return self

    @property
    def virtual_stages(self) -> int | None:
        """`virtual_pipeline` as Megatron-core names it: None for the schedule without chunks."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None


class LMLoRAConfig(LoRAConfig):
    """A LoRA adapter of the language model.

    q, k and v of a layer share A, and so do w1 and w3: they are one matrix each in Megatron-core.
    """

    targets: tuple[Literal["wqkv", "wo", "w1", "w3", "w2"], ...] = Field(
        default=("wqkv", "wo"),
        min_length=1,
        description="Linear layers of each block to adapt. `w1` and `w3` must be adapted together.",
    )

    @model_validator(mode="after")
    def _whole_matrices(self, info: ValidationInfo) -> LMLoRAConfig:
        if ("w1" in self.targets) != ("w3" in self.targets):
            missing = "w3" if "w1" in self.targets else "w1"
            refuse_values(
                info,
                [
                    "targets: w1 and w3 are one matrix in Megatron-core, which shares A; add "
                    f"{missing} or remove the other"
                ],
            )
        return self


class LMPhaseConfig(PhaseConfig):
    """Values of the language model trainer that change at a step. null keeps a value."""

    text_dropout: float | None = Field(
        default=None, ge=0, le=1, description="As `text_dropout` of the trainer."
    )


class RendererConfig(Config):
    """Models that turn sampled tokens into videos for previews. The LM's `tokenizer` belongs to it.

    Videos are rendered without text, so that they show what the tokens say.
    """

    diffusion: str = Field(description="Zoo entry of kind `diffusion`, in the zoo of the LM.")
    codec: CodecConfig = Field(description="Codec that decodes the latents.")
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of the diffusion model."
    )
    steps: PositiveInt = Field(default=20, description="Sampling steps.")
    clean_frames: PositiveInt = Field(
        default=7,
        description=(
            "Latent frames at the end of a chunk that the next chunk of a long clip continues."
        ),
    )


class LMTrainConfig(TrainConfig):
    """`landiff train lm`: a Megatron-core GPT over semantic tokens (docs/specification.md §4)."""

    must_match: ClassVar[tuple[str, ...]] = (
        "model",
        "precision",
        "vocab_multiple",
        "head_multiple",
        "lora",
    )

    run: Path = Field(description="Run folder: checkpoints, metrics and logs.")
    parent: Path | None = Field(default=None, description=PARENT_DESCRIPTION)
    zoo: Path = Field(description="Zoo in which `init_from` and `tokenizer` are looked up.")
    data: DataConfig = Field(
        description=(
            "Data folder with the columns, and batch sizes. The `micro_batch_size` samples of a "
            "forward pass are packed into one row."
        )
    )
    loop: LoopConfig = Field(description="Length of training, logging, validation and checkpoints.")
    optim: OptimConfig = Field(description="AdamW and its learning rate.")
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights. null: none."
    )
    trackers: tuple[TrackerConfig, ...] = Field(
        default=(),
        description="Experiment trackers that get the metrics in addition to TensorBoard.",
    )
    phases: tuple[LMPhaseConfig, ...] = Field(default=(), description=PHASES_DESCRIPTION)
    model: LMConfig = Field(description="Sizes of the language model.")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="Parallel layout of the model."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description=(
            "Precision of weights and activations. The optimizer keeps float32 master weights."
        ),
    )
    fp8: bool = Field(
        default=False,
        description=(
            "Compute the matrix multiplications of the blocks in float8, with torchao (extra "
            "`fp8`). Needs a GPU of compute capability 8.9 or newer, and `compile_blocks` to be "
            "fast; the CPU emulates it slowly. Checkpoints do not depend on it. Needs layers = "
            "local; does not work with `lora`."
        ),
    )
    recompute: bool = Field(
        default=False,
        description=(
            "Store one activation per layer and recompute the others in the backward pass. Saves "
            "memory and takes more time."
        ),
    )
    selective_recompute: bool = Field(
        default=False,
        description=(
            "Recompute norms, rotations and activation functions in the backward pass, and store "
            "the outputs of matrix multiplications and attention. Saves about half of the memory "
            "of activations and takes little time. Instead of `recompute`; `compile_blocks` "
            "recomputes norms and activation functions too. Needs layers = local and "
            "parallel.tensor = 1."
        ),
    )
    layers: Literal["local", "te"] = Field(
        default="local",
        description=(
            "Linear layers and norms: Megatron-core's own (`local`) or Transformer Engine's (`te`)."
        ),
    )
    compile_blocks: bool = Field(
        default=False,
        description=(
            "Compile norms, rotations, activation functions and float8 layers with torch.compile, "
            "which needs a compiler. Faster on CUDA, but the start takes minutes longer. Results "
            "differ by rounding."
        ),
    )
    tokens_column: str = Field(default="tokens", description="Column of the semantic tokens.")
    tokenizer: str | None = Field(
        default=None,
        description=(
            "Zoo entry of the tokenizer that the tokens must come from. null checks sizes only."
        ),
    )
    text_column: str = Field(description="Column of text states, for example `text-minilm`.")
    text_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description=(
            "Probability of replacing all text states of a sample by the null vector, for "
            "classifier-free guidance."
        ),
    )
    validation_samples: NonNegativeInt = Field(
        default=0,
        description=(
            "Number of held-out clips for which tokens are sampled in each validation, to compare "
            "their distribution with that of the data."
        ),
    )
    renderer: RendererConfig | None = Field(
        default=None,
        description=(
            "Models that render the previews of `loop.preview_every`: sampled tokens and the "
            "tokens of the data. They are loaded on as many ranks as there are videos, and freed "
            "after each preview. null: no previews."
        ),
    )
    preview_prompts: tuple[str, ...] = Field(
        default=(),
        description=(
            "Prompts for which previews show a sampled video. Needs `renderer`. Each video is one "
            "segment long."
        ),
    )
    preview_text: TextConfig | None = Field(
        default=None,
        description=(
            "Text encoder for `preview_prompts`; must be the one of `text_column`. It runs once, "
            "on the CPU, before training."
        ),
    )
    row_multiple: PositiveInt = Field(
        default=8, description="Packed rows are padded to a multiple of this many tokens."
    )
    vocab_multiple: PositiveInt = Field(
        default=128,
        description=(
            "The vocabulary is padded to a multiple of this number. Padded ids are masked in "
            "logits and loss."
        ),
    )
    head_multiple: PositiveInt = Field(
        default=1,
        description=(
            "The number of heads is padded to a multiple of this number with heads of zeros. "
            "Needed only if the number of heads is not a multiple of `parallel.tensor`."
        ),
    )
    init_from: str | None = Field(
        default=None,
        description="Zoo entry of a language model to start from. null: random initialization.",
    )
    lora: LMLoRAConfig | None = Field(
        default=None,
        description=(
            "Train a LoRA adapter of `init_from` instead of its weights. null trains the weights. "
            "Needs layers = local."
        ),
    )

    def clip_tokens(self, shape: ClipShape) -> int:
        """Tokens of a clip, without its text."""
        return TokenLayout.of(self.model).body_length(shape.latent_frames)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the loader reads."""
        return (self.tokens_column, self.text_column)

    def _lora_problems(self) -> list[str]:
        """What is missing for training an adapter."""
        if self.lora is None:
            return []
        problems = []
        if self.init_from is None:
            problems.append("lora needs init_from, the zoo reference of the weights it adapts")
        if self.layers == "te":
            problems.append(
                "lora has no layers of Transformer Engine (layers = te); use layers = local"
            )
        return problems

    def _fp8_problems(self) -> list[str]:
        """Why the linear layers cannot multiply in float8."""
        if not self.fp8:
            return []
        problems = []
        if self.layers == "te":
            problems.append(
                "fp8 = true has no layers of Transformer Engine (layers = te), which keep states "
                "of float8 in checkpoints; use layers = local"
            )
        if self.lora is not None:
            problems.append("fp8 = true has no adapters (lora); set fp8 = false")
        tensor = self.parallel.tensor
        model = self.model
        heads = -(-model.num_heads // self.head_multiple) * self.head_multiple
        divided = {
            "the width of all heads": heads * (model.hidden_size // model.num_heads),
            "model.ffn_size": model.ffn_size,
        }
        sizes = {"model.hidden_size": model.hidden_size}
        for name, size in divided.items():
            if size % tensor == 0:  # else it is reported as such
                sizes[f"{name} / parallel.tensor"] = size // tensor
        for name, size in sizes.items():
            if size % MULTIPLE:
                problems.append(
                    f"fp8 = true multiplies matrices whose sides are multiples of {MULTIPLE}, and "
                    f"{name} = {size} is not; change it, or set fp8 = false"
                )
        return problems

    def _recompute_problems(self) -> list[str]:
        """What `selective_recompute` does not work with."""
        if not self.selective_recompute:
            return []
        problems = []
        if self.recompute:
            problems.append("recompute and selective_recompute exclude each other; choose one")
        if self.compile_blocks:
            problems.append(
                "compile_blocks recomputes elementwise operations already; set selective_recompute "
                "= false, or compile_blocks = false"
            )
        if self.layers == "te":
            problems.append(
                "selective_recompute has no layers of Transformer Engine (layers = te); use layers "
                "= local"
            )
        if self.parallel.tensor > 1:
            problems.append(
                "selective_recompute keeps no results that tensor-parallel ranks have reduced; set "
                "parallel.tensor = 1, or recompute = true instead"
            )
        return problems

    @model_validator(mode="after")
    def _layers_divide(self, info: ValidationInfo) -> LMTrainConfig:
        tensor = self.parallel.tensor
        pipeline = self.parallel.pipeline
        heads = self.model.num_heads
        problems = self._lora_problems() + self._fp8_problems() + self._recompute_problems()
        if self.preview_prompts and self.preview_text is None:
            problems.append("preview_prompts needs preview_text, the text encoder of text_column")
        if self.preview_prompts and self.renderer is None:
            problems.append("preview_prompts needs renderer, the models that show tokens as videos")
        if heads % tensor and self.head_multiple % tensor:
            problems.append(
                f"model.num_heads = {heads} is not a multiple of parallel.tensor = {tensor}; "
                f"{nearest_divisors(heads, tensor)}, or head_multiple = {tensor} adds heads of "
                "zeros"
            )
        sizes = {"model.ffn_size": self.model.ffn_size, "vocab_multiple": self.vocab_multiple}
        for name, value in sizes.items():
            if value % tensor:
                problems.append(
                    f"{name} = {value} is not a multiple of parallel.tensor = {tensor}; "
                    f"{nearest_divisors(value, tensor)}"
                )
        num_layers = self.model.num_layers
        chunks = pipeline * self.parallel.virtual_pipeline
        if self.parallel.virtual_pipeline > 1 and num_layers % chunks:
            problems.append(
                f"model.num_layers = {num_layers} is not a multiple of parallel.pipeline * "
                f"parallel.virtual_pipeline = {pipeline} * {self.parallel.virtual_pipeline} = "
                f"{chunks}; {nearest_divisors(num_layers, chunks)}"
            )
        elif num_layers % pipeline:
            problems.append(
                f"model.num_layers = {num_layers} is not a multiple of parallel.pipeline = "
                f"{pipeline}; {nearest_divisors(num_layers, pipeline)}"
            )
        refuse_values(info, problems)
        return self


def nearest_divisors(number: int, asked: int) -> str:
    """The divisors of `number` next to `asked` on both sides, as a part of an error message."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = max((divisor for divisor in divisors if divisor < asked), default=1)
    above = min((divisor for divisor in divisors if divisor > asked), default=number)
    return f"the nearest that divide it: {' and '.join(map(str, sorted({below, above})))}"
