"""A bad text state on one rank stops the language model's training on both before the update."""

import math

import torch

from landiff.model_zoo.health import non_finite
from landiff.training.guard import Guard
from landiff.training.lm.averages import parts_of
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.samples import tiny_batch, tiny_config

LAYOUTS = {
    "data 2": ({}, "fp32"),
    "data 2, bf16": ({}, "bf16"),
    "distributed optimizer": ({"distributed_optimizer": True}, "fp32"),
    "distributed optimizer, overlap, bf16": (
        {"distributed_optimizer": True, "overlap": True},
        "bf16",
    ),
    "tensor 2": ({"tensor": 2}, "fp32"),
    "pipeline 2, bf16": ({"pipeline": 2}, "bf16"),
}


def masters(engine):
    """The tensors that the optimizer updates."""
    return [
        parameter
        for part in parts_of(engine.optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]


def diverge(world, folder):
    found = {}
    for name, (parallel, precision) in LAYOUTS.items():
        config = tiny_config(folder, parallel, precision=precision)
        engine = MegatronEngine(config, Guard(config.loop, world))
        engine.train_step(tiny_batch(config, 0, engine.dp_rank, engine.dp_size))
        before = [master.detach().clone() for master in masters(engine)]
        bad = tiny_batch(config, 1, engine.dp_rank, engine.dp_size)
        if engine.dp_rank == engine.dp_size - 1:
            bad.micro_batches[0][0].tensors[config.text_column][0, 0] = math.nan
        assert engine.train_step(bad).skipped
        same = [torch.equal(old, new) for old, new in zip(before, masters(engine), strict=True)]
        found[name] = all(same) and len(same) > 0
        with torch.no_grad():
            masters(engine)[0].view(-1)[0] = math.inf
        found[f"{name}, master"] = non_finite(engine.local_weights()) != []
        engine.close()
    return found


def test_a_bad_text_state_stops_all_ranks_before_the_update(tmp_path):
    for found in run_distributed(diverge, 2, tmp_path):
        assert found == dict.fromkeys(found, True)
        assert len(found) == 2 * len(LAYOUTS)
