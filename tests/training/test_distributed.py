"""Ranks find each other, agree, and say why they died."""


import torch.distributed as dist

from tests.distributed import run_distributed


def agree(world):
    return {
        "any": world.any_says(world.rank == 1),
        "none": world.any_says(False),
        "all": world.all_agree(True),
        "not all": world.all_agree(world.rank == 0),
        "broadcast": world.broadcast({"from": world.rank}),
        "gather": world.gather("x" * (1 + 3 * world.rank)),
        "group": (dist.get_rank(), dist.get_world_size(), dist.get_backend()),
        "world": (world.rank, world.size, str(world.device), world.backend),
    }


def test_ranks_agree_on_flags_and_values():
    for rank, said in enumerate(run_distributed(agree, 2)):
        assert said == {
            "any": True, "none": False, "all": True, "not all": False, "broadcast": {"from": 0},
            "gather": ["x", "xxxx"], "group": (rank, 2, "gloo"), "world": (rank, 2, "cpu", "gloo"),
        }
