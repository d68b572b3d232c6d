"""A training step reads a fixed number of scalars on the host, whatever the model and the batch."""

from __future__ import annotations

from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import torch

from landiff.training.diffusion.engine import build_engine
from landiff.training.distributed import World
from tests.distributed import run_distributed
from tests.training.diffusion.tiny import batch, config, make_zoo
from tests.training.host_reads import counted_host_reads

# In C++ these wait for the device too. `aten::item` is counted where Python asks for it.
OPERATORS = {"aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
CASES = {
    "main": {},
    "main, more layers": {"model__transformer__num_layers": 4},
    "main, more micro-batches": {"data__micro_batch_size": 1},
    "main, average": {"ema__decay": 0.9},
    "control": {"phase": "control"},
    "control, more micro-batches": {"phase": "control", "data__micro_batch_size": 1},
}


def reads_of_steps(world: World, folder: Path) -> dict[str, tuple[dict[str, int], set[str]]]:
    """By case: reads of the second step by the function that asks, and operators that read."""
    found = {}
    for name, changes in CASES.items():
        settings = config(folder, zero__stage=2, optim__fused="true", **changes)
        engine = build_engine(settings, world)
        engine.train_step(batch(settings, 0, world))
        # `inputs` draws and stacks samples, which are on the host.
        with torch.profiler.profile() as profile, counted_host_reads("inputs") as reads:
            engine.train_step(batch(settings, 1, world))
        operators = {event.key for event in profile.key_averages()} & OPERATORS
        found[name] = dict(reads), operators
    return found


def test_a_step_reads_loss_and_norm_once_for_any_model_and_batch(tmp_path):
    make_zoo(tmp_path)
    found = run_distributed(reads_of_steps, 1, tmp_path, timeout_s=300)[0]
    # DeepSpeed checks the norm before the update, and once more for each parameter group, when the
    # guard has waited for it already.
    expected = {"read_scalars": 1, "is_invalid_grad_norm": 3}
    assert found == dict.fromkeys(CASES, (expected, set()))
