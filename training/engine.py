"""The seam between the one loop and the three back ends: one whole optimizer step.

Megatron's schedule owns forward and backward, DeepSpeed's engine owns backward, clipping and step; what
they share is this much and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.loader import Batch


@dataclass
class StepResult:
    """What one optimizer step has to say. Tensors stay on the device: `metrics.log` is the loop's only sync."""

    loss: (
        Tensor | float
    )  # mean over the global batch, equal on all ranks (rank 0 logs it, whatever its pipeline stage)
    grad_norm: Tensor | float
    lr: float
    metrics: dict[str, Tensor | float] = field(
        default_factory=dict
    )  # more scalars, by TensorBoard tag
    tokens: int = 0  # model tokens of the global batch that were trained on, for throughput


class Engine(Protocol):
    """A model with its optimizer, spread over some ranks."""

    def train_step(self, batch: Batch) -> StepResult:
        """Forward, backward, clip, step on this data-parallel rank's share of global batch `batch.step`."""
        ...

    def save(self, folder: Path) -> None:
        """Collective. Write everything that a restart needs into `folder` (exists, empty, on a shared disk).

        A rank that cannot write raises after its last collective, or all ranks raise: peers must not be left
        waiting. All files are closed on return.
        """
        ...

    def load(self, folder: Path) -> None:
        """Collective. Restore what `save` wrote, possibly from another parallel layout."""
        ...

    def local_weights(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's part of weights, buffers and float32 masters by name; not copied."""
        ...

    def preview(self) -> dict[str, Tensor]:
        """Collective. uint8 videos [T, H, W, 3] by TensorBoard tag; empty where there is nothing to look at."""
        ...


class BatchSource(Protocol):
    """What the loop asks of a loader (`landiff.data_pipeline.loading.loader.Loader` is one)."""

    manifest: Manifest

    def next_batch(self) -> Batch:
        """This rank's share of the next global batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, JSON-able, equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, also on another number of ranks."""
        ...


@dataclass
class TrainState:
    """What the loop itself has to remember."""

    step: int = 0  # finished optimizer steps
    healthy: bool = True  # recorded in the checkpoint; False: do not resume from here
