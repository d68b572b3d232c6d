"""The three interfaces of frozen encoders. Everything that reads pixels or text goes through one of them.

Letters: B batch, T frames, t latent or semantic frames, C channels, H W pixels, h w cells, L text rows, D width.

Each encoder has a `name`, a `fingerprint` (16 hex digits over weights and preprocessing, equal on every
machine) and lives on the device it was built for. Building is `landiff.model_zoo.frozen.build`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

NO_VARIANCE = -60.0  # log-variance of what is certain: a deviation of 1e-13


@runtime_checkable
class VisionFeatures(Protocol):
    """uint8 frames -> semantic features."""

    name: str
    fingerprint: str
    channels: int
    cell: int  # pixels per feature cell, e.g. 16

    def __call__(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, T, C, H / cell, W / cell]."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """uint8 video <-> latents, scaled to about unit variance."""

    name: str
    fingerprint: str
    channels: int
    space: int  # pixels per latent cell along one side: 8
    time: int  # frames per latent frame after the first: 4

    def encode(self, video_BTHWC: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """uint8 [B, 1 + time*k, H, W, 3] -> float32 [B, 1 + k, C, H / space, W / space], scaled.

        A variational codec returns the posterior mean, or with `noise` (standard normal, latent shape) the
        sample mean + std * noise; a deterministic one ignores `noise`.
        """
        ...

    def encode_moments(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 video -> float32 [B, 1 + k, 2C, H / space, W / space]: mean and log-variance of the scaled latents.

        A deterministic codec gives `NO_VARIANCE` as log-variance.
        """
        ...

    def decode(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents -> uint8 [B, T, H, W, 3]."""
        ...


def posterior_mean(latents: Tensor, channels: int) -> Tensor:
    """[..., C, h, w] of latents, or of moments, which have twice the channels."""
    assert latents.shape[-3] in (channels, 2 * channels), (latents.shape, channels)
    return latents[..., :channels, :, :]


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """[..., 2C, h, w] mean and log-variance, [..., C, h, w] standard normal noise -> one sample of the posterior."""
    mean, log_variance = moments.chunk(2, dim=-3)
    return mean + (0.5 * log_variance).exp() * noise


@runtime_checkable
class TextEncoder(Protocol):
    """Strings -> last hidden states."""

    name: str
    fingerprint: str
    dim: int
    max_length: int

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text that `max_length` tokens leave out, "" where nothing is."""
        ...

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> float32 states [B, L, D] and int64 lengths [B]; rows at and past a length are pads.

        A `padded` encoder (T5-v1.1 of the diffusion model) always returns L = lengths = max_length: its
        pads are attended. Any other returns the real tokens of the longest text.
        """
        ...
