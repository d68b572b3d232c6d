"""Noise schedule of the diffusion model: shifted, with zero terminal signal. Training, loss and sampling ask it.

Letters: B batch, T latent frames, C channels, H W latent height and width.

x_t = a_t * x0 + b_t * noise with a = sqrt(alpha_cumprod), b = sqrt(1 - a^2); the network predicts the velocity
v = a * noise - b * x0, so x0 = a * x_t - b * v. Source: CogVideoX's schedule as LanDiff uses it; zero terminal
signal: arXiv 2305.08891.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.base import ConfigError
from model_zoo.config import ScheduleConfig


@dataclass(frozen=True)
class SamplerTable:
    """What an n-step sampler uses at its steps; the lists start at pure noise."""

    timesteps: list[int]  # n, given to the network
    alphas_sqrt: list[float]  # n + 1: the level of the state before each step; the last is 1, no noise
    denoiser_alphas_sqrt: list[float]  # n: the nearest values of the training table, used for x0


@dataclass(frozen=True)
class DenoisingLoss:
    loss: Tensor  # scalar, mean of `per_sample`
    per_sample: Tensor  # float32 [B]
    noised: Tensor  # what the network saw, float32 [B, T, C, H, W]
    velocity: Tensor  # what it answered, float32 [B, T, C, H, W]


class NoiseSchedule:
    """Tables are computed on the CPU, in float64 up to the shift and in float32 behind it, as in the reference (its order of
    operations too: a last bit of a_0 is 1e-5 of the loss weight there). Indexing moves them to the timesteps' device."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        steps = config.num_timesteps
        betas = torch.linspace(config.linear_start**0.5, config.linear_end**0.5, steps, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        self.shifted_alphas = alphas / (config.shift_scale + (1 - config.shift_scale) * alphas)  # float64, before rescaling
        self.alphas_sqrt = zero_terminal(self.shifted_alphas)
        self._on_device = {self.alphas_sqrt.device: self.alphas_sqrt}

    def signal(self, timestep_B: Tensor) -> Tensor:
        """a at integer timesteps, float32, shaped to multiply BTCHW."""
        device = timestep_B.device
        if device not in self._on_device:
            self._on_device[device] = self.alphas_sqrt.to(device)
        return self._on_device[device][timestep_B][:, None, None, None, None]

    def noised(self, x0_BTCHW: Tensor, noise_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        a = self.signal(timestep_B)
        return a * x0_BTCHW.float() + noise_level(a) * noise_BTCHW.float()

    def velocity(self, x0_BTCHW: Tensor, noise_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        a = self.signal(timestep_B)
        return a * noise_BTCHW.float() - noise_level(a) * x0_BTCHW.float()

    def denoised(self, x_BTCHW: Tensor, velocity_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """x0 that a velocity amounts to."""
        a = self.signal(timestep_B)
        return a * x_BTCHW.float() - noise_level(a) * velocity_BTCHW.float()

    def loss_weight(self, timestep_B: Tensor) -> Tensor:
        """float32 [B]: weight under which a squared error of x0 equals the squared error of the velocity."""
        return 1 / (1 - self.signal(timestep_B).flatten() ** 2)

    def sampler_table(self, num_steps: int) -> SamplerTable:
        """Levels of a sampler with `num_steps` steps.

        As in the reference, the rescaling to zero terminal signal is applied to the selected values (so they
        differ from the training table by up to 1e-3), while the network's answer is read with the nearest
        value of the training table.
        """
        total = self.config.num_timesteps
        if not 2 <= num_steps <= total:
            raise ConfigError(f"a sampler takes 2..{total} steps, not {num_steps}")
        timesteps = np.linspace(total - 1, 0, num_steps, endpoint=False).astype(int).tolist()
        levels = zero_terminal(self.shifted_alphas[timesteps[::-1]]).flip(0)
        nearest = (levels[:, None] - self.alphas_sqrt).abs().argmin(dim=1)
        return SamplerTable(
            timesteps=timesteps,
            alphas_sqrt=[*levels.double().tolist(), 1.0],
            denoiser_alphas_sqrt=self.alphas_sqrt[nearest].double().tolist(),
        )


def zero_terminal(alphas: Tensor) -> Tensor:
    """Their square roots as float32, shifted and scaled so that the last is 0 and the first stays."""
    # torch's own float32 root is not rounded alike on every machine; through float64 it is
    alphas_sqrt = alphas.float().double().sqrt().float()
    first, last = alphas_sqrt[0], alphas_sqrt[-1]
    return (alphas_sqrt - last) * (first / (first - last))


def noise_level(alpha_sqrt: Tensor) -> Tensor:
    return (1 - alpha_sqrt**2).sqrt()


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x0_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    timestep_B: Tensor,
    fixed_frames: int | Tensor = 0,
) -> DenoisingLoss:
    """Mean squared error of the velocity; `network(noised_BTCHW, timestep_B)` is the model with its conditions.

    With `fixed_frames` = K > 0 the first K latent frames enter clean and the loss counts the others only; the
    timestep stays one for all frames (training for streaming, where a chunk continues K finished frames). An
    int64 [B] gives every sample its own K.
    Equal to the loss weight times the squared error of x0, but without its cancellation at small timesteps.
    """
    frames = x0_BTCHW.shape[1]
    if isinstance(fixed_frames, int) and not 0 <= fixed_frames < frames:
        raise ValueError(f"fixed_frames = {fixed_frames} must leave a frame of the {frames} to be denoised")
    fixed_B = torch.as_tensor(fixed_frames, device=x0_BTCHW.device).expand(len(x0_BTCHW))
    denoised_BT = torch.arange(frames, device=x0_BTCHW.device) >= fixed_B[:, None]
    noised = schedule.noised(x0_BTCHW, noise_BTCHW, timestep_B)
    noised = torch.where(denoised_BT[:, :, None, None, None], noised, x0_BTCHW.float())
    velocity = network(noised, timestep_B).float()
    error = velocity - schedule.velocity(x0_BTCHW, noise_BTCHW, timestep_B)
    error_BT = error.square().mean(dim=(2, 3, 4))
    per_sample = (error_BT * denoised_BT).sum(dim=1) / denoised_BT.sum(dim=1)
    return DenoisingLoss(loss=per_sample.mean(), per_sample=per_sample, noised=noised, velocity=velocity)
