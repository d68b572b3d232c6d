"""Weights before the first step: created one at a time, and equal to those of a module in float32.

The reference builds the whole module in float32 on the CPU, as torch does by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import peft  # noqa: F401 - the same
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.convert.rules import ConversionError
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.training import rng
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import DeepSpeedEngine, build_engine
from landiff.training.diffusion.model import (
    FLOAT8_LAYERS,
    _select_trained,
    build_phase_model,
    load_start,
    load_tokenizer,
    weights_in,
)
from landiff.training.diffusion.step import Objective
from landiff.training.float8 import layers as float8
from tests.distributed import run_distributed
from tests.quantize_package import torchao  # noqa: F401 - a fixture
from tests.training.diffusion.tiny import MODEL, batch, config, make_zoo

CPU = torch.device("cpu")
LORA = {"lora__rank": 4, "lora__alpha": 8, "lora__targets": "[qkv, mlp_in]"}
STARTS: dict[str, dict[str, Any]] = {
    "main": {},
    "main, compiled": {"compile_blocks": True},
    "main from a transformer": {"init_from": "main"},
    "main from a whole model": {"init_from": "whole"},
    "control from a transformer": {"phase": "control"},
    "control, other semantic condition": {
        "phase": "control",
        "model__semantic__upsampler": "linear",
    },
    "control from a whole model": {"phase": "control", "init_from": "whole"},
    "lora": {"init_from": "main", **LORA},
    "lora of phase control": {"phase": "control", "init_from": "whole", **LORA},
}
ENGINES = [  # start, precision, ZeRO stage
    ("main", "bf16", 1),
    ("main", "bf16", 2),
    ("main", "bf16", 3),
    ("main", "fp32", 2),
    ("control from a transformer", "bf16", 2),
    ("control from a transformer", "bf16", 3),
    ("control from a transformer", "fp32", 1),
    ("lora", "bf16", 1),
    ("lora", "bf16", 3),
]


def config_of(folder: Path, start: str, **changes: Any) -> DiffusionTrainConfig:
    return config(folder, **STARTS[start] | changes)


def whole_module(settings: DiffusionTrainConfig) -> DiffusionTransformer | ControlledDiffusion:
    """The module of a phase in float32, created, drawn and loaded as a whole."""
    control = settings.phase == "control"
    model: DiffusionTransformer | ControlledDiffusion
    with rng.seeded(settings.loop.seed, "weights", control):
        if control:
            model = ControlledDiffusion(settings.model)
        else:
            model = DiffusionTransformer(settings.model.transformer)
    if settings.init_from is not None:
        entry = registry.resolve(settings.zoo, settings.init_from)
        weights = entry.load()
        if isinstance(model, DiffusionTransformer) and entry.kind == "diffusion":
            prefix = "transformer."
            weights = {n.removeprefix(prefix): w for n, w in weights.items() if prefix in n[:12]}
        if isinstance(model, ControlledDiffusion) and entry.kind == "transformer":
            model.transformer.load_state_dict(weights)
            model.copy_main_to_control()
        else:
            model.load_state_dict(weights)
    with rng.seeded(settings.loop.seed, "lora", control):
        _select_trained(model, settings)
    if settings.fp8:
        float8.convert(model, lambda name: FLOAT8_LAYERS.fullmatch(name) is not None)
    return model


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A main transformer, a tokenizer, and a whole diffusion model with random weights."""
    folder = tmp_path_factory.mktemp("start")
    make_zoo(folder)
    model = DiffusionConfig.model_validate(MODEL)
    draw = torch.Generator().manual_seed(5)
    state = {}
    for name, tensor in registry.build_module("diffusion", model).state_dict().items():
        state[name] = torch.randn(tensor.shape, generator=draw)
    registry.export(folder / "zoo", "whole", "diffusion", model, state, {})
    return folder


def assert_equal(found: nn.Module, expected: nn.Module, dtype: torch.dtype) -> None:
    theirs = dict(expected.named_parameters())
    ours = dict(found.named_parameters())
    assert list(ours) == list(theirs)
    assert found.state_dict().keys() == expected.state_dict().keys() == ours.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == dtype, name
        assert parameter.requires_grad == theirs[name].requires_grad, name
        assert torch.equal(parameter, theirs[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_weights_are_those_of_a_module_that_is_cast_as_a_whole(zoo, start, dtype):
    settings = config_of(zoo, start)
    state = torch.get_rng_state()
    found = build_phase_model(settings, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert_equal(found, whole_module(settings), dtype)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("start", ["main", "control from a transformer"])
def test_float8_layers_have_the_same_weights(zoo, start):
    settings = config_of(zoo, start, fp8=True, precision="bf16")
    found = build_phase_model(settings, torch.bfloat16)
    expected = whole_module(settings)
    assert_equal(found, expected, torch.bfloat16)
    kinds = [type(module) for module in expected.modules()]
    assert [type(module) for module in found.modules()] == kinds
    assert len({kind.__module__ for kind in kinds if kind.__module__.startswith("torchao")}) == 1


def test_random_numbers_that_depend_on_the_dtype_are_refused():
    with weights_in(torch.bfloat16, CPU), pytest.raises(AssertionError, match="bernoulli_"):
        torch.empty(3).bernoulli_()


def test_weights_of_another_model_are_refused(zoo):
    model = build_phase_model(config_of(zoo, "main", model__transformer__num_layers=3))
    entry = registry.resolve(zoo / "zoo", "main")
    with pytest.raises(ConversionError, match=r"(?s)main@.*missing.*blocks\.\*\.qkv\.weight"):
        load_start(model, entry)


# ------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations have returned, and the most that existed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                entry = (StorageWeakRef(storage), storage.nbytes())
                self.alive[storage._cdata] = entry
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


WIDE: dict[str, Any] = {"model__transformer__hidden_size": 256, "model__transformer__num_layers": 4}


def peak(folder: Path, changes: dict[str, Any], dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Peak of allocated host memory, and size of the module's weights, in bytes."""
    with Allocations() as allocations:
        model = build_phase_model(config(folder, **WIDE | changes), dtype, torch.device(device))
    return allocations.peak, sum(p.numel() * p.itemsize for p in model.parameters())


@pytest.fixture(scope="module")
def wide_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    model = config(folder, **WIDE).model
    state = build_phase_model(config(folder, **WIDE)).state_dict()
    registry.export(folder / "zoo", "main", "transformer", model.transformer, state, {})
    return folder


@pytest.mark.parametrize("init_from", [None, "main"])
def test_no_second_copy_of_the_weights_is_in_host_memory(wide_zoo, init_from):
    """On another device, host memory holds a few weights; on the CPU, all of them once."""
    changes = {} if init_from is None else {"init_from": init_from}
    largest = 4 * 256 * 4 * 256  # of `mlp_in` in float32
    build_phase_model(config(wide_zoo, **WIDE | changes))  # verifies the entry
    host, size = peak(wide_zoo, changes, torch.bfloat16, "cpu")
    assert size > 4 * largest
    assert host < size + 3 * largest
    host, _ = peak(wide_zoo, changes, torch.bfloat16, "meta")
    assert host < 3 * largest


# ------------------------------------------------------------------ with DeepSpeed


def engines(world: Any, folder: Path) -> dict[Any, Any]:
    """The weights of engines before the first step, and one step, from both modules."""
    found = {}
    for start, precision, stage in ENGINES:
        settings = config_of(folder, start, precision=precision, zero__stage=stage)
        objective = Objective(settings, CPU, load_tokenizer(settings, CPU))
        whole = DeepSpeedEngine(settings, world, whole_module(settings), objective)
        pair = []
        for engine in (whole, build_engine(settings, world)):
            weights = {name: weight.detach().clone() for name, weight in engine.local_weights()}
            result = engine.train_step(batch(settings, 0, world))
            pair.append((weights, float(result.loss), float(result.grad_norm)))
        found[start, precision, stage] = pair
    return found


@pytest.fixture(scope="module")
def compared(zoo: Path) -> list[dict[Any, Any]]:
    return run_distributed(engines, 2, zoo, timeout_s=300)


@pytest.mark.parametrize(("start", "precision", "stage"), ENGINES)
def test_engines_start_with_the_same_weights_and_train_the_same(compared, start, precision, stage):
    for rank in compared:
        (before, *numbers), (after, *others) = rank[start, precision, stage]
        assert numbers == others
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype, name
            assert torch.equal(tensor, after[name]), name
