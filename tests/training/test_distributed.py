"""Ranks find each other, agree, and say why they died."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from landiff.configs.base import ConfigError
from landiff.training import distributed
from landiff.training.checkpoint.errors import first_error, write_error
from tests.distributed import RankError, nursery, run_distributed


def agree(world):
    return {
        "any": world.any_true(world.rank == 1),
        "none": world.any_true(False),
        "all": world.all_true(True),
        "not all": world.all_true(world.rank == 0),
        "broadcast": world.broadcast({"from": world.rank}),
        "gather": world.gather("x" * (1 + 3 * world.rank)),
        "group": (dist.get_rank(), dist.get_world_size(), dist.get_backend()),
        "world": (world.rank, world.size, str(world.device), world.backend),
    }


def test_ranks_agree_on_flags_and_values():
    for rank, said in enumerate(run_distributed(agree, 2)):
        assert said == {
            "any": True,
            "none": False,
            "all": True,
            "not all": False,
            "broadcast": {"from": 0},
            "gather": ["x", "xxxx"],
            "group": (rank, 2, "gloo"),
            "world": (rank, 2, "cpu", "gloo"),
        }


def fail_on_rank_1(run):
    with distributed.start(run) as world:
        world.step = 7
        if world.rank == 1:
            raise ValueError("rank 1 has had enough")
        world.barrier()


def test_a_failed_rank_leaves_its_reason_and_the_others_end(tmp_path):
    ranks = nursery(__name__).start(fail_on_rank_1, 4, (tmp_path,))
    assert ranks.wait(60) == [1, 1, 1, 1]
    path = first_error(tmp_path)
    assert path == tmp_path / "errors" / "rank_0001.txt"
    text = path.read_text()
    assert "step: 7" in text
    assert "rank 1 has had enough" in text
    assert "Traceback" in text


def test_the_helper_reports_the_traceback_of_a_rank():
    with pytest.raises(RankError, match="out of range"):
        run_distributed(index_too_far, 2)


def index_too_far(world):
    return [0][world.rank]


def lone_rank(run):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    write_error(run, 0, 3, ValueError("of an earlier attempt"))
    write_error(run, 5, 3, ValueError("of a rank that is no more"))
    before = signal.getsignal(signal.SIGTERM)
    with distributed.start(run) as world:
        assert first_error(run) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        total = torch.ones(2)
        dist.all_reduce(total)
        found = (
            world.rank,
            world.size,
            world.any_true(False),
            world.gather(3),
            total.tolist(),
            world.stop_signalled,
        )
    assert signal.getsignal(signal.SIGTERM) == before
    assert not dist.is_initialized()
    return found


def test_one_process_needs_no_launcher(tmp_path):
    (found,) = nursery(__name__).start(lone_rank, 1, (tmp_path,)).results(60)
    assert found == (0, 1, False, [3], [1.0, 1.0], True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2"}, "RANK = 2 does not fit WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is not a number"),
        ({"MASTER_PORT": ""}, "MASTER_PORT not set"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, variables, message):
    for name, value in (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"} | variables
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), distributed.start():
        pass
