"""A bad latent on one rank leaves diffusion model and optimizer of both as they were."""

import math
from dataclasses import replace

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import torch

from landiff.model_zoo.health import non_finite
from landiff.training.diffusion.engine import build_engine
from tests.distributed import run_distributed
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
