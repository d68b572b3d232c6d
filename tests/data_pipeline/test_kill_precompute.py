"""Processes killed inside writes, fsyncs, renames, locks and reads leave the same bytes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed import ROOT


def kills(what: str, work, number: int, seed: int) -> int:
    command = [
        sys.executable,
        "-m",
        "tests.data_pipeline.kill_precompute",
        what,
        str(work),
        str(number),
        str(seed),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return int(ended.stdout.split()[-1])


def test_four_tasks_killed_on_one_folder_give_the_bytes_of_an_undisturbed_run(tmp_path):
    assert kills("precompute", tmp_path, 15, seed=0) >= 15


def test_killed_captioning_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    assert kills("captions", tmp_path, 2, seed=0) >= 2


@pytest.mark.long
def test_captioning_killed_twenty_times(tmp_path):
    assert kills("captions", tmp_path, 20, seed=1) >= 20


def test_a_killed_trainer_sees_each_sample_once_and_in_the_same_order(tmp_path):
    assert kills("loader", tmp_path, 8, seed=0) >= 8


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_kills(tmp_path, seed):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert kills("precompute", tmp_path / "a", 75, seed) >= 75
    assert kills("loader", tmp_path / "b", 30, seed) >= 30
