"""State of `landiff.training.guard` in a checkpoint. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpikeWindow:
    """Finite values of the last `loop.spikes.window` steps with one clip shape."""

    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()

    def after(self, loss: float, grad_norm: float, length: int) -> SpikeWindow:
        """The window with the values of one more step, at most `length` of each."""
        losses = (*self.losses, loss)[-length:]
        return SpikeWindow(losses, (*self.grad_norms, grad_norm)[-length:])


@dataclass
class GuardState:
    """What the guard keeps between steps. JSON-serializable and equal on all ranks.

    Its containers are replaced and not changed: a checkpoint that is being written holds them.

    windows: what a step is compared with, by the clip shape of its batch: images have other losses
        than videos. The shape is "" if the data do not name it.
    updates: steps whose update the weights hold.
    skipped: steps without an update.
    skips_in_a_row: skipped steps since the last update.
    suspect_steps: steps in a row, up to the last one, that were skipped or had a spike.
    last_skipped: numbers of the last skipped steps.
    spikes: steps with a spike.
    rollbacks: rollbacks to a checkpoint.
    undone: updates that rollbacks have undone.
    anchor: step of the checkpoint that a rollback returns to.
    anchor_rollbacks: rollbacks to that checkpoint.
    """

    windows: dict[str, SpikeWindow] = field(default_factory=dict)
    updates: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    suspect_steps: int = 0
    last_skipped: list[int] = field(default_factory=list)
    spikes: int = 0
    rollbacks: int = 0
    undone: int = 0
    anchor: int | None = None
    anchor_rollbacks: int = 0

    def forget_windows(self) -> None:
        """Forget losses and gradient norms, so that spikes are looked for among later ones."""
        self.windows = {}
