"""Batches of several clip shapes: what they hold, how large they are, exact order and resume."""

from __future__ import annotations

from collections import Counter

import pytest

from landiff.configs import ConfigError
from landiff.data_pipeline.format.buckets import bucket_names, check_buckets
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import EXTRA
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.data_pipeline.loading.phases import DataPhase, factors_of
from tests.data_pipeline.data_sets import write_buckets

IMAGE, VIDEO, TALL = "1x32x32", "17x32x32", "17x32x16"
BATCH = 30  # divided by 1, 2, 3 and 5 ranks
FACTORS = {IMAGE: 5}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return write_buckets(folder, [IMAGE, VIDEO, IMAGE, TALL], [40, 31, 35, 29])


def config(folder, buckets=(IMAGE, VIDEO, TALL), **changes):
    fields = {"manifest": folder, "global_batch_size": BATCH, "shuffle_window": 2, "seed": 3}
    return DataConfig(**fields, buckets=buckets, **changes)


def curriculum(folder):
    """Images, from step 3 on images and videos in balanced batches, from step 11 on videos."""
    both = config(folder, (IMAGE, VIDEO), balance_tokens=True)
    return (
        DataPhase(0, 0, config(folder, (IMAGE,))),
        DataPhase(1, 3, both, factors=FACTORS),
        DataPhase(2, 11, config(folder, (VIDEO, TALL)), factors={}),
    )


def take(phases, steps, size=1, state=None):
    """[(step, batch size, bucket, {position: (index, key)})] of the batches of all ranks."""
    loaders = [PhasedLoader(phases, ["tokens"], dp_rank=r, dp_size=size) for r in range(size)]
    found = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    for _ in range(steps):
        batches = [loader.next_batch() for loader in loaders]
        samples = {}
        for batch in batches:
            assert len({len(micro) for micro in batch.micro_batches}) == 1
            for sample in batch.samples:
                samples[sample.position] = (sample.index, sample.key)
        first = batches[0]
        assert sorted(samples) == list(range(first.global_batch_size))
        place = (first.step, first.global_batch_size, first.bucket, samples)
        found.append(place)
    last = loaders[-1].state_dict()
    for loader in loaders:
        loader.close()
    return found, last


def test_order_is_equal_on_1_2_3_and_5_ranks_and_after_a_stop_at_every_step(mixed):
    phases = curriculum(mixed)
    steps = 16
    expected, _ = take(phases, steps)
    buckets = [bucket for _, _, bucket, _ in expected]
    assert set(buckets[:3]) == {IMAGE} and set(buckets[3:11]) == {IMAGE, VIDEO}
    assert set(buckets[11:]) == {VIDEO, TALL}
    balanced = [size for step, size, bucket, _ in expected if bucket == IMAGE and step >= 3]
    assert set(balanced) == {5 * BATCH}
    for size in (2, 3, 5):
        assert take(phases, steps, size)[0] == expected
    for stop in (1, 4, 7, 11, 14):  # within and at the ends of orders
        before, state = take(phases, stop, (1, 2, 3, 5)[stop % 4])
        after, _ = take(phases, steps - stop, (5, 3, 2, 1)[stop % 4], state)
        assert before + after == expected
    indices = [index for *_, samples in expected for index, _ in samples.values()]
    assert len(set(indices)) == len(indices)  # no two samples share a random draw
    assert sum(index >= EXTRA for index in indices) == 4 * BATCH * len(balanced)


def test_every_clip_comes_once_an_epoch_also_in_larger_batches(mixed):
    phases = (DataPhase(0, 0, config(mixed, balance_tokens=True), factors=FACTORS),)
    # A whole number of epochs of all buckets: 75 images, 31 and 29 videos.
    turns = 15 + 31 + 29
    found, _ = take(phases, 2 * turns)
    keys: dict[str, Counter[str]] = {}
    for _, _, bucket, samples in found:
        keys.setdefault(bucket, Counter()).update(key for _, key in samples.values())
    for bucket, clips in ((IMAGE, 75), (VIDEO, 31), (TALL, 29)):
        assert len(keys[bucket]) == clips
        assert len(set(keys[bucket].values())) == 1


def test_one_bucket_alone_has_the_order_of_a_run_without_buckets(tmp_path):
    folder = write_buckets(tmp_path, [VIDEO, VIDEO], [31, 20])
    named, state = take((DataPhase(0, 0, config(folder, (VIDEO,))),), 5)
    plain, _ = take((DataPhase(0, 0, config(folder, None)),), 5)
    assert [samples for *_, samples in named] == [samples for *_, samples in plain]
    with pytest.raises(ConfigError, match=r"buckets = \['17x32x32'\].*set data.buckets back"):
        take((DataPhase(0, 0, config(folder, None)),), 1, state=state)


def test_data_sets_of_one_shape_each_are_blended_by_shape(tmp_path):
    images = write_buckets(tmp_path / "images", [IMAGE], [12], "images")
    videos = write_buckets(tmp_path / "videos", [VIDEO], [12], "videos")
    blend = config(videos, (IMAGE, VIDEO), blend=[{"manifest": images}])
    with PhasedLoader((DataPhase(0, 0, blend),), ["tokens"], dp_rank=0, dp_size=1) as loader:
        for _ in range(6):
            batch = loader.next_batch()
            source = {IMAGE: "images", VIDEO: "videos"}[batch.bucket]
            assert {sample.meta.source for sample in batch.samples} == {source}


def test_a_bucket_without_clips_is_refused_with_those_that_exist(mixed):
    manifest = read_manifest(mixed)
    assert bucket_names(manifest) == [IMAGE, VIDEO, IMAGE, TALL]
    with pytest.raises(ShardError, match="no clip has the shape 9x32x32; the data set has 17x32x1"):
        check_buckets([manifest], (IMAGE, "9x32x32"))


def test_factors_fill_the_tokens_of_the_largest_bucket():
    assert factors_of({IMAGE: 20, VIDEO: 100, TALL: 51}) == {IMAGE: 5}
    assert factors_of({VIDEO: 100}) == {}
