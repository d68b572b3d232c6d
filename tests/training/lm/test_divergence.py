"""A bad text state on one rank leaves language model and optimizer of both as they were."""

import math

import torch

from landiff.model_zoo.health import non_finite
from landiff.training.guard import Guard
from landiff.training.lm.checkpoint import parts_of
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.samples import tiny_batch, tiny_config
from tests.training.skipping import check_skip_and_rollback

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


def diverge(world, folder):
    found = {}
    for name, (parallel, precision) in LAYOUTS.items():
        config = tiny_config(folder, parallel, precision=precision, ema={"decay": 0.9})
        engine = MegatronEngine(config, Guard(config.loop, world))

        def optimizers(engine=engine):
            return [part.optimizer for part in parts_of(engine.optimizer)]

        def batches(step, config=config, engine=engine):
            return tiny_batch(config, step, engine.dp_rank, engine.dp_size)

        def spoil(bad, config=config, engine=engine):
            if engine.dp_rank == engine.dp_size - 1:
                bad.micro_batches[0][0].tensors[config.text_column][0, 0] = math.nan

        wrong = check_skip_and_rollback(engine, optimizers, world, folder, batches, spoil)
        found |= {f"{name}: {what}": names for what, names in wrong.items()}
        with torch.no_grad():
            optimizers()[0].param_groups[0]["params"][0].view(-1)[0] = math.inf
        if not non_finite(engine.local_weights()):
            found[f"{name}: a poisoned float32 weight is overlooked"] = ["all"]
        engine.close()
    return found


def test_a_bad_text_state_on_one_rank_leaves_no_trace(tmp_path):
    for found in run_distributed(diverge, 2, tmp_path):
        assert not any(found.values()), found
