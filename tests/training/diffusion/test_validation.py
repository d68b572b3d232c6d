"""Validation of the diffusion trainer: equal in every layout, and training does not notice it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch

from landiff.model_zoo.frozen.base import NO_VARIANCE
from landiff.training.diffusion.engine import build_engine
from landiff.training.diffusion.model import build_phase_model, load_tokenizer
from landiff.training.diffusion.step import Objective
from landiff.training.diffusion.validation import clip_sums, quantile_timesteps, summarize_sums
from tests.distributed import run_distributed
from tests.training.diffusion.tiny import batch, config, make_zoo, sample
from tests.training.toy import held_out_batches, validation_metrics

CPU = torch.device("cpu")
CLIPS = [sample(1000 + number, 4) for number in range(3)]
# float32 forward passes of other batch sizes round differently; losses are about 2, and gains are
# their differences
CLOSE = {"rel": 1e-5, "abs": 1e-6}
# phase, micro-batch of validation, changes of the config
RANKS = {
    1: ("main", 2, {"zero__stage": 1}),
    2: (
        "control",
        2,
        {"zero__stage": 3, "zero__parameter_persistence_threshold": 500, "recompute": "true"},
    ),
    4: ("control", 1, {"zero__stage": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    make_zoo(folder)
    return folder


def reference(folder, phase, micro_batch_size=3):
    """Metrics without an engine, in one process. The model is that of step 0."""
    settings = config(folder, phase)
    model = build_phase_model(settings).eval()
    objective = Objective(settings, CPU, load_tokenizer(settings, CPU))
    sums = {}
    with torch.no_grad():
        for part in held_out_batches(CLIPS, 0, 1, micro_batch_size):
            for name, value in clip_sums(model, objective, part, 1).items():
                sums[name] = sums.get(name, 0) + value
    return summarize_sums(sums, settings)


@pytest.mark.parametrize("phase", ["main", "control"])
def test_losses_are_those_of_the_objective_at_nine_timesteps(folder, phase):
    settings = config(folder, phase)
    metrics = reference(folder, phase)
    timesteps = quantile_timesteps(1000)
    assert timesteps == [100, 200, 300, 400, 500, 600, 700, 800, 900]
    names = {"loss", "loss_prefix", "prefix_gain", "loss_other_caption", "caption_gain"}
    names |= {f"loss_t{timestep}" for timestep in timesteps}
    names |= {f"loss_frame_{frame:02d}" for frame in range(3)}
    names |= {"loss_after_prefix_1", "loss_after_prefix_2"}
    if phase == "control":
        names |= {"loss_other_tokens", "tokens_gain"}
    assert set(metrics) == names
    by_timestep = [metrics[f"loss_t{timestep}"] for timestep in timesteps]
    assert metrics["loss"] == pytest.approx(sum(by_timestep) / 9)
    assert len(set(by_timestep)) == 9
    by_frame = [metrics[f"loss_frame_{frame:02d}"] for frame in range(3)]
    assert metrics["loss"] == pytest.approx(sum(by_frame) / 3)
    # A model that has learned nothing does not use its text.
    assert metrics["caption_gain"] == pytest.approx(metrics["loss_other_caption"] - metrics["loss"])
    if phase == "control":
        assert metrics["tokens_gain"] == 0 and settings.model.control_layers  # zero projections
        assert metrics["caption_gain"] != 0  # the main transformer of the zoo is a trained one


def test_it_does_not_depend_on_the_seed_of_the_run_or_on_the_micro_batch(folder):
    settings = config(folder, "control")
    expected = reference(folder, "control")
    for size in (1, 2):
        assert reference(folder, "control", size) == pytest.approx(expected, **CLOSE)
    model = build_phase_model(settings).eval()
    other = config(folder, "control", loop__seed=9, text_dropout=1.0, prefix__probability=1.0)
    objective = Objective(other, CPU, load_tokenizer(other, CPU))
    (part,) = held_out_batches(CLIPS, 0, 1, 3)
    with torch.no_grad():
        found = summarize_sums(clip_sums(model, objective, part, 1), settings)
    assert found == expected


def test_latents_with_a_variance_are_drawn_in_the_same_way_every_time(folder):
    settings = config(folder)
    objective = Objective(settings, CPU)
    model = build_phase_model(settings).eval()

    def loss(log_variance):
        clips = []
        for clip in CLIPS:
            mean = clip.tensors["latents"]
            moments = torch.cat([mean, torch.full_like(mean, log_variance)], dim=1)
            clips.append(replace(clip, tensors=clip.tensors | {"latents": moments}))
        (part,) = held_out_batches(clips, 0, 1, 3)
        with torch.no_grad():
            return summarize_sums(clip_sums(model, objective, part, 1), settings)["loss"]

    assert loss(-2.0) == loss(-2.0)
    assert loss(-2.0) != loss(NO_VARIANCE)


def steps_with_validation(world, folder, phase, micro_batch_size, changes):
    """Metrics before the first step, and training with and without validation."""
    found = {}
    for validating in (True, False):
        settings = config(folder, phase, data__micro_batch_size=1, **changes)
        engine = build_engine(settings, world)
        if validating:
            part = (world.rank, world.size, micro_batch_size)
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
                found["metrics"] = validation_metrics(engine, CLIPS, *part)
            assert kept == []  # no activations
        curve = []
        for step in range(2):
            result = engine.train_step(batch(settings, step, world))
            curve.append((float(result.loss), float(result.grad_norm)))
            if validating and step == 0:
                found["after"] = validation_metrics(engine, CLIPS, *part)
                if world.size == 1:
                    assert found["after"] == validation_metrics(engine, CLIPS, *part)
                assert engine.module.training
        found[validating] = curve
        weights = {name: tensor.clone() for name, tensor in engine.local_weights()}
        found["weights", validating] = weights
    return found


def check(found, expected):
    for each in found:
        assert each["metrics"] == pytest.approx(expected, **CLOSE)
        assert each["after"]["loss"] != each["metrics"]["loss"]
        assert each[True] == each[False]
        for name, tensor in each["weights", True].items():
            assert torch.equal(tensor, each["weights", False][name]), name


@pytest.mark.parametrize("size", RANKS)
def test_ranks_and_stages_agree_and_training_after_it_is_bit_equal(folder, size):
    phase, micro_batch_size, changes = RANKS[size]
    found = run_distributed(steps_with_validation, size, folder, phase, micro_batch_size, changes)
    check(found, reference(folder, phase))


def show_with_a_slow_rank(world, folder):
    """For each stage, the metrics and previews of rank 0; rank 1 sleeps in every forward."""
    found = {}
    for stage in (2, 3):
        settings = config(
            folder,
            "control",
            zero__stage=stage,
            zero__parameter_persistence_threshold=500,
            data__global_batch_size=3,
            data__micro_batch_size=1,
            preview_codec__kind="dct",
            preview_steps=2,
        )
        engine = build_engine(settings, world)
        before = [(name, tensor.clone()) for name, tensor in engine.local_weights()]
        if world.rank == 1:
            engine.module.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        metrics = validation_metrics(engine, CLIPS, world.rank, world.size)
        previews = engine.preview([*CLIPS, sample(1003, 4)])  # one more than there are ranks
        assert engine.module.training
        for (name, tensor), (_, now) in zip(before, engine.local_weights(), strict=True):
            assert torch.equal(tensor, now), name
        loss = float(engine.train_step(batch(settings, 0, world)).loss)
        found[stage] = (metrics, previews, loss)
    return found


def test_previews_and_validation_finish_when_one_of_three_ranks_is_slow(folder):
    first, *others = run_distributed(show_with_a_slow_rank, 3, folder)
    for stage in (2, 3):
        metrics, previews, loss = first[stage]
        assert metrics == pytest.approx(reference(folder, "control"), **CLOSE)
        assert [preview.tag for preview in previews] == [
            f"preview/held_out_{number}" for number in range(4)
        ]
        assert (
            len({preview.panels["sample from noise"].numpy().tobytes() for preview in previews})
            == 4
        )
        for other in others:
            assert other[stage][1] == []  # rank 0 has them all
            assert other[stage][2] == loss
    for two, three in zip(first[2][1], first[3][1], strict=True):
        assert two.text == three.text
        for title, video in two.panels.items():
            assert torch.equal(video, three.panels[title]), title


def show_prompts(world, folder, stage):
    settings = config(
        folder,
        zero__stage=stage,
        model__transformer__text_dim=384,
        preview_codec__kind="dct",
        preview_steps=2,
        preview_prompts=json.dumps(["a dog", "a cat", "a red car"]),
        preview_text=json.dumps({"kind": "minilm", "max_length": 3, "padded": True}),
    )
    engine = build_engine(settings, world)
    return engine.preview([])


def test_prompts_give_the_same_videos_whatever_the_ranks(folder):
    (one,) = run_distributed(show_prompts, 1, folder, 2)
    assert [preview.text for preview in one] == ["a dog", "a cat", "a red car"]
    first, second = run_distributed(show_prompts, 2, folder, 3)
    assert second == []
    for preview, expected in zip(first, one, strict=True):
        assert (preview.tag, preview.text) == (expected.tag, expected.text)
        video = preview.panels["sample from noise"]
        assert torch.equal(video, expected.panels["sample from noise"])


def test_training_after_it_is_bit_equal_with_the_shipped_options(folder):
    """As landiff/diffusion-control: bfloat16, ZeRO-2, overlapped reduction, recompute."""
    changes = {"precision": "bf16", "recompute": "true", "zero__overlap_communication": "true"}
    part = (folder, "control", 2, changes | {"zero__stage": 2})
    for each in run_distributed(steps_with_validation, 2, *part):
        assert each[True] == each[False]
        assert each["metrics"]["loss"] == pytest.approx(
            reference(folder, "control")["loss"], rel=2e-2
        )
