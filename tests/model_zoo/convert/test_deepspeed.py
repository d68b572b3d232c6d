"""The reader of ZeRO checkpoints, on files laid out by hand for three ranks.

That it reads what DeepSpeed itself writes, for every stage, is tested in tests/training/diffusion.
"""

from __future__ import annotations

import collections
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.formats.deepspeed import export_diffusion, read_deepspeed
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition, write_deepspeed
from landiff.model_zoo.convert.formats.zero.state import LazyTensorPlace
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.health import UnhealthyError
from tests.model_zoo.convert.zero_files import (
    BUFFER,
    FROZEN,
    RANKS,
    SHAPES,
    WEIGHTS,
    write,
    write_stage_2,
    write_stage_3,
)


@pytest.mark.parametrize("layout", [write_stage_2, write_stage_3])
def test_tensors_come_back_whole_from_three_ranks(tmp_path, layout):
    state = read_deepspeed(layout(tmp_path))
    assert (state.world_size, state.optimizer_steps, state.trainable) == (
        RANKS,
        5,
        frozenset(WEIGHTS),
    )
    assert state.shapes == {"frozen": FROZEN.shape, "mask": BUFFER.shape, **SHAPES[0]}
    assert torch.equal(state.weights["frozen"], FROZEN) and torch.equal(
        state.weights["mask"], BUFFER
    )
    for name, tensor in WEIGHTS.items():
        assert torch.equal(state.weights[name], tensor)
        assert torch.equal(state.moments["exp_avg"][name], 2 * tensor)
        assert torch.equal(state.moments["exp_avg_sq"][name], 3 * tensor)


def test_classes_of_others_are_refused_by_name(tmp_path):
    write_stage_2(tmp_path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(
        {"param_shapes": SHAPES, "module": {"path": collections.Counter("a")}, "x": Path}, path
    )
    with pytest.raises(
        ConfigError, match=r"mp_rank_00_model_states\.pt is refused: .* pathlib\.Path"
    ):
        read_deepspeed(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "zero_pp_rank_2_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
    ],
)
def test_a_missing_file_is_named(tmp_path, name):
    (write_stage_2(tmp_path) / name).unlink()
    with pytest.raises(
        ConfigError,
        match=r"ranks \[0, 2\] only|written by 3 ranks but holds the optimizer states of 2"
        r"|mp_rank_00_model_states.pt is missing",
    ):
        read_deepspeed(tmp_path)


def test_a_cut_file_is_called_damaged(tmp_path):
    path = write_stage_2(tmp_path) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ConfigError,
        match=r"rank_1_mp_rank_00_optim_states\.pt is damaged|refused: an unreadable pickle",
    ):
        read_deepspeed(tmp_path)


def test_shards_of_two_checkpoints_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"different Adam step counts, \[5, 6\]"):
        read_deepspeed(write_stage_2(tmp_path, steps=(5, 6, 5)))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no ZeRO checkpoint"):
        read_deepspeed(tmp_path)
    with pytest.raises(
        ConfigError, match=r"is not a checkpoint of the diffusion trainer: it has no layout\.json"
    ):
        export_diffusion(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor, pipeline or expert parallelism"),
        ("layer_00-model_states.pt", "tensor, pipeline"),
    ],
)
def test_other_kinds_of_parallelism_are_refused(tmp_path, name, words):
    (write_stage_2(tmp_path) / name).touch()
    with pytest.raises(ConfigError, match=words):
        read_deepspeed(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"ds_config": {"zero_optimization": {"round_robin_gradients": True}}},
            "round_robin_gradients = true",
        ),
        ({"shared_params": {"head": "a.weight"}}, r"ties parameters together \(head\)"),
    ],
)
def test_what_would_be_read_wrong_is_refused(tmp_path, change, words):
    path = write_stage_2(tmp_path) / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path) | change, path)
    with pytest.raises(ConfigError, match=words):
        read_deepspeed(tmp_path)


def test_an_elastic_checkpoint_is_refused(tmp_path):
    write_stage_2(tmp_path)
    write(
        tmp_path,
        0,
        2,
        {
            "base_optimizer_state": [],
            "partition_count": [RANKS],
            "single_partition_of_fp32_groups": [],
        },
        None,
    )
    with pytest.raises(ConfigError, match="elastic_checkpoint = true"):
        read_deepspeed(tmp_path)


def test_a_step_that_is_a_number_stays_one_and_sub_groups_are_as_the_config_has_them(tmp_path):
    """DeepSpeed's own Adam counts in integers; sub_group_size limits the size of vectors."""
    write_stage_2(tmp_path)
    for path in tmp_path.glob("*optim_states.pt"):
        content = torch.load(path, weights_only=False)
        for entry in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            entry["step"] = 5
        torch.save(content, path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(
        torch.load(path) | {"ds_config": {"zero_optimization": {"sub_group_size": 17}}}, path
    )
    write_deepspeed(tmp_path / "out", read_deepspeed(tmp_path), ZeroPartition(3, 2))
    optimizer = torch.load(
        tmp_path / "out" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", weights_only=False
    )["optimizer_state_dict"]
    state = optimizer["optimizer_state_dict"]
    assert [len(vector) for vector in optimizer["fp32_flat_groups"]] == [18, 3] and state[
        "param_groups"
    ][0]["params"] == [0, 1]
    assert [entry["step"] for entry in state["state"].values()] == [5, 5] and type(
        state["state"][0]["step"]
    ) is int


@pytest.mark.parametrize("what", ["weights", "exp_avg_sq"])
def test_a_checkpoint_with_nan_is_not_resharded(tmp_path, what):
    state = read_deepspeed(write_stage_2(tmp_path / "theirs"))
    places = dict(state.places if what == "weights" else state.moment_places[what])
    bad = torch.full(places["b"].shape, float("nan"))
    places["b"] = LazyTensorPlace(LazyTensors.of({"b": bad}), "b")
    if what == "weights":
        state = replace(state, places=places)
    else:
        state = replace(state, moment_places={**state.moment_places, what: places})
    with pytest.raises(UnhealthyError, match="NaN or infinity in b"):
        write_deepspeed(tmp_path / "ours", state, ZeroPartition(1, 2))
