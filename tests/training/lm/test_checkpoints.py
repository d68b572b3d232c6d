"""Checkpoints of every layout hold the last weights, and training resumes bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from landiff.launchers.cli import main
from landiff.model_zoo.convert.formats.megatron import write_megatron_config
from landiff.training.lm.device import megatron_device  # noqa: F401 - imports Megatron once
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import run_distributed
from tests.training.lm.checkpoints import (
    STEPS,
    Options,
    all_of,
    all_shipped,
    assert_equal,
    assert_weights_are_cast_masters,
    assert_whole_and_resumed,
    fresh,
    save,
    save_unsynchronized,
    shipped_config,
    stale_weights,
    tensors_of,
    train,
)
from tests.training.lm.samples import tiny_config

ALL = [
    Options(tensor, pipeline, data, distributed, overlap, bf16)
    for tensor, pipeline, data in itertools.product((1, 2), repeat=3)
    for distributed, overlap, bf16 in itertools.product((False, True), repeat=3)
]


def pairwise() -> list[Options]:
    """Eight combinations with every pair of values of any two options (an orthogonal array)."""
    chosen = []
    for a, b, c in itertools.product((False, True), repeat=3):
        chosen.append(Options(1 + a, 1 + b, 1 + (a ^ b), c, a ^ c, b ^ c))
    return chosen


# and where a missing gather shows most clearly: all three options at once, on two copies of the
# model
QUICK = [*pairwise(), Options(1, 1, 2, True, True, True), Options(1, 1, 2, True, True, False)]
SHIPPED = {"nano/lm": 2, "landiff/lm": 2}  # -> copies of the model


def check(folder: Path, combinations: list[Options], world_size: int) -> None:
    """Run those that need `world_size` ranks, in one set of processes."""
    chosen = [options for options in combinations if options.world_size == world_size]
    ranks = run_distributed(all_of, world_size, folder, chosen, timeout_s=60 + 60 * len(chosen))
    for found in ranks:
        for options, result in zip(chosen, found, strict=True):
            assert_whole_and_resumed(result, folder / str(options))


def test_the_quick_combinations_cover_every_pair_of_values():
    fields = list(Options.__dataclass_fields__)
    for one, other in itertools.combinations(fields, 2):
        pairs = {(getattr(options, one), getattr(options, other)) for options in QUICK}
        assert len(pairs) == 4, (one, other)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_are_the_cast_masters_and_resume_is_bit_equal(tmp_path, world_size):
    check(tmp_path, QUICK, world_size)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_weights_are_the_cast_masters_and_resume_is_bit_equal_in_all_combinations(
    tmp_path, world_size
):
    check(tmp_path, ALL, world_size)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_options_checkpoint_and_resume_bit_for_bit(tmp_path, name):
    parallel = shipped_config(tmp_path, name).parallel
    world_size = SHIPPED[name] * parallel.tensor * parallel.pipeline
    for [found] in run_distributed(all_shipped, world_size, tmp_path, [name]):
        assert_whole_and_resumed(found, tmp_path / name)


# ------------------------------------------ checkpoints with weights that are partly one step old


def heal(world, folder: Path) -> dict[str, tuple[float, float]]:
    """A checkpoint of older versions, loaded with and without overlap: (loss, norm) of a step."""
    found = {}
    for precision in ("fp32", "bf16"):
        overlap = tiny_config(
            folder, {"distributed_optimizer": True, "overlap": True}, precision=precision
        )
        plain = tiny_config(folder, {"distributed_optimizer": True}, precision=precision)
        engine = MegatronEngine(overlap)
        train(engine, 0, STEPS)
        save_unsynchronized(engine, folder / precision / "stale")
        save(engine, folder / precision / "right")
        found[precision, "straight"] = train(engine, STEPS, STEPS + 1)
        engine.close()
        for name, config in (("overlap", overlap), ("no overlap", plain)):
            engine = fresh(config)
            engine.load(folder / precision / "stale")
            save(engine, folder / precision / name)
            found[precision, name] = train(engine, STEPS, STEPS + 1)
            engine.close()
    return found


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("stale")
    return folder, run_distributed(heal, 2, folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stale_weights_are_restored_from_the_masters_on_resume(healed, precision):
    folder, ranks = healed
    right = tensors_of(folder / precision / "right")
    assert len(stale_weights(tensors_of(folder / precision / "stale"))) > 5
    assert_weights_are_cast_masters(right)
    for name in ("overlap", "no overlap"):
        assert_equal(tensors_of(folder / precision / name), right)
        assert [found[precision, name] for found in ranks] == [
            found[precision, "straight"] for found in ranks
        ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_stale_weights_are_restored_by_a_conversion(healed, tmp_path, precision, distributed):
    folder, _ = healed
    stale = folder / precision / "stale"
    if not (stale / "config.yaml").exists():
        write_megatron_config(stale, tiny_config(folder).model)
    words = [
        "--to",
        "megatron",
        "--out",
        str(tmp_path / "next"),
        f"parallel.distributed_optimizer={str(distributed).lower()}",
    ]
    assert main(["convert", str(stale), *words]) == 0
    converted, right = tensors_of(tmp_path / "next"), tensors_of(folder / precision / "right")
    assert_weights_are_cast_masters(converted)
    for key in (key for key in right if not key.startswith("optimizer.")):
        assert torch.equal(converted[key], right[key]), key
