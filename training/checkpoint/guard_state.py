"""State of `landiff.training.guard` in a checkpoint. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class GuardState:
    """What the guard keeps between steps. JSON-serializable and equal on all ranks.

    losses, grad_norms: finite values of the last `loop.spikes.window` steps.
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

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
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

    def forget_window(self) -> None:
        """Forget losses and gradient norms, so that spikes are looked for among later ones."""
        self.losses = []
        self.grad_norms = []
