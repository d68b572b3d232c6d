"""Planning shards of many clips: memory and time, without the videos.

    python -m benchmarks.plan [rows ...]

The rows come from a generator and the probes are made up: every tenth video has the content of an
earlier one, every fiftieth is damaged. Everything else is `landiff shards`. The growth of the peak
memory is counted from before the first row, in one process per number of rows.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from landiff.configs.loader import load
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.layout import plan_shards
from landiff.data_pipeline.ingest.plan.probes import probe_all
from landiff.data_pipeline.ingest.plan.rows import read_source_state, write_rows
from landiff.data_pipeline.ingest.plan.shard_plan import ShardPlan, plan_path, write_plan
from landiff.data_pipeline.ingest.shots import VideoProbe
from landiff.data_pipeline.ingest.sources.listing import Listing, SourceClip
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile


class Here(Executor):
    """Runs work at once, in the calling thread."""

    def submit(self, function: Callable, /, *args: Any, **named: Any) -> Future:
        """Calls the function. Returns a finished future."""
        future: Future = Future()
        future.set_result(function(*args, **named))
        return future


def rows(count: int) -> Iterator[SourceClip]:
    """Made-up rows of a source."""
    for number in range(count):
        name = f"part{number // 1000:05d}/{hashlib.md5(str(number).encode()).hexdigest()}.mp4"
        caption = (
            "A caption of about a hundred characters, as they are found under videos on the web, "
            f"number {number}."
        )
        yield SourceClip(name, VideoFile(Path("/videos") / name), caption)


def probe(video: VideoFile) -> VideoProbe:
    """A made-up probe of a video."""
    number = int.from_bytes(hashlib.sha256(os.fspath(video.path).encode()).digest()[:8], "big")
    if number % 50 == 0:
        return VideoProbe(failure=DecodeFailure("invalid_data", "made up"))
    content = number
    if number % 10 == 0:
        content = number % 100_000
    return VideoProbe(hashlib.sha256(str(content).encode()).hexdigest(), 4.0 + number % 5)


def measure(count: int, folder: Path) -> str:
    """Plans `count` rows. Returns a line of the table."""
    config = load(
        ShardsConfig, {"source": "made up", "fps": 8, "num_frames": 17, "height": 64, "width": 64}
    )
    listing = Listing(lambda: rows(count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.process_time()]
    path = plan_path(folder, read_source_state(config, listing))
    times.append(time.process_time())
    written = write_rows(config, listing, path)
    times.append(time.process_time())
    probe_all(config, written, task=(0, 1), executor=Here(), probe=probe, progress=None)
    times.append(time.process_time())
    write_plan(config, path, plan_shards(config, written))
    times.append(time.process_time())
    plan = ShardPlan(path)
    spans = sum(entry.spans for entry in plan.entries)
    assert plan.read_shard(plan.entries[len(plan.entries) // 2]).spans
    times.append(time.process_time())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    disk = sum(path.stat().st_size for path in path.parent.iterdir()) / 1e6
    seconds = "".join(f"{after - begin:>9.1f}" for begin, after in itertools.pairwise(times))
    return f"{count:>10}{spans:>10}{len(plan.entries):>8}{grown:>9.0f}{disk:>9.0f}{seconds}"


def main(counts: list[int]) -> None:
    """Prints the table, with one process per line."""
    header = ("id s", "rows s", "probe s", "layout s", "open s")
    print(
        f"{'rows':>10}{'spans':>10}{'shards':>8}{'RAM MB':>9}{'disk MB':>9}"
        + "".join(f"{name:>9}" for name in header),
        flush=True,
    )
    for count in counts:
        subprocess.run([sys.executable, "-m", "benchmarks.plan", "--one", str(count)], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        with tempfile.TemporaryDirectory() as temporary:
            print(measure(int(sys.argv[2]), Path(temporary)), flush=True)
    else:
        main([int(count) for count in sys.argv[1:]] or [10_000, 100_000])
