"""Noise schedule of the diffusion model, shifted and with zero terminal signal, and its loss.

A noisy latent is x_t = a_t · x0 + b_t · noise with a = sqrt(alpha_cumprod) and b = sqrt(1 - a²).
The network predicts the velocity v = a · noise - b · x0, so x0 = a · x_t - b · v, or x0 itself.

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width in
latent cells.

Source: schedule of CogVideoX as LanDiff uses it (docs/specification.md §5.5); zero terminal signal:
arXiv 2305.08891.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import ScheduleConfig

# What a network returns: the velocity, or the clean latents x0.
Prediction = Literal["velocity", "clean"]


@dataclass(frozen=True)
class SamplerTable:
    """Timesteps and signal levels of a sampler with n steps, from pure noise on.

    timesteps: n timesteps, which the network receives.
    alphas_sqrt: n + 1 levels, of the state before each step and of the result, where it is 1.
    denoiser_alphas_sqrt: n levels with which x0 is computed from the velocity, the nearest ones of
        the training table.
    """

    timesteps: list[int]
    alphas_sqrt: list[float]
    denoiser_alphas_sqrt: list[float]


@dataclass(frozen=True)
class DenoisingLoss:
    """Loss of a batch with the network's input and output.

    loss: scalar, the mean of `per_sample`.
    per_sample: float32 [B].
    per_frame: squared error of each latent frame, prefix included, float32 [B, T].
    noised: input of the network, float32 [B, T, C, H, W].
    velocity: velocity that the network predicts, float32 [B, T, C, H, W].
    """

    loss: Tensor
    per_sample: Tensor
    per_frame: Tensor
    noised: Tensor
    velocity: Tensor


class NoiseSchedule:
    """Signal and noise levels of all timesteps.

    The tables are computed on the CPU, in float64 up to the shift and in float32 after it. Dtypes
    and order of operations are those of the reference: the last bit of a_0 changes the loss weight
    at timestep 0 by 1e-5 of its value. Methods use a copy on the device of their timesteps.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        start = config.linear_start**0.5
        end = config.linear_end**0.5
        betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        shift = config.shift_scale
        self.shifted_alphas = alphas / (shift + (1 - shift) * alphas)  # float64, before rescaling
        self.alphas_sqrt = zero_terminal(self.shifted_alphas)
        self._on_device = {self.alphas_sqrt.device: self.alphas_sqrt}

    def signal(self, timestep_B: Tensor) -> Tensor:
        """a at integer timesteps, float32 [B, 1, 1, 1, 1]."""
        device = timestep_B.device
        if device not in self._on_device:
            self._on_device[device] = self.alphas_sqrt.to(device)
        return self._on_device[device][timestep_B][:, None, None, None, None]

    def noised(self, x0_BTCHW: Tensor, noise_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """x_t, float32 [B, T, C, H, W]."""
        a = self.signal(timestep_B)
        return a * x0_BTCHW.float() + noise_level(a) * noise_BTCHW.float()

    def velocity(self, x0_BTCHW: Tensor, noise_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """v, float32 [B, T, C, H, W]."""
        a = self.signal(timestep_B)
        return a * noise_BTCHW.float() - noise_level(a) * x0_BTCHW.float()

    def denoised(self, x_BTCHW: Tensor, velocity_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
        """x0 that follows from x_t and a velocity, float32 [B, T, C, H, W]."""
        a = self.signal(timestep_B)
        return a * x_BTCHW.float() - noise_level(a) * velocity_BTCHW.float()

    def as_velocity(
        self,
        output_BTCHW: Tensor,
        noised_BTCHW: Tensor,
        timestep_B: Tensor,
        prediction: Prediction,
    ) -> Tensor:
        """The velocity that an output of the network stands for, float32 [B, T, C, H, W].

        noised_BTCHW: x_t that the network received. It counts where the prediction is x0: the
        velocity is then (a · x_t - x0) / b.
        """
        output_BTCHW = output_BTCHW.float()
        if prediction == "velocity":
            return output_BTCHW
        a = self.signal(timestep_B)
        return (a * noised_BTCHW.float() - output_BTCHW) / noise_level(a)

    def loss_weight(self, timestep_B: Tensor) -> Tensor:
        """Weight with which the squared error of x0 equals that of the velocity, float32 [B]."""
        return 1 / (1 - self.signal(timestep_B).flatten() ** 2)

    def sampler_table(self, num_steps: int) -> SamplerTable:
        """Timesteps and levels of a sampler with `num_steps` steps.

        As in the reference, the rescaling to zero terminal signal is applied to the selected
        values, which therefore differ from the training table by up to 1e-3. The velocity is
        converted to x0 with the nearest level of the training table.

        Raises ConfigError for fewer than two steps or more steps than timesteps.
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
    """Square roots of `alphas`, shifted and scaled so that the last is 0 and the first is kept.

    Returns float32 of the shape of `alphas`, [timesteps].
    """
    # torch rounds float32 square roots differently on different machines; float64 ones, cast to
    # float32, are the same everywhere.
    alphas_sqrt = alphas.float().double().sqrt().float()
    first = alphas_sqrt[0]
    last = alphas_sqrt[-1]
    return (alphas_sqrt - last) * (first / (first - last))


def noise_level(alpha_sqrt: Tensor) -> Tensor:
    """b = sqrt(1 - a²), elementwise."""
    return (1 - alpha_sqrt**2).sqrt()


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x0_BTCHW: Tensor,
    noise_BTCHW: Tensor,
    timestep_B: Tensor,
    *,
    fixed_frames: int | Tensor = 0,
    fixed_BTCHW: Tensor | None = None,
    prediction: Prediction = "velocity",
    max_snr_weight: float | None = None,
) -> DenoisingLoss:
    """Mean squared error of the velocity (docs/specification.md §5.6), weighted if so configured.

    network(noised_BTCHW, timestep_B) is the model with its conditions and returns what `prediction`
        names.
    x0_BTCHW, noise_BTCHW: clean latents and noise; timestep_B: int64.
    fixed_frames: number of latent frames at the start that the network receives without noise and
        that do not count in the loss, one int or int64 [B] with a number per sample. All frames
        have the same timestep. This trains a chunk that continues finished frames (§5.8).
    fixed_BTCHW: latents of which the network receives those first frames; `x0_BTCHW` by default.

    max_snr_weight: upper limit of the weight 1 / b² of the squared error of x0. None: no limit, so
        the loss is the squared error of the velocity.

    The loss equals the weighted squared error of x0, without its cancellation at small timesteps.
    Raises ValueError where `fixed_frames` leaves no frame to denoise.
    """
    num_frames = x0_BTCHW.shape[1]
    if isinstance(fixed_frames, int) and not 0 <= fixed_frames < num_frames:
        raise ValueError(
            f"fixed_frames = {fixed_frames} must leave a frame of the {num_frames} to be denoised"
        )
    fixed_B = torch.as_tensor(fixed_frames, device=x0_BTCHW.device).expand(len(x0_BTCHW))
    denoised_BT = torch.arange(num_frames, device=x0_BTCHW.device) >= fixed_B[:, None]
    noised_BTCHW = schedule.noised(x0_BTCHW, noise_BTCHW, timestep_B)
    is_noisy = denoised_BT[:, :, None, None, None]
    given_BTCHW = x0_BTCHW if fixed_BTCHW is None else fixed_BTCHW
    noised_BTCHW = torch.where(is_noisy, noised_BTCHW, given_BTCHW.float())
    output_BTCHW = network(noised_BTCHW, timestep_B)
    velocity_BTCHW = schedule.as_velocity(output_BTCHW, noised_BTCHW, timestep_B, prediction)
    error_BTCHW = velocity_BTCHW - schedule.velocity(x0_BTCHW, noise_BTCHW, timestep_B)
    error_BT = error_BTCHW.square().mean(dim=(2, 3, 4))
    loss_B = (error_BT * denoised_BT).sum(dim=1) / denoised_BT.sum(dim=1)
    if max_snr_weight is not None:
        # The error of x0 would weigh 1 / b². The squared error of the velocity has this weight.
        loss_B = loss_B * (max_snr_weight / schedule.loss_weight(timestep_B)).clamp(max=1)
    return DenoisingLoss(
        loss=loss_B.mean(),
        per_sample=loss_B,
        per_frame=error_BT,
        noised=noised_BTCHW,
        velocity=velocity_BTCHW,
    )
