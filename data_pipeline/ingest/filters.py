"""Filters: conditions that a clip must meet to become a sample.

A filter is off unless its threshold is set. Filters get the frames as they would be stored, so what
they measure depends on nothing else.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import FiltersConfig
from landiff.data_pipeline.video.codec import DecodeFailure
from landiff.data_pipeline.video.motion import Motion

FILTERED = frozenset(("little_motion", "much_motion", "too_dark", "too_bright", "static", "text"))
CHANGED = 12  # of 255: smaller differences of a pixel may be noise of the codec
REPEATED = 5e-4  # a frame repeats the one before if a smaller fraction of its pixels changed
TEXT_FRAMES = 3  # frames of a clip that are searched for text: first, middle, last
TEXT_SCORE = 0.6  # recognition score; boxes without readable text (wood grain) score less
LUMA_BT709 = (0.2126, 0.7152, 0.0722)


class Filters:
    """The filters of one config. Safe for use by several threads.

    Raises ConfigError if a package that a filter needs is not installed.
    """

    def __init__(self, config: FiltersConfig) -> None:
        self.config = config
        self._text_reader: Callable[[np.ndarray], Sequence[Any]] | None = None
        self._lock = threading.Lock()
        if config.text_area_max is not None:
            self._text_reader = _load_text_reader()

    def refuse(self, frames_THWC: np.ndarray, motion: Motion) -> DecodeFailure | None:
        """The first filter that rejects the clip, with the measured value; None if it passes all.

        Args:
            frames_THWC: uint8 RGB frames of the clip.
            motion: Motion of the same frames.
        """
        return (
            self._check_motion(motion, num_frames=len(frames_THWC))
            or self._check_brightness(frames_THWC)
            or self._check_static(frames_THWC)
            or self._check_text(frames_THWC)
        )

    def _check_motion(self, motion: Motion, *, num_frames: int) -> DecodeFailure | None:
        if num_frames == 1:  # an image
            return None
        least, most = self.config.motion_min, self.config.motion_max
        if least is not None and motion.mean < least:
            return _below("little_motion", "motion", motion.mean, least)
        if most is not None and motion.mean > most:
            return _above("much_motion", "motion", motion.mean, most)
        return None

    def _check_brightness(self, frames_THWC: np.ndarray) -> DecodeFailure | None:
        least, most = self.config.brightness_min, self.config.brightness_max
        if least is None and most is None:
            return None
        value = brightness(frames_THWC)
        if least is not None and value < least:
            return _below("too_dark", "brightness", value, least)
        if most is not None and value > most:
            return _above("too_bright", "brightness", value, most)
        return None

    def _check_static(self, frames_THWC: np.ndarray) -> DecodeFailure | None:
        most = self.config.static_max
        if most is None:
            return None
        fraction = repeated_fraction(frames_THWC)
        if fraction <= most:
            return None
        detail = f"{fraction:.4f} of the frames repeat the one before"
        return DecodeFailure("static", f"{detail}, more than static_max = {most:g}")

    def _check_text(self, frames_THWC: np.ndarray) -> DecodeFailure | None:
        most = self.config.text_area_max
        if most is None:
            return None
        area = self.text_area(frames_THWC)
        if area <= most:
            return None
        detail = f"{area:.4f} of the picture is text"
        return DecodeFailure("text", f"{detail}, more than text_area_max = {most:g}")

    def text_area(self, frames_THWC: np.ndarray) -> float:
        """Fraction of the picture under recognized text, mean over `TEXT_FRAMES` frames."""
        assert self._text_reader is not None, self.config
        count = len(frames_THWC)
        indices = np.linspace(0, count - 1, min(TEXT_FRAMES, count)).round().astype(int)
        found = []
        with self._lock:
            for index in indices:
                frame_bgr = np.ascontiguousarray(frames_THWC[index][..., ::-1])
                found.append(self._text_reader(frame_bgr)[0] or [])
        height, width = frames_THWC.shape[1:3]
        return float(np.mean([text_area(boxes, height, width) for boxes in found]))


def brightness(frames_THWC: np.ndarray) -> float:
    """Mean luma (BT.709) of uint8 RGB frames, from 0 (black) to 1 (white)."""
    mean_rgb = frames_THWC.mean((0, 1, 2), dtype=np.float64)
    return round(float(mean_rgb @ LUMA_BT709) / 255, 6)


def repeated_fraction(frames_THWC: np.ndarray) -> float:
    """Fraction of the frames, without the first, that repeat the frame before."""
    if len(frames_THWC) < 2:
        return 0.0
    changes = [
        np.mean(cv2.absdiff(before, after).max(-1) > CHANGED)
        for before, after in itertools.pairwise(frames_THWC)
    ]
    return round(float(np.mean(np.array(changes) < REPEATED)), 6)


def text_area(boxes: Sequence[Any], height: int, width: int) -> float:
    """Fraction of the picture under boxes whose text was recognized.

    `boxes` holds (corners, text, score) as RapidOCR returns them.
    """
    mask = np.zeros((height, width), np.uint8)
    for corners, text, score in boxes:
        if text.strip() and float(score) >= TEXT_SCORE:
            cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
    return float(mask.mean())


def _below(reason: str, name: str, value: float, least: float) -> DecodeFailure:
    return DecodeFailure(reason, f"{name} {value:g} is below {name}_min = {least:g}")


def _above(reason: str, name: str, value: float, most: float) -> DecodeFailure:
    return DecodeFailure(reason, f"{name} {value:g} is above {name}_max = {most:g}")


def _load_text_reader() -> Callable[[np.ndarray], Sequence[Any]]:
    """The text recognizer. Raises ConfigError if its package is not installed."""
    try:
        return importlib.import_module("rapidocr_onnxruntime").RapidOCR()
    except ImportError as error:
        raise ConfigError(
            f"filters.text_area_max needs the package rapidocr-onnxruntime ({error}); "
            "pip install 'landiff-pretrain[text]', or set filters.text_area_max=null"
        ) from None
