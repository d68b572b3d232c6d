"""Held-out clips: by source video, fixed as data grow, on every rank alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw
from tests.distributed import run_distributed

VIDEOS = 12


def video(key: str) -> str:
    """Source video of a clip."""
    return f"video {int(key[:6], 16) % VIDEOS}"


def meta_of(key: str) -> dict[str, object]:
    return {"source": f"{video(key)}.mp4", "source_sha256": video(key)}


def write(data: Path, sizes: list[int], mark: str = "raw", bad: set[str] = frozenset()) -> Path:
    write_raw(data, sizes, mark, meta_of)
    write_column(data, "tokens", bad=bad)
    return data


def all_keys(sizes: list[int]) -> list[str]:
    keys: list[str] = []
    for shard, samples in enumerate(sizes):
        keys += keys_of(shard, samples)
    return keys


def loader(data: Path, validation: dict[str, Any] | None, **changes: Any) -> Loader:
    rank = changes.pop("rank", 0)
    ranks = changes.pop("ranks", 1)
    world = changes.pop("world", None)
    fields = {"manifest": data, "global_batch_size": 4, "validation": validation} | changes
    return Loader(DataConfig(**fields), ["tokens"], dp_rank=rank, dp_size=ranks, ranks=world)


def epoch_keys(opened: Loader) -> set[str]:
    """Keys of the training samples."""
    keys = set()
    for _ in range(-(-opened.num_samples // 4) * 2):
        keys.update(sample.key for sample in opened.next_batch().samples)
    return keys


def held_out_keys(opened: Loader) -> list[str]:
    return [clip.key for clip in opened.held_out.clips]


SIZES = [7, 9, 5, 8]
BAD = {keys_of(1, 9)[3], keys_of(2, 5)[0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("split") / "data", SIZES, bad=BAD)


def test_no_video_is_on_both_sides_and_every_clip_is_on_one(data):
    opened = loader(data, {"fraction": 0.4})
    trained = epoch_keys(opened)
    validated = set(held_out_keys(opened))
    assert trained | validated == set(all_keys(SIZES)) - BAD
    assert {video(key) for key in trained}.isdisjoint({video(key) for key in validated})
    assert len(validated) > 3 and len(trained) == opened.num_samples


def test_growing_data_move_no_video(data, tmp_path):
    before = loader(data, {"fraction": 0.4})
    grown = loader(write(tmp_path / "grown", [*SIZES, 6, 9], bad=BAD), {"fraction": 0.4})
    assert set(held_out_keys(before)) == set(held_out_keys(grown)) & set(all_keys(SIZES))
    more = loader(data, {"fraction": 0.6})
    assert set(held_out_keys(before)) < set(held_out_keys(more))


def test_a_blend_holds_out_the_same_videos_of_every_data_set(data, tmp_path):
    other = write(tmp_path / "other", [9, 8, 7, 6, 5])
    opened = loader(data, {"fraction": 0.4}, blend=[{"manifest": other}])
    trained = {video(key) for key in epoch_keys(opened)}
    validated = {video(key) for key in held_out_keys(opened)}
    assert trained.isdisjoint(validated)
    assert {clip.source for clip in opened.held_out.clips} == {0, 1}
    # Both data sets hold some clips, and each is validated once.
    assert len(set(held_out_keys(opened))) == len(opened.held_out)


def test_listed_clips_and_videos_are_held_out(data, tmp_path):
    key = keys_of(0, 7)[0]
    other = next(each for each in all_keys(SIZES) if video(each) != video(key) and each not in BAD)
    listed = tmp_path / "clips.txt"
    listed.write_text(f"{key}\n\n{video(other)}.mp4\n")
    opened = loader(data, {"clips": [key, f"{video(other)}.mp4"]})
    assert loader(data, {"clips_file": listed}).held_out.clips == opened.held_out.clips
    of_other = {each for each in all_keys(SIZES) if video(each) == video(other)}
    assert set(held_out_keys(opened)) == ({key} | of_other) - BAD
    trained = {video(each) for each in epoch_keys(opened)}
    assert trained.isdisjoint({video(key), video(other)})


def test_a_separate_data_set_takes_its_videos_out_of_training(data, tmp_path):
    separate = write(tmp_path / "separate", [3])
    opened = loader(data, {"data_set": {"manifest": separate}})
    assert set(held_out_keys(opened)) == set(keys_of(0, 3))
    validated = {video(key) for key in keys_of(0, 3)}
    trained = {video(key) for key in epoch_keys(opened)}
    assert trained == {video(key) for key in set(all_keys(SIZES)) - BAD} - validated


def test_of_few_videos_one_is_held_out_on_every_rank(data, tmp_path):
    """A fraction that is too small for the data still leaves clips to validate on."""
    opened = loader(data, {"fraction": 1e-9})
    validated = held_out_keys(opened)
    assert len({video(key) for key in validated}) == 1
    trained = epoch_keys(opened)
    assert trained | set(validated) == set(all_keys(SIZES)) - BAD
    assert {video(key) for key in trained}.isdisjoint({video(key) for key in validated})
    loader(data, {"fraction": 1e-9}).load_state_dict(opened.state_dict())
    single = write(tmp_path / "single", [1])
    with pytest.raises(ConfigError, match=r"fraction = 1e-09 holds out all 1 clips"):
        loader(single, {"fraction": 1e-9})


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"fraction": 0.999999}, r"fraction = 0.999999 holds out all 27 clips"),
        ({"clips": ["no such clip"]}, r"1 entries are neither keys .* no such clip"),
        ({"clips_file": "/no/such/file"}, r"clips_file = /no/such/file cannot be read"),
    ],
)
def test_an_unusable_split_is_refused(data, validation, message):
    with pytest.raises(ConfigError, match=message):
        loader(data, validation)


def test_the_training_data_cannot_be_the_validation_data(data):
    with pytest.raises(ConfigError, match=r"data_set.manifest = .* holds out all 27 clips"):
        loader(data, {"data_set": {"manifest": data}})


def test_exactly_one_way_of_holding_out_is_given():
    with pytest.raises(ValueError, match="exactly one of fraction, clips, .* not none of them"):
        DataConfig(manifest="m", global_batch_size=1, validation={})
    with pytest.raises(ValueError, match="not fraction and clips"):
        validation = {"fraction": 0.1, "clips": ["a"]}
        DataConfig(manifest="m", global_batch_size=1, validation=validation)


def test_a_state_of_another_split_is_refused_and_one_without_a_split_is_as_before(data):
    plain = loader(data, None)
    assert "validation" not in plain.state_dict()
    loader(data, None).load_state_dict(plain.state_dict())
    split = loader(data, {"fraction": 0.4})
    loader(data, {"fraction": 0.4, "max_clips": 1}).load_state_dict(split.state_dict())
    for state, other in [
        (split.state_dict(), loader(data, {"fraction": 0.6})),
        (split.state_dict(), loader(data, None)),
        (plain.state_dict(), loader(data, {"fraction": 0.4})),
    ]:
        with pytest.raises(ConfigError, match=r"validation = .*; other clips are held out"):
            other.load_state_dict(state)


def found_by(world: Any, data: Path) -> list[Any]:
    found = []
    for validation in ({"fraction": 0.4, "max_clips": 5}, {"clips": ["video 3.mp4"]}):
        opened = loader(data, validation, world=world)
        found.append((opened.held_out.clips, opened.state_dict()))
    return found


def test_ranks_that_share_the_search_find_the_same_split(data):
    alone = found_by(None, data)
    assert len(alone[0][0]) == 5
    assert run_distributed(found_by, 3, data) == [alone] * 3


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (1, 64), (2, 1), (2, 2), (4, 1)])
def test_every_rank_gets_equally_many_batches_and_every_clip_counts_once(
    data, ranks, micro_batch_size
):
    batches = []
    for rank in range(ranks):
        opened = loader(
            data,
            {"fraction": 0.4},
            rank=rank,
            ranks=ranks,
            global_batch_size=64,
            micro_batch_size=micro_batch_size,
        )
        batches.append(list(opened.held_out))
    assert len({len(part) for part in batches}) == 1
    assert len({len(batch.samples) for batch in itertools.chain(*batches)}) == 1
    counted = []
    for batch in itertools.chain(*batches):
        for sample, other, counts in zip(batch.samples, batch.others, batch.counted, strict=True):
            if counts:
                counted.append(sample.key)
            assert video(other.key) != video(sample.key)
            assert other.meta.caption != sample.meta.caption
    assert sorted(counted) == sorted(held_out_keys(opened))
    assert [sample.key for sample in opened.held_out.first(3)] == held_out_keys(opened)[:3]
