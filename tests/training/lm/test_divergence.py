"""A bad text state on one rank leaves language model and optimizer of both as they were."""

import math

import torch

from landiff.model_zoo.health import non_finite
from landiff.training.guard import Guard
from landiff.training.lm.checkpoint import parts_of
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.bad_step import BadStep, Trial, check_bad_step
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


SHIPPED = {"distributed_optimizer": True, "overlap": True}  # as landiff/lm, in bf16


def through_fit(world, folder, bad):
    def make_config(place, loop):
        optim = {"lr": 3e-3, "warmup_steps": 2, "decay": "linear", "weight_decay": 0.1}
        return tiny_config(
            place,
            SHIPPED,
            precision="bf16",
            ema={"decay": 0.9},
            loop=loop,
            optim=optim,
            text_dropout=0.0,
        )

    def spoil(config, batch):
        batch.micro_batches[-1][-1].tensors[config.text_column][0, 0] = math.nan

    trial = Trial(
        config=make_config,
        build=lambda config: MegatronEngine(config, Guard(config.loop, world)),
        close=lambda engine: engine.close(),
        optimizers=lambda engine: [part.optimizer for part in parts_of(engine.optimizer)],
        batches=lambda config, step: tiny_batch(config, step, world.rank, world.size),
        spoil=spoil,
    )
    return check_bad_step(trial, world, folder, bad)


def test_a_bad_text_state_at_a_random_step_of_a_run_is_skipped_or_rolled_back(tmp_path):
    bad = BadStep.draw(ranks=2)
    assert run_distributed(through_fit, 2, tmp_path, bad, timeout_s=300) == [{}, {}], bad
