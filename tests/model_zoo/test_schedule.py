"""Noise schedule and loss: noise, velocity and x0, and training with clean prefix frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from landiff.model_zoo.config import ScheduleConfig
from landiff.model_zoo.schedule import NoiseSchedule, denoising_loss

SCHEDULE = NoiseSchedule(ScheduleConfig())
TIMESTEPS = torch.tensor([0, 250, 999])


def latents(seed: int) -> Tensor:
    return torch.randn(3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_last_timestep_is_pure_noise_and_the_table_falls():
    assert SCHEDULE.alphas_sqrt[-1] == 0
    assert (SCHEDULE.alphas_sqrt.diff() < 0).all()
    assert torch.equal(SCHEDULE.noised(latents(0), latents(1), TIMESTEPS)[2], latents(1)[2])


def test_true_velocity_gives_back_x0():
    x0 = latents(0)
    noise = latents(1)
    noised = SCHEDULE.noised(x0, noise, TIMESTEPS)
    velocity = SCHEDULE.velocity(x0, noise, TIMESTEPS)
    torch.testing.assert_close(
        SCHEDULE.denoised(noised, velocity, TIMESTEPS), x0, atol=2e-6, rtol=0
    )


def test_velocity_error_is_the_weighted_error_of_x0():
    x0 = latents(0)
    noise = latents(1)
    answer = latents(2)
    result = denoising_loss(lambda x, t: answer, SCHEDULE, x0, noise, TIMESTEPS)
    denoised = SCHEDULE.denoised(result.noised, answer, TIMESTEPS)
    weighted = SCHEDULE.loss_weight(TIMESTEPS) * (denoised - x0).square().flatten(1).mean(1)
    # The tolerance is for cancellation at t = 0.
    torch.testing.assert_close(result.per_sample, weighted, atol=0, rtol=1e-4)
    assert result.loss == result.per_sample.mean()


def test_perfect_network_has_no_loss():
    x0 = latents(0)
    noise = latents(1)
    result = denoising_loss(
        lambda x, t: SCHEDULE.velocity(x0, noise, t), SCHEDULE, x0, noise, TIMESTEPS, fixed_frames=2
    )
    assert result.loss == 0


def test_fixed_frames_enter_clean_and_do_not_count():
    x0 = latents(0)
    noise = latents(1)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        wrong_in_the_prefix = SCHEDULE.velocity(x0, noise, t)
        wrong_in_the_prefix[:, :2] += 5
        return wrong_in_the_prefix

    assert denoising_loss(network, SCHEDULE, x0, noise, TIMESTEPS, fixed_frames=2).loss == 0
    assert torch.equal(seen[0][:, :2], x0[:, :2])
    assert torch.equal(seen[0][:, 2:], SCHEDULE.noised(x0, noise, TIMESTEPS)[:, 2:])


def test_every_sample_may_have_its_own_number_of_fixed_frames():
    x0 = latents(0)
    noise = latents(1)
    answer = latents(2)
    fixed = [0, 3, 1]
    together = denoising_loss(
        lambda x, t: answer, SCHEDULE, x0, noise, TIMESTEPS, fixed_frames=torch.tensor(fixed)
    )
    for i, frames in enumerate(fixed):
        one = slice(i, i + 1)
        alone = denoising_loss(
            lambda x, t, one=one: answer[one],
            SCHEDULE,
            x0[one],
            noise[one],
            TIMESTEPS[one],
            fixed_frames=frames,
        )
        assert torch.equal(together.noised[one], alone.noised)
        torch.testing.assert_close(together.per_sample[one], alone.per_sample)


@pytest.mark.parametrize("fixed_frames", [-1, 4])
def test_fixed_frames_must_leave_a_frame(fixed_frames):
    with pytest.raises(
        ValueError, match=f"fixed_frames = {fixed_frames} must leave a frame of the 4"
    ):
        denoising_loss(
            lambda x, t: x, SCHEDULE, latents(0), latents(1), TIMESTEPS, fixed_frames=fixed_frames
        )


def test_half_precision_latents_are_noised_in_float32():
    x0 = latents(0).bfloat16()
    noise = latents(1).bfloat16()
    result = denoising_loss(lambda x, t: x.bfloat16(), SCHEDULE, x0, noise, TIMESTEPS)
    assert result.noised.dtype == result.velocity.dtype == result.loss.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [2, 7, 50, 1000])
def test_sampler_table_runs_from_noise_to_signal(num_steps):
    table = SCHEDULE.sampler_table(num_steps)
    assert (
        len(table.timesteps)
        == len(table.denoiser_alphas_sqrt)
        == len(table.alphas_sqrt) - 1
        == num_steps
    )
    assert table.timesteps[0] == 999
    assert table.alphas_sqrt[0] == 0 and table.alphas_sqrt[-1] == 1
    assert table.alphas_sqrt == sorted(table.alphas_sqrt)


@pytest.mark.parametrize("num_steps", [1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=r"2\.\.1000 steps"):
        SCHEDULE.sampler_table(num_steps)


def test_full_sampler_table_is_the_training_table():
    table = SCHEDULE.sampler_table(1000)
    assert torch.tensor(table.alphas_sqrt[:-1]).flip(0).equal(SCHEDULE.alphas_sqrt)


def test_schedule_is_the_one_of_diffusers():
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    torch.testing.assert_close(
        SCHEDULE.alphas_sqrt, theirs.alphas_cumprod.sqrt().float(), atol=1e-7, rtol=0
    )


def test_a_network_that_predicts_x0_has_the_loss_of_the_velocity_that_follows_from_it():
    x0 = latents(0)
    noise = latents(1)
    answer = x0 + 0.1 * latents(2)
    result = denoising_loss(lambda x, t: answer, SCHEDULE, x0, noise, TIMESTEPS, prediction="clean")
    error = (answer - x0).square().flatten(1).mean(1)
    # The velocity is a quotient by b = 0.03 at t = 0.
    torch.testing.assert_close(
        result.per_sample, SCHEDULE.loss_weight(TIMESTEPS) * error, atol=0, rtol=1e-3
    )
    limited = denoising_loss(
        lambda x, t: answer,
        SCHEDULE,
        x0,
        noise,
        TIMESTEPS,
        prediction="clean",
        max_snr_weight=5.0,
    )
    weight = SCHEDULE.loss_weight(TIMESTEPS).clamp(max=5)
    torch.testing.assert_close(limited.per_sample, weight * error, atol=0, rtol=1e-3)
    assert limited.loss == limited.per_sample.mean()
