"""The language model trainer on images and videos: layouts, packing, checks."""

from __future__ import annotations

from pathlib import Path

import pytest

import landiff.training.lm.engine  # noqa: F401 - the nursery imports it once
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.checks import Launch
from landiff.training.lm.checks import check
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.data_set import write_mixed_data
from tests.training.lm.samples import tiny_config
from tests.training.mixed import IMAGE, TALL, VIDEO

BATCH = 30  # divided by 1, 2, 3 and 5 ranks
STEPS = 4


def settings(folder: Path, micro: int = 1, **data: object) -> LMTrainConfig:
    section = {
        "manifest": folder / "data",
        "buckets": [IMAGE, VIDEO, TALL],
        "balance_tokens": True,
        "global_batch_size": BATCH,
        "micro_batch_size": micro,
    }
    model = {"grid_condition": True}
    return tiny_config(folder, data=section | data, model=model, validation_samples=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_data(folder / "data", tiny_config(folder).model)
    return folder


def train(world, folder):
    """(bucket, batch size, tokens), and loss and gradient norm of each step."""
    config = settings(folder, BATCH // world.size)
    engine = MegatronEngine(config)
    places = []
    numbers = []
    loader = PhasedLoader(
        config.data_phases, config.columns, dp_rank=engine.dp_rank, dp_size=engine.dp_size
    )
    with loader:
        for _ in range(STEPS):
            batch = loader.next_batch()
            result = engine.train_step(batch)
            places.append((batch.bucket, batch.global_batch_size, result.tokens))
            numbers.append((float(result.loss), float(result.grad_norm)))
    engine.close()
    return places, numbers


@pytest.mark.parametrize("sizes", [(1, 3), pytest.param((1, 2, 3, 5), marks=pytest.mark.long)])
def test_ranks_train_the_same_model_on_mixed_buckets(folder, sizes):
    by_size = [run_distributed(train, size, folder) for size in sizes]
    expected_places, expected = by_size[0][0]
    assert (IMAGE, BATCH) not in [place[:2] for place in expected_places]
    assert {place[0] for place in expected_places} >= {IMAGE, VIDEO}
    for ranks in by_size:
        for places, numbers in ranks:
            assert places == expected_places
            for ours, theirs in zip(numbers, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4)  # float32 sums in another order


def test_batches_are_balanced_by_the_tokens_of_the_model(folder):
    config = settings(folder)
    lengths = {name: config.clip_tokens(ClipShape.parse(name)) for name in (IMAGE, VIDEO, TALL)}
    # SI, codes, EI of an I frame; of two P frames; EOS. Height and width have no effect.
    assert lengths == {IMAGE: 9 + 2 + 1, VIDEO: 9 + 2 + 2 * (4 + 2) + 1, TALL: 24}
    assert config.batch_factors == {IMAGE: 2}


def test_what_a_bucket_needs_is_checked_before_the_start(folder):
    def problems(config: LMTrainConfig):
        return [str(problem) for problem in check(config, Launch())]

    assert problems(settings(folder)) == []
    (text,) = problems(settings(folder, buckets=[VIDEO, "5x32x32"]))
    assert "no clip has the shape 5x32x32" in text
    short = settings(folder)
    short = short.model_copy(update={"model": short.model.model_copy(update={"max_positions": 20})})
    found = problems(short)
    assert [f"clip of {name}" in text for name, text in zip((VIDEO, TALL), found, strict=True)]
    assert all("more than model.max_positions = 20" in text for text in found)
