"""Gradients are summed in float32 over micro-batches and ranks, in buckets of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.convert.formats.deepspeed import read_deepspeed
from landiff.training.diffusion import zero
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import build_engine
from landiff.training.diffusion.gradients import FlatGradients
from landiff.training.diffusion.model import build_phase_model, load_tokenizer
from landiff.training.diffusion.step import Objective
from landiff.training.diffusion.zero_settings import deepspeed_config
from landiff.training.distributed import World
from landiff.training.replace import replaced
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

STAGES = (1, 2, 3)
SAMPLES = 64
BETA1 = 0.9
Gradients = dict[str, torch.Tensor]


def settings(folder: Path, stage: int, micro: int) -> DiffusionTrainConfig:
    return config(
        folder,
        "main",
        zero__stage=stage,
        precision="bf16",
        optim__clip_grad=0,
        data__global_batch_size=SAMPLES,
        data__micro_batch_size=micro,
        init_from="main",
    )


def engine_gradients(world: World, folder: Path) -> dict[int, Gradients]:
    """By stage: gradients of the first step, from Adam's first moments (1 - beta1) * g."""
    found = {}
    for stage in STAGES:
        engine = build_engine(settings(folder, stage, 1), world)
        engine.train_step(batch(engine.config, 0, world))
        place = folder / f"{stage}-{world.size}"
        if world.rank == 0:
            place.mkdir()
        world.barrier()
        saving.save(engine, place)
        world.barrier()
        moments = read_deepspeed(place / "zero").moments["exp_avg"]
        found[stage] = {key: tensor.double() / (1 - BETA1) for key, tensor in moments.items()}
    return found


def plain_gradients(
    folder: Path, micro: int, dtype: torch.dtype, linear: Any = functional.linear
) -> Gradients:
    """Gradients without DeepSpeed, in `dtype` at the bfloat16 weights, summed in float64."""
    chosen = settings(folder, 1, micro)
    model = build_phase_model(chosen).to(torch.bfloat16).to(dtype)
    objective = Objective(chosen, torch.device("cpu"), load_tokenizer(chosen, torch.device("cpu")))
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    micro_batches = batch(chosen, 0).micro_batches
    with replaced(functional, "linear", linear):
        for samples in micro_batches:
            model.zero_grad()
            loss = objective.loss(model, objective.inputs(samples)).loss
            (loss / len(micro_batches)).backward()
            for name, parameter in model.named_parameters():
                sums[name] += parameter.grad.double()
    return sums


def relative_error(found: Gradients, expected: Gradients) -> float:
    """|found - expected| / |expected| over all parameters."""
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    return float(
        difference.norm() / torch.cat([tensor.flatten() for tensor in expected.values()]).norm()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    make_zoo(folder)
    return folder


@pytest.fixture(scope="module")
def exact(folder: Path) -> dict[int, Gradients]:
    """By stage, the mean of the micro-batches' bfloat16 gradients.

    ZeRO-3 rounds differently inside linear layers.
    """
    plain = plain_gradients(folder, 1, torch.bfloat16)
    return {1: plain, 2: plain, 3: plain_gradients(folder, 1, torch.bfloat16, zero3_linear_wrap)}


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_the_mean_over_micro_batches_and_ranks(folder, exact, size):
    found = run_distributed(engine_gradients, size, folder)[0]
    big = plain_gradients(folder, SAMPLES, torch.float32)
    for stage in STAGES:
        # float32 rounding; sums in bfloat16 are off by 5e-3 to 8e-3
        assert relative_error(found[stage], exact[stage]) < 2e-7, stage
        # bfloat16 activations alone leave 2e-3; with sums in bfloat16 8e-3
        assert relative_error(found[stage], big) < 4e-3, stage


class Branches(nn.Module):
    """Three layers, of which a forward uses two, so that gradients are missing."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(3, size) for size in (1, 4, 7))

    def forward(self, left_out: int) -> Tensor:
        values = torch.arange(3.0) + left_out
        kept = [layer for number, layer in enumerate(self.layers) if number != left_out]
        return sum(layer(values).square().sum() for layer in kept)


MICRO_BATCHES = 3


def missing_gradients(world: World, folder: Path) -> dict[str, Any]:
    """Gradients and norms of two steps in which each rank leaves out other layers."""
    zero.prepare_deepspeed()
    found: dict[str, Any] = {}
    for stage, overlap, bucket_size in ((1, False, 5), (1, True, 5), (2, True, 5), (2, False, 100)):
        batch_size = MICRO_BATCHES * world.size
        sizes = {"data__global_batch_size": batch_size, "data__micro_batch_size": 1}
        settings = deepspeed_config(config(folder, zero__stage=stage, **sizes), world)
        module = Branches()
        groups = [{"params": parameters} for parameters in weights_and_biases(module)]
        engine = zero.initialize(module, torch.optim.AdamW(groups, lr=0.0), settings, world.device)
        FlatGradients(engine, bucket_size, overlap)
        steps: list[tuple[float, list[Tensor]]] = []

        def record(norm: Tensor, engine: Any = engine, steps: list = steps) -> bool:
            partitions = engine.optimizer.averaged_gradients.values()
            steps.append((float(norm), [gathered(each.flat_partition) for each in partitions]))
            return True

        zero.ask_before_update(engine, record)
        for step in range(2):
            for number in range(MICRO_BATCHES):
                engine.backward(engine((world.rank + step * number) % 3))
                engine.step()
        found[f"ZeRO-{stage}, overlap {overlap}, buckets of {bucket_size}"] = steps
    return found


def weights_and_biases(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [p for p in module.parameters() if p.dim() == 2]
    return matrices, [p for p in module.parameters() if p.dim() == 1]


def gathered(partition: Tensor) -> Tensor:
    """The partitions of all ranks, one after the other. Collective."""
    parts = [torch.empty_like(partition) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, partition)
    return torch.cat(parts)


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_that_a_micro_batch_does_not_have_are_zero(tmp_path, size):
    expected = []
    for step in range(2):
        module = Branches()
        for rank in range(size):
            for number in range(MICRO_BATCHES):
                loss = module((rank + step * number) % 3)
                (loss / MICRO_BATCHES / size).backward()
        vectors = []
        for parameters in weights_and_biases(module):
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            vectors.append(torch.cat([p.grad.flatten() for p in parameters]))
        expected.append((float(torch.cat(vectors).norm()), vectors))
    for found in run_distributed(missing_gradients, size, tmp_path):
        for case, steps in found.items():
            for (norm, vectors), (expected_norm, expected_vectors) in zip(
                steps, expected, strict=True
            ):
                assert norm == pytest.approx(expected_norm, rel=1e-6), case
                for vector, values in zip(vectors, expected_vectors, strict=True):
                    padded = torch.zeros(len(vector))
                    padded[: len(values)] = values
                    torch.testing.assert_close(vector, padded, msg=case)
