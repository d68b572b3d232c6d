"""Packing while the model computes, selective recompute and fused accumulation of gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core.tensor_parallel.layers as core_layers
import pytest
from torch import Tensor

from landiff.configs import ConfigError
from landiff.training.distributed import World
from landiff.training.lm import engine as engine_module
from landiff.training.lm import layers
from landiff.training.lm.engine import MegatronEngine
from landiff.training.replace import replaced
from tests.distributed import run_distributed
from tests.training.lm.samples import tiny_batch, tiny_config

STEPS = 3


def events_of_step(_: World, folder: Path) -> list[str]:
    """What happens in a step of four rows, in order."""
    config = tiny_config(folder, data={"global_batch_size": 4, "micro_batch_size": 1})
    engine = MegatronEngine(config)
    events: list[str] = []
    pack = engine_module.pack
    engine.model.register_forward_hook(lambda *_: events.append("forward"))

    def noted(*arguments: Any, **named: Any) -> Any:
        events.append("pack")
        return pack(*arguments, **named)

    with replaced(engine_module, "pack", noted):
        engine.train_step(tiny_batch(config, 0))
    engine.close()
    return events


def test_each_row_is_packed_once_and_after_the_device_has_the_row_before(tmp_path):
    [events] = run_distributed(events_of_step, 1, tmp_path)
    assert events == ["pack", "forward"] * 4


class Kernels:
    """apex's kernel in plain torch."""

    calls = 0

    @classmethod
    def wgrad_gemm_accum_fp32(cls, inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        cls.calls += 1
        total += (gradient.t() @ inputs).float()


def selective_runs(_: World, folder: Path) -> list[list[tuple[float, float]]]:
    """Losses and gradient norms with and without `selective_recompute`."""
    found = []
    for selective in (False, True):
        config = tiny_config(folder, precision="bf16", selective_recompute=selective)
        engine = MegatronEngine(config)
        numbers = []
        for step in range(STEPS):
            result = engine.train_step(tiny_batch(config, step))
            numbers.append((float(result.loss), float(result.grad_norm)))
        found.append(numbers)
        engine.close()
    return found


def test_selective_recompute_changes_no_bit(tmp_path):
    [(without, selective)] = run_distributed(selective_runs, 1, tmp_path)
    assert selective == without


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"recompute": True}, "choose one"),
        ({"compile_blocks": True}, "recomputes elementwise operations already"),
        ({"layers": "te"}, "use layers = local"),
        ({"parallel": {"tensor": 2}}, "recompute = true instead"),
    ],
)
def test_what_selective_recompute_does_not_go_with_is_refused(tmp_path, changes, text):
    with pytest.raises(ConfigError, match=text):
        tiny_config(tmp_path, selective_recompute=True, **changes)


def losses_of_run(_: World, folder: Path, changes: dict[str, Any], fused: bool) -> Any:
    """Losses and gradient norms, and how often the kernel was called."""
    core_layers._grad_accum_fusion_available = fused
    if fused:
        core_layers.fused_weight_gradient_mlp_cuda = Kernels
    kernel = "torch" if fused else "no_such_module"
    config = tiny_config(folder, **changes)
    with replaced(layers, "ACCUMULATING_KERNEL", kernel):
        engine = MegatronEngine(config)
    numbers = []
    for step in range(STEPS):
        result = engine.train_step(tiny_batch(config, step))
        numbers.append((float(result.loss), float(result.grad_norm)))
    engine.close()
    return numbers, Kernels.calls


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 1),
        ({"precision": "bf16", "recompute": True}, 1),
        ({"parallel": {"tensor": 2, "sequence": True}}, 2),
    ],
)
def test_gradients_accumulated_in_the_kernel_of_apex_train_the_same(tmp_path, changes, ranks):
    plain, none = run_distributed(losses_of_run, ranks, tmp_path, changes, False)[0]
    fused, calls = run_distributed(losses_of_run, ranks, tmp_path, changes, True)[0]
    # Four matrices in each of two layers, and the output layer, for each of two rows.
    assert none == 0 and calls == STEPS * 2 * (2 * 4 + 1)
    for found, expected in zip(fused, plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-5 if "precision" not in changes else 2e-2)
