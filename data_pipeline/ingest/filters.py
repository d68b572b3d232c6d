"""Filters: what a clip must be like to become a sample. Each is off unless its threshold is set.

They see the clip as it would be stored, so what they measure depends on nothing but its frames.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Sequence

import cv2
import numpy as np

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import FiltersConfig
from landiff.data_pipeline.video.codec import DecodeFailure
from landiff.data_pipeline.video.motion import Motion

FILTERED = frozenset(("little_motion", "much_motion", "too_dark", "too_bright", "static", "text"))
CHANGED = 12  # levels: less may be noise of the codec
REPEATED = (
    5e-4  # share of a frame's pixels: fewer that changed, and it shows what the one before showed
)
TEXT_FRAMES = 3  # looked at: first, middle, last
TEXT_SCORE = 0.6  # of the recogniser: boxes without readable text are false alarms (wood grain)


class Filters:
    """The filters of one config. Safe for use by several threads.

    Raises ConfigError when a filter's package is not installed.
    """

    def __init__(self, config: FiltersConfig) -> None:
        self.config = config
        self._reader = None
        self._lock = threading.Lock()
        if config.text_area_max is not None:
            self._reader = _text_reader()

    def refuse(self, frames_THWC: np.ndarray, motion: Motion) -> DecodeFailure | None:
        """The first filter that the clip does not pass, with what was measured; None where it passes all."""
        config = self.config
        if config.motion_min is not None or config.motion_max is not None:
            failure = _outside(
                motion.mean,
                "motion",
                config.motion_min,
                config.motion_max,
                "little_motion",
                "much_motion",
            )
            if failure:
                return failure
        if config.brightness_min is not None or config.brightness_max is not None:
            failure = _outside(
                brightness(frames_THWC),
                "brightness",
                config.brightness_min,
                config.brightness_max,
                "too_dark",
                "too_bright",
            )
            if failure:
                return failure
        if (
            config.static_max is not None
            and (share := repeated_share(frames_THWC)) > config.static_max
        ):
            return DecodeFailure(
                "static",
                f"{share:.4f} of the frames repeat the one before, more than static_max = {config.static_max:g}",
            )
        if (
            config.text_area_max is not None
            and (area := self._text_area(frames_THWC)) > config.text_area_max
        ):
            return DecodeFailure(
                "text",
                f"{area:.4f} of the picture is text, more than text_area_max = {config.text_area_max:g}",
            )
        return None

    def _text_area(self, frames_THWC: np.ndarray) -> float:
        """Share of the picture under recognised text, mean over some frames."""
        picked = (
            np.linspace(0, len(frames_THWC) - 1, min(TEXT_FRAMES, len(frames_THWC)))
            .round()
            .astype(int)
        )
        with self._lock:
            found = [
                self._reader(np.ascontiguousarray(frames_THWC[index][..., ::-1]))[0] or []
                for index in picked
            ]
        return float(np.mean([text_area(boxes, *frames_THWC.shape[1:3]) for boxes in found]))


def brightness(frames_THWC: np.ndarray) -> float:
    """Mean luma (BT.709), 0 black to 1 white."""
    return round(
        float(frames_THWC.mean((0, 1, 2), dtype=np.float64) @ (0.2126, 0.7152, 0.0722)) / 255, 6
    )


def repeated_share(frames_THWC: np.ndarray) -> float:
    """Share of the frames, but the first, that look like the one before."""
    if len(frames_THWC) < 2:
        return 0.0
    changes = [
        np.mean(cv2.absdiff(before, after).max(-1) > CHANGED)
        for before, after in itertools.pairwise(frames_THWC)
    ]
    return round(float(np.mean(np.array(changes) < REPEATED)), 6)


def text_area(boxes: Sequence, height: int, width: int) -> float:
    """Share of the picture under boxes of (corners, text, score) whose text could be read."""
    mask = np.zeros((height, width), np.uint8)
    for corners, text, score in boxes:
        if text.strip() and float(score) >= TEXT_SCORE:
            cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    return float(mask.mean())


def _outside(
    value: float, name: str, least: float | None, most: float | None, below: str, above: str
) -> DecodeFailure | None:
    if least is not None and value < least:
        return DecodeFailure(below, f"{name} {value:g} is below {name}_min = {least:g}")
    if most is not None and value > most:
        return DecodeFailure(above, f"{name} {value:g} is above {name}_max = {most:g}")
    return None


def _text_reader():
    try:
        return importlib.import_module("rapidocr_onnxruntime").RapidOCR()
    except ImportError as error:
        raise ConfigError(
            f"filters.text_area_max needs the package rapidocr-onnxruntime ({error}); "
            "pip install 'landiff-pretrain[text]', or set filters.text_area_max=null"
        ) from None
