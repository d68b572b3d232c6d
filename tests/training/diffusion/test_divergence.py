"""A bad latent on one rank stops the diffusion training on both before the update."""

import math

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import torch

from landiff.model_zoo.health import non_finite
from landiff.training.diffusion.engine import build_engine
from tests.distributed import run_distributed
from tests.training.diffusion.tiny import batch, config

CASES = [
    (stage, precision, value)
    for stage in (1, 2, 3)
    for precision, value in (("fp32", math.nan), ("bf16", 3e38))
]


def diverge(world, folder):
    found = []
    for stage, precision, value in CASES:
        settings = config(folder, zero__stage=stage, precision=precision)
        engine = build_engine(settings, world)
        engine.train_step(batch(settings, 0, world))
        before = {name: tensor.detach().clone() for name, tensor in engine.local_weights()}
        bad = batch(settings, 1, world)
        if world.rank == 1:
            bad.micro_batches[0][0].tensors["latents"][0, 0, 0, 0] = value
        assert engine.train_step(bad).skipped
        after = dict(engine.local_weights())
        same = [name for name in before if torch.equal(before[name], after[name])]
        name, last = list(engine.local_weights())[-1]
        with torch.no_grad():
            last.view(-1)[0] = math.nan
        found.append((len(same) == len(before) > 0, name in non_finite(engine.local_weights())))
    return found


def test_a_bad_latent_stops_all_ranks_before_the_update(tmp_path):
    for found in run_distributed(diverge, 2, tmp_path):
        assert found == [(True, True)] * len(CASES)
