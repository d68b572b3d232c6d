"""Kill the shards job inside its writes, fsyncs, links and renames, and compare the results.

    python -m tests.data_pipeline.kill_shards CONFIG REFERENCE WORK KILLS TASKS

The job runs in forks of this process, so that a kill costs a second. CONFIG is a YAML file,
REFERENCE the data folder of an undisturbed run, and WORK a folder for temporary data. TASKS
processes work on one folder, and one more does the work of the first again. Prints the number of
kills and of places where the job can be killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from landiff.configs.loader import load
from landiff.configs.ownership import OwnedError
from landiff.data_pipeline.format.shards import read_sidecar
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.job import finalize_raw_shards, make_shards, make_task_shards
from tests.data_pipeline import kills
from tests.data_pipeline.ingest_helpers import contents
from tests.data_pipeline.kills import Killer, killed

DIFFERENT = "the result of a killed and resumed job differs from that of an undisturbed one"


def forked(work: Callable[[], object], plan: int, record: Path | None = None) -> int:
    """Start `work` in a fork that is killed at operation `plan`. Returns its process id."""

    def prepare(killer: Killer) -> None:
        killer.watch(os, "fsync", "replace", "link")
        killer.watch_writes()

    return kills.forked(work, Killer(plan), prepare, record)


def ended(pids: Sequence[int], kill_after_s: float | None = None) -> bool:
    """Wait for all processes. True if none was killed.

    The first is killed after `kill_after_s`, if that is given.
    """
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pids[0], signal.SIGKILL)
    were_killed = [killed(pid) for pid in pids]  # waits for each
    return not any(were_killed)


def attempt(
    config: ShardsConfig,
    data: Path,
    plan: int,
    tasks: int,
    record: Path | None = None,
    kill_after_s: float | None = None,
) -> bool:
    """Run the job with a kill planned for its first process (0: none). True if none happened."""
    if tasks == 1:
        return ended([forked(lambda: make_shards(config, data), plan, record)], kill_after_s)
    pids = []
    for number in [0, *range(1, tasks), 0]:
        work = partial(make_task_shards_alone, config, data, (number, tasks))
        pids.append(forked(work, 0 if pids else plan))
    if not ended(pids, kill_after_s):
        return False
    return ended([forked(lambda: finalize_raw_shards(config, data), plan)])


def make_task_shards_alone(config: ShardsConfig, data: Path, task: tuple[int, int]) -> None:
    """Of two processes that work on one task, one is refused."""
    with suppress(OwnedError):
        make_task_shards(config, data, task)


def check_committed(data: Path) -> None:
    """Assert that every tar with a sidecar is complete."""
    for tar in (data / "raw").glob("[0-9]*.tar"):
        sidecar = read_sidecar(tar)
        if sidecar is not None:
            assert sidecar.entry.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest(), tar


def main(config_file: str, reference: str, work: str, number: str, tasks: str) -> None:
    config = load(ShardsConfig, Path(config_file))
    expected = contents(Path(reference))
    data = Path(work) / "data"
    record = Path(work) / "operations"
    chance = random.Random(int(tasks))
    assert attempt(config, data, 0, 1, record)
    assert contents(data) == expected
    places = list(range(2, int(record.read_text()) + 2))
    chance.shuffle(places)
    shutil.rmtree(data)
    done = 0
    for place in places[: int(number)]:
        by_clock = chance.uniform(0.0, 1.0) if done % 4 == 3 else None
        while attempt(config, data, 0 if by_clock else place, int(tasks), kill_after_s=by_clock):
            # it ended before the kill, because little was left to do: compare, and start over
            assert contents(data) == expected, DIFFERENT
            shutil.rmtree(data)
            place = chance.randrange(2, place + 1)  # one of several tasks has less to do
            by_clock = by_clock and by_clock / 2
        done += 1
        check_committed(data)
    assert attempt(config, data, 0, int(tasks))
    assert contents(data) == expected, DIFFERENT
    print(done, len(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
