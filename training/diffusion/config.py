"""Config of the diffusion trainer. Torch-free.

One trainer, two phases (docs/specification.md §5.4):

* `main` pretrains the main transformer alone.
* `control` freezes it and trains the control branch with its semantic condition. It starts from a
  zoo entry of kind "transformer", whose first layers the control branch copies, or from one of kind
  "diffusion", whose control branch and semantic condition it continues.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from landiff.configs.base import Config, refuse_values
from landiff.data_pipeline.loading.config import DataConfig
from landiff.model_zoo.config import DiffusionConfig, ScheduleConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.frozen.config import CodecConfig, TextConfig
from landiff.training.config import (
    PARENT_DESCRIPTION,
    EmaConfig,
    LoopConfig,
    LoRAConfig,
    OptimConfig,
    TrainConfig,
)
from landiff.training.observe.config import TrackerConfig
from landiff.training.phases import PHASES_DESCRIPTION, PhaseConfig

START_KINDS = ("transformer", "diffusion")  # of the zoo entry `init_from`

STAGE_ZERO = (
    "zero.stage = 0 is refused: in bf16 DeepSpeed's unpartitioned optimizer takes a step on zero "
    "gradients before training starts (Adam counts from 1 and one full weight decay is applied), "
    "and in fp32 it reports no gradient norm; zero.stage = 1 works correctly, on one rank too"
)


class ZeroConfig(Config):
    """What DeepSpeed ZeRO partitions over the ranks, and the sizes of its buckets."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description=(
            "ZeRO stage. 1 shards optimizer states, 2 also gradients, 3 also parameters. 0 is not "
            "supported."
        ),
    )
    reduce_bucket_size: PositiveInt = Field(
        default=500_000_000, description="Number of elements per reduction."
    )
    allgather_bucket_size: PositiveInt = Field(
        default=500_000_000, description="Number of elements per all-gather."
    )
    overlap_communication: bool = Field(
        default=False, description="Reduce gradients during the backward pass."
    )
    parameter_persistence_threshold: NonNegativeInt = Field(
        default=100_000,
        description="Parameters with fewer elements than this are not sharded. Stage 3 only.",
    )
    prefetch_bucket_size: NonNegativeInt = Field(
        default=50_000_000,
        description=(
            "Number of parameter elements that are gathered before they are used. Stage 3 only."
        ),
    )
    max_live_parameters: PositiveInt = Field(
        default=1_000_000_000,
        description="Maximum number of gathered elements per rank. Stage 3 only.",
    )
    hpz_partition_size: PositiveInt = Field(
        default=1,
        description=(
            "Number of neighboring ranks, usually those of a node, that share a second copy of the "
            "working weights (hierarchical ZeRO). Trained weights are then sent between nodes once "
            "per step, frozen weights once, and all other gathers stay within these ranks. Takes "
            "memory for this copy. Has no effect if there are no more ranks than this. 1: off. "
            "Stage 3 only."
        ),
    )

    @model_validator(mode="after")
    def _partitioned(self, info: ValidationInfo) -> ZeroConfig:
        problems = []
        if self.stage == 0:
            problems.append(STAGE_ZERO)
        if self.hpz_partition_size > 1 and self.stage in (1, 2):
            problems.append(
                f"zero.hpz_partition_size = {self.hpz_partition_size} needs zero.stage = 3: stage "
                f"{self.stage} gathers no weights in forward and backward passes; set it to 1"
            )
        refuse_values(info, problems)
        return self

    def node_copies(self, ranks: int) -> int:
        """Number of copies of the weights beside the partitioned one, on `ranks` ranks."""
        if ranks <= self.hpz_partition_size or self.hpz_partition_size == 1:
            return 0
        return ranks // self.hpz_partition_size


class PrefixConfig(Config):
    """Training for streaming: the first latent frames of some samples stay clean (§5.6).

    The loss covers the other frames.
    """

    frames: PositiveInt | tuple[PositiveInt, ...] = Field(
        default=7,
        description=(
            "Length of the prefix in latent frames, or a list of lengths from which one is chosen "
            "at random for each sample with a prefix. A length that occurs twice in the list is "
            "twice as likely."
        ),
    )
    probability: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Probability that a sample has a prefix."
    )
    noise: NonNegativeFloat = Field(
        default=0.0,
        description=(
            "Maximum standard deviation of noise added to the latents of a prefix. The level of "
            "each sample is random and is not given to the model, so that it learns to continue "
            "frames with the errors of its own samples. 0: no noise."
        ),
    )

    @model_validator(mode="after")
    def _some_length(self, info: ValidationInfo) -> PrefixConfig:
        if not self.lengths:
            refuse_values(info, ["prefix.frames is empty; name at least one number of frames"])
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that a prefix can have."""
        if isinstance(self.frames, int):
            return (self.frames,)
        return self.frames


class DiffusionLoRAConfig(LoRAConfig):
    """A LoRA adapter of the main transformer (phase `main`) or the control branch (`control`)."""

    targets: tuple[Literal["modulation", "qkv", "out", "mlp_in", "mlp_out"], ...] = Field(
        default=("qkv", "out"),
        min_length=1,
        description="Linear layers of each block to adapt.",
    )


class PrefixChange(Config):
    """New values of `prefix`. null keeps a value."""

    frames: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        default=None, description="As `prefix.frames`."
    )
    probability: float | None = Field(
        default=None, ge=0.0, le=1.0, description="As `prefix.probability`."
    )
    noise: NonNegativeFloat | None = Field(default=None, description="As `prefix.noise`.")


class DiffusionPhaseConfig(PhaseConfig):
    """Values of the diffusion trainer that change at a step. null keeps a value."""

    text_dropout: float | None = Field(
        default=None, ge=0.0, le=1.0, description="As `text_dropout` of the trainer."
    )
    timestep_power: NonNegativeFloat | None = Field(
        default=None, description="As `timestep_power` of the trainer."
    )
    prefix: PrefixChange | None = Field(default=None, description="Changes of the prefixes.")


class DiffusionTrainConfig(TrainConfig):
    """`landiff train diffusion`: main transformer or control branch (§5)."""

    must_match: ClassVar[tuple[str, ...]] = ("model", "schedule", "phase", "lora")

    run: Path = Field(description="Run folder: checkpoints, metrics and logs.")
    parent: Path | None = Field(default=None, description=PARENT_DESCRIPTION)
    zoo: Path = Field(description="Zoo in which `init_from` and `tokenizer` are looked up.")
    phase: Literal["main", "control"] = Field(
        description=(
            "`main` trains the main transformer. `control` freezes it and trains the control "
            "branch."
        )
    )
    data: DataConfig = Field(description="Data folder with the columns, and batch sizes.")
    loop: LoopConfig = Field(description="Length of training, logging, validation and checkpoints.")
    optim: OptimConfig = Field(description="AdamW and its learning rate.")
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights. null: none."
    )
    trackers: tuple[TrackerConfig, ...] = Field(
        default=(),
        description="Experiment trackers that get the metrics in addition to TensorBoard.",
    )
    phases: tuple[DiffusionPhaseConfig, ...] = Field(default=(), description=PHASES_DESCRIPTION)
    model: DiffusionConfig = Field(description="Sizes of the diffusion model.")
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of training."
    )
    zero: ZeroConfig = Field(default=ZeroConfig(), description="DeepSpeed ZeRO.")
    sequence_parallel: PositiveInt = Field(
        default=1,
        description=(
            "Number of ranks that process each clip together, each a part of its positions "
            "(DeepSpeed-Ulysses). Reduces activation memory of long or large clips. At most "
            "`model.transformer.num_heads`. The ranks are consecutive; a group should fit within a "
            "node."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Precision of weights and activations. Master weights are float32.",
    )
    fp8: bool = Field(
        default=False,
        description=(
            "Compute the matrix multiplications of the blocks, except modulations, in float8, with "
            "torchao (extra `fp8`). Needs a GPU of compute capability 8.9 or newer, and "
            "`compile_blocks` to be fast; the CPU emulates it slowly. Checkpoints do not depend on "
            "it. Needs zero.stage = 1 or 2; does not work with `lora`."
        ),
    )
    init_from: str | None = Field(
        default=None,
        description=(
            "Zoo entry to start from, of kind `transformer` or `diffusion`. Phase `main` uses its "
            "main transformer. Phase `control` requires an entry: with a `transformer`, the "
            "control branch starts as a copy of its first layers; with a `diffusion`, all parts "
            "start from the entry. null: random initialization."
        ),
    )
    lora: DiffusionLoRAConfig | None = Field(
        default=None,
        description=(
            "Train a LoRA adapter of `init_from` instead of its weights: of the main transformer "
            "in phase `main`, of the control branch of an entry of kind `diffusion` in phase "
            "`control`. null trains the weights."
        ),
    )
    tokenizer: str | None = Field(
        default=None,
        description=(
            "Zoo entry of the tokenizer that decodes tokens to the features of the semantic "
            "condition. Required in phase `control`."
        ),
    )
    latents_column: str = Field(default="latents", description="Column of the latents.")
    tokens_column: str = Field(
        default="tokens", description="Column of the semantic tokens. Phase `control` only."
    )
    text_column: str = Field(
        description=(
            "Column of padded text states, for example `text-t5-v1.1` or `text-minilm-padded`."
        )
    )
    text_dropout: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description=(
            "Probability of replacing the text states of a sample by zeros, for classifier-free "
            "guidance."
        ),
    )
    max_snr_weight: PositiveFloat | None = Field(
        default=None,
        description=(
            "Upper limit of the weight 1 / b² of the squared error of x0, where b is the noise "
            "level. null: no limit, so the loss is the squared error of the velocity (§5.6)."
        ),
    )
    timestep_power: NonNegativeFloat = Field(
        default=0.0,
        description=(
            "Timesteps are sampled with a density proportional to this power of the timestep, so "
            "that noisy samples are trained on more often. 0: uniformly, as in §5.6. Validation "
            "uses evenly spaced timesteps for every power."
        ),
    )
    prefix: PrefixConfig = Field(
        default=PrefixConfig(), description="Clean first frames of some samples, for streaming."
    )
    recompute: bool = Field(
        default=False,
        description=(
            "Recompute activations in the backward pass instead of storing them. Saves memory and "
            "takes about a third more time."
        ),
    )
    offload_activations: bool = Field(
        default=False,
        description=(
            "Keep the inputs of the blocks, which `recompute` needs in the backward pass, in "
            "pinned host memory instead of GPU memory. For long clips; takes the time of two "
            "copies over the bus."
        ),
    )
    compile_blocks: bool = Field(
        default=False,
        description=(
            "Compile the blocks of the transformers with torch.compile, which needs a compiler. "
            "Faster on CUDA, but the start takes minutes longer. Results differ by rounding. No "
            "effect with zero.stage = 3, which gathers the weights of each block in Python."
        ),
    )
    preview_codec: CodecConfig | None = Field(
        default=None,
        description="Codec that decodes latents for previews in TensorBoard. null: no previews.",
    )
    preview_steps: PositiveInt = Field(default=20, description="Sampling steps of a preview.")
    preview_prompts: tuple[str, ...] = Field(
        default=(),
        description=(
            "Prompts for which previews show a sampled video. Phase `main` only, since videos in "
            "phase `control` follow the tokens of clips."
        ),
    )
    preview_text: TextConfig | None = Field(
        default=None,
        description=(
            "Text encoder for `preview_prompts`; must be the one of `text_column`. It runs once, "
            "on the CPU, before training."
        ),
    )

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        return self.compile_blocks and self.zero.stage != 3

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> DiffusionTrainConfig:
        problems = []
        if self.phase == "control":
            required = {
                "the frozen main transformer": ("init_from", self.init_from),
                "the semantic tokenizer": ("tokenizer", self.tokenizer),
            }
            for what, (name, value) in required.items():
                if value is None:
                    problems.append(f"phase = control needs {name}, the zoo reference of {what}")
        if self.lora is not None and self.phase == "main" and self.init_from is None:
            problems.append("lora needs init_from, the zoo reference of the weights it adapts")
        if self.preview_prompts:
            problems += self._prompt_problems()
        if self.offload_activations and not self.recompute:
            problems.append(
                "offload_activations = true keeps the inputs of recomputed blocks on the host; set "
                "recompute = true too"
            )
        if self.fp8:
            problems += self._fp8_problems()
        num_heads = self.model.transformer.num_heads
        if self.sequence_parallel > num_heads:
            problems.append(
                f"sequence_parallel = {self.sequence_parallel} is more than "
                f"model.transformer.num_heads = {num_heads}, which the ranks divide; set it to at "
                f"most {num_heads}"
            )
        latent_frames = self.model.transformer.latent_frames
        longest = max(self.prefix.lengths)
        if self.prefix.probability and longest >= latent_frames:
            problems.append(
                f"prefix.frames = {longest} leaves nothing to learn of "
                f"model.transformer.latent_frames = {latent_frames}; lower it"
            )
        refuse_values(info, problems)
        return self

    def fits(self, height: int, width: int) -> bool:
        """Whether patches, and in phase control feature cells, divide latents of a size."""
        unit = self.model.transformer.patch_size
        if self.phase == "control":
            unit = math.lcm(unit, self.model.semantic.scale)
        return height % unit == 0 and width % unit == 0

    def clip_tokens(self, shape: ClipShape) -> int:
        """Patches and text rows of a clip, or of a window of a longer one."""
        model = self.model.transformer
        frames = min(shape.latent_frames, model.latent_frames)
        height, width = shape.latent_size
        patches = height // model.patch_size * (width // model.patch_size)
        return frames * patches + model.text_length

    def _fp8_problems(self) -> list[str]:
        """Why the linear layers cannot multiply in float8.

        Widths are multiples of 16 in every diffusion model, as float8 needs them.
        """
        problems = []
        if self.zero.stage == 3:
            problems.append(
                "fp8 = true does not work with zero.stage = 3: the backward pass of a float8 layer "
                "keeps the gathered weight of the forward pass; set zero.stage to 1 or 2"
            )
        if self.lora is not None:
            problems.append("fp8 = true has no adapters (lora); set fp8 = false")
        return problems

    def _prompt_problems(self) -> list[str]:
        """What is missing for previews of prompts."""
        if self.phase == "control":
            return [
                "preview_prompts have no tokens for phase = control, whose previews show held-out "
                "clips; remove them, or look at them in the phase main or the language model"
            ]
        problems = []
        if self.preview_text is None:
            problems.append("preview_prompts needs preview_text, the text encoder of text_column")
        if self.preview_codec is None:
            problems.append("preview_prompts needs preview_codec, which decodes the videos")
        return problems

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the loader reads."""
        if self.phase == "control":
            return (self.latents_column, self.text_column, self.tokens_column)
        return (self.latents_column, self.text_column)
