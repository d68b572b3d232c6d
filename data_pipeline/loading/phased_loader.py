"""Loader of a run whose data, weights or batch sizes change at some of its steps.

Each order of samples (`phases.OrderPlan`) has its own `Loader`. Orders that are complete are not
opened, so their data may have grown or been deleted. Later orders are opened with the first batch,
so that a mistake in them is reported before training starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.loader import Batch, Loader
from landiff.data_pipeline.loading.phases import (
    DataPhase,
    OrderPlan,
    batch_sizes,
    order_at,
    order_plans,
    phase_at,
)
from landiff.data_pipeline.loading.position import (
    check_position,
    phase_identity,
    state_of,
    step_of,
)
from landiff.data_pipeline.loading.split import Ranks


class PhasedLoader:
    """Returns this rank's part of each global batch, over all phases of a run."""

    def __init__(
        self,
        phases: Sequence[DataPhase],
        columns: Sequence[str],
        *,
        dp_rank: int,
        dp_size: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Open the data sets of a run with one order. Those of several are opened when needed.

        `ranks` is that of `Loader`.

        Raises what `Loader` raises.
        """
        self._phases = tuple(phases)
        self._columns = tuple(columns)
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._ranks = ranks
        self._sizes = batch_sizes(phases)
        self._plans = order_plans(phases)
        self._loaders: dict[int, Loader] = {}  # by index of the order
        self._step = 0
        if len(self._plans) == 1:
            self._loader(self._plans[0])

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first data set of the present order."""
        return self._loader(order_at(self._plans, self._last_step)).manifest

    @property
    def held_out(self) -> HeldOutClips:
        """The clips that are validated: those of the first phase, throughout the run."""
        if self._phases[0].config.validation is None:
            return HeldOutClips()
        return self._loader(self._plans[0]).held_out

    def next_batch(self) -> Batch:
        """This rank's part of the next global batch.

        Raises ShardError with file and key of a damaged sample.
        """
        plan = order_at(self._plans, self._step)
        self._open_from(plan)
        batch = self._loader(plan).next_batch()
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and their identity: JSON values, equal on all ranks."""
        phase = phase_at(self._phases, self._last_step)
        plan = order_at(self._plans, self._last_step)
        identity = self._loader(plan).identity() | phase_identity(phase.config, plan)
        return state_of(self._step, self._sizes, identity)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch of `state`, on any number of ranks.

        Raises ConfigError if the state belongs to another data set, seed or batch size than the
        phase of that batch. The data of an order that ends with it are not compared.
        """
        step = step_of(state)
        self._step = step
        phase = phase_at(self._phases, self._last_step)
        last = order_at(self._plans, self._last_step)
        plan = order_at(self._plans, step)
        identity = phase_identity(phase.config, last)
        if plan == last:
            identity = self._loader(plan).identity() | identity
        check_position(state, identity, phase.config, step)
        if state["consumed_samples"] != self._sizes.samples_before(step):
            raise ConfigError(
                f"the checkpoint was written after {state['consumed_samples']} samples, and the "
                f"phases of this config have {self._sizes.samples_before(step)} samples before "
                f"step {step}; phases that are complete cannot change, restore them"
            )
        self._open_from(plan)
        self._loader(plan).seek(step)

    def close(self) -> None:
        """End the background threads and close the files."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders.clear()

    def __enter__(self) -> PhasedLoader:
        """Return this loader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the loader."""
        self.close()

    @property
    def _last_step(self) -> int:
        """The step of the last batch that was returned, or 0."""
        return max(0, self._step - 1)

    def _open_from(self, plan: OrderPlan) -> None:
        """Open `plan` and the orders after it, and close those that are complete."""
        validates = self._phases[0].config.validation is not None
        for other in self._plans:
            if other.index >= plan.index:
                self._loader(other)
            elif other.index == 0 and validates:
                continue  # its held-out clips are validated throughout the run
            elif self._step > plan.first_step and other.index in self._loaders:
                # A checkpoint at the first step of an order still describes the one before.
                self._loaders.pop(other.index).close()

    def _loader(self, plan: OrderPlan) -> Loader:
        """The loader of an order."""
        if plan.index not in self._loaders:
            first = None
            if plan.index > 0 and plan.config.validation is not None:
                first = self._loader(self._plans[0])
            self._loaders[plan.index] = Loader(
                plan.config,
                self._columns,
                dp_rank=self._dp_rank,
                dp_size=self._dp_size,
                ranks=self._ranks,
                plan=plan,
                first=first,
            )
        return self._loaders[plan.index]
