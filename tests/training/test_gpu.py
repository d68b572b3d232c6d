"""All trainers on GPUs: precisions, attention kernels, parallel layouts, and waits for the device.

`pytest -m gpu` runs them. Layouts of several ranks need as many GPUs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.data_pipeline.loading.samples import Batch
from landiff.model_zoo import attention
from landiff.model_zoo.attention import BACKENDS, Backend
from landiff.training.diffusion.engine import build_engine
from landiff.training.distributed import World, choose_kernels
from landiff.training.engine import Engine
from landiff.training.guard import Guard
from landiff.training.lm.engine import MegatronEngine
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.distributed import run_distributed, run_on_gpus
from tests.training.diffusion import tiny as diffusion
from tests.training.lm import samples as lm
from tests.training.saving import save
from tests.training.tokenizer import tiny as tokenizer

pytestmark = pytest.mark.gpu

TRAINERS = ("tokenizer", "lm", "main", "control")
PRECISIONS = ("fp32", "bf16")
STEPS = 3
LM_SIZES = {"hidden_size": 64, "num_heads": 4, "ffn_size": 128}  # heads of 16, as kernels need
GLOBAL_BATCH = {"tokenizer": 8, "lm": 4, "main": 4, "control": 4}

Numbers = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def build(
    world: World, trainer: str, folder: Path, changes: dict[str, Any]
) -> tuple[Engine, Callable[[int], Batch]]:
    """An engine and its batches by step. `changes`: of the config, by section."""
    if trainer == "tokenizer":
        loop = {"steps": 60, "log_every": 1, **changes.get("loop", {})}
        data = {"manifest": "unused", "global_batch_size": 8, "micro_batch_size": 8 // world.size}
        data |= changes.get("data", {})
        of_tokenizer = tokenizer.config(folder, **{**changes, "loop": loop, "data": data})
        choose_kernels(of_tokenizer.loop)
        parts = 8 // world.size // of_tokenizer.data.micro_batch_size
        return TokenizerEngine(of_tokenizer, world), lambda step: tokenizer.batch(
            step, world.rank, world.size, parts
        )
    if trainer == "lm":
        loop = {"steps": 5, "seed": 7, **changes.get("loop", {})}
        sizes = LM_SIZES | changes.get("model", {})
        of_lm = lm.tiny_config(folder, **{**changes, "loop": loop, "model": sizes})
        choose_kernels(of_lm.loop)
        engine = MegatronEngine(of_lm, Guard(of_lm.loop, world))
        return engine, lambda step: lm.tiny_batch(of_lm, step, engine.dp_rank, engine.dp_size)
    dotted = {}
    for section, value in changes.items():
        if isinstance(value, dict):
            dotted |= {f"{section}__{key}": inner for key, inner in value.items()}
        else:
            dotted[section] = value
    of_diffusion = diffusion.config(folder, trainer, **dotted)
    choose_kernels(of_diffusion.loop)
    copies = world.size // of_diffusion.sequence_parallel
    reader = World(
        world.rank // of_diffusion.sequence_parallel, copies, 0, world.device, world.backend
    )
    return build_engine(of_diffusion, world), lambda step: diffusion.batch(
        of_diffusion, step, reader
    )


def numbers_of(
    world: World, trainer: str, folder: Path, changes: dict[str, Any]
) -> tuple[Numbers, set[str], str]:
    """Numbers of a few steps, the attention kernels in use, and the type of the device."""
    engine, make_batch = build(world, trainer, folder, changes)
    numbers = []
    for step in range(STEPS):
        result = engine.train_step(make_batch(step))
        numbers.append((float(result.loss), float(result.grad_norm)))
    kernels = {str(kernel) for kernel in attention._CHOICES.made.values()}
    return numbers, kernels, world.device.type


def on_gpus(trainer: str, folder: Path, changes: dict[str, Any], ranks: int = 1) -> Any:
    """`numbers_of` on GPUs. Skips the test without as many."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    found = run_on_gpus(numbers_of, ranks, trainer, folder, changes)[0]
    assert found[2] == "cuda"
    return found


def assert_close(found: Numbers, expected: Numbers, rel: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    diffusion.make_zoo(path)
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_follows_the_cpu(trainer, precision, folder):
    changes = {"precision": precision}
    found, _, _ = on_gpus(trainer, folder, changes)
    expected, _, device = run_distributed(numbers_of, 1, trainer, folder, changes)[0]
    assert device == "cpu"
    # Convolutions round to TF32, which the loss of the control branch shows.
    assert_close(found, expected, 5e-3 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_follows_torchs_own_attention_with_every_kernel(trainer, backend, folder):
    if backend not in attention.find_installed():
        pytest.skip(f"{backend} is not installed")

    def changes(preferred: Backend) -> dict[str, Any]:
        return {"precision": "bf16", "loop": {"attention": preferred}}

    expected, _, _ = on_gpus(trainer, folder, changes("torch"))
    found, kernels, _ = on_gpus(trainer, folder, changes(backend))
    packed = trainer == "lm"  # cuDNN has no packed rows
    assert backend in kernels or (packed and backend == "cudnn"), kernels
    assert_close(found, expected, 3e-2)


@pytest.mark.parametrize(
    "changes",
    [{"compile_blocks": True}, {"recompute": True}],
    ids=["compiled", "recompute"],
)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_options_of_the_blocks_change_rounding_only(trainer, changes, folder):
    expected, _, _ = on_gpus(trainer, folder, {"precision": "bf16"})
    found, _, _ = on_gpus(trainer, folder, {"precision": "bf16", **changes})
    assert_close(found, expected, 3e-2)


@pytest.mark.parametrize("trainer", ["main", "control"])
def test_inputs_of_blocks_on_the_host_change_nothing(trainer, folder):
    changes = {"recompute": True, "loop": {"deterministic": True}}
    expected, _, _ = on_gpus(trainer, folder, changes)
    found, _, _ = on_gpus(trainer, folder, {**changes, "offload_activations": True})
    assert found == expected


LAYOUTS: list[tuple[str, dict[str, Any], int]] = [
    ("tokenizer", {}, 2),
    ("lm", {"parallel": {}}, 2),
    ("lm", {"parallel": {"distributed_optimizer": True, "overlap": True}}, 2),
    ("lm", {"parallel": {"tensor": 2}}, 2),
    ("lm", {"parallel": {"tensor": 2, "sequence": True}}, 2),
    ("lm", {"parallel": {"pipeline": 2}}, 2),
    ("lm", {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "model": {"num_layers": 4}}, 2),
    ("lm", {"parallel": {"context": 2}}, 2),
    ("lm", {"parallel": {"tensor": 2, "pipeline": 2}}, 4),
    ("main", {"zero": {"stage": 1}}, 2),
    ("main", {"zero": {"stage": 2, "overlap_communication": True}}, 2),
    ("main", {"zero": {"stage": 3}}, 2),
    ("main", {"zero": {"stage": 3, "hpz_partition_size": 2}}, 4),
    ("main", {"sequence_parallel": 2}, 2),
    ("control", {"zero": {"stage": 1, "overlap_communication": True}}, 2),
    ("control", {"zero": {"stage": 3}}, 2),
    ("control", {"sequence_parallel": 2}, 2),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("trainer", "changes", "ranks"), LAYOUTS)
def test_a_layout_follows_one_gpu(trainer, changes, ranks, precision, folder):
    changes = {**changes, "precision": precision}
    # One clip for each forward pass, so that batches divide over all layouts.
    data = {"micro_batch_size": 1}
    alone = {"precision": precision, "data": data}
    if "model" in changes:
        alone["model"] = changes["model"]
    expected, _, _ = on_gpus(trainer, folder, alone)
    found, _, _ = on_gpus(trainer, folder, {**changes, "data": data}, ranks)
    assert_close(found, expected, 5e-3 if precision == "fp32" else 5e-2)


def resumed_numbers(
    world: World, trainer: str, folder: Path, changes: dict[str, Any], stop: int
) -> Numbers:
    """Numbers of the steps from `stop` on, after a restart from a checkpoint there."""
    engine, make_batch = build(world, trainer, folder, changes)
    for step in range(stop):
        engine.train_step(make_batch(step))
    checkpoint = folder / f"checkpoint_{trainer}"
    save(engine, checkpoint)
    if isinstance(engine, MegatronEngine):
        engine.close()
    engine, make_batch = build(world, trainer, folder, changes)
    engine.load(checkpoint)
    numbers = []
    for step in range(stop, STEPS):
        result = engine.train_step(make_batch(step))
        numbers.append((float(result.loss), float(result.grad_norm)))
    return numbers


@pytest.mark.parametrize("trainer", TRAINERS)
def test_deterministic_runs_are_bit_equal_also_after_a_restart(trainer, folder):
    changes = {"precision": "bf16", "loop": {"deterministic": True}}
    first, _, _ = on_gpus(trainer, folder, changes)
    again, _, _ = on_gpus(trainer, folder, changes)
    assert again == first
    [resumed] = run_on_gpus(resumed_numbers, 1, trainer, folder, changes, 1)
    assert resumed == first[1:]


def waits_of_step(world: World, trainer: str, folder: Path, micro_batch_size: int) -> int:
    """How often the host waits for the device in a step after the first ones."""
    changes = {"precision": "bf16", "data": {"micro_batch_size": micro_batch_size}}
    engine, make_batch = build(world, trainer, folder, changes)
    for step in range(2):
        engine.train_step(make_batch(step))
    batch = make_batch(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        engine.train_step(batch)
    torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]
    return len(waits)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_host_waits_equally_often_for_one_and_for_many_micro_batches(trainer, folder):
    """Loss and norm of a step are read; between its micro-batches nothing is."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    waits = []
    for parts in (1, 4):
        size = GLOBAL_BATCH[trainer] // parts
        waits += run_on_gpus(waits_of_step, 1, trainer, folder, size)
    assert waits[0] == waits[1] <= 12
