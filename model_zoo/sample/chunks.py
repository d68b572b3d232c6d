"""Latents of long videos, sampled chunk by chunk (docs/specification.md §5.8).

The first chunk has `window` frames, each further one `window - clean` new ones after the last
`clean` frames of the chunk before, which are kept as they are. With 13 and 7, N chunks are
49 + 24 (N - 1) frames of video. The reference contains no such loop, but this is the arithmetic of
its streaming interface.

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width in
latent cells, h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.sample.latents import (
    Noise,
    OnStep,
    SamplerOptions,
    Stop,
    sample_latents,
)
from landiff.model_zoo.sample.sizes import num_chunks
from landiff.model_zoo.schedule import NoiseSchedule


@dataclass(frozen=True)
class ChunkConditions:
    """Conditions of one chunk.

    features_BTChw: features of its frames, those of the clean frames included.
    negative_BLD: as in `sample_latents`.
    """

    text_BLD: Tensor
    features_BTChw: Tensor
    negative_BLD: Tensor | None = None


def stream_latents(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    noise_of_chunk: Callable[[int], Noise],
    *,
    negative_BLD: Tensor | None = None,
    options: SamplerOptions | None = None,
    window: int = 13,
    clean: int = 7,
    prefix_BTCHW: Tensor | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Iterator[Tensor]:
    """Samples the latents of a long video and yields the new frames of each chunk.

    features_BTChw: features of the whole video. Those after the last whole chunk are not used, see
        `num_chunks`.
    prefix_BTCHW: first latent frames of the video, which are given.

    Other arguments and errors are those of `sample_latents`.
    """
    chunks = num_chunks(features_BTChw.shape[1], window, clean)
    conditions = (
        ChunkConditions(text_BLD, part_BTChw, negative_BLD)
        for part_BTChw in windows([features_BTChw], chunks, window, clean)
    )
    return sample_chunks(
        model,
        schedule,
        conditions,
        noise_of_chunk,
        options=options,
        clean=clean,
        prefix_BTCHW=prefix_BTCHW,
        on_step=on_step,
        stop=stop,
    )


def sample_chunks(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    conditions: Iterable[ChunkConditions],
    noise_of_chunk: Callable[[int], Noise],
    *,
    clean: int,
    options: SamplerOptions | None = None,
    first: int = 0,
    prefix_BTCHW: Tensor | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Iterator[Tensor]:
    """Samples consecutive chunks and yields the new frames of each.

    first: number of the first chunk; above 0 to continue a video.
    prefix_BTCHW: the clean frames of that chunk; of the first, frames that are given.

    Other arguments and errors are those of `sample_latents`.
    """
    for chunk, given in enumerate(conditions, start=first):
        latents_BTCHW = sample_latents(
            model,
            schedule,
            given.text_BLD,
            given.features_BTChw,
            noise_of_chunk(chunk),
            negative_BLD=given.negative_BLD,
            options=options,
            prefix_BTCHW=prefix_BTCHW,
            on_step=on_step,
            stop=stop,
        )
        yield latents_BTCHW[:, clean:] if chunk else latents_BTCHW
        if stop is not None and stop():
            return
        prefix_BTCHW = latents_BTCHW[:, -clean:] if clean else None


def windows(
    parts: Iterable[Tensor], chunks: int, window: int, clean: int, first: int = 0
) -> Iterator[Tensor]:
    """Features of each chunk, [B, T, C, h, w], from consecutive parts of those of a video.

    Keeps the features of one chunk and one part. A video shorter than the window is one chunk.

    first: number of the first chunk. The parts start with its first frame.
    """
    remaining = iter(parts)
    held_BTChw: Tensor | None = None
    for _chunk in range(first, chunks):
        while held_BTChw is None or held_BTChw.shape[1] < window:
            part_BTChw = next(remaining, None)
            if part_BTChw is None:
                break
            if held_BTChw is None:
                held_BTChw = part_BTChw
            else:
                held_BTChw = torch.cat([held_BTChw, part_BTChw], dim=1)
        assert held_BTChw is not None
        yield held_BTChw[:, :window]
        held_BTChw = held_BTChw[:, window - clean :]
