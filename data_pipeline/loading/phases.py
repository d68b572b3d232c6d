"""Batch sizes and data orders of a run whose data change at some of its steps. Torch-free.

A run has one or more phases. A phase that sets data (manifest, remote, weight or blend) starts a
new order with its own epochs. The other phases continue the order of the previous phase, possibly
with another batch size. Earlier steps do not depend on a phase.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from landiff.data_pipeline.loading.config import DataConfig


@dataclass(frozen=True)
class Level:
    """Batch sizes from `first_step` on, until the next level."""

    first_step: int
    global_batch_size: int
    micro_batch_size: int


class BatchSizes:
    """The batch size of every step, constant between the first steps of levels."""

    def __init__(self, levels: Sequence[Level]) -> None:
        """`levels`: in the order of their first steps, which begin at 0."""
        assert levels[0].first_step == 0, levels
        self.levels = tuple(levels)
        self._first_steps = [level.first_step for level in levels]
        self._first_samples = [0]
        for before, level in itertools.pairwise(levels):
            steps = level.first_step - before.first_step
            self._first_samples.append(self._first_samples[-1] + steps * before.global_batch_size)

    @staticmethod
    def constant(global_batch_size: int, micro_batch_size: int = 1) -> BatchSizes:
        """The same sizes in all steps."""
        return BatchSizes([Level(0, global_batch_size, micro_batch_size)])

    def at(self, step: int) -> Level:
        """The sizes of `step`."""
        return self.levels[self._number(step)]

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        number = self._number(step)
        level = self.levels[number]
        steps = step - level.first_step
        return self._first_samples[number] + steps * level.global_batch_size

    def step_of(self, samples: int) -> int | None:
        """The step before which there are `samples`, or None if they end within a step."""
        number = bisect.bisect_right(self._first_samples, samples) - 1
        level = self.levels[number]
        steps, rest = divmod(samples - self._first_samples[number], level.global_batch_size)
        return None if rest else level.first_step + steps

    def after(self, step: int) -> BatchSizes:
        """The sizes from `step` on, with steps that count from there."""
        levels = [replace(self.at(step), first_step=0)]
        for level in self.levels:
            if level.first_step > step:
                levels.append(replace(level, first_step=level.first_step - step))
        return BatchSizes(levels)

    def _number(self, step: int) -> int:
        """Number of the level of `step`."""
        return bisect.bisect_right(self._first_steps, step) - 1


@dataclass(frozen=True)
class DataPhase:
    """The data of one phase.

    index: 0 for the top level of the config, then 1 and so on for the entries of `phases`.
    config: complete, with the values that the phase keeps of those before it.
    new_order: whether it names data.
    new_sizes: whether it names a global batch size or a ramp.
    factors: with `balance_tokens`, how many times more clips a batch of each bucket has.
    """

    index: int
    first_step: int
    config: DataConfig
    new_order: bool = True
    new_sizes: bool = True
    factors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OrderPlan:
    """One order of samples.

    index: that of the phase that begins it. Part of the random key.
    end_step: first step of the next order. None for the last one.
    sizes: of the whole run, without factors.
    factors: those of the phase that begins it.
    validated: buckets of all phases of the run, whose held-out clips are validated. None: all.
    """

    index: int
    first_step: int
    end_step: int | None
    config: DataConfig
    sizes: BatchSizes
    factors: Mapping[str, int] = field(default_factory=dict)
    validated: tuple[str, ...] | None = None


def single_phase(config: DataConfig) -> tuple[DataPhase, ...]:
    """The phases of a run that has only one."""
    return (DataPhase(0, 0, config),)


def batch_sizes(phases: Sequence[DataPhase]) -> BatchSizes:
    """The batch sizes of all steps of a run."""
    levels: list[Level] = []
    sized = phases[0]  # the phase that named the current batch size
    for number, phase in enumerate(phases):
        if phase.new_sizes:
            sized = phase
        end_step = None
        if number + 1 < len(phases):
            end_step = phases[number + 1].first_step
        for first_step, size in _ramp(sized):
            first_step = max(first_step, phase.first_step)
            if end_step is not None and first_step >= end_step:
                break
            if levels and levels[-1].first_step == first_step:
                levels.pop()  # the next size of the ramp begins here or before
            levels.append(Level(first_step, size, phase.config.micro_batch_size))
    return BatchSizes(levels)


def _ramp(phase: DataPhase) -> list[tuple[int, int]]:
    """(first step, global batch size) of the sizes that a phase goes through."""
    final = phase.config.global_batch_size
    ramp = phase.config.ramp
    if ramp is None or ramp.start == final:
        return [(phase.first_step, final)]
    sizes = range(ramp.start, final + 1, ramp.increment)
    increments = len(sizes) - 1
    found = []
    for number, size in enumerate(sizes):
        steps = -(-number * ramp.steps // increments)  # rounded up
        found.append((phase.first_step + steps, size))
    return found


def factors_of(tokens: Mapping[str, int]) -> dict[str, int]:
    """How many times more clips than one of the largest bucket a batch of each bucket has.

    tokens: of a clip of each bucket. Only factors above 1 are returned.
    """
    most = max(tokens.values())
    factors = {name: most // count for name, count in tokens.items()}
    return {name: factor for name, factor in factors.items() if factor > 1}


def _all_buckets(phases: Sequence[DataPhase]) -> tuple[str, ...] | None:
    """The buckets of all phases, None if one of them reads all clips."""
    found: dict[str, None] = {}
    for phase in phases:
        if phase.config.buckets is None:
            return None
        found.update(dict.fromkeys(phase.config.buckets))
    return tuple(found)


def order_plans(phases: Sequence[DataPhase]) -> list[OrderPlan]:
    """The orders of a run, one after the other."""
    sizes = batch_sizes(phases)
    validated = _all_buckets(phases)
    beginnings = [phase for phase in phases if phase.new_order]
    plans = []
    for number, phase in enumerate(beginnings):
        end_step = None
        if number + 1 < len(beginnings):
            end_step = beginnings[number + 1].first_step
        plan = OrderPlan(
            phase.index,
            phase.first_step,
            end_step,
            phase.config,
            sizes,
            phase.factors,
            validated,
        )
        plans.append(plan)
    return plans


def order_at(plans: Sequence[OrderPlan], step: int) -> OrderPlan:
    """The order of `step`."""
    return [plan for plan in plans if plan.first_step <= step][-1]


def phase_at(phases: Sequence[DataPhase], step: int) -> DataPhase:
    """The phase of `step`."""
    return [phase for phase in phases if phase.first_step <= step][-1]


def phases_from(phases: Sequence[DataPhase], step: int) -> list[DataPhase]:
    """The phase of each order whose data are read at `step` or later."""
    found = []
    for plan in order_plans(phases):
        if plan.end_step is None or plan.end_step > step:
            found.append(phases[plan.index])
    return found
