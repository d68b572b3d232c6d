"""Process groups of the language model: few per rank, equal names, and the same training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from landiff.training.lm.device import create_groups
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.samples import steps, tiny_config

DIVIDED = {"distributed_optimizer": True, "overlap": True}
MODEL = {"num_layers": 4}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    4: {
        "tensor 2, pipeline 2": {"tensor": 2, "pipeline": 2},
        "virtual pipeline 2": {"pipeline": 2, "virtual_pipeline": 2} | DIVIDED,
    },
    8: {
        "tensor 2, pipeline 2, sequence": {"tensor": 2, "pipeline": 2, "sequence": True} | DIVIDED,
        "context 2, pipeline 2": {"context": 2, "pipeline": 2} | DIVIDED,
    },
}


class Calls:
    """Counts the calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.count = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        return self.function(*args, **options)


def create(
    folder: Path, rank: int, ranks: int, parallel: dict[str, Any]
) -> tuple[int, dict[str, list[int]], int]:
    """Groups of a rank in a world that sends nothing.

    Returns the number of calls of `new_group`, members by group name, and torch's group counter.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    calls = Calls(dist.new_group)
    dist.new_group = calls
    try:
        create_groups(tiny_config(folder, parallel, model=MODEL))
        members = {}
        for group, name in c10d._world.pg_names.items():
            if group is not dist.group.WORLD:
                members[str(name)] = dist.get_process_group_ranks(group)
        return calls.count, members, c10d._world.group_count
    finally:
        dist.new_group = calls.function
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


PARALLEL = [{}, {"tensor": 2, "pipeline": 4}, {"tensor": 2, "context": 2, "pipeline": 2}]


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_a_rank_creates_as_many_groups_in_a_world_of_1024_as_in_one_of_16(tmp_path, parallel):
    few, _, _ = create(tmp_path, 0, 16, parallel)
    many, members, _ = create(tmp_path, 0, 1024, parallel)
    assert few == many == len(members) < 25
    assert max(len(ranks) for ranks in members.values()) == 1024


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_all_members_have_the_same_name_for_a_group(tmp_path, parallel):
    found: dict[str, list[int]] = {}
    counters = set()
    counted = []
    for rank in range(16):
        _, members, counter = create(tmp_path, rank, 16, parallel)
        counters.add(counter)
        for name, ranks in members.items():
            assert rank in ranks
            assert found.setdefault(name, ranks) == ranks
            counted.append(name)
    assert len(counters) == 1, "groups that are created later would have different names"
    for name, ranks in found.items():
        assert counted.count(name) == len(ranks)


def test_no_communicator_of_all_ranks_is_split_for_a_group(tmp_path, monkeypatch):
    """NCCL splits that of a default group that is bound to a device, which all ranks must call."""
    bound = []
    helper = c10d._new_process_group_helper

    def record(*args: Any, **options: Any) -> Any:
        bound.append((world.bound_device_id, options["device_id"]))
        return helper(*args, **options)

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        device = torch.device("cuda", 0)
        world: Any = dist.group.WORLD
        world.bound_device_id = device
        monkeypatch.setattr(c10d, "_new_process_group_helper", record)
        create_groups(tiny_config(tmp_path, {"tensor": 2}))
        assert set(bound) == {(None, None)}
        assert world.bound_device_id == device
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def train(_: Any, folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """(loss, gradient norm) of two steps by layout, one engine after another."""
    found = {}
    for name, parallel in layouts.items():
        config = tiny_config(folder, parallel, model=MODEL, data={"global_batch_size": 16})
        engine = MegatronEngine(config)
        found[name] = steps(engine, 0, 2)
        engine.close()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    folder = tmp_path_factory.mktemp("groups")
    return run_distributed(train, 1, folder, {"one": {}})[0]["one"]


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_layouts_of_four_and_eight_ranks_train_as_one_process(tmp_path, alone, ranks):
    for found in run_distributed(train, ranks, tmp_path, LAYOUTS[ranks], timeout_s=300):
        for numbers in found.values():
            for one, expected in zip(numbers, alone, strict=True):
                assert one == pytest.approx(expected, abs=1e-5)
