"""The diffusion trainer with `fp8`: losses, phases, checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.configs import ConfigError
from landiff.model_zoo.convert.formats.deepspeed import SHARDS, read_deepspeed
from landiff.training.diffusion.checks import check
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import DeepSpeedEngine, build_engine
from landiff.training.diffusion.model import build_phase_model, load_tokenizer
from landiff.training.diffusion.step import Objective
from tests.distributed import run_distributed, run_on_gpus
from tests.quantize_package import add_torchao, assert_missing_torchao_is_named
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

STEPS = 6
BEFORE = 4  # steps before a checkpoint
PHASES = ("main", "control")


def config_of(folder: Path, phase: str = "main", **changes: Any) -> DiffusionTrainConfig:
    values = {"fp8": True, "precision": "bf16", "ema__decay": 0.5, "zero__stage": 2}
    return config(folder, phase, **values | changes)


def go(engine: DeepSpeedEngine, first: int = 0, end: int = STEPS) -> list[tuple[float, float]]:
    """[(loss, gradient norm)] of some steps, with all samples on each rank."""
    found = []
    for step in range(first, end):
        result = engine.train_step(batch(engine.config, step))
        found.append((float(result.loss), float(result.grad_norm)))
    return found


def float8_layers(engine: DeepSpeedEngine) -> set[str]:
    found = set()
    for name, module in engine.module.named_modules():
        if type(module).__module__.startswith("torchao."):
            found.add(name)
    return found


def described(engine: DeepSpeedEngine) -> dict[str, tuple]:
    """Shapes and dtypes of weights, master weights and averages, by name."""
    return {name: (tuple(x.shape), x.dtype) for name, x in engine.local_weights()}


def one_process(world: Any, folder: Path) -> dict[str, Any]:
    add_torchao()
    found: dict[str, Any] = {}
    for phase in PHASES:
        for fp8 in (True, False):
            engine = build_engine(config_of(folder, phase, fp8=fp8), world)
            frozen = {n: p.clone() for n, p in engine.module.named_parameters() if not trained(p)}
            found[f"described {phase} {fp8}"] = described(engine)
            found[f"layers {phase} {fp8}"] = float8_layers(engine)
            saving.save(engine, folder / f"first {phase} {fp8}")
            curve = go(engine, 0, BEFORE)
            saving.save(engine, folder / f"later {phase} {fp8}")
            found[f"{phase} {fp8}"] = curve + go(engine, BEFORE)
            after = dict(engine.module.named_parameters())
            found[f"frozen {phase}"] = all(torch.equal(after[n], frozen[n]) for n in frozen)
            found[f"number frozen {phase}"] = len(frozen)
    for fp8 in (True, False):
        engine = build_engine(config_of(folder, fp8=fp8), world)
        engine.load(folder / "later main True")
        found[f"resumed {fp8}"] = go(engine, BEFORE)
    for name, changes in {"recompute": {"recompute": True}, "stage 1": {"zero__stage": 1}}.items():
        found[name] = go(build_engine(config_of(folder, "control", **changes), world))
    found["gradients"] = {
        "fp8": gradients(config_of(folder, "control")),
        "fp32": gradients(config_of(folder, "control", precision="fp32", fp8=False)),
        "bf16": gradients(config_of(folder, "control", fp8=False)),
    }
    return found


def trained(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


def gradients(settings: DiffusionTrainConfig) -> dict[str, torch.Tensor]:
    """Gradients of one batch, by name, without DeepSpeed."""
    model = build_phase_model(settings)
    with torch.no_grad():  # projections that are 0 would leave the control branch without gradients
        for projection in model.control.projections:
            projection.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if settings.precision == "bf16":
        model.bfloat16()
    device = torch.device("cpu")
    objective = Objective(settings, device, load_tokenizer(settings, device))
    objective.loss(model, objective.inputs(list(batch(settings, 0).samples))).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def two_processes(world: Any, folder: Path) -> list[tuple[float, float]]:
    add_torchao()
    return go(build_engine(config_of(folder, sequence_parallel=2), world))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8")
    make_zoo(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return run_distributed(one_process, 1, folder, timeout_s=400)[0]


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Any]:
    return run_distributed(two_processes, 2, folder)


def losses(curve: list[tuple[float, float]]) -> list[float]:
    return [loss for loss, _ in curve]


def norms(curve: list[tuple[float, float]]) -> list[float]:
    return [norm for _, norm in curve]


def layers_of(prefix: str, count: int) -> set[str]:
    found = set()
    for block in range(count):
        for name in ("qkv", "out", "mlp_in", "mlp_out"):
            found.add(f"{prefix}blocks.{block}.{name}")
    return found


def test_linear_layers_of_blocks_and_no_others_multiply_in_float8(found):
    assert found["layers main True"] == layers_of("", 2)
    control = layers_of("transformer.", 2) | layers_of("control.", 1)
    assert found["layers control True"] == control
    assert found["layers main False"] == found["layers control False"] == set()


@pytest.mark.parametrize("phase", PHASES)
def test_training_follows_bfloat16(found, phase):
    """At first the blocks contribute little here, so that the losses are close."""
    fp8 = found[f"{phase} True"]
    bf16 = found[f"{phase} False"]
    assert losses(fp8) == pytest.approx(losses(bf16), rel=1e-3)
    assert norms(fp8) == pytest.approx(norms(bf16), rel=1e-2)
    assert fp8 != bf16


def test_gradients_err_as_products_in_float8_do(found):
    """Gradients of a block's matrices err by 5 to 9 %, as one or two products, bfloat16's by 1 %.

    Errors of several products in a row add up as random numbers do. bfloat16 has 5 bits more.
    """
    wanted = found["gradients"]["fp32"]
    names = [
        name for name in wanted if name.startswith("control.blocks.") and wanted[name].ndim > 1
    ]
    assert len(names) == 5
    for kind, low, high in (("bf16", 1e-3, 0.03), ("fp8", 0.03, 0.15)):
        for name in names:
            gradient = found["gradients"][kind][name]
            error = float((gradient - wanted[name]).norm() / wanted[name].norm())
            assert low < error < high, (kind, name, error)


@pytest.mark.parametrize("how", ["recompute", "stage 1"])
def test_scales_are_the_same_however_a_step_is_computed(found, how):
    assert found[how] == found["control True"]


def test_frozen_weights_stay_the_same(found):
    assert found["number frozen control"] > 40 and found["frozen control"]


def test_a_sequence_that_two_ranks_compute_differs_by_rounding(found, ranks):
    """Each scales its own positions."""
    assert ranks[0] == ranks[1]
    assert losses(ranks[0]) == pytest.approx(losses(found["main True"]), rel=1e-3)
    assert ranks[0] != found["main True"]


@pytest.mark.parametrize("phase", PHASES)
def test_checkpoints_are_those_without_fp8(found, folder, phase):
    """Before the first step in every bit, later in all names, shapes and dtypes."""
    assert found[f"described {phase} True"] == found[f"described {phase} False"]
    first = folder / f"first {phase} True"
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) > 2
    for name in names:
        same = folder / f"first {phase} False" / name
        assert (first / name).read_bytes() == same.read_bytes(), name
    entries = []
    for fp8 in (True, False):
        state = read_deepspeed(folder / f"later {phase} {fp8}" / SHARDS)
        weights = {name: (x.shape, x.dtype) for name, x in state.weights.items()}
        moments = {key: set(state.moments[key]) for key in state.moment_places}
        entries.append((state.shapes, weights, moments))
    assert entries[0] == entries[1]


def test_runs_resume_with_and_without_fp8(found):
    """A checkpoint is a start for both: bit for bit with the setting that wrote it."""
    straight = found["main True"][BEFORE:]
    assert found["resumed True"] == straight
    assert losses(found["resumed False"]) == pytest.approx(losses(straight), rel=1e-3)
    assert found["resumed False"] != straight


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"zero__stage": 3}, "fp8 = true does not work with zero.stage = 3.*zero.stage to 1 or 2"),
        ({"init_from": "main", "lora": "{}"}, r"fp8 = true has no adapters \(lora\); set fp8 = f"),
    ],
)
def test_what_float8_layers_do_not_go_with_is_refused_in_the_config(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        config(tmp_path, fp8=True, **changes)


def test_a_missing_torchao_is_named_before_ranks_start(tmp_path):
    assert_missing_torchao_is_named(check, config_of(tmp_path), config_of(tmp_path, fp8=False))


def two_steps(world: Any, folder: Path, fp8: bool) -> list[tuple[float, float]]:
    add_torchao()
    return go(build_engine(config_of(folder, "control", fp8=fp8), world), 0, 2)


@pytest.mark.gpu
def test_a_gpu_trains_as_in_bfloat16(folder):
    assert torch.cuda.is_available()
    fp8, bf16 = (run_on_gpus(two_steps, 1, folder, each)[0] for each in (True, False))
    assert losses(fp8) == pytest.approx(losses(bf16), rel=1e-3)
    assert norms(fp8) == pytest.approx(norms(bf16), rel=1e-2)
    assert fp8 != bf16
