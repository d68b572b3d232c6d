"""The motion score: how fast things move, in frame heights per second.

Scores computed with another method, frame rate or size are not comparable. The definition:

- Gray frames with a short side of 128 pixels, 8 per second.
- Dense DIS optical flow (preset fast) between neighbouring frames.
- For each pair of frames, the mean length of the flow divided by the gray height, times the rate.
- The score is the mean over all pairs that are not cuts.

DIS measures the correct speed on a pan of known speed, where Farneback gives half of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

SHORT_SIDE = 128
RATE = 8.0
# A pair is a cut if it is below both thresholds. Measured on 81 single shots and 321 joints between
# them: 0.6 % false cuts, 3 % missed cuts.
CUT_CORRELATION = 0.6  # of a frame with its neighbour warped along the flow
CUT_HISTOGRAM = 0.9  # overlapping fraction of the gray histograms (32 bins)


@dataclass(frozen=True)
class Motion:
    """Motion of a clip. All but `cuts` is in frame heights per second.

    Everything else is zero if all pairs are cuts, or if there is only one frame.
    """

    mean: float  # the motion score
    p95: float  # 95th percentile of the pairs' means
    camera: tuple[float, float]  # mean over pairs of the median flow (x to the right, y down)
    residual: float  # mean length of the flow minus its median: motion of objects
    cuts: int  # pairs of frames that are left out


def motion(frames_THWC: np.ndarray, fps: float) -> Motion:
    """Measure the motion of uint8 RGB frames [T, H, W, 3] displayed at `fps`."""
    # DIS divides a frame into one stripe per thread, so the score would depend on the machine
    cv2.setNumThreads(1)
    rate = min(RATE, fps)
    count = int((len(frames_THWC) - 1) * rate / fps + 1e-6) + 1
    grays = [_gray(frames_THWC[int(k * fps / rate + 1e-6)]) for k in range(count)]
    optical_flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    flows: list[np.ndarray] = []
    cuts = 0
    for before, after in itertools.pairwise(grays):
        flow = optical_flow.calc(before, after, None)
        if is_cut(before, after, flow):
            cuts += 1
        else:
            flows.append(flow)
    if not flows:
        return Motion(0.0, 0.0, (0.0, 0.0), 0.0, cuts)
    unit = rate / grays[0].shape[0]
    # Contiguous x and y: reductions over the last axis of [h, w, 2] take several times as long.
    planes = [np.ascontiguousarray(flow.reshape(-1, 2).T) for flow in flows]
    medians = [np.median(xy, axis=1) for xy in planes]
    means = [_length(xy) * unit for xy in planes]
    residuals = [_length(xy - median[:, None]) for xy, median in zip(planes, medians, strict=True)]
    camera = np.mean(medians, axis=0) * unit
    return Motion(
        mean=_rounded(np.mean(means)),
        p95=_rounded(np.percentile(means, 95)),
        camera=(_rounded(camera[0]), _rounded(camera[1])),
        residual=_rounded(np.mean(residuals) * unit),
        cuts=cuts,
    )


def is_cut(before: np.ndarray, after: np.ndarray, flow: np.ndarray) -> bool:
    """Whether two gray frames [h, w] are of different shots, because their flow explains little."""
    overlap = cv2.compareHist(_histogram(before), _histogram(after), cv2.HISTCMP_INTERSECT)
    if overlap / before.size >= CUT_HISTOGRAM:
        return False
    height, width = before.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warped = cv2.remap(
        after, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    correlation = 0.0  # of flat frames
    if float(before.std()) != 0.0 and float(warped.std()) != 0.0:
        correlation = float(np.corrcoef(before.ravel(), warped.ravel())[0, 1])
    return correlation < CUT_CORRELATION


def _histogram(gray: np.ndarray) -> np.ndarray:
    """Histogram of a gray frame in 32 bins."""
    return cv2.calcHist([gray], [0], None, [32], [0, 256])


def _gray(frame_HWC: np.ndarray) -> np.ndarray:
    """Convert an RGB frame to gray, with a short side of `SHORT_SIDE` pixels."""
    gray = cv2.cvtColor(np.ascontiguousarray(frame_HWC), cv2.COLOR_RGB2GRAY)
    height, width = gray.shape
    factor = SHORT_SIDE / min(height, width)
    if factor == 1:
        return gray
    size = (max(SHORT_SIDE, round(width * factor)), max(SHORT_SIDE, round(height * factor)))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(gray, size, interpolation=interpolation)


def _length(xy: np.ndarray) -> float:
    """Mean length of the vectors of a flow [2, h * w], in pixels."""
    x, y = xy
    return float(np.sqrt(x * x + y * y).mean())


def _rounded(value: float | np.floating) -> float:
    """Round to 6 digits, so that stored scores are short."""
    return round(float(value), 6)
