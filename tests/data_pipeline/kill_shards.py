"""Kill the shards job inside its writes, fsyncs, links and renames, again and again, and compare what comes out.

    python -m tests.data_pipeline.kill_shards CONFIG REFERENCE WORK KILLS TASKS

The job runs in forks of this process, so that a kill costs a second. CONFIG: a YAML file; REFERENCE: the data
folder of an undisturbed run; WORK: a folder to use up; TASKS: processes on one folder, and one more that does
the work of the first again. Prints the number of kills and of places.
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
from pathlib import Path

from landiff.configs.loader import load
from landiff.configs.ownership import OwnedError
from landiff.data_pipeline.format.shards import read_sidecar
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.job import finalize, make_shards, make_share
from tests.data_pipeline import kills
from tests.data_pipeline.kills import Killer, contents, killed


def forked(work: Callable[[], object], plan: int, record: Path | None = None) -> int:
    def prepare(killer: Killer) -> None:
        killer.watch(os, "fsync", "replace", "link")
        killer.watch_writes()

    return kills.forked(work, Killer(plan), prepare, record)


def ended(pids: Sequence[int], kill_after_s: float | None = None) -> bool:
    """Wait for all. True when each came to its end; the first is killed after some time, if one is given."""
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pids[0], signal.SIGKILL)
    return not any([killed(pid) for pid in pids])


def attempt(
    config: ShardsConfig,
    data: Path,
    plan: int,
    tasks: int,
    record: Path | None = None,
    kill_after_s: float | None = None,
) -> bool:
    """Run the job with a kill planned for its first process (0: none). True when all of it came to its end."""
    if tasks == 1:
        return ended([forked(lambda: make_shards(config, data), plan, record)], kill_after_s)
    numbers = [0, *range(1, tasks), 0]
    pids = [
        forked(
            lambda number=number: make_share_alone(config, data, (number, tasks)), 0 if at else plan
        )
        for at, number in enumerate(numbers)
    ]
    if not ended(pids, kill_after_s):
        return False
    return ended([forked(lambda: finalize(config, data), plan)])


def make_share_alone(config: ShardsConfig, data: Path, task: tuple[int, int]) -> None:
    """Of two processes that work on one task, one is refused."""
    with suppress(OwnedError):
        make_share(config, data, task)


def check_committed(data: Path) -> None:
    """Whatever has its final name and a sidecar is whole."""
    for tar in (data / "raw").glob("[0-9]*.tar"):
        sidecar = read_sidecar(tar)
        assert (
            sidecar is None or sidecar.entry.sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()
        ), tar


def main(config_file: str, reference: str, work: str, number: str, tasks: str) -> None:
    config, expected, data = (
        load(ShardsConfig, Path(config_file)),
        contents(Path(reference)),
        Path(work) / "data",
    )
    record, chance = Path(work) / "operations", random.Random(int(tasks))
    assert attempt(config, data, 0, 1, record)
    assert contents(data) == expected
    places = list(range(2, int(record.read_text()) + 2))
    chance.shuffle(places)
    shutil.rmtree(data)
    done = 0
    for place in places[: int(number)]:
        by_clock = chance.uniform(0.0, 1.0) if done % 4 == 3 else None
        while attempt(
            config, data, 0 if by_clock else place, int(tasks), kill_after_s=by_clock
        ):  # little was left to do: compare, and start over
            assert contents(data) == expected, (
                "what was killed and went on differs from what was not"
            )
            shutil.rmtree(data)
            place = chance.randrange(2, place + 1)  # of several tasks each has less to do
            by_clock = by_clock and by_clock / 2
        done += 1
        check_committed(data)
    assert attempt(config, data, 0, int(tasks))
    assert contents(data) == expected, "what was killed and went on differs from what was not"
    print(done, len(places))


if __name__ == "__main__":
    main(*sys.argv[1:])
