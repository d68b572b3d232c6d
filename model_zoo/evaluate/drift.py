"""Joins and drift of long videos, chunk by chunk, in memory that does not depend on their length.

Shape letters (docs/glossary.md): T RGB frames, H, W height and width in pixels, C channels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.frozen.base import VisionFeatures
from landiff.model_zoo.sample.texts import chunk_start


@dataclass
class _Sums:
    """What is kept of the frames of a chunk. Pixels are of 0 ... 255."""

    first_frame: int
    frames: int = 0
    pixels_HWC: Tensor = field(default_factory=lambda: torch.zeros(()))
    features_C: Tensor = field(default_factory=lambda: torch.zeros(()))
    inner: float = 0.0  # mean absolute differences between neighbours, added up
    join: float | None = None  # to the last frame of the chunk before

    @property
    def inner_mean(self) -> float | None:
        """Mean of the differences inside the chunk, None for a single frame."""
        return self.inner / (self.frames - 1) if self.frames > 1 else None

    @property
    def mean_HWC(self) -> Tensor:
        """The mean frame, float64."""
        return self.pixels_HWC / self.frames


@dataclass(frozen=True)
class ChunkDrift:
    """One chunk beside its neighbours and the first chunk.

    first_frame, frames: its new RGB frames.
    inner_difference: mean absolute difference between neighbouring frames, of 255.
    join_difference: the same between its first frame and the one before.
    join_ratio: join_difference over the mean of inner_difference of the two chunks that it joins;
        1 is a join like any other pair of frames.
    psnr_to_first: PSNR in dB of its mean frame against that of the first chunk.
    colour_to_first: its mean red, green and blue less those of the first chunk, of 255.
    feature_distance: 1 - cosine similarity between its mean vision features and those of the first
        chunk, if there is an encoder.

    Values that do not exist, such as the join of the first chunk, are None.
    """

    first_frame: int
    frames: int
    inner_difference: float | None
    join_difference: float | None
    join_ratio: float | None
    psnr_to_first: float | None
    colour_to_first: tuple[float, ...]
    feature_distance: float | None


class DriftMeter:
    """Measures the frames of one video as they come.

    The first chunk has `window` latent frames, each further one `window - clean` new ones, and a
    latent frame after the first has `time` RGB frames. `features` adds `feature_distance`.
    """

    def __init__(
        self, *, time: int, window: int, clean: int, features: VisionFeatures | None = None
    ) -> None:
        self._sizes = (time, window, clean)
        self._vision = features
        self._first: _Sums | None = None
        self._before: _Sums | None = None  # the chunk before the current one
        self._current = _Sums(0)
        self._reports: list[ChunkDrift] = []
        self._last_HWC: Tensor | None = None
        self._total = 0

    def add(self, frames_THWC: Tensor) -> None:
        """Measures the next frames, uint8 [T, H, W, 3]."""
        while len(frames_THWC):
            end = chunk_start(len(self._reports) + 1, *self._sizes)
            if self._total == end:
                self._finish()
                continue
            part_THWC = frames_THWC[: end - self._total]
            self._measure(part_THWC)
            self._total += len(part_THWC)
            frames_THWC = frames_THWC[len(part_THWC) :]

    def report(self) -> list[dict[str, Any]]:
        """The chunks as objects for JSON, after all frames were added."""
        if self._current.frames:
            self._finish()
        return [asdict(chunk) for chunk in self._reports]

    def _measure(self, frames_THWC: Tensor) -> None:
        """Adds frames to the sums of the current chunk."""
        sums = self._current
        for frame_HWC in frames_THWC:  # one at a time: in float64 a frame takes eight times as much
            pixels_HWC = frame_HWC.double()
            if self._last_HWC is not None:
                difference = float((pixels_HWC - self._last_HWC).abs().mean())
                if sums.frames:
                    sums.inner += difference
                else:
                    sums.join = difference
            sums.frames += 1
            sums.pixels_HWC = sums.pixels_HWC + pixels_HWC
            self._last_HWC = pixels_HWC
        if self._vision is not None:
            features_1TChw = self._vision(frames_THWC[None])
            sums.features_C = sums.features_C + features_1TChw[0].double().sum((0, -2, -1))

    def _finish(self) -> None:
        """Reports the current chunk and begins the next."""
        sums = self._current
        first = self._first or sums
        ratio = None
        if sums.join is not None and self._before is not None:
            inner = [one.inner_mean for one in (self._before, sums) if one.inner_mean]
            if inner:
                ratio = sums.join / (sum(inner) / len(inner))
        error_HWC = sums.mean_HWC - first.mean_HWC
        distance = None
        if self._vision is not None:
            similarity = torch.cosine_similarity(sums.features_C, first.features_C, dim=0)
            distance = max(0.0, 1 - float(similarity))
        self._reports.append(
            ChunkDrift(
                first_frame=sums.first_frame,
                frames=sums.frames,
                inner_difference=sums.inner_mean,
                join_difference=sums.join,
                join_ratio=ratio,
                psnr_to_first=_psnr(float(error_HWC.square().mean())),
                colour_to_first=tuple(error_HWC.mean((0, 1)).tolist()),
                feature_distance=distance,
            )
        )
        self._first = first
        self._before = sums
        self._current = _Sums(sums.first_frame + sums.frames)


def _psnr(squared_error: float) -> float | None:
    """PSNR in dB of a mean squared error, of 255; None for equal pictures."""
    if not squared_error:
        return None
    return 10 * math.log10(255**2 / squared_error)
