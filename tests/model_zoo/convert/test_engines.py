"""Engines load converted folders in every layout, bit for bit, and what they save is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron import Padded, write_megatron
from landiff.model_zoo.convert.formats.megatron_optimizer import read_state
from landiff.model_zoo.convert.known_formats import (
    Options,
    describe_source,
    open_source,
    source_fingerprint,
    write_target,
)
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import Part
from landiff.training.diffusion.engine import build_engine
from landiff.training.lm import checkpoint
from landiff.training.lm.checkpoint import _layout
from landiff.training.lm.device import megatron_device
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from tests.distributed import run_distributed
from tests.model_zoo.convert.tiny import same
from tests.training import saving
from tests.training.diffusion import tiny as diffusion
from tests.training.diffusion.test_engine import weights as live_weights
from tests.training.lm.samples import tiny_batch, tiny_config

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}],
}


def lm_weights(folder: Path) -> dict[str, Tensor]:
    return dict(InitialWeights(tiny_config(folder).model, 99))


def load_megatron(world: Any, folder: Path) -> list[str]:
    """Load the converted folder with Megatron in every layout; returns the folders saved then."""
    written = []
    for number, parallel in enumerate(LAYOUTS[world.size]):
        engine = MegatronEngine(tiny_config(folder, parallel))
        for source in ("own padding", "other padding"):
            engine.load_weights(InitialWeights(engine.config.model, 7))
            with megatron_device():
                state = {"model": engine.model.sharded_state_dict(metadata=_layout())}
                engine.model.load_state_dict(
                    dist_checkpointing.load(state, str(folder / source))["model"]
                )
            found = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
            engine.load_weights(lm_weights(folder))
            for name, parameter in engine.model.named_parameters():
                assert torch.equal(found[name], parameter), (parallel, source, name)
        out = folder / f"saved-{world.size}-{number}"
        if world.rank == 0:
            out.mkdir()
        dist.barrier()
        saving.save(engine, out)
        engine.close()
        written.append(out.name)
    return written


def test_megatron_loads_a_converted_folder_in_any_layout_and_what_it_saves_exports_equal(tmp_path):
    config = tiny_config(tmp_path)
    expected = lm_weights(tmp_path)
    write_target(
        tmp_path / "other padding",
        "megatron",
        [Part("lm", config.model, LazyTensors.of(expected))],
        {},
    )
    (tmp_path / "own padding").mkdir()
    write_megatron(
        tmp_path / "own padding",
        config.model,
        LazyTensors.of(expected),
        Padded(48, config.model.num_heads),
    )
    saved = (
        run_distributed(load_megatron, 1, tmp_path)[0]
        + run_distributed(load_megatron, 2, tmp_path)[0]
    )
    assert len(saved) == 5
    for name in saved:
        (tmp_path / name / "config.yaml").write_text(
            (tmp_path / "own padding" / "config.yaml").read_text()
        )
        assert same(dict(open_source(tmp_path / name).parts[0].tensors), expected), name


def load_deepspeed(
    world: Any, folder: Path, jobs: list[tuple[str, int]]
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Our engine, of another seed, starts from the converted folder. Then it saves."""
    found = {}
    for phase, stage in jobs:
        engine = build_engine(
            diffusion.config(folder, phase, zero__stage=stage, loop__seed=8), world
        )
        engine.load(folder / phase)
        found[phase, stage] = live_weights(engine)
        out = folder / f"saved-{phase}-{stage}-{world.size}"
        if world.rank == 0:
            out.mkdir()
        world.barrier()
        saving.save(engine, out)
        world.barrier()
    return found


def load_by_deepspeed_alone(world: Any, folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """DeepSpeed's loader of weights: one folder for ZeRO 1 and 2, one per world size for ZeRO 3."""
    found = {}
    for phase in ("main", "control"):
        for stage in (1, 2, 3):
            place, more = (
                (f"{phase}-3-{world.size}", {"load_optimizer_states": False})
                if stage == 3
                else (phase, {})
            )
            engine = build_engine(
                diffusion.config(folder, phase, zero__stage=stage, loop__seed=8), world
            )
            path, _ = engine.zero.load_checkpoint(
                str(folder / place), tag="zero", load_module_only=True, **more
            )
            assert path is not None
            found[phase, stage] = live_weights(engine)
            engine.train_step(
                diffusion.batch(engine.config, 0, world)
            )  # the optimizer has taken the weights too
            moved = live_weights(engine)
            assert all(
                torch.allclose(moved[name], tensor, atol=0.01)
                for name, tensor in found[phase, stage].items()
            )
    return found


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Converted folders of both phases, and the weights in them."""
    folder = tmp_path_factory.mktemp("starts")
    diffusion.make_zoo(folder)
    settings = diffusion.config(folder, "control")
    expected = {}
    for phase, kind, config in (
        ("main", "transformer", settings.model.transformer),
        ("control", "diffusion", settings.model),
    ):
        from landiff.model_zoo import registry

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            expected[phase] = {
                name: t + torch.randn_like(t)
                for name, t in registry.build_module(kind, config).state_dict().items()
            }
        parts = [Part(kind, config, LazyTensors.of(expected[phase]))]
        write_target(folder / phase, "deepspeed", parts, {})
        for size in (1, 2):
            write_target(
                folder / f"{phase}-3-{size}", "deepspeed", parts, {}, layout=ZeroPartition(3, size)
            )
    return folder, expected


@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_starts_from_a_converted_folder_at_any_stage_and_what_it_saves_exports_equal(
    starts, size
):
    folder, expected = starts
    jobs = [("main", 1), ("control", 2), ("control", 3)]
    for rank in run_distributed(load_deepspeed, size, folder, jobs):
        for (phase, _), found in rank.items():
            assert same(found, expected[phase])
    for phase, stage in jobs:
        saved = open_source(folder / f"saved-{phase}-{stage}-{size}")
        assert same(dict(saved.parts[0].tensors), expected[phase])
        write_target(
            folder / f"again-{phase}-{stage}-{size}",
            "release" if phase == "control" else "diffusers",
            saved.parts,
            {},
        )


@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_itself_loads_the_weights(starts, size):
    folder, expected = starts
    for rank in run_distributed(load_by_deepspeed_alone, size, folder):
        for (phase, _), found in rank.items():
            assert same(found, expected[phase])


def test_weights_for_zero_3_come_back_and_serve_our_engine_at_any_stage_and_world_size(
    starts, tmp_path
):
    folder, expected = starts
    for phase in ("main", "control"):
        assert same(dict(open_source(folder / f"{phase}-3-2").parts[0].tensors), expected[phase])
    for dtype in (torch.bfloat16, torch.float16):
        part = open_source(folder / "control").parts[0].cast(dtype)
        write_target(tmp_path / str(dtype), "deepspeed", [part], {}, layout=ZeroPartition(3, 2))
        assert same(
            dict(open_source(tmp_path / str(dtype)).parts[0].tensors),
            {name: t.to(dtype) for name, t in expected["control"].items()},
        )
    for found in run_distributed(load_cut_for_two, 1, folder):
        assert all(same(weights, expected["control"]) for weights in found)


def load_cut_for_two(world: Any, folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for stage in (2, 3):
        engine = build_engine(
            diffusion.config(folder, "control", zero__stage=stage, loop__seed=8), world
        )
        engine.load(folder / "control-3-2")
        found.append(live_weights(engine))
    return found


def save_as_stock_megatron(world: Any, folder: Path) -> None:
    """Train one step and save twice: layers stacked, Megatron's default, and separate, as ours."""
    for distributed in (False, True):
        engine = MegatronEngine(
            tiny_config(
                folder,
                {"tensor": world.size, "distributed_optimizer": distributed},
                precision="bf16",
            )
        )
        engine.train_step(tiny_batch(engine.config, 0))
        for name, layout in (
            ("apart", _layout()),
            ("stacked", {**_layout(), "non_homogeneous_layers": False}),
        ):
            out = folder / f"{name}-{distributed}"
            if world.rank == 0:
                out.mkdir()
            dist.barrier()
            with mock.patch.object(checkpoint, "_layout", lambda layout=layout: layout):
                saving.save(engine, out)
        engine.close()


def test_layers_that_stock_megatron_stacks_come_in_with_their_optimizer(tmp_path):
    run_distributed(save_as_stock_megatron, 2, tmp_path)
    config = tiny_config(tmp_path).model
    options = Options(ModelConfig(lm=config))
    for distributed in (False, True):
        stacked, apart = tmp_path / f"stacked-{distributed}", tmp_path / f"apart-{distributed}"
        assert "decoder.layers.mlp.linear_fc1.weight" in DistReader(stacked).entries
        first, second = read_state(stacked, config), read_state(apart, config)
        assert (
            first.layout == second.layout
            and first.groups == second.groups
            and first.steps == second.steps == 1
        )
        for ones, others in (
            (first.weights, second.weights),
            (first.masters, second.masters),
            *zip(first.moments.values(), second.moments.values(), strict=True),
        ):
            assert same(dict(ones), dict(others))
        text = describe_source(open_source(stacked, options))
        assert (
            "format       megatron" in text
            and "with the optimizer" in text
            and f"fingerprint {source_fingerprint(open_source(apart, options).parts[0])}" in text
        )
        assert same(dict(open_source(stacked, options).parts[0].tensors), dict(first.masters))
