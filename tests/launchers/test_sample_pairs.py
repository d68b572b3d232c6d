"""A broken process of a pair that generates one video with `split_guidance=true`."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from landiff.configs import ConfigError
from landiff.launchers.commands import JobFailed
from landiff.launchers.results.sampling import processes
from landiff.launchers.results.sampling.pair import Pair, lead
from landiff.launchers.results.sampling.processes import PARTNER_LOST, free_port
from tests.launchers.random_zoo import PROMPTS, sample_config, write_random_zoo


def join_and_die(port: int) -> None:
    """The second process of a pair, which is ended once it has joined."""
    with Pair(1, port).joined(torch.device("cpu")):
        os._exit(9)


def test_the_first_process_reports_that_the_second_has_ended(tmp_path, capfd):
    zoo = write_random_zoo(tmp_path / "zoo")
    port = free_port()
    second = multiprocessing.get_context("fork").Process(target=join_and_die, args=(port,))
    second.start()
    options = {"prompts": PROMPTS[:1], "split_guidance": True, "device": "cpu"}
    config = sample_config(zoo, tmp_path / "two", **options)
    assert lead(config, Pair(0, port), (0, 1)) == PARTNER_LOST
    second.join()
    err = capfd.readouterr().err
    assert "the second process of the pair has ended" in err and "Traceback" not in err
    assert not list((tmp_path / "two").glob("*.mp4"))


@pytest.mark.parametrize(
    ("first", "second", "patience_s", "error", "words"),
    [
        (
            "time.sleep(600)",
            "os.kill(os.getpid(), 9)",
            0,
            JobFailed,
            ["2 of 2", "second", "SIGKILL"],
        ),
        (f"sys.exit({PARTNER_LOST})", "sys.exit(1)", 60, JobFailed, ["2 of 2", "exit code 1"]),
        ("sys.exit(2)", f"sys.exit({PARTNER_LOST})", 60, ConfigError, ["1 of 2", "first"]),
    ],
)
def test_the_process_that_failed_is_named(monkeypatch, first, second, patience_s, error, words):
    monkeypatch.setattr(processes, "PARTNER_S", patience_s)
    children = []
    for code in (first, second):
        program = f"import os, sys, time; {code}"
        children.append(subprocess.Popen([sys.executable, "-c", program]))
    with pytest.raises(error) as raised:
        processes.wait_in_pairs(children)
    for word in [*words, "split_guidance=false"]:
        assert word in str(raised.value)
    assert all(child.returncode for child in children)
