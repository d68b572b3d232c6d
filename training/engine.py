"""Interface between the training loop and the three backends: one whole optimizer step.

The interface works in whole steps, because Megatron's schedule runs forward and backward itself,
and DeepSpeed's engine runs backward, clipping and update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.training.checkpoint.guard_state import GuardState
from landiff.training.checkpoint.parts import StateFile
from landiff.training.guard import Guard
from landiff.training.observe.alarms import AlarmRule
from landiff.training.observe.charts import Charts
from landiff.training.observe.previews import Preview
from landiff.training.observe.step_times import StepTimes


@dataclass
class StepResult:
    """Results of one optimizer step.

    Tensors stay on the device: `Metrics.log` is the only place where the loop waits for it.

    loss: mean over the global batch, equal on all ranks and pipeline stages.
    grad_norm: global norm before clipping.
    lr: learning rate of the step.
    metrics: further scalars by TensorBoard tag. NaN is a metric without a value in this step, which
        is not logged.
    tokens: model tokens of the global batch that were trained on, for the throughput.
    flops: model FLOPs of the global batch (training/observe/flops.py).
    times: of the step on this rank.
    skipped: whether the guard refused the update.
    alarms: limits of the metrics, checked when the step is logged.
    """

    loss: Tensor | float
    grad_norm: Tensor | float
    lr: float
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    tokens: int = 0
    flops: float = 0.0
    times: StepTimes | None = None
    skipped: bool = False
    alarms: Sequence[AlarmRule] = ()


@dataclass
class TrainState:
    """State of the loop itself.

    step: finished optimizer steps.
    healthy: False while steps are skipped or spike. Recorded in the checkpoint: a run resumes from
        and rolls back to healthy ones.
    guard: counts and windows of the guard.
    bucket_losses: of each clip shape, sum of the losses since the last logged step, and number of
        steps. Empty if the data do not name shapes.
    """

    step: int = 0
    healthy: bool = True
    guard: GuardState = field(default_factory=GuardState)
    bucket_losses: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add_loss(self, bucket: str, loss: float) -> None:
        """Add the loss of a step to those of its bucket."""
        total, steps = self.bucket_losses.get(bucket, (0.0, 0))
        self.bucket_losses[bucket] = (total + loss, steps + 1)


class Engine(Protocol):
    """A model with its optimizer, distributed over ranks.

    guard: decides in `train_step`, between gradient norm and update, whether to update.
    charts: which curves TensorBoard shows together.
    """

    guard: Guard
    charts: Charts

    def train_step(self, batch: Batch) -> StepResult:
        """Forward, loss, backward, clipping and update for global batch number `batch.step`.

        `batch` holds the part of this data-parallel rank. If `guard.decide(loss, grad_norm)` is
        False there is no update, and the state of the engine is that before the call.
        """
        ...

    def state_files(self) -> list[StateFile]:
        """This rank's files of a checkpoint, with everything that a restart needs. Collective.

        Nothing is written or copied: the tensors in it are the engine's own, so they must be
        written or copied before the next step. What ranks hold in common, one of them writes.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore the files of all ranks, possibly in another parallel layout. Collective."""
        ...

    def local_weights(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's part of weights, buffers and float32 master weights by name, not copied."""
        ...

    def weights(self, ema: bool) -> AbstractContextManager[None]:
        """Context in which forward passes read the moving average, or with False the weights.

        For validation and previews: no training step, save or load belongs in it. Everything is
        bit-equal afterwards. Collective. True needs `ema` in the config.
        """
        ...

    def validate(self, batch: HeldOutBatch) -> dict[str, Tensor]:
        """Sums over the counted samples of one micro-batch of held-out clips. Collective.

        Returns float64 tensors of any shape, with equal names and shapes in every call with the
        same bucket and on all ranks. Ranks that hold the same samples as another rank
        (tensor-parallel ranks after the first, pipeline stages before the last) return zeros. Draws
        are keyed by the samples' `index`. Weights, optimizer and random state stay unchanged.
        """
        ...

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, from the sums of `validate` over all batches and ranks.

        The name "loss" is that of the validation loss. The trackers add the prefix "val/".
        """
        ...

    def preview(self, clips: Sequence[Sample]) -> list[Preview]:
        """Videos of `clips` for TensorBoard, or none. Collective; those of rank 0 are shown.

        clips: fixed held-out clips, equal on all ranks. Without any, a clip of the last batch is
        shown.
        """
        ...


class BatchSource(Protocol):
    """What the loop needs of a loader. `landiff.data_pipeline.loading.loader.Loader` is one."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first data set."""
        ...

    @property
    def held_out(self) -> HeldOutClips:
        """The clips that are validated."""
        ...

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, JSON-serializable and equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, possibly on another number of ranks."""
        ...
