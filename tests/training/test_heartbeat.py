"""A rank that hangs: the files that it and the other ranks write."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from landiff.training.checkpoint.errors import error_path, first_error, read_message
from landiff.training.config import LoopConfig
from landiff.training.observe.heartbeat import HARD_MARGIN_S, PEERS_GRACE_S, Heartbeat
from tests.distributed import RankError, run_distributed


def stand_still(world, run: Path) -> None:
    """Rank 1 sleeps where rank 0 waits for it in a collective."""
    dist.all_reduce(torch.ones(3))  # before: a busy machine starts ranks seconds apart
    with Heartbeat(run, world.rank, timeout_s=1.0, grace_s=1.0) as heartbeat:
        heartbeat.beat(7)
        if world.rank == 1:
            time.sleep(60)
        dist.all_reduce(torch.ones(5))


def test_all_ranks_leave_their_stacks_and_the_collective_that_hangs(tmp_path):
    with pytest.raises(RankError):
        run_distributed(stand_still, 2, tmp_path)
    stacks = [(tmp_path / "hangs" / f"rank_{rank:04d}.txt").read_text() for rank in range(2)]
    assert all("no step for 1 s after step 7" in text and "stand_still" in text for text in stacks)
    assert "all_reduce" in stacks[0] and "all_reduce" not in stacks[1]
    sizes = []
    for rank in range(2):
        record = json.loads((tmp_path / "hangs" / f"gloo_rank_{rank}.json").read_text())
        reductions = [e for e in record["entries"] if e["profiling_name"] == "gloo:all_reduce"]
        sizes.append([entry["input_sizes"] for entry in reductions])
    # rank 0 is one collective ahead
    assert sizes[0][-2:] == [[[3]], [[5]]]
    assert sizes[1][-1] == [[3]]
    assert "HangError" in first_error(tmp_path).read_text()


def stop_one(world, run: Path) -> None:
    """Rank 1 is stopped, as by a debugger, where rank 0 waits for it."""
    dist.all_reduce(torch.ones(3))  # before: a busy machine starts ranks seconds apart
    with Heartbeat(run, world.rank, timeout_s=1.0, grace_s=1.0, world_size=world.size) as heartbeat:
        heartbeat.beat(7)
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(5))


def test_a_stopped_rank_is_named_and_not_the_one_that_noticed(tmp_path):
    with pytest.raises(RankError):
        run_distributed(stop_one, 2, tmp_path)
    assert first_error(tmp_path) == error_path(tmp_path, 1)
    assert read_message(error_path(tmp_path, 1)).startswith(
        "RankLost: rank 1 hangs after step 7: no step for 1 s"
    )
    assert "HangError" in read_message(error_path(tmp_path, 0))


def test_a_slow_step_within_the_limit_is_no_hang(tmp_path):
    with Heartbeat(tmp_path, 0, timeout_s=2.0) as heartbeat:
        for step in range(3):
            time.sleep(0.3)
            heartbeat.beat(step)
    assert not (tmp_path / "hangs").exists() and (
        tmp_path / "heartbeat" / "rank_0000"
    ).read_text().endswith("step 0\n")


@pytest.mark.parametrize("hang_timeout_s", [0.0, 60.0, 7200.0])
def test_torch_gives_a_collective_up_after_the_heartbeat_has_shown_it(hang_timeout_s):
    loop = LoopConfig(steps=1, hang_timeout_s=hang_timeout_s)
    assert loop.collective_timeout_s > loop.hang_timeout_s + PEERS_GRACE_S + HARD_MARGIN_S
