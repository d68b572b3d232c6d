"""Checks of one engine: a skipped step leaves no trace, and a rollback restores a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.data_pipeline.loading.loader import Batch
from landiff.training.distributed import World
from landiff.training.engine import Engine
from tests.training import saving

State = dict[str, Tensor]


def state_of(engine: Engine, optimizers: Iterable[torch.optim.Optimizer]) -> State:
    """Copies of weights, buffers, moving averages, and everything that the optimizers keep."""
    state = {name: tensor.detach().clone() for name, tensor in engine.local_weights()}
    for number, optimizer in enumerate(optimizers):
        for index, kept in enumerate(optimizer.state.values()):
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    state[f"{key} {index} of optimizer {number}"] = value.detach().clone()
    return state


def differing(first: State, second: State) -> list[str]:
    """Names of tensors that are not bit-equal."""
    names = sorted(first.keys() ^ second.keys())
    return names + [name for name in first if not torch.equal(first[name], second[name])]


def check_skip_and_rollback(
    engine: Any,
    optimizers: Callable[[], Iterable[torch.optim.Optimizer]],
    world: World,
    folder: Path,
    batches: Callable[[int], Batch],
    spoil: Callable[[Batch], None],
) -> dict[str, list[str]]:
    """Names of tensors that are wrong: after a skipped step, and in the step that follows it.

    Batch 0 is trained on, batch 1 is bad, batch 2 follows. `spoil` makes a batch bad on one rank.
    The expected state after batch 2 is that of a return to the checkpoint after batch 0, so both
    ways lead to the same weights: those of a run that never saw batch 1.
    """
    checkpoint = folder / "checkpoint"
    if world.rank == 0:
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir(parents=True)
    world.barrier()
    assert not engine.train_step(batches(0)).skipped
    saving.save(engine, checkpoint)
    before = state_of(engine, optimizers())
    bad = batches(1)
    spoil(bad)
    assert engine.train_step(bad).skipped
    skipped = state_of(engine, optimizers())
    assert not engine.train_step(batches(2)).skipped
    after = state_of(engine, optimizers())
    engine.load(checkpoint)
    rolled_back = state_of(engine, optimizers())
    assert not engine.train_step(batches(2)).skipped
    unseen = state_of(engine, optimizers())
    return {
        "changed by the skipped step": differing(before, skipped),
        "not as in the checkpoint after a rollback": differing(before, rolled_back),
        "not as in a run that never saw the batch": differing(unseen, after),
        "equal although trained": [name for name in before if "weight" in name]
        if not differing(before, after)
        else [],
    }
