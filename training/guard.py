"""Check for divergence between the gradient norm and the optimizer's update.

An engine computes loss and gradient norm, calls `guard.decide(loss, grad_norm)`, and updates its
weights only if that returns. A non-finite step therefore never reaches the weights.
"""

from __future__ import annotations

import math

from torch import Tensor

from landiff.training.checkpoint.errors import NonFiniteError
from landiff.training.distributed import World
from landiff.training.observe.metrics import read_scalars


class Guard:
    """Stops a run whose loss or gradient norm is not finite, on all ranks in the same step."""

    def __init__(self, world: World | None = None) -> None:
        """`world`: the ranks that must agree. None if one process trains alone."""
        self.world = world

    def decide(self, loss: Tensor | float, grad_norm: Tensor | float) -> None:
        """Return if the step may update the weights. Collective.

        Both values are copied to the host at once. The ranks agree over the control group on the
        CPU. Raises NonFiniteError on all ranks if a value is NaN or infinite on one of them.
        """
        values = read_scalars({"loss": loss, "gradient norm": grad_norm})
        diverged = not all(math.isfinite(value) for value in values.values())
        step = ""
        if self.world is not None:
            diverged = self.world.any_true(diverged)
            step = f" in step {self.world.step + 1}"
        if not diverged:
            return
        text = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        raise NonFiniteError(
            f"{text}{step}: training has diverged and stops before this update; the checkpoints "
            "on disk are from before it. Lower optim.lr, raise optim.warmup_steps, set "
            "optim.clip_grad or check the data; the same command resumes from the newest checkpoint"
        )
