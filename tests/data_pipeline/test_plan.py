"""The plan of long sources: read in pieces, with nothing in memory that grows with them."""

from __future__ import annotations

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
from landiff.data_pipeline.ingest.plan.layout import Repeats, lay
from landiff.data_pipeline.ingest.plan.probes import look_at_all
from landiff.data_pipeline.ingest.plan.rows import chunks, read_rows, videos_of, write_rows
from landiff.data_pipeline.ingest.plan.shard_plan import ShardPlan, path_of, write
from landiff.data_pipeline.ingest.shots import Look
from landiff.data_pipeline.ingest.sources.listing import Listing, SourceClip, list_source
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile
from tests.data_pipeline.test_ingest import config

CONFIG = config("made up", max_spans=2, samples_per_shard=16)


def rows(count: int) -> Iterator[SourceClip]:
    for number in range(count):
        name = f"{number:06d}.mp4"
        yield SourceClip(name, VideoFile(Path(name)), f"number {number}" if number % 13 else "")


def look(video: VideoFile) -> Look:
    number = int(video.path.stem)
    if number % 11 == 0:
        return Look(failure=DecodeFailure("invalid_data"))
    return Look(f"content {number % 40}" if number % 7 == 0 else video.path.stem, 1.2 + number % 3)


def planned(folder: Path, listing: Listing) -> ShardPlan:
    path = path_of(CONFIG, folder, listing)
    written = write_rows(CONFIG, listing, path)
    with ThreadPoolExecutor(1) as pool:
        look_at_all(CONFIG, written, (0, 1), pool, look, None)
    write(CONFIG, path, lay(CONFIG, written))
    return ShardPlan(path)


def test_every_row_is_a_span_or_set_aside_and_the_first_of_equals_stays(tmp_path: Path) -> None:
    plan = planned(tmp_path, Listing(lambda: rows(500)))
    units = [plan.unit(line) for line in plan.lines]
    assert [unit.name for unit in units] == [f"{number:06d}" for number in range(len(units))]
    assert [len(unit.spans) for unit in units[:-1]] == [16] * (len(units) - 1)
    spans = [span for unit in units for span in unit.spans]
    expected, came_before = [], set()
    for clip in rows(500):
        seen = look(clip.video)
        if clip.caption and not seen.failure:
            for start in (0.0, 1.125)[: 1 + (seen.duration_s > 2.125)]:
                if (seen.sha256, start) not in came_before:
                    expected.append((clip.name, clip.caption, seen.sha256, start))
                came_before.add((seen.sha256, start))
    assert [
        (span.source, span.caption, span.source_sha256, span.start_s) for span in spans
    ] == expected
    assert len({span.key for span in spans}) == len(spans)
    repeated = [
        aside.reject for unit in units for aside in unit.aside if aside.reject.reason == "duplicate"
    ]
    firsts = {(span.source_sha256, span.start_s): span.source for span in spans}
    for reject in repeated:
        at = float(reject.detail.split()[2])
        assert reject.detail.endswith(
            f"is that of {firsts[look(VideoFile(Path(reject.key))).sha256, at]}"
        )
    assert (
        len(
            {aside.reject.key for unit in units for aside in unit.aside}
            | {span.source for span in spans}
        )
        == 500
    )


def test_number_of_files_on_the_way_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = planned(tmp_path / "one", Listing(lambda: rows(300)))
    monkeypatch.setattr(plan_layout, "BYTES_PER_FILE", 1000)
    many = planned(tmp_path / "many", Listing(lambda: rows(300)))
    assert many.lines == one.lines
    assert (
        many.path.with_suffix(".jsonl").read_bytes() == one.path.with_suffix(".jsonl").read_bytes()
    )
    assert sorted(path.suffix for path in many.path.parent.iterdir()) == sorted(
        path.suffix for path in one.path.parent.iterdir()
    )


def test_repeats_come_in_order_with_the_name_of_the_first(tmp_path: Path) -> None:
    keys = [f"{random.Random(number % 90).getrandbits(160):040x}" for number in range(250)]
    with Repeats(tmp_path, 7) as repeats:
        for number, key in enumerate(keys):
            repeats.add(key, f"row {number}")
        assert list(repeats.found()) == [
            (number, f"row {number % 90}") for number in range(90, 250)
        ]
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "VIDEOS_PER_CHUNK", 32)
    monkeypatch.setattr(plan_layout, "BYTES_PER_FILE", 20_000)

    def held_half_way(count: int) -> int:
        """Bytes that are in use when half of the units are laid, but for the interpreter's table of interned strings."""
        path = planned(tmp_path / str(count), Listing(lambda: rows(count))).path
        tracemalloc.start()
        units = lay(CONFIG, plan_rows.rows_path(path))
        for _ in range(count // 16 // 4):
            next(units)
        held = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(False, "*/pathlib.py")]
        )
        tracemalloc.stop()
        return sum(trace.size for trace in held.traces)

    assert (
        held_half_way(2400) - held_half_way(400) < 2000 * 100
    )  # a row and what is seen of it are 2000 and more


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
    path = write_rows(CONFIG, listing, path_of(CONFIG, tmp_path, listing))
    pieces = list(chunks(CONFIG, path))
    assert [row for _, members in pieces for row in members] == list(read_rows(path))
    assert [row.clip for row in read_rows(path)] == list(listing.clips())
    videos = [video for _, members in pieces for video in videos_of(members)]
    assert len(videos) == len(set(videos)) == 134  # rows of one video stay together
    assert len(pieces) > 10
    more = Listing(
        lambda: (clip for number, clip in enumerate(listing.clips()) if number // 3 != 50)
    )
    others = {
        piece.looks
        for piece, _ in chunks(CONFIG, write_rows(CONFIG, more, path_of(CONFIG, tmp_path, more)))
    }
    assert (
        len({piece.looks for piece, _ in pieces} - others) <= 2
    )  # of the chunk it was in, at most of the next


def test_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    listing = Listing(lambda: rows(20))
    path = path_of(CONFIG, tmp_path, listing)
    with pytest.raises(ConfigError, match="changed while it was read"):
        write_rows(CONFIG, Listing(lambda: rows(21)), path)
    assert list(path.parent.iterdir()) == []


def test_folders_are_read_in_the_order_of_whole_paths(tmp_path: Path) -> None:
    for name in ("a/x", "a-b/x", "a.b/y", "a", "b/a/z", "b/a.mp4/z", "b/c", "Z", "é/ü"):
        (tmp_path / f"{name}.mp4").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "b")  # a folder that is linked is not read twice
    names = [clip.name for clip in list_source(config(tmp_path)).clips()]
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
    found = [
        row.clip
        for row in read_rows(write_rows(CONFIG, listing, path_of(CONFIG, tmp_path, listing)))
    ]
    assert found[0] == clips[0]
    assert found[1].failure.reason == "long_caption" and found[1].caption == ""
    assert found[2] == clips[2]
    assert json.loads(
        plan_rows.rows_path(path_of(CONFIG, tmp_path, listing)).read_text().splitlines()[0]
    )[4] == ["Ünï\nœ"]
