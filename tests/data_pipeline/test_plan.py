"""The plan of long sources: read in pieces, with nothing in memory that grows with them."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.plan import layout as plan_layout
from landiff.data_pipeline.ingest.plan import rows as plan_rows
from landiff.data_pipeline.ingest.plan.layout import DuplicateFinder, plan_shards
from landiff.data_pipeline.ingest.plan.probes import probe_all
from landiff.data_pipeline.ingest.plan.rows import (
    iter_chunks,
    read_rows,
    read_source_state,
    videos_of,
    write_rows,
)
from landiff.data_pipeline.ingest.plan.shard_plan import ShardPlan, plan_path, write_plan
from landiff.data_pipeline.ingest.shots import VideoProbe
from landiff.data_pipeline.ingest.sources.listing import Listing, SourceClip, list_source
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile
from tests.data_pipeline.ingest_helpers import shards_config

CONFIG = shards_config("made up", max_spans=2, samples_per_shard=16)


def rows(count: int) -> Iterator[SourceClip]:
    for number in range(count):
        name = f"{number:06d}.mp4"
        yield SourceClip(name, VideoFile(Path(name)), f"number {number}" if number % 13 else "")


def probe(video: VideoFile) -> VideoProbe:
    number = int(video.path.stem)
    if number % 11 == 0:
        return VideoProbe(failure=DecodeFailure("invalid_data"))
    return VideoProbe(
        f"content {number % 40}" if number % 7 == 0 else video.path.stem, 1.2 + number % 3
    )


def path_of(folder: Path, listing: Listing) -> Path:
    """The path of the plan of a listing."""
    return plan_path(folder, read_source_state(CONFIG, listing))


def planned(folder: Path, listing: Listing) -> ShardPlan:
    """The plan of a listing, with probes that are made up."""
    path = path_of(folder, listing)
    written = write_rows(CONFIG, listing, path)
    with ThreadPoolExecutor(1) as pool:
        probe_all(CONFIG, written, task=(0, 1), executor=pool, probe=probe, progress=None)
    write_plan(CONFIG, path, plan_shards(CONFIG, written))
    return ShardPlan(path)


def test_every_row_is_a_span_or_rejected_and_the_first_of_equals_stays(tmp_path: Path) -> None:
    plan = planned(tmp_path, Listing(lambda: rows(500)))
    shards = [plan.read_shard(entry) for entry in plan.entries]
    assert [shard.name for shard in shards] == [f"{number:06d}" for number in range(len(shards))]
    assert [len(shard.spans) for shard in shards[:-1]] == [16] * (len(shards) - 1)
    spans = list(itertools.chain(*[shard.spans for shard in shards]))
    rejects = [rejected.reject for rejected in itertools.chain(*[s.rejects for s in shards])]
    expected, came_before = [], set()
    for clip in rows(500):
        found = probe(clip.video)
        if clip.caption and not found.failure:
            for start in (0.0, 1.125) if found.duration_s > 2.125 else (0.0,):
                if (found.sha256, start) not in came_before:
                    expected.append((clip.name, clip.caption, found.sha256, start))
                came_before.add((found.sha256, start))
    assert expected == [
        (span.source, span.caption, span.source_sha256, span.start_s) for span in spans
    ]
    assert len({span.key for span in spans}) == len(spans)
    firsts = {(span.source_sha256, span.start_s): span.source for span in spans}
    for reject in rejects:
        if reject.reason == "duplicate":
            start = float(reject.detail.split()[2])
            first = firsts[probe(VideoFile(Path(reject.key))).sha256, start]
            assert reject.detail.endswith(f"is that of {first}")
    names = {reject.key for reject in rejects} | {span.source for span in spans}
    assert len(names) == 500


def test_number_of_temporary_files_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = planned(tmp_path / "one", Listing(lambda: rows(300)))
    monkeypatch.setattr(plan_layout, "BYTES_PER_FILE", 1000)
    many = planned(tmp_path / "many", Listing(lambda: rows(300)))
    assert many.entries == one.entries
    written = one.path.with_suffix(".jsonl").read_bytes()
    assert many.path.with_suffix(".jsonl").read_bytes() == written
    suffixes = sorted(path.suffix for path in one.path.parent.iterdir())
    assert sorted(path.suffix for path in many.path.parent.iterdir()) == suffixes


def test_duplicates_come_in_order_with_the_name_of_the_first(tmp_path: Path) -> None:
    keys = [f"{random.Random(number % 90).getrandbits(160):040x}" for number in range(250)]
    with DuplicateFinder(tmp_path, 7) as finder:
        for number, key in enumerate(keys):
            finder.add(key, f"row {number}")
        expected = [(number, f"row {number % 90}") for number in range(90, 250)]
        assert list(finder.duplicates()) == expected
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "VIDEOS_PER_CHUNK", 32)
    monkeypatch.setattr(plan_layout, "BYTES_PER_FILE", 20_000)

    def held_half_way(count: int) -> int:
        """Bytes in use when half of the shards are planned, without interned strings."""
        path = planned(tmp_path / str(count), Listing(lambda: rows(count))).path
        tracemalloc.start()
        shards = plan_shards(CONFIG, plan_rows.rows_path(path))
        for _ in range(count // 16 // 4):
            next(shards)
        without_interned = [tracemalloc.Filter(False, "*/pathlib.py")]
        held = tracemalloc.take_snapshot().filter_traces(without_interned)
        tracemalloc.stop()
        return sum(trace.size for trace in held.traces)

    # a row and its probe take 2000 bytes and more
    assert held_half_way(2400) - held_half_way(400) < 2000 * 100


def test_chunks_hold_every_row_once_and_each_video_where_it_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "VIDEOS_PER_CHUNK", 4)
    listing = Listing(
        lambda: (
            SourceClip(f"{number}", VideoFile(Path(f"{number // 3}.mp4")), "x", start_s=number % 3)
            for number in range(400)
        )
    )
    path = write_rows(CONFIG, listing, path_of(tmp_path, listing))
    chunks = list(iter_chunks(CONFIG, path))
    assert list(itertools.chain(*[members for _, members in chunks])) == list(read_rows(path))
    assert [row.clip for row in read_rows(path)] == list(listing.clips())
    videos = list(itertools.chain(*[videos_of(members) for _, members in chunks]))
    assert len(videos) == len(set(videos)) == 134  # rows of one video stay together
    assert len(chunks) > 10
    fewer = Listing(
        lambda: (clip for number, clip in enumerate(listing.clips()) if number // 3 != 50)
    )
    fewer_rows = write_rows(CONFIG, fewer, path_of(tmp_path, fewer))
    others = {chunk.probes_file for chunk, _ in iter_chunks(CONFIG, fewer_rows)}
    # those of the chunk that the video was in, and at most of the next
    assert len({chunk.probes_file for chunk, _ in chunks} - others) <= 2


def test_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    listing = Listing(lambda: rows(20))
    path = path_of(tmp_path, listing)
    with pytest.raises(ConfigError, match="changed while it was read"):
        write_rows(CONFIG, Listing(lambda: rows(21)), path)
    assert list(path.parent.iterdir()) == []


def test_folders_are_read_in_the_order_of_whole_paths(tmp_path: Path) -> None:
    for name in ("a/x", "a-b/x", "a.b/y", "a", "b/a/z", "b/a.mp4/z", "b/c", "Z", "é/ü"):
        (tmp_path / f"{name}.mp4").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "b")  # a folder that is linked is not read twice
    names = [clip.name for clip in list_source(shards_config(tmp_path)).clips()]
    assert names == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4") if path.is_file()
    )
    assert len(names) == 9


def test_rows_keep_all_that_is_known_of_a_clip(tmp_path: Path) -> None:
    clips = [
        SourceClip("a", VideoFile(Path("a\udcff.mp4"), 512, 99), "Ünï\nœ", 1.5, 2.5),
        SourceClip("b", VideoFile(Path("b")), "x" * 30_000),
        SourceClip("c", VideoFile(Path("c")), "", failure=DecodeFailure("truncated", "why")),
    ]
    listing = Listing(lambda: iter(clips))
    path = write_rows(CONFIG, listing, path_of(tmp_path, listing))
    found = [row.clip for row in read_rows(path)]
    assert found[0] == clips[0]
    assert found[1].failure.reason == "long_caption" and found[1].caption == ""
    assert found[2] == clips[2]
    assert json.loads(path.read_text().splitlines()[0])[4] == ["Ünï\nœ"]
