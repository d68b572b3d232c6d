"""Exclusive ownership, and when an owner counts as ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from landiff.configs import ownership
from landiff.configs.files import is_abandoned, temporary_name
from landiff.configs.ownership import OwnedError, holder, take, this_process
from landiff.configs.processes import is_running, start_time

ROOT = Path(__file__).resolve().parents[2]


def write_lock(path: Path, **changes: object) -> ownership.Owner:
    """A lock as another process left it; by default of a process that is gone."""
    owner = replace(this_process(), token="theirs", pid=gone(), started="1", **changes)
    written = path.with_name("written")
    written.write_text(json.dumps(asdict(owner)))
    written.rename(path)  # a reader never sees half a record
    return owner


def gone() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / ".owner"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of cluster "here" whose queue is what the file holds."""
    tools = tmp_path / "tools"
    tools.mkdir()
    queue = tools / "queue"
    scripts = {
        "squeue": f"cat {queue}",
        "scontrol": "echo 'ClusterName             = here'",
    }
    for name, line in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return queue


def test_the_second_owner_is_refused_and_told_who_the_first_is(lock):
    with take(lock, "run folder runs/lm") as first:
        with pytest.raises(
            OwnedError,
            match=rf"run folder runs/lm is in use by process {os.getpid()} of \w+ "
            rf"on {os.uname().nodename}, since 20",
        ):
            take(lock, "run folder runs/lm")
        with pytest.raises(OwnedError):  # one that runs is not taken over
            take(lock, "run folder runs/lm", take_over=True)
        assert take(lock, "run folder runs/lm", inherited=first.token).inherited
    assert list(lock.parent.iterdir()) == []
    take(lock, "run folder runs/lm").release()


def test_an_owner_whose_process_is_gone_is_followed_at_once(lock):
    write_lock(lock)
    with take(lock, "it") as mine:
        assert holder(lock) == (mine.owner, "running") and list(lock.parent.iterdir()) == [lock]


def test_a_process_that_has_its_id_by_chance_is_not_the_owner(lock):
    write_lock(lock)
    theirs = json.loads(lock.read_text()) | {"pid": os.getpid()}
    lock.write_text(json.dumps(theirs))
    assert holder(lock)[1] == "gone"
    lock.write_text(json.dumps(theirs | {"started": start_time(os.getpid())}))
    assert holder(lock)[1] == "running"


def test_a_zombie_is_gone(lock):
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()
    while is_running(child.pid):  # it has ended, and nobody has asked for its exit code
        time.sleep(0.01)
    child.wait()


def test_on_another_machine_the_lease_decides(lock):
    write_lock(lock, machine="elsewhere/boot/pid:[1]")
    with pytest.raises(OwnedError, match=r"on elsewhere, .* --take-over"):
        take(lock, "it")
    age(lock, 50)
    with pytest.raises(OwnedError):
        take(lock, "it")
    age(lock, 70)
    assert holder(lock)[1] == "silent"
    take(lock, "it").release()


def test_take_over_does_not_wait_for_the_lease(lock):
    write_lock(lock, machine="elsewhere/boot/pid:[1]")
    take(lock, "it", take_over=True).release()


def test_the_lease_is_measured_on_the_clock_of_the_file_system(lock, monkeypatch):
    write_lock(lock, machine="elsewhere/boot/pid:[1]")
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock is decades ahead
    assert holder(lock)[1] == "unknown"


def test_an_owner_in_a_job_is_gone_with_its_job(lock, slurm):
    write_lock(lock, machine="node7/boot/pid:[1]", job="12", cluster="here")
    age(lock, 1000)  # not renewed, but its job is there
    slurm.write_text("11\n12\n")
    with pytest.raises(OwnedError, match="on node7, SLURM job 12"):
        take(lock, "it", take_over=True)
    slurm.write_text("11\n121\n")
    age(lock, 0)
    take(lock, "it").release()


def test_job_ids_of_another_cluster_say_nothing(lock, slurm):
    slurm.write_text("11\n")
    write_lock(lock, machine="node7/boot/pid:[1]", job="12", cluster="there")
    assert holder(lock)[1] == "unknown"


def test_the_next_attempt_of_a_job_follows_the_one_before(lock, monkeypatch):
    write_lock(lock, machine="node7/boot/pid:[1]", job="12", attempt=0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert holder(lock)[1] == "unknown"  # another process of the same attempt
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert holder(lock)[1] == "gone"


def test_a_lock_without_content_is_kept_for_the_lease(lock):
    lock.touch()
    with pytest.raises(OwnedError, match="an unknown process|process 0"):
        take(lock, "it")
    age(lock, 70)
    take(lock, "it").release()


def test_a_file_system_without_links_has_one_owner_too(lock, monkeypatch):
    def no_link(*_: object) -> None:
        raise OSError(ownership.errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", no_link)
    write_lock(lock)
    with take(lock, "it"), pytest.raises(OwnedError):
        take(lock, "it")
    assert list(lock.parent.iterdir()) == []


def test_who_died_while_taking_over_is_followed_in_turn(lock):
    first = write_lock(lock)
    successor = lock.with_name(f"{lock.name}.after-{first.token}")
    write_lock(successor)
    successor.write_text(successor.read_text().replace('"theirs"', '"second"'))
    with take(lock, "it") as mine:
        assert json.loads(lock.read_text())["token"] == mine.token
        assert list(lock.parent.iterdir()) == [lock]


def race(lock: Path, barrier, results) -> None:
    """Take over as soon as everybody is ready; hold on to it until all have tried."""
    barrier.wait()
    try:
        mine = take(lock, "it")
    except OwnedError:
        mine = None
    results.put(mine is not None)
    barrier.wait()
    os._exit(0)  # without a release: the next round finds an owner that is gone


@pytest.mark.parametrize("left_behind", [True, False])
def test_of_many_that_take_over_at_once_one_wins(lock, left_behind):
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        if left_behind:
            write_lock(lock)
        else:
            lock.unlink(missing_ok=True)
        barrier, results = context.Barrier(8), context.SimpleQueue()
        racers = [context.Process(target=race, args=(lock, barrier, results)) for _ in range(8)]
        for racer in racers:
            racer.start()
        won = [results.get() for _ in racers]
        for racer in racers:
            racer.join()
        assert won.count(True) == 1
        assert [path.name for path in lock.parent.iterdir()] == [lock.name]


def test_an_owner_that_lost_its_lock_hears_of_it(lock, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.01)
    heard: list[str] = []
    mine = take(lock, "it", on_lost=heard.append)
    write_lock(lock, machine="elsewhere/boot/pid:[1]")
    while not heard:
        time.sleep(0.01)
    assert "taken over by process" in heard[0] and "elsewhere" in heard[0]
    mine.release()
    assert lock.exists()  # it is another's


def test_a_process_that_removes_an_abandoned_lock_is_waited_for(lock):
    write_lock(lock)
    cleanup = take(lock, "it", is_cleanup=True)
    threading.Timer(0.3, cleanup.release).start()
    with take(lock, "it") as owned:
        found = holder(lock)
        assert found is not None and found[0].token == owned.token


def test_a_lock_is_renewed(lock, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.01)
    with take(lock, "it"):
        age(lock, 1000)
        while time.time() - lock.stat().st_mtime > 100:
            time.sleep(0.01)


def test_a_temporary_file_of_a_reused_process_id_is_abandoned(tmp_path):
    mine = temporary_name(tmp_path / "a")
    mine.touch()
    assert not is_abandoned(mine)
    assert is_abandoned(mine.with_name(mine.name.replace(start_time(os.getpid()), "1")))
    dotted = tmp_path / f".b.c.{os.uname().nodename}.{gone()}-1.tmp"
    dotted.touch()
    assert is_abandoned(dotted)
    foreign = tmp_path / ".d.node.with.dots.12-1.tmp"
    foreign.touch()
    assert not is_abandoned(foreign) and is_abandoned(foreign, foreign_after_s=0)
