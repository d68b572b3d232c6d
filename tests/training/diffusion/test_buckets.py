"""The diffusion trainer on images and videos of several sizes: layouts, checks, metrics."""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.training.checks import Launch
from landiff.training.diffusion.checks import check
from landiff.training.diffusion.engine import build_engine
from landiff.training.diffusion.step import Objective
from tests.distributed import run_distributed
from tests.training.diffusion.tiny import config, make_zoo, write_mixed_data
from tests.training.mixed import IMAGE, TALL, VIDEO

BATCH = 30  # divided by 1, 2, 3 and 5 ranks
STEPS = 3
# float32 sums in another order (ranks, reduction buckets), through three AdamW steps
CLOSE = {"rel": 1e-5}


def settings(folder: Path, phase: str = "main", **changes: object):
    """A run on all three shapes, with batches of equal numbers of tokens."""
    defaults = {
        "data__manifest": folder / "data",
        "data__adopt": "true",
        "data__buckets": json.dumps([IMAGE, VIDEO, TALL]),
        "data__balance_tokens": "true",
        "data__global_batch_size": BATCH,
        "data__micro_batch_size": 1,
        "prefix__frames": "[1,2]",
    }
    return config(folder, phase, **defaults | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    make_zoo(folder)
    write_mixed_data(folder / "data")
    return folder


def train(world, folder, phase="main", stage=2):
    """(bucket, batch size, loss, gradient norm) of each step."""
    micro = BATCH // world.size  # draws do not depend on it
    run = settings(folder, phase, zero__stage=stage, data__micro_batch_size=micro)
    engine = build_engine(run, world)
    found = []
    loader = PhasedLoader(run.data_phases, run.columns, dp_rank=world.rank, dp_size=world.size)
    with loader:
        for _ in range(STEPS):
            batch = loader.next_batch()
            result = engine.train_step(batch)
            place = (batch.bucket, batch.global_batch_size)
            found.append((*place, float(result.loss), float(result.grad_norm)))
    return found


@pytest.mark.parametrize(
    ("phase", "stage", "sizes"),
    [
        ("main", 2, (1, 3)),
        pytest.param("main", 1, (1, 2, 3, 5), marks=pytest.mark.long),
        pytest.param("control", 3, (1, 2, 3, 5), marks=pytest.mark.long),
    ],
)
def test_ranks_train_the_same_model_on_mixed_buckets(folder, phase, stage, sizes):
    by_size = [run_distributed(train, size, folder, phase, stage) for size in sizes]
    expected = by_size[0][0]
    assert {step[:2] for step in expected} >= {(IMAGE, 3 * BATCH), (VIDEO, BATCH)}
    for ranks in by_size:
        for rank in ranks:
            for ours, theirs in zip(rank, expected, strict=True):
                assert ours[:2] == theirs[:2]
                assert ours[2:] == pytest.approx(theirs[2:], **CLOSE)


def test_images_have_no_prefix_and_strata_follow_the_batch_size(folder):
    run = settings(folder, prefix__probability=1.0)
    objective = Objective(run, torch.device("cpu"))
    prefixes = {}
    timesteps = {}
    with PhasedLoader(run.data_phases, run.columns, dp_rank=0, dp_size=1) as loader:
        while len(prefixes) < 3:
            batch = loader.next_batch()
            at_step = objective.at(batch)
            inputs = [at_step.inputs(samples) for samples in batch.micro_batches]
            prefixes[batch.bucket] = set(torch.cat([i.prefix_B for i in inputs]).tolist())
            drawn = torch.cat([i.timestep_B for i in inputs])
            timesteps[batch.bucket] = (drawn.sort().values * len(drawn) // 1000).unique()
    assert prefixes == {IMAGE: {0}, VIDEO: {1, 2}, TALL: {1, 2}}
    # 90 samples draw from 10 blocks of 100 timesteps, nine of each
    assert all(len(blocks) > 8 for blocks in timesteps.values())


def problems(run):
    return [str(problem) for problem in check(run, Launch())]


def test_what_a_bucket_needs_is_checked_before_the_start(folder):
    assert problems(settings(folder)) == []
    assert problems(settings(folder, "control")) == []
    (text,) = problems(settings(folder, data__buckets="null", data__balance_tokens="false"))
    assert f"data.buckets=[{IMAGE},{VIDEO},{TALL}]" in text
    (text,) = problems(settings(folder, data__buckets=json.dumps([VIDEO, "5x32x32"])))
    assert f"no clip has the shape 5x32x32; the data set has {IMAGE}, {VIDEO}, {TALL}" in text
    (text,) = problems(settings(folder, model__transformer__patch_size=4))
    assert f"the latents of {TALL} are 6 x 4, which patches of 4 latent cells do not divide" in text
    phases = [{"from_step": 5, "data": {"buckets": ["9x16x16"]}}]
    (text,) = problems(settings(folder, phases=json.dumps(phases)))
    assert text.startswith("phases.0: data.buckets: no clip has the shape 9x16x16")
