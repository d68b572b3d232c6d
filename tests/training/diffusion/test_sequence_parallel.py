"""The diffusion engine with ranks that compute each clip together."""

from __future__ import annotations

from dataclasses import replace

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest

from landiff.configs import ConfigError
from landiff.training.diffusion.engine import build_engine
from landiff.training.layout import check_batch, data_rank
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

# phase, ZeRO stage, ranks that compute each clip, precision
CASES = [("main", 2, 2, "fp32"), ("control", 1, 2, "fp32"), ("control", 3, 2, "bf16")]
BEFORE, AFTER = 2, 2  # steps, around the save
# float32 sums in another order, and bfloat16 with 8 bits, through four AdamW steps, which amplify
# the rounding of small gradients
CLOSE = {"fp32": 1e-4, "bf16": 5e-3}


def go(engine, world, first, steps):
    """[(loss, gradient norm)] of some steps, on the clips of this rank's copy."""
    rank, size = data_rank(engine.config, world.rank, world.size)
    found = []
    for step in range(first, first + steps):
        result = engine.train_step(batch(engine.config, step, replace(world, rank=rank, size=size)))
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def settings(folder, phase, stage, size, precision, seed=3):
    return config(
        folder,
        phase,
        zero__stage=stage,
        sequence_parallel=size,
        precision=precision,
        loop__seed=seed,
        recompute="true",
        init_from="main",  # has left its zero start, in which attention has no effect
        preview_codec__kind="dct",
        preview_steps=2,
    )


def train(world, folder):
    """Curves by case: before and after a save, and after loading it into another engine."""
    results = {}
    for phase, stage, size, precision in CASES:
        size = min(size, world.size)
        engine = build_engine(settings(folder, phase, stage, size, precision), world)
        curve = go(engine, world, 0, BEFORE)
        previews = engine.preview([])
        resumed = None
        if world.size > 1:
            place = folder / f"{phase}-{stage}"
            if world.rank == 0:
                place.mkdir()
            world.barrier()
            saving.save(engine, place)
            world.barrier()
            curve += go(engine, world, BEFORE, AFTER)
            engine = build_engine(settings(folder, phase, stage, size, precision, 4), world)
            engine.load(place)
            # The seed decides on initial weights, and then on noise.
            same = settings(folder, phase, stage, size, precision)
            engine.objective.config = engine.config = same
            resumed = go(engine, world, BEFORE, AFTER)
        else:
            curve += go(engine, world, BEFORE, AFTER)
        panels = [video for preview in previews for video in preview.panels.values()]
        results[phase, stage] = (curve, resumed, panels)
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def results(request, tmp_path_factory):
    """Of one rank, and of two or four ranks, which are one or two groups."""
    folder = tmp_path_factory.mktemp("sequence")
    make_zoo(folder)
    alone = run_distributed(train, 1, folder)[0]
    return alone, run_distributed(train, request.param, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_losses_and_gradients_are_those_of_one_rank(results, case):
    alone, ranks = results
    expected = alone[case[:2]][0]
    for rank in ranks:
        for found, wanted in zip(rank[case[:2]][0], expected, strict=True):
            assert found == pytest.approx(wanted, rel=CLOSE[case[3]])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
def test_a_resumed_run_continues_exactly(results, case):
    for rank in results[1]:
        curve, resumed, _ = rank[case[:2]]
        assert resumed == curve[BEFORE:]


def test_previews_show_the_same_video_as_one_rank(results):
    alone, ranks = results
    for case in CASES[:2]:
        expected = alone[case[:2]][2]
        found = ranks[0][case[:2]][2]
        assert len(found) == len(expected) > 0
        for video, wanted in zip(found, expected, strict=True):
            difference = (video.float() - wanted.float()).abs().max()
            assert difference <= 1  # of 255: rounding of values that differ in the last bits


def test_ranks_that_the_groups_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sequence_parallel = 2 does not divide the 3 .* 2 or 4"):
        check_batch(settings(tmp_path, "main", 2, 2, "fp32"), 3)
    with pytest.raises(ConfigError, match=r"sequence_parallel = 3 is more than .* at most 2"):
        settings(tmp_path, "main", 2, 3, "fp32")


def test_ranks_of_a_group_read_the_same_clips(tmp_path):
    shared = settings(tmp_path, "main", 2, 2, "fp32")
    assert [data_rank(shared, rank, 4) for rank in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert check_batch(shared, 4) == 1  # four clips, two of them in a forward pass of each copy
