"""The DeepSpeed engine: every layout trains the same model and loads checkpoints of all others.

Two sets of processes, of one rank and of two, train and save. Two more load each other's
checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.total import checkpoint_size
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.deepspeed import export_diffusion, read_deepspeed
from landiff.training.diffusion import zero
from landiff.training.diffusion.engine import build_engine
from landiff.training.diffusion.model import build_phase_model, load_tokenizer
from landiff.training.diffusion.step import Objective
from landiff.training.optim import adamw, clip_gradients, rate_of_step, set_rate_and_decay
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo
from tests.training.toy import assert_measured

STAGES = (1, 2, 3)
PHASES = ("main", "control")
BEFORE, AFTER = 2, 2  # steps, around the save

# float32 sums in another order (ranks, buckets, micro-batches), through four AdamW steps; losses
# are about 2
CLOSE = {"rel": 1e-5}
# bfloat16 has 8 bits; what accumulates differs in the last one
CLOSE_BF16 = {"rel": 5e-3}


def go(engine, world, first, steps):
    """[(loss, gradient norm)] of some steps."""
    found = []
    for step in range(first, first + steps):
        result = engine.train_step(batch(engine.config, step, world))
        assert_measured(result)
        found.append((float(result.loss), float(result.grad_norm)))
    return found


CURRICULUM_STEPS = 5


def curriculum(folder, stage):
    """2, 2, 6 and 4 micro-batches of a single rank: each number begins within the one before."""
    ramp = {"start": 4, "increment": 8, "steps": 2}
    phase = {
        "from_step": 3,
        "data": {"global_batch_size": 4, "micro_batch_size": 1},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "text_dropout": 0.5,
        "prefix": {"probability": 1.0},
    }
    decay = {"from_step": 1, "optim": {"weight_decay": 20.0, "clip_grad": 0.01}}
    return config(
        folder,
        zero__stage=stage,
        data__global_batch_size=12,
        data__ramp=json.dumps(ramp),
        phases=json.dumps([decay, phase]),
    )


def weights(engine):
    """fp32 weights by name. Collective."""
    return {name: zero.read_full(parameter) for name, parameter in engine.module.named_parameters()}


def frozen(engine):
    return {
        name: zero.read_full(p)
        for name, p in engine.module.named_parameters()
        if not p.requires_grad
    }


def plain_torch(settings, steps):
    """The same training without DeepSpeed: [(loss, gradient norm)]."""
    model = build_phase_model(settings)
    objective = Objective(
        settings, torch.device("cpu"), load_tokenizer(settings, torch.device("cpu"))
    )
    optimizer = adamw(model.named_parameters(), settings.optim)
    found = []
    for step in range(steps):
        samples = list(batch(settings, step).samples)
        optim = settings.at(step).optim
        set_rate_and_decay(optimizer, rate_of_step(settings, step), optim.weight_decay)
        optimizer.zero_grad()
        inputs = objective.at(batch(settings, step)).inputs(samples)
        loss = objective.loss(model, inputs).loss
        loss.backward()
        norm = clip_gradients(model.parameters(), optim.clip_grad)
        optimizer.step()
        found.append((float(loss), float(norm)))
    return found


def checkpoint(folder: Path, phase: str, stage: int, size: int, precision: str = "fp32") -> Path:
    return folder / f"{phase}-{stage}-{size}-{precision}"


def save(engine, world, folder):
    if world.rank == 0:
        folder.mkdir()
    world.barrier()
    saving.save(engine, folder)
    world.barrier()


def tensor_bytes(files):
    """Bytes of tensors in files that change from checkpoint to checkpoint, and in the others."""
    found = {False: 0, True: 0}
    for file in files:
        for part in file.parts:
            found[file.constant] += part.numel() if isinstance(part, torch.Tensor) else 0
    return found


def train_and_save(world, folder):
    """Every phase and stage: steps, save, steps. -> what the tests compare."""
    results = {}
    generator_state = torch.get_rng_state()
    for phase in PHASES:
        for stage in STAGES:
            engine = build_engine(config(folder, phase, zero__stage=stage), world)
            still = frozen(engine)
            curve = go(engine, world, 0, BEFORE)
            save(engine, world, checkpoint(folder, phase, stage, world.size))
            saved = weights(engine)
            curve += go(engine, world, BEFORE, AFTER)
            results[phase, stage] = {
                "curve": curve,
                "saved": saved,
                "layout": engine.layout,
                "still": still,
                "still_after": frozen(engine),
                "bytes": tensor_bytes(engine.state_files()),
            }
    settings = config(folder, "control", zero__stage=2, data__micro_batch_size=1)
    results["micro 1"] = go(build_engine(settings, world), world, 0, BEFORE + AFTER)
    for stage in STAGES:
        engine = build_engine(curriculum(folder, stage), world)
        results["phases", stage] = go(engine, world, 0, CURRICULUM_STEPS)
    for stage in STAGES:
        engine = build_engine(config(folder, "control", zero__stage=stage, precision="bf16"), world)
        curve = go(engine, world, 0, BEFORE)
        save(engine, world, checkpoint(folder, "control", stage, world.size, "bf16"))
        results["bf16", stage] = curve + go(engine, world, BEFORE, AFTER)
    for phase, stage in (("main", 2), ("control", 3)):
        engine = build_engine(
            config(folder, phase, zero__stage=stage, preview_codec__kind="dct", preview_steps=2),
            world,
        )
        before = engine.preview([])
        step = engine.train_step(batch(engine.config, 0, world))
        results["after prefix", phase] = {tag: float(v) for tag, v in step.metrics.items()}
        panels = {}
        for preview in engine.preview([]):  # one on rank 0, none on others
            for title, video in preview.panels.items():
                panels[title] = (video.dtype, tuple(video.shape))
        results["preview", phase] = (before, panels)
    results["generator left alone"] = torch.equal(generator_state, torch.get_rng_state())
    results["plain"] = None
    if world.size == 1:
        results["plain phases"] = plain_torch(curriculum(folder, 1), CURRICULUM_STEPS)
        results["plain"] = {
            phase: plain_torch(config(folder, phase), BEFORE + AFTER) for phase in PHASES
        }
    return results


def resume(world, folder, jobs):
    """Load checkpoints in engines of another seed, and go on."""
    results = {}
    for job in jobs:
        phase, stage, size, precision, own = job
        engine = build_engine(
            config(folder, phase, zero__stage=own, precision=precision, loop__seed=4), world
        )
        engine.load(checkpoint(folder, phase, stage, size, precision))
        engine.objective.config = engine.config = config(
            folder, phase, zero__stage=own, precision=precision
        )
        held = weights(engine) if precision == "fp32" else None
        results[job] = {"held": held, "curve": go(engine, world, BEFORE, AFTER)}
    return results


def same_layout(size):
    """(phase, stage, size, precision, stage to load in)"""
    return [("control", stage, size, "fp32", stage) for stage in STAGES] + [
        ("control", 2, size, "bf16", 2)
    ]


def other_layout(size):
    """Two ranks' checkpoints of ZeRO-2 at one rank in ZeRO-1 and 3, and the other way."""
    moves = [(2, 1), (2, 3)] if size == 1 else [(1, 2), (3, 2)]
    return [("control", stage, 3 - size, "fp32", own) for stage, own in moves] + [
        ("control", 2, 3 - size, "bf16", 3)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    make_zoo(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """By world size, rank 0's results."""
    return {size: run_distributed(train_and_save, size, folder)[0] for size in (1, 2)}


@pytest.fixture(scope="module")
def resumed(folder, trained):
    return {
        size: run_distributed(resume, size, folder, same_layout(size) + other_layout(size))[0]
        for size in (1, 2)
    }


def assert_close(found, expected, tolerance=CLOSE):
    for (loss, norm), (other_loss, other_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other_loss, **tolerance)
        assert norm == pytest.approx(other_norm, **{"rel": tolerance["rel"] * 10})


@pytest.mark.parametrize("phase", PHASES)
def test_all_stages_and_world_sizes_follow_a_plain_torch_step(trained, phase):
    expected = trained[1]["plain"][phase]
    assert len({loss for loss, _ in expected}) == BEFORE + AFTER
    for size in (1, 2):
        for stage in STAGES:
            assert_close(trained[size][phase, stage]["curve"], expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_grows_and_a_new_phase_follow_plain_torch_steps(trained, stage):
    for size in (1, 2):
        assert_close(trained[size]["phases", stage], trained[1]["plain phases"])


def test_micro_batches_of_one_equal_larger_ones(trained):
    for size in (1, 2):
        assert_close(trained[size]["micro 1"], trained[size]["control", 2]["curve"])


def test_frozen_parameters_stay_bit_identical(trained):
    for size in (1, 2):
        for stage in STAGES:
            result = trained[size]["control", stage]
            assert any(name.startswith("transformer.") for name in result["still"])
            for name, tensor in result["still"].items():
                assert torch.equal(tensor, result["still_after"][name]), name


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_have_the_size_that_is_planned(trained, folder, phase, stage):
    settings = config(folder, phase, zero__stage=stage)
    size = checkpoint_size(settings, make_plan(settings, 1))
    found = trained[1][phase, stage]["bytes"]
    # Step counts, and padding of flat vectors to a multiple of some elements.
    assert found[False] == pytest.approx(size.own, rel=0.01)
    assert found[True] == pytest.approx(size.shared, rel=0.01)
    assert (size.shared > 0) == (phase == "control")


def test_the_loss_after_a_prefix_is_that_of_the_global_batch(trained):
    for phase in PHASES:
        expected = trained[1]["after prefix", phase]
        assert set(expected) == {"train/loss_after_prefix_1", "train/loss_after_prefix_2"}
        assert trained[2]["after prefix", phase] == pytest.approx(expected, **CLOSE)


def test_training_leaves_the_global_generator_alone(trained):
    assert trained[1]["generator left alone"] and trained[2]["generator left alone"]


def test_previews_show_the_clip_and_what_the_model_makes_of_it(trained):
    titles = ["codec round trip", "with noise, t = 500", "one-step estimate", "sample from noise"]
    for size in (1, 2):
        for phase in PHASES:
            before, after = trained[size]["preview", phase]
            assert before == []
            assert list(after) == titles
            assert set(after.values()) == {(torch.uint8, (9, 160, 160, 3))}


def test_bf16_follows_fp32(trained):
    for size in (1, 2):
        for stage in STAGES:
            assert_close(trained[size]["bf16", stage], trained[1]["bf16", 1], CLOSE_BF16)
            for (loss, _), (exact, _) in zip(
                trained[size]["bf16", stage], trained[1]["control", 1]["curve"], strict=True
            ):
                assert loss == pytest.approx(exact, rel=2e-2)


def curve(trained, phase, stage, size, precision):
    if precision == "bf16":
        return trained[size]["bf16", stage]
    return trained[size][phase, stage]["curve"]


def test_resume_on_the_same_layout_is_bit_equal(trained, resumed):
    for size in (1, 2):
        for job in same_layout(size):
            assert resumed[size][job]["curve"] == curve(trained, *job[:4])[BEFORE:], job


def test_a_checkpoint_goes_on_at_another_world_size_and_stage(trained, resumed):
    for size in (1, 2):
        for job in other_layout(size):
            phase, stage, source, precision, _ = job
            result = resumed[size][job]
            if precision == "fp32":
                for name, tensor in trained[source][phase, stage]["saved"].items():
                    assert torch.equal(result["held"][name], tensor), (
                        name
                    )  # frozen ones too, in an engine of another seed
            assert_close(
                result["curve"],
                curve(trained, *job[:4])[BEFORE:],
                CLOSE_BF16 if precision == "bf16" else CLOSE,
            )


def test_moments_and_step_count_of_all_layouts_agree(folder, trained):
    reference = read_deepspeed(checkpoint(folder, "control", 1, 1) / "zero")
    assert reference.optimizer_steps == BEFORE
    for stage in STAGES:
        for size in (1, 2):
            state = read_deepspeed(checkpoint(folder, "control", stage, size) / "zero")
            assert (state.zero_stage, state.world_size, state.optimizer_steps) == (
                stage,
                size,
                BEFORE,
            )
            assert state.trainable == reference.trainable
            for moment, tensors in reference.moments.items():
                for name, tensor in tensors.items():
                    # gradients of about 1e-2 summed in another order
                    torch.testing.assert_close(
                        state.moments[moment][name], tensor, rtol=1e-3, atol=1e-6
                    )


def test_export_equals_the_live_weights_and_loads(folder, trained):
    for phase, kind in (("main", "transformer"), ("control", "diffusion")):
        for stage in STAGES:
            for size in (1, 2):
                found, settings, tensors = export_diffusion(checkpoint(folder, phase, stage, size))
                assert found == kind
                live = trained[size][phase, stage]["saved"]
                assert set(live) == set(tensors)
                for name, tensor in tensors.items():
                    assert tensor.dtype == torch.float32 and torch.equal(tensor, live[name]), name
                registry.build_module(kind, settings).load_state_dict(tensors, strict=True)
