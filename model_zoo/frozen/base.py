"""Interfaces of the frozen encoders: vision features, latent codec and text encoder.

Everything that turns pixels or text into tensors has one of them. `landiff.model_zoo.frozen.build`
builds an encoder. Each has a `name`, stays on the device that it was built for, and has a
`fingerprint`: 16 hex digits over weights and preprocessing, equal on every machine.

Shape letters (docs/glossary.md): B batch, T RGB frames, t latent or semantic frames, C channels,
H, W height and width in pixels, h, w height and width in feature or latent cells, L text rows,
D width of text states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

NO_VARIANCE = -60.0  # log-variance of exact values: a standard deviation of 1e-13


@runtime_checkable
class VisionFeatures(Protocol):
    """Maps uint8 frames to semantic features.

    channels: number of feature channels.
    cell: pixels per feature cell along one side, 16 for instance.
    """

    name: str
    fingerprint: str
    channels: int
    cell: int

    def __call__(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, T, C, h, w]; h = H / cell, w = W / cell."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """Maps uint8 videos to latents of about unit variance, and back.

    channels: number of latent channels.
    space: pixels per latent cell along one side, 8 for instance.
    time: RGB frames per latent frame after the first, 4 for instance.
    """

    name: str
    fingerprint: str
    channels: int
    space: int
    time: int

    def encode(self, video_BTHWC: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] -> scaled latents, float32 [B, t, C, h, w].

        T = 1 + time · (t - 1), h = H / space, w = W / space. A variational codec returns the mean
        of the posterior, or with standard normal noise the sample mean + std · noise. Other codecs
        ignore the noise.
        """
        ...

    def encode_moments(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> mean and log-variance of scaled latents [B, t, 2 C, h, w].

        The log-variance of a codec that is not variational is `NO_VARIANCE`.
        """
        ...

    def decode(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents [B, t, C, h, w] -> uint8 [B, T, H, W, 3]."""
        ...

    def decode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive parts [B, t, C, h, w] of latents -> their frames, uint8 [B, T, H, W, 3].

        Together the frames are those of `decode`, bit for bit. One tensor of frames is returned for
        each part, in memory that does not depend on the number of parts. It may lack the last
        frames of its part, which then come with the next.
        """
        ...


def decode_first_and_later(codec: LatentCodec, parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """`decode_stream` of a codec without memory: a first latent frame, then independent ones.

    A later latent frame is decoded behind any other, whose frames are dropped.
    """
    started = False
    for part_BtChw in parts:
        if started:
            part_BtChw = torch.cat([part_BtChw[:, :1], part_BtChw], dim=1)
        frames = [codec.decode(clip_1tChw) for clip_1tChw in part_BtChw.split(1)]
        yield torch.cat(frames)[:, started:]
        started = True


def posterior_mean(latents: Tensor, channels: int) -> Tensor:
    """Mean [..., C, h, w] of stored latents, which are means or moments with twice the channels."""
    assert latents.shape[-3] in (channels, 2 * channels), (latents.shape, channels)
    return latents[..., :channels, :, :]


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Sample of the posterior, [..., C, h, w].

    moments: mean and log-variance [..., 2 C, h, w]. noise: standard normal [..., C, h, w].
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    return mean + (0.5 * log_variance).exp() * noise


@runtime_checkable
class HasBlocks(Protocol):
    """An encoder of transformer blocks that torch.compile can compile one by one."""

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Maps texts to last hidden states.

    dim: width of the states.
    max_length: longest text in tokens.
    """

    name: str
    fingerprint: str
    dim: int
    max_length: int

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text after its first `max_length` tokens, "" for shorter texts."""
        ...

    def num_tokens(self, texts: list[str]) -> list[int]:
        """The tokens of each text, at most `max_length`, special tokens included."""
        ...

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns states, float32 [B, L, D], and lengths, int64 [B]; other rows are padding.

        A padded encoder, such as T5 v1.1 of the diffusion model, attends to its padding and returns
        L = max_length for every text. Other encoders return as many rows as the longest text has
        tokens.
        """
        ...
