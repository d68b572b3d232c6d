"""The latent sampler beyond the golden runs: exact models, batches, prefixes, streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from landiff.model_zoo.config import ScheduleConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.sample.chunks import stream_latents
from landiff.model_zoo.sample.latents import (
    SamplerOptions,
    SamplerStep,
    guidance_scale,
    reference_noise,
    sample_latents,
    sample_main_latents,
    seeded_noise,
)
from landiff.model_zoo.sample.placement.split import SplitDiffusion
from landiff.model_zoo.sample.sizes import num_chunks
from landiff.model_zoo.schedule import NoiseSchedule
from tests.model_zoo.tiny_diffusion import TINY, randomize

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "diffusion_sampling"
SCHEDULE = NoiseSchedule(ScheduleConfig())
FEW = SamplerOptions(num_steps=3)


@pytest.fixture(scope="module")
def model() -> ControlledDiffusion:
    model = ControlledDiffusion(TINY).eval()
    randomize(model)
    return model


def conditions(batch: int = 1, num_frames: int = 3, seed: int = 5) -> tuple[Tensor, Tensor]:
    """(text_BLD, features_BTChw)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, 12, generator=generator), torch.randn(
        batch, num_frames, 8, 2, 3, generator=generator
    )


def test_shape_comes_from_the_features(model):
    text, features = conditions(batch=2, num_frames=4)
    latents = sample_latents(model, SCHEDULE, text, features, seeded_noise([1, 2]), options=FEW)
    assert latents.shape == (2, 4, 4, 4, 6)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


def test_the_main_transformer_samples_alone_what_it_samples_below_a_control_branch_of_zeros():
    model = ControlledDiffusion(TINY).eval()
    randomize(model.transformer)
    text, features = conditions()
    controlled = sample_latents(model, SCHEDULE, text, features, seeded_noise([1]), options=FEW)
    alone = sample_main_latents(model.transformer, SCHEDULE, text, seeded_noise([1]), options=FEW)
    assert torch.equal(alone, controlled) and float(alone.std()) > 0.1


def test_rows_of_a_batch_are_independent(model):
    text, features = conditions(batch=2)
    together = sample_latents(model, SCHEDULE, text, features, seeded_noise([1, 2]), options=FEW)
    alone = sample_latents(model, SCHEDULE, text[1:], features[1:], seeded_noise([2]), options=FEW)
    # other shapes of the matrix products round differently; guidance multiplies it
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=0)


def test_same_seed_same_latents_other_seed_others(model):
    text, features = conditions()
    first, again, other = (
        sample_latents(model, SCHEDULE, text, features, seeded_noise([seed]), options=FEW)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_text_and_features_both_count(model):
    text, features = conditions()
    other_text, other_features = conditions(seed=6)
    base = sample_latents(model, SCHEDULE, text, features, seeded_noise([1]), options=FEW)
    for changed in ((other_text, features), (text, other_features)):
        latents = sample_latents(model, SCHEDULE, *changed, seeded_noise([1]), options=FEW)
        assert not torch.allclose(latents, base, atol=1e-4)


def test_last_step_adds_no_noise(model):
    asked: list[int] = []
    replay = seeded_noise([1])

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        asked.append(step)
        return replay(step, shape)

    sample_latents(model, SCHEDULE, *conditions(), noise, options=SamplerOptions(num_steps=4))
    assert asked == [0, 1, 2, 3]


def test_features_are_upsampled_once(model):
    calls: list[int] = []
    handle = model.semantic.register_forward_hook(lambda *_: calls.append(1))
    sample_latents(model, SCHEDULE, *conditions(), seeded_noise([1]), options=FEW)
    handle.remove()
    assert calls == [1]


class KnowsTheAnswer(ControlledDiffusion):
    """Answers with the velocity that belongs to one x0."""

    x0_BTCHW: Tensor

    def forward(
        self, latents_BTCHW: Tensor, timestep_B: Tensor, *_: object, **__: object
    ) -> Tensor:
        a = SCHEDULE.signal(timestep_B.long())
        return (a * latents_BTCHW - self.x0_BTCHW) / (1 - a**2).sqrt()


def test_exact_network_leads_to_x0_whatever_the_noise():
    model = KnowsTheAnswer(TINY).eval()
    model.x0_BTCHW = torch.randn(1, 3, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    for seed in (1, 2):
        latents = sample_latents(
            model,
            SCHEDULE,
            *conditions(),
            seeded_noise([seed]),
            options=SamplerOptions(num_steps=20),
        )
        # As in the reference, the noise level of the answer is up to one timestep off.
        torch.testing.assert_close(latents, model.x0_BTCHW, atol=5e-2, rtol=0)


def test_noise_of_a_seed_is_the_references_in_its_order_and_number(model):
    steps = json.loads((GOLDEN / "config.json").read_text())[
        "randn_draws_per_step"
    ]  # recorded from the reference
    taken = torch.Generator().manual_seed(5)
    used = []

    def noise(step, shape):
        used.append(replay(step, shape))
        return used[-1]

    replay = reference_noise(taken)
    sample_latents(
        model, SCHEDULE, *conditions(), noise, options=SamplerOptions(num_steps=len(steps))
    )
    again = torch.Generator().manual_seed(5)
    expected = [torch.randn(used[0].shape, generator=again)]
    expected += [
        [torch.randn(used[0].shape, generator=again) for _ in range(count)][-1]
        for count in steps
        if count
    ]
    assert len(used) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(used, expected, strict=True)
    )
    assert torch.equal(taken.get_state(), again.get_state())


def test_prefix_is_returned_untouched_and_guides_the_rest(model):
    text, features = conditions()
    prefix = torch.randn(1, 2, 4, 4, 6, generator=torch.Generator().manual_seed(8))
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, :2]))
    latents = sample_latents(
        model, SCHEDULE, text, features, seeded_noise([1]), options=FEW, prefix_BTCHW=prefix
    )
    handle.remove()
    assert torch.equal(latents[:, :2], prefix)
    assert len(seen) == 3 and all(torch.equal(x, prefix.expand(2, -1, -1, -1, -1)) for x in seen)
    without = sample_latents(model, SCHEDULE, text, features, seeded_noise([1]), options=FEW)
    assert not torch.allclose(latents[:, 2:], without[:, 2:], atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 6), (1, 1, 4, 4, 4), (2, 1, 4, 4, 6)])
def test_prefix_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"a prefix .* does not fit latents \[1, 3, 4, 4, 6\]"):
        sample_latents(
            model,
            SCHEDULE,
            *conditions(),
            seeded_noise([1]),
            options=FEW,
            prefix_BTCHW=torch.zeros(shape),
        )


def test_text_for_another_number_of_clips_is_refused(model):
    with pytest.raises(ValueError, match="2 rows of text for 1 clips"):
        sample_latents(
            model, SCHEDULE, conditions(batch=2)[0], conditions()[1], seeded_noise([1]), options=FEW
        )


def test_guidance_by_step_rises_and_constant_stays():
    rising = [guidance_scale(SamplerOptions(dynamic="step"), step, 999) for step in range(50)]
    assert rising == sorted(rising) and rising[0] == 1 and 6 < rising[-1] < 7
    assert guidance_scale(SamplerOptions(dynamic="constant", guidance=2), 7, 500) == 3


@pytest.mark.parametrize(
    "num_frames, chunks", [(1, 1), (13, 1), (18, 1), (19, 2), (25, 3), (26, 3), (13 + 6 * 9, 10)]
)
def test_chunks_of_a_stream(num_frames, chunks):
    assert num_chunks(num_frames) == chunks


def test_clean_frames_must_leave_room():
    with pytest.raises(ValueError, match="clean = 13 must be"):
        num_chunks(26, window=13, clean=13)


def test_stream_continues_each_chunk_from_the_last(model):
    text, features = conditions(num_frames=6)
    noises = [seeded_noise([seed]) for seed in (1, 2, 3)]
    parts = list(
        stream_latents(
            model, SCHEDULE, text, features, lambda i: noises[i], options=FEW, window=4, clean=3
        )
    )
    assert [part.shape[1] for part in parts] == [4, 1, 1]
    joined = torch.cat(parts, dim=1)
    for chunk in range(1, 3):
        expected = sample_latents(
            model,
            SCHEDULE,
            text,
            features[:, chunk : chunk + 4],
            seeded_noise([chunk + 1]),
            options=FEW,
            prefix_BTCHW=joined[:, chunk : chunk + 3],
        )
        assert torch.equal(joined[:, chunk : chunk + 4], expected)


def test_stream_of_one_chunk_is_plain_sampling(model):
    text, features = conditions()
    (only,) = stream_latents(
        model, SCHEDULE, text, features, lambda _i: seeded_noise([1]), options=FEW
    )
    assert torch.equal(
        only, sample_latents(model, SCHEDULE, text, features, seeded_noise([1]), options=FEW)
    )


def test_stream_without_clean_frames_makes_independent_chunks(model):
    text, features = conditions(num_frames=6)
    parts = list(
        stream_latents(
            model,
            SCHEDULE,
            text,
            features,
            lambda i: seeded_noise([i]),
            options=FEW,
            window=3,
            clean=0,
        )
    )
    alone = sample_latents(model, SCHEDULE, text, features[:, 3:], seeded_noise([1]), options=FEW)
    assert torch.equal(parts[1], alone)


class KnowsTheDistribution(ControlledDiffusion):
    """Answers with the velocity of the best x0 for data of N(0, DEVIATION²)."""

    DEVIATION = 0.5

    def forward(
        self, latents_BTCHW: Tensor, timestep_B: Tensor, *_: object, **__: object
    ) -> Tensor:
        a = SCHEDULE.signal(timestep_B.long()).double()
        b_squared = 1 - a**2
        variance = self.DEVIATION**2
        x0 = a * variance / (a**2 * variance + b_squared) * latents_BTCHW
        return ((a * latents_BTCHW - x0) / b_squared.sqrt()).float()


@pytest.mark.parametrize(
    ("solver", "tolerance"), [("ddim", 0.011), ("euler", 0.011), ("unipc", 0.005)]
)
def test_deterministic_solvers_follow_the_exact_flow(solver, tolerance):
    """For Gaussian data, the probability flow maps noise x to DEVIATION · x.

    The error is that of the first steps, which start without any signal. It is 1.06 % with 1,000
    steps of first order, 0.45 % with those of UniPC, and proportional to the step size.
    """
    model = KnowsTheDistribution(TINY).eval()
    errors = []
    for num_steps in (250, 1000):
        options = SamplerOptions(num_steps=num_steps, solver=solver, dynamic="constant", guidance=0)
        latents = sample_latents(model, SCHEDULE, *conditions(), seeded_noise([4]), options=options)
        expected = model.DEVIATION * seeded_noise([4])(0, tuple(latents.shape))
        errors.append(float((latents - expected).abs().max() / expected.abs().max()))
    assert errors[1] < tolerance
    assert 3 < errors[0] / errors[1] < 5


@pytest.mark.parametrize("solver", ["ddim", "euler", "unipc"])
def test_deterministic_solvers_keep_the_prefix_and_show_it_to_the_network(model, solver):
    prefix = torch.randn(1, 2, 4, 4, 6, generator=torch.Generator().manual_seed(8))
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _m, args: seen.append(args[0][:, :2]))
    latents = sample_latents(
        model,
        SCHEDULE,
        *conditions(),
        seeded_noise([1]),
        options=SamplerOptions(num_steps=4, solver=solver),
        prefix_BTCHW=prefix,
    )
    handle.remove()
    assert torch.equal(latents[:, :2], prefix) and torch.isfinite(latents).all()
    assert all(torch.equal(x, prefix.expand(len(x), -1, -1, -1, -1)) for x in seen)


def test_without_guidance_the_unconditional_pass_is_left_out(model):
    rows: list[int] = []
    handle = model.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    options = SamplerOptions(num_steps=4, dynamic="constant", guidance_interval=(0.25, 0.75))
    sample_latents(model, SCHEDULE, *conditions(), seeded_noise([1]), options=options)
    handle.remove()
    assert rows == [1, 2, 2, 1]


def test_a_guidance_of_zero_equals_guidance_outside_of_its_interval(model):
    arguments = (model, SCHEDULE, *conditions())
    none = SamplerOptions(num_steps=3, dynamic="constant", guidance=0)
    outside = SamplerOptions(num_steps=3, dynamic="constant", guidance_interval=(0, 0))
    first = sample_latents(*arguments, seeded_noise([1]), options=none)
    assert torch.equal(first, sample_latents(*arguments, seeded_noise([1]), options=outside))


def test_rescaled_guidance_has_the_deviation_of_the_conditional_estimate(model):
    found: dict[float, SamplerStep] = {}
    for rescale in (0.0, 1.0):
        options = SamplerOptions(num_steps=2, dynamic="constant", guidance_rescale=rescale)
        steps: list[SamplerStep] = []
        sample_latents(
            model, SCHEDULE, *conditions(), seeded_noise([1]), options=options, on_step=steps.append
        )
        found[rescale] = steps[0]
    plain = SamplerOptions(num_steps=2, dynamic="constant", guidance=0)
    steps = []
    sample_latents(
        model, SCHEDULE, *conditions(), seeded_noise([1]), options=plain, on_step=steps.append
    )
    conditional = steps[0].denoised.std()
    torch.testing.assert_close(found[1.0].denoised.std(), conditional)
    assert (found[0.0].denoised.std() - conditional).abs() > 1e-4 * conditional


def first_estimate(model, **options) -> Tensor:
    """Estimate of x0 of the first step, with the same start for all options."""
    steps: list[SamplerStep] = []
    sampler = SamplerOptions(num_steps=2, dynamic="constant", **options)
    noise = seeded_noise([1])
    sample_latents(model, SCHEDULE, *conditions(), noise, options=sampler, on_step=steps.append)
    return steps[0].denoised


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_control_guidance_moves_away_from_the_main_transformer(model, guidance):
    """By its multiple of what the control branch changes, and as far whatever text guidance is."""
    steps: list[SamplerStep] = []
    text, _ = conditions()
    sample_main_latents(
        model.transformer,
        SCHEDULE,
        text,
        seeded_noise([1]),
        options=SamplerOptions(num_steps=2, dynamic="constant", guidance=0),
        on_step=steps.append,
    )
    alone = steps[0].denoised
    controlled = first_estimate(model, guidance=0)
    change = controlled - alone
    assert change.std() > 1e-2 * alone.std()
    plain = first_estimate(model, guidance=guidance)
    for amount in (0.5, 2.0):
        moved = first_estimate(model, guidance=guidance, control_guidance=amount)
        torch.testing.assert_close(moved - plain, amount * change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["sde-dpm++", "ddim"])
def test_control_guidance_runs_the_main_transformer_once_more_a_step(model, solver):
    passes: list[str] = []
    handles = [
        model.control.blocks[0].register_forward_hook(lambda *_: passes.append("control")),
        model.transformer.blocks[0].register_forward_hook(lambda *_: passes.append("main")),
    ]
    options = SamplerOptions(num_steps=3, solver=solver, control_guidance=1.0)
    sample_latents(model, SCHEDULE, *conditions(), seeded_noise([1]), options=options)
    for handle in handles:
        handle.remove()
    assert passes == ["main", "control", "main"] * 3


def test_a_split_model_runs_the_main_transformer_alone_itself(model):
    """Control guidance asks for that, without a semantic latent."""
    text, _ = conditions(batch=2)
    inputs = (torch.ones(2, 3, 4, 4, 6), torch.full((2,), 500.0), text)
    split = SplitDiffusion(model, torch.device("cpu"))
    assert torch.equal(split(*inputs), model(*inputs))
