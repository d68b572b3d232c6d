"""Configs that all trainers have in common. Torch-free."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from landiff.configs.base import Config, refuse_values
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.phases import DataPhase, batch_sizes, factors_of
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.observe.config import ProfileConfig, TrackerConfig
from landiff.training.phases import (
    PhaseConfig,
    apply_phase,
    begins_schedule,
    names_batch_size,
    names_data,
)

HANG_MARGIN_S = 300.0
NO_TIMEOUT_S = 86400.0

PARENT_DESCRIPTION = (
    "Checkpoint of another run to start from, or a run folder to use its newest healthy one. "
    "The run continues with its weights, optimizer state, step number and position in the data."
)


AttentionKernel = Literal["flash-4", "flash-3", "flash-2", "cudnn", "torch"]


class SpikeConfig(Config):
    """Detection of steps whose loss or gradient norm is far above that of recent steps."""

    window: int = Field(
        default=128,
        ge=8,
        description=(
            "Number of recent steps with the same clip shape, with whose median and median "
            "absolute deviation a step is compared. Detection starts when half of the window is "
            "filled."
        ),
    )
    threshold: PositiveFloat = Field(
        default=10.0,
        description=(
            "Robust z-score above which a step is a spike: the distance from the median, in "
            "standard deviations estimated from the median absolute deviation."
        ),
    )
    action: Literal["report", "skip", "rollback"] = Field(
        default="report",
        description=(
            "Action on a spike. `report` records it and trains on the step, `skip` makes no "
            "update, `rollback` returns to the last healthy checkpoint and continues with the next "
            "batch."
        ),
    )


class LoopConfig(Config):
    """Length of the training loop, and how often it logs, saves and previews."""

    steps: PositiveInt = Field(description="Number of optimizer steps of the run.")
    seed: NonNegativeInt = Field(
        default=0,
        description=(
            "Seed of initial weights, noise and dropout. "
            "The order of samples has its own seed, `data.seed`."
        ),
    )
    log_every: PositiveInt = Field(
        default=10,
        description=(
            "Steps between two logged steps in metrics.jsonl, TensorBoard and the terminal."
        ),
    )
    save_every: PositiveInt = Field(
        default=1000,
        description="Steps between two checkpoints. The last step is always saved.",
    )
    preview_every: NonNegativeInt = Field(
        default=0,
        description="Steps between two previews in TensorBoard. 0 turns previews off.",
    )
    preview_clips: PositiveInt = Field(
        default=2,
        description=(
            "Number of held-out clips in a preview, the same in all previews. Without "
            "`data.validation`, previews show a training clip."
        ),
    )
    val_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Steps between two validations on the clips of `data.validation`. The last step is "
            "always validated. 0 turns validation off."
        ),
    )
    keep_last: PositiveInt = Field(
        default=2,
        description="Number of newest checkpoints to keep.",
    )
    keep_every: NonNegativeInt = Field(
        default=0,
        description=(
            "Checkpoints at multiples of this step are kept permanently. 0 keeps none of them."
        ),
    )
    async_save: bool = Field(
        default=True,
        description=(
            "Write checkpoints in another process while training continues. Needs host memory for "
            "a copy of this rank's part of a checkpoint. With `false`, training waits until they "
            "are written. The files are the same. The last checkpoint of a process is always "
            "written synchronously."
        ),
    )
    on_save_failure: Literal["warn", "retry", "fatal"] = Field(
        default="retry",
        description=(
            "Action if a checkpoint cannot be written. `warn` logs it and continues, `retry` tries "
            "again after 1, 10 and 60 s and then fails, `fatal` fails immediately."
        ),
    )
    on_nonfinite: Literal["skip", "stop", "rollback"] = Field(
        default="skip",
        description=(
            "Action if the loss or gradient norm of a step is NaN or infinite. Such a step never "
            "changes the weights. `skip` continues with the next batch, `stop` ends the run, "
            "`rollback` returns to the weights of the last healthy checkpoint and continues with "
            "the next batch."
        ),
    )
    max_skips_in_a_row: NonNegativeInt = Field(
        default=3,
        description=(
            "Maximum number of consecutive skipped steps. One more ends the run with an error."
        ),
    )
    max_skipped_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description=(
            "Maximum fraction of `steps` that may be skipped, but at least `max_skips_in_a_row` "
            "steps. One more ends the run with an error."
        ),
    )
    deterministic: bool = Field(
        default=False,
        description=(
            "Use deterministic CUDA kernels, so that a resumed run is bit-identical to an "
            "uninterrupted one. They are slower. Runs on the CPU are always deterministic."
        ),
    )
    attention: AttentionKernel | None = Field(
        default=None,
        description=(
            "Preferred attention kernel on CUDA, used wherever it is installed and applicable. "
            "null: the fastest according to the table in model_zoo/attention.py. The log names the "
            "kernel."
        ),
    )
    spikes: SpikeConfig | None = Field(
        default=None,
        description="Detection of spikes of loss and gradient norm. null turns it off.",
    )
    hang_timeout_s: NonNegativeFloat = Field(
        default=1800.0,
        description=(
            "Seconds without a finished step after which a rank writes its stack traces and "
            "aborts. 0 waits forever."
        ),
    )
    profile: ProfileConfig | None = Field(
        default=None,
        description=(
            "Steps to record with torch's profiler, with a memory snapshot on CUDA. null records "
            "none."
        ),
    )

    @model_validator(mode="after")
    def _profile_is_reached(self, info: ValidationInfo) -> LoopConfig:
        if self.profile is not None and self.profile.start > self.steps:
            refuse_values(
                info,
                [
                    f"profile.start = {self.profile.start} is after the last step, steps = "
                    f"{self.steps}; lower it"
                ],
            )
        return self

    @property
    def may_roll_back(self) -> bool:
        """Whether a step can return to the weights of a checkpoint."""
        spikes = self.spikes is not None and self.spikes.action == "rollback"
        return spikes or self.on_nonfinite == "rollback"

    @property
    def collective_timeout_s(self) -> float:
        """Seconds after which torch aborts a collective.

        It is longer than the heartbeat's timeout, so that the heartbeat reports the hang first.
        """
        if self.hang_timeout_s:
            return self.hang_timeout_s + HANG_MARGIN_S
        return NO_TIMEOUT_S


class ParameterGroupConfig(Config):
    """Scales of learning rate and weight decay for some parameters."""

    match: str = Field(
        min_length=1,
        description=(
            "Pattern of parameter names, in which `*` matches any characters: `token_embedding.*`. "
            "The names are those of the exported weights; the tensors of an adapter have those of "
            "the trained module."
        ),
    )
    lr_scale: PositiveFloat = Field(
        default=1.0, description="Factor by which the scheduled learning rate is multiplied."
    )
    weight_decay_scale: NonNegativeFloat = Field(
        default=1.0,
        description=(
            "Factor by which `optim.weight_decay` is multiplied; 0 for no decay. Vectors have no "
            "weight decay in any group."
        ),
    )


class OptimConfig(Config):
    """AdamW and its learning rate: linear warmup, then a constant or a falling rate."""

    lr: PositiveFloat = Field(description="Learning rate after warmup.")
    warmup_steps: NonNegativeInt = Field(
        default=0, description="Steps over which the learning rate rises linearly to `lr`."
    )
    decay: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="constant",
        description=(
            "Schedule after warmup: `constant`; `linear` or half a `cosine` down to `min_lr`; or "
            "`wsd` (warmup, stable, decay), which is constant until the last `decay_steps` of the "
            "run."
        ),
    )
    decay_steps: PositiveInt | None = Field(
        default=None,
        description=(
            "Number of steps of the decay. With `linear` and `cosine`, the decay starts after "
            "warmup; null: it ends at `loop.steps`. With `wsd` the decay ends at `loop.steps`, and "
            "this key is required."
        ),
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(
        default="linear",
        description=(
            "Shape of the decay of `wsd`. `sqrt` is 1 minus the square root of the completed "
            "fraction, which falls fastest at the start."
        ),
    )
    min_lr: NonNegativeFloat = Field(
        default=0.0, description="Learning rate at the end of the decay."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95),
        description="Decay rates of the first and second moment of AdamW.",
    )
    eps: PositiveFloat = Field(
        default=1e-8, description="Term added to the denominator of AdamW for stability."
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.01,
        description=(
            "Weight decay of tensors with two or more dimensions. Biases and norm scales have none."
        ),
    )
    clip_grad: NonNegativeFloat = Field(
        default=1.0,
        description="Maximum global norm of the gradients. 0 turns clipping off.",
    )
    fused: bool | None = Field(
        default=None,
        description=(
            "Update all parameters with torch's fused AdamW. On the CPU it takes a quarter of the "
            "time, and results differ by rounding. null: on CUDA in the tokenizer and diffusion "
            "trainers. The LM trainer uses the fused kernels of Apex or Transformer Engine if they "
            "are installed."
        ),
    )
    groups: tuple[ParameterGroupConfig, ...] = Field(
        default=(),
        description=(
            "Parameters with a different learning rate or weight decay. For each parameter, the "
            "first entry that matches its name applies."
        ),
    )

    def scales_of(self, name: str, dim: int) -> tuple[float, float]:
        """Factors of learning rate and weight decay of a parameter with `dim` dimensions.

        Tensors of two or more dimensions decay. Vectors (biases, norm scales) do not: decay would
        pull a norm scale towards 0, which does not make the function simpler, only smaller.
        """
        lr_scale = 1.0
        decay_scale = 1.0
        for group in self.groups:
            if fnmatchcase(name, group.match):
                lr_scale = group.lr_scale
                decay_scale = group.weight_decay_scale
                break
        return lr_scale, decay_scale if dim >= 2 else 0.0


class EmaConfig(Config):
    """Exponential moving average of the weights, for validation, previews and export."""

    decay: float = Field(
        default=0.9999,
        gt=0,
        lt=1,
        description=(
            "Decay of the average per step. The average covers about the last 1 / (1 - decay) "
            "steps."
        ),
    )
    every: PositiveInt = Field(
        default=1,
        description=(
            "Steps between two updates of the average. The decay of an update is decay ** every, "
            "so that the meaning of `decay` does not depend on `every`."
        ),
    )
    from_step: NonNegativeInt = Field(
        default=0,
        description="Until this step the average is a copy of the weights.",
    )


class LoRAConfig(Config):
    """Base class of the section `lora`: training of a low-rank adapter instead of the weights.

    There is no dropout: checkpoints hold no random state, and its masks would depend on the layout.
    """

    rank: PositiveInt = Field(default=16, description="Rank of the update of each matrix.")
    alpha: PositiveFloat = Field(
        default=16.0, description="The update is scaled by `alpha / rank`."
    )


class TrainConfig(Config):
    """Base class of the trainers' configs: the sections that code for all trainers reads."""

    must_match: ClassVar[tuple[str, ...]] = ("model",)
    """Sections in which a run and the checkpoint it resumes from must be equal."""

    # Declared for type checkers only. Each trainer defines the fields itself, because their order
    # is that of the keys in its config.yaml.
    if TYPE_CHECKING:
        run: Path
        parent: Path | None
        data: DataConfig
        loop: LoopConfig
        optim: OptimConfig
        ema: EmaConfig | None
        trackers: tuple[TrackerConfig, ...]
        phases: tuple[PhaseConfig, ...]

    @model_validator(mode="after")
    def _phases_fit(self, info: ValidationInfo) -> Self:
        problems = []
        first_step = 0
        for number, phase in enumerate(self.phases):
            if phase.from_step <= first_step:
                problems.append(
                    f"phases.{number}.from_step = {phase.from_step} must be above the first step "
                    f"of the phase before, {first_step}"
                )
            first_step = phase.from_step
            values = self.in_phase(number + 1).model_dump() | {"phases": ()}
            try:
                type(self).model_validate(values)
            except ValidationError as error:
                for each in error.errors():
                    where = ".".join(map(str, each["loc"]))
                    text = each["msg"].removeprefix("Value error, ")
                    problems.append(f"phases.{number} is not valid: {where}: {text}")
        refuse_values(info, problems)
        return self

    def phase_index(self, step: int) -> int:
        """Number of the phase of `step`: 0 for the top level, then the entries of `phases`."""
        return sum(phase.from_step <= step for phase in self.phases)

    def in_phase(self, index: int) -> Self:
        """The config of one phase. `data.global_batch_size` is that of the end of its ramp."""
        config = self
        for phase in self.phases[:index]:
            config = apply_phase(config, phase)
        return config

    def at(self, step: int) -> Self:
        """The config of one step: that of its phase, with the global batch size of the step."""
        if not self.phases and self.data.ramp is None:
            return self
        config = self.in_phase(self.phase_index(step))
        level = batch_sizes(self.data_phases).at(step)
        values = {"global_batch_size": level.global_batch_size, "ramp": None}
        return config.model_copy(update={"data": config.data.model_copy(update=values)})

    def step_metrics(self, step: int) -> dict[str, float]:
        """Phase and global batch size of a step, if they change within the run."""
        if not self.phases and self.data.ramp is None:
            return {}
        level = batch_sizes(self.data_phases).at(step)
        return {
            "train/phase": self.phase_index(step),
            "train/batch_size": level.global_batch_size,
        }

    def samples_after(self, step: int) -> int | None:
        """Samples of `step` and of all later steps; None if they depend on the buckets."""
        if any(phase.factors for phase in self.data_phases):
            return None
        sizes = batch_sizes(self.data_phases)
        return sizes.samples_before(self.loop.steps) - sizes.samples_before(step)

    def schedule_at(self, step: int) -> tuple[OptimConfig, int]:
        """The schedule of the learning rate in `step`, and its first step."""
        index = self.phase_index(step)
        while index > 0 and not begins_schedule(self.phases[index - 1]):
            index -= 1
        first_step = self.phases[index - 1].from_step if index else 0
        return self.in_phase(index).optim, first_step

    @property
    def data_phases(self) -> tuple[DataPhase, ...]:
        """What the loader reads in each phase."""
        found = [DataPhase(0, 0, self.data, factors=self.batch_factors)]
        for index, phase in enumerate(self.phases, start=1):
            config = self.in_phase(index)
            found.append(
                DataPhase(
                    index,
                    phase.from_step,
                    config.data,
                    new_order=names_data(phase),
                    new_sizes=names_batch_size(phase),
                    factors=config.batch_factors,
                )
            )
        return tuple(found)

    @property
    def batch_factors(self) -> dict[str, int]:
        """How many times larger the batches of a bucket are, if tokens are balanced."""
        if not self.data.balance_tokens or self.data.buckets is None:
            return {}
        tokens = {}
        for name in self.data.buckets:
            tokens[name] = self.clip_tokens(ClipShape.parse(name))
        return factors_of(tokens)

    def clip_tokens(self, shape: ClipShape) -> int:
        """Tokens that the model processes for a clip of a shape."""
        raise NotImplementedError(f"{type(self).__name__} does not count tokens")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that the loader reads."""
        raise NotImplementedError(f"{type(self).__name__} names no columns")
