"""A task of precompute that is divided among several processes, one per GPU."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time

import psutil
import pytest

from landiff.configs import ConfigError
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.units import shards_of_task
from landiff.launchers.data.processes import divide_task, run_in_processes
from tests.data_pipeline.precompute_data import config, contents, copied, write_clips

COLUMNS = {"latents": {"encoder": {"kind": "dct"}}}


def words(data, **fields) -> list[str]:
    settings = {"data": str(data), "zoo": str(data), "columns": COLUMNS, "device": "cpu"}
    path = data.parent / "precompute.yaml"
    path.write_text(json.dumps(settings | {"batch_size": 3} | fields))
    return ["precompute", "run", "--config", str(path)]


@pytest.mark.parametrize(("task", "processes"), [((0, 1), 8), ((3, 5), 4)])
def test_processes_share_the_shards_of_their_task_and_no_others(tmp_path, task, processes):
    shards = write_clips(tmp_path, [1] * 12).shards
    parts = [shards_of_task(shards, part) for part in divide_task(task, processes)]
    assert sorted(itertools.chain(*parts)) == shards_of_task(shards, task)


def test_two_processes_compute_what_one_does(tmp_path):
    write_clips(tmp_path / "one", [2] * 6)
    copied(tmp_path / "one", tmp_path / "two")
    precompute.run(config(tmp_path / "one", tmp_path, COLUMNS))
    run_in_processes(words(tmp_path / "two"), (0, 1), 2)
    assert contents(tmp_path / "two", ["latents"]) == contents(tmp_path / "one", ["latents"])
    shards = read_manifest(tmp_path / "two").shards
    assert all(shards_of_task(shards, part) for part in divide_task((0, 1), 2))  # both had work


def test_processes_that_fail_are_named(tmp_path, capfd):
    write_clips(tmp_path / "data", [2])
    codec = {"kind": "pca", "path": "missing.safetensors"}
    failing = words(tmp_path / "data", columns={"latents": {"encoder": codec}})
    with pytest.raises(ConfigError, match="1 ended with exit code 2, 2 ended with exit code 2"):
        run_in_processes(failing, (0, 1), 2)
    assert capfd.readouterr().err.count("missing.safetensors") >= 2


def test_sigterm_ends_all_processes(tmp_path):
    write_clips(tmp_path / "data", [2])
    code = (
        "from landiff.launchers.data.processes import run_in_processes\n"
        f"run_in_processes({words(tmp_path / 'data')}, (0, 1), 2)"
    )
    parent = psutil.Popen([sys.executable, "-c", code])
    children: list[psutil.Process] = []
    while len(children) < 2:
        assert parent.poll() is None, "it ended before it started two processes"
        children = parent.children()
        time.sleep(0.01)
    parent.terminate()
    assert parent.wait(timeout=120) == -signal.SIGINT  # as after Ctrl-C
    assert not any(child.is_running() for child in children)
    assert not list(tmp_path.glob("data/latents/*.tar"))  # they did not end by being done
