"""Decision, between gradient norm and update, whether a step may change the weights.

An engine computes loss and gradient norm and asks `guard.decide(loss, grad_norm)`. If the answer is
False, it leaves weights, moments, their step count and moving averages unchanged. The position in
the data and the schedule advance, so a skipped step counts as a step of the run.

    value is NaN or infinite    loop.on_nonfinite: skip, stop or rollback
    value is a spike            loop.spikes.action: report, skip or rollback

On a rollback the step makes no update either. `Run.settle` then loads the last healthy checkpoint
into the engine, and training continues with the next batch: the batches since that checkpoint are
not repeated.

A step is compared with the last steps with the same clip shape.

The state of the guard is saved in checkpoints, so a resumed run makes the same decisions as an
uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from landiff.training.checkpoint.errors import NonFiniteError
from landiff.training.checkpoint.guard_state import GuardState, SpikeWindow
from landiff.training.config import LoopConfig
from landiff.training.distributed import World
from landiff.training.observe.scalars import read_scalars

FINE, SPIKE, NON_FINITE = range(3)  # the ranks agree on the largest
STEPS_NAMED = 10  # skipped steps that an error lists
MIN_WINDOW_FRACTION = 0.5  # of the window must be filled before spikes are looked for
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
MIN_DEVIATION = 0.01  # relative to the median, for values that hardly change

ADVICE = (
    "Lower optim.lr, raise optim.warmup_steps, set optim.clip_grad or check the data; the same "
    "command resumes from the newest checkpoint"
)


@dataclass
class GuardEvent:
    """A step that the guard skipped, rolled back or reported.

    values: loss, gradient norm and their scores, as far as they are known.
    """

    action: Literal["report", "skip", "rollback"]
    cause: Literal["not finite", "spike"]
    values: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The event without its step. Values that are not finite become text."""
        shown: dict[str, float | str] = {}
        for name, value in self.values.items():
            shown[name] = value if math.isfinite(value) else str(value)
        kind = "spike" if self.action == "report" else self.action
        return {"kind": kind, "cause": self.cause, **shown}

    def describe(self, checkpoint: int | None = None) -> str:
        """One line for the log: the cause, loss and gradient norm, and what became of the step.

        checkpoint: step of the checkpoint that a rollback has loaded; None if there is none.
        """
        numbers = []
        for name, text in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if name in self.values:
                number = f"{text} {self.values[name]:.4g}"
                if f"guard/{name}_score" in self.values:
                    score = self.values[f"guard/{name}_score"]
                    number += f" ({score:+.1f} deviations from the median)"
                numbers.append(number)
        effect = "the weights were not updated"
        if self.action == "report":
            effect = "the step was trained on"
        elif checkpoint is not None:
            effect = f"training continues from the weights of step {checkpoint}"
        return f"{self.cause}: {', '.join(numbers)}; {effect}"


class Guard:
    """Decides for all ranks whether a step may change the weights.

    state: replaced by that of a checkpoint when a run resumes.
    bucket: clip shape of the batch of this step; "" if the data do not name it. The loop sets it.
    event: of the last step, None if it was accepted and not a spike.
    scores: robust z-scores of the last step by TensorBoard tag, with `loop.spikes`.
    """

    def __init__(self, loop: LoopConfig, world: World | None = None) -> None:
        """`world`: the ranks that must agree. None if one process trains alone."""
        self.loop = loop
        self.world = world
        self.state = GuardState()
        self.bucket = ""
        self.event: GuardEvent | None = None
        self.scores: dict[str, float] = {}

    def decide(self, loss: Tensor | float, grad_norm: Tensor | float) -> bool:
        """Whether the step may change the weights. Collective; call once in each step.

        Both values are copied to the host at once. The ranks agree, and learn of requests to stop
        the run, in one small all-reduce between CPUs (`World.agree`).

        Raises NonFiniteError on all ranks if the run must stop.
        """
        values = read_scalars({"loss": loss, "grad_norm": grad_norm})
        self.event = None
        self.scores = self._scores(values)
        verdict = self._verdict(values)
        if self.world is not None:
            verdict = self.world.agree(verdict)
        if self.loop.spikes is not None and verdict != NON_FINITE:
            length = self.loop.spikes.window
            window = self._window().after(values["loss"], values["grad_norm"], length)
            self.state.windows = {**self.state.windows, self.bucket: window}
        if verdict == FINE:
            return self._accept()
        return self._handle(verdict, {**values, **self.scores})

    def _window(self) -> SpikeWindow:
        """What the step is compared with."""
        return self.state.windows.get(self.bucket, SpikeWindow())

    def _scores(self, values: Mapping[str, float]) -> dict[str, float]:
        """Robust z-scores of loss and gradient norm, none while the window fills."""
        spikes = self.loop.spikes
        window = self._window()
        if spikes is None or len(window.losses) < spikes.window * MIN_WINDOW_FRACTION:
            return {}
        return {
            "guard/loss_score": robust_score(values["loss"], window.losses),
            "guard/grad_norm_score": robust_score(values["grad_norm"], window.grad_norms),
        }

    def _verdict(self, values: Mapping[str, float]) -> int:
        if not all(math.isfinite(value) for value in values.values()):
            return NON_FINITE
        if self.loop.spikes is None:
            return FINE
        threshold = self.loop.spikes.threshold
        return SPIKE if max(self.scores.values(), default=0.0) > threshold else FINE

    def _accept(self) -> bool:
        self.state.updates += 1
        self.state.skips_in_a_row = 0
        self.state.suspect_steps = 0
        return True

    def _handle(self, verdict: int, values: dict[str, float]) -> bool:
        """Record a step with a value that is not finite or a spike. Returns the decision."""
        self.state.suspect_steps += 1
        if verdict == NON_FINITE:
            cause: Literal["not finite", "spike"] = "not finite"
            action: Literal["report", "skip", "rollback", "stop"] = self.loop.on_nonfinite
        else:
            assert self.loop.spikes is not None
            self.state.spikes += 1
            cause = "spike"
            action = self.loop.spikes.action
        text = ", ".join(f"{name} = {value:g}" for name, value in values.items())
        what = f"{text}{self._place()}"
        if action == "stop":
            raise NonFiniteError(
                f"{what}: training has diverged and stops before this update; the checkpoints on "
                f"disk are from before it. {ADVICE}"
            )
        self.event = GuardEvent(action, cause, values)
        if action == "report":
            self.state.updates += 1
            self.state.skips_in_a_row = 0
            return True
        self._count_skip()
        self._require_few_skips(what)
        return False

    def _place(self) -> str:
        if self.world is None:
            return ""
        return f" in step {self.world.step + 1}"

    def _count_skip(self) -> None:
        self.state.skipped += 1
        self.state.skips_in_a_row += 1
        if self.world is not None:
            named = [*self.state.last_skipped, self.world.step + 1]
            self.state.last_skipped = named[-STEPS_NAMED:]

    def _require_few_skips(self, what: str) -> None:
        """Raise NonFiniteError if more steps were skipped than the config allows."""
        loop = self.loop
        in_a_row = loop.max_skips_in_a_row
        total = max(in_a_row, int(loop.max_skipped_fraction * loop.steps))
        if self.state.skips_in_a_row > in_a_row:
            limit = f"{in_a_row} in a row (loop.max_skips_in_a_row)"
        elif self.state.skipped > total:
            limit = f"{total} of {loop.steps} (loop.max_skipped_fraction)"
        else:
            return
        steps = ", ".join(map(str, self.state.last_skipped))
        raise NonFiniteError(
            f"{what}: training has diverged. {self.state.skipped} steps were skipped, the last of "
            f"them {steps}; at most {limit} may be. The weights were not changed by these steps. "
            f"{ADVICE}"
        )

    def metrics(self) -> dict[str, Tensor | float]:
        """Scalars of the last step by TensorBoard tag."""
        found: dict[str, Tensor | float] = {"guard/skipped_steps": float(self.state.skipped)}
        found.update(self.scores)
        return found


def robust_score(value: float, window: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `window`.

    The deviation is the median absolute deviation, scaled to that of a normal distribution, and at
    least MIN_DEVIATION of the median.
    """
    median = statistics.median(window)
    deviation = statistics.median(abs(other - median) for other in window)
    least = max(MIN_DEVIATION * abs(median), 1e-12)
    return (value - median) / max(MAD_TO_DEVIATION * deviation, least)
