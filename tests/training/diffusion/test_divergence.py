"""A bad latent on one rank leaves diffusion model and optimizer of both as they were."""

import math
from dataclasses import replace

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import torch

from landiff.model_zoo.health import non_finite
from landiff.training.diffusion.engine import build_engine
from tests.distributed import run_distributed
from tests.training.bad_step import BadStep, Trial, check_bad_step
from tests.training.diffusion.tiny import batch, config
from tests.training.skipping import check_skip_and_rollback, differing, state_of

CASES = [
    (stage, precision, value)
    for stage in (1, 2, 3)
    for precision, value in (("fp32", math.nan), ("bf16", 3e38))
]


def skip_loss(engine, optimizers, good):
    """Names of tensors that a step changes whose loss is NaN while its gradients are finite."""
    before = state_of(engine, optimizers())
    compute = engine.objective.loss

    def loss(*arguments):
        result = compute(*arguments)
        return replace(result, loss=result.loss + math.nan)

    engine.objective.loss = loss
    result = engine.train_step(good)
    engine.objective.loss = compute
    assert result.skipped and math.isfinite(result.grad_norm)
    return differing(before, state_of(engine, optimizers()))


def diverge(world, folder):
    found = {}
    for stage, precision, value in CASES:
        name = f"ZeRO-{stage} {precision}"
        settings = config(folder, zero__stage=stage, precision=precision, ema__decay=0.9)
        engine = build_engine(settings, world)

        def optimizers(engine=engine):
            return [engine.zero.optimizer.optimizer]

        def batches(step, settings=settings):
            return batch(settings, step, world)

        def spoil(bad, value=value):
            if world.rank == 1:
                bad.micro_batches[0][0].tensors["latents"][0, 0, 0, 0] = value

        wrong = check_skip_and_rollback(engine, optimizers, world, folder, batches, spoil)
        found |= {f"{name}: {what}": names for what, names in wrong.items()}
        found[f"{name}: changed by a loss of NaN"] = skip_loss(engine, optimizers, batches(3))
        last_name, last = list(engine.local_weights())[-1]
        with torch.no_grad():
            last.view(-1)[0] = math.nan
        if last_name not in non_finite(engine.local_weights()):
            found[f"{name}: a poisoned float32 weight is overlooked"] = [last_name]
    return found


def test_a_bad_latent_or_loss_on_one_rank_leaves_no_trace(tmp_path):
    for found in run_distributed(diverge, 2, tmp_path):
        assert not any(found.values()), found


def through_fit(world, folder, bad, stage=2):
    def make_config(place, loop):
        return config(
            place,
            zero__stage=stage,
            zero__overlap_communication="true",
            precision="bf16",
            ema__decay=0.9,
            optim__decay="linear",
            **{f"loop__{name}": value for name, value in loop.items()},
        )

    def spoil(settings, spoiled):
        spoiled.micro_batches[-1][-1].tensors["latents"][0, 0, 0, 0] = math.nan

    trial = Trial(
        config=make_config,
        build=lambda settings: build_engine(settings, world),
        close=lambda engine: None,
        optimizers=lambda engine: [engine.zero.optimizer.optimizer],
        batches=lambda settings, step: batch(settings, step, world),
        spoil=spoil,
    )
    return check_bad_step(trial, world, folder, bad)


def test_a_bad_latent_at_a_random_step_of_a_run_is_skipped_or_rolled_back(tmp_path):
    bad = BadStep.draw(ranks=2)
    assert run_distributed(through_fit, 2, tmp_path, bad, timeout_s=300) == [{}, {}], bad


def undefined_memory(world, folder):
    """Names of weights that are not finite if memory is NaN until something is written to it."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    sizes = {"data__global_batch_size": 3, "data__micro_batch_size": 1}
    try:
        engine = build_engine(config(folder, zero__stage=3, ema__decay=0.9, **sizes), world)
    finally:
        torch.use_deterministic_algorithms(False)
    return non_finite(engine.local_weights())


def test_parts_that_weights_do_not_fill_are_finite(tmp_path):
    """Three ranks do not divide the parameters evenly. ZeRO-3 leaves the rest undefined."""
    assert run_distributed(undefined_memory, 3, tmp_path) == [[]] * 3
