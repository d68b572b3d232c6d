"""`landiff evaluate videos`: metrics of a folder of videos, beside a folder of reference videos.

Shape letters: T frames, H, W height and width in pixels, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.data_pipeline.synthetic.judge import judge, rates
from landiff.data_pipeline.synthetic.world import Label, parse_caption
from landiff.data_pipeline.video.codec import ClipDamaged, ClipDecoder
from landiff.data_pipeline.video.motion import motion
from landiff.launchers.config import VideoMetricsConfig
from landiff.launchers.data.shapes import format_rates, rates_document
from landiff.launchers.progress import ProgressLine
from landiff.launchers.results.sample_folder import read_record
from landiff.model_zoo import frozen
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.evaluate.video_metrics import (
    flicker,
    frame_difference,
    frechet_distance,
    kernel_distance,
    video_vector,
)
from landiff.model_zoo.frozen.base import VisionFeatures

MEANS = ("flicker", "frame_difference", "motion", "residual_motion")
TITLES = {
    "flicker": "flicker, of 255",
    "frame_difference": "frame difference, of 255",
    "motion": "motion, frame heights per second",
    "residual_motion": "motion without the camera's",
}
NETWORK_NOTE = (
    "FVD and KVD are those of {network}, whose features of single frames are averaged over time: "
    "compare them with others of this network and number of videos only, not with published ones."
)


@dataclass
class MeasuredVideos:
    """A folder of videos: a row of metrics and a feature vector of each, and what they show."""

    rows: list[dict[str, Any]]
    vectors: list[Tensor]
    shown: list[tuple[Label, Mapping[str, str | None]]]

    def mean(self, name: str) -> float:
        """Mean of a metric over the videos."""
        return float(np.mean([row[name] for row in self.rows]))


def measure_folder(
    folder: Path,
    config: VideoMetricsConfig,
    network: VisionFeatures,
    size: tuple[int, int] | None = None,
) -> tuple[MeasuredVideos, tuple[int, int]]:
    """Measures the videos of a folder, and returns the size at which features were computed.

    size: height and width; those of the first video if None, in whole cells of the network.

    Raises ConfigError for a video that cannot be read.
    """
    found = MeasuredVideos([], [], [])
    paths = video_files(folder)
    progress = ProgressLine(f"evaluate {folder}", "videos")
    with ClipDecoder("pyav") as decoder:
        for number, path in enumerate(paths):
            progress(number, len(paths), path.name)
            try:
                frames_THWC = decoder.decode(path.read_bytes())
            except ClipDamaged as error:
                raise ConfigError(f"{path} cannot be read: {error}; remove it") from None
            frames_THWC = frames_THWC[: config.num_frames]
            if size is None:
                size = whole_cells(frames_THWC.shape[1], frames_THWC.shape[2], network.cell)
            found.rows.append(measure(path, frames_THWC, config.fps))
            resized = torch.from_numpy(resize(frames_THWC, size))
            found.vectors.append(video_vector(network, resized.to(pick_device(config.device))))
            _judge(found, path, frames_THWC, config.fps)
    progress(len(paths), len(paths))
    assert size is not None
    return found, size


def video_files(folder: Path) -> list[Path]:
    """The mp4 files of a folder, at least two. Raises ConfigError."""
    paths = sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))
    if len(paths) < 2:
        raise ConfigError(f"{folder} holds {len(paths)} *.mp4; metrics of a set need at least 2")
    return paths


def measure(path: Path, frames_THWC: np.ndarray, fps: float) -> dict[str, Any]:
    """The metrics of one video."""
    moving = motion(frames_THWC, fps)
    frames = torch.from_numpy(frames_THWC)
    return {
        "file": path.name,
        "frames": len(frames_THWC),
        "flicker": flicker(frames),
        "frame_difference": frame_difference(frames),
        "motion": moving.mean,
        "residual_motion": moving.residual,
        "cuts": moving.cuts,
    }


def whole_cells(height: int, width: int, cell: int) -> tuple[int, int]:
    """The nearest size in whole cells."""
    return max(1, round(height / cell)) * cell, max(1, round(width / cell)) * cell


def resize(frames_THWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames at another height and width."""
    if frames_THWC.shape[1:3] == size:
        return frames_THWC
    height, width = size
    scaled = [
        cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames_THWC
    ]
    return np.stack(scaled)


def _judge(found: MeasuredVideos, path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    """Adds what a video of the shapes world shows, if its prompt is a caption of that world."""
    record = read_record(path)
    label = None if record is None else parse_caption(str(record.get("prompt", "")))
    if label is not None:
        found.shown.append((label, judge(frames_THWC, fps).found))


def evaluate_videos(config: VideoMetricsConfig) -> dict[str, Any]:
    """Measures the videos of a config. Prints a table, writes the results and returns them."""
    network = frozen.build(config.features, pick_device(config.device))
    assert isinstance(network, VisionFeatures), type(network)
    videos, size = measure_folder(config.videos, config, network)
    document: dict[str, Any] = {
        "videos": {name: videos.mean(name) for name in MEANS},
        "network": {"name": network.name, "fingerprint": network.fingerprint, "size": size},
        "notes": [],
        "rows": videos.rows,
    }
    if videos.shown:
        labels = [label for label, _ in videos.shown]
        document["text_following"] = rates_document(
            rates(labels, [shown for _, shown in videos.shown])
        )
    if config.reference is not None:
        reference, _ = measure_folder(config.reference, config, network, size)
        document["reference"] = {name: reference.mean(name) for name in MEANS}
        first, second = torch.stack(videos.vectors), torch.stack(reference.vectors)
        document["fvd"] = frechet_distance(first, second)
        document["kvd"] = kernel_distance(first, second)
        document["notes"] = notes(videos.rows, reference.rows, network.name)
    write_text(config.out, json.dumps(document, indent=1) + "\n")
    print(format_metrics(document))
    return document


def notes(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], network: str
) -> list[str]:
    """What limits the comparison."""
    found = [NETWORK_NOTE.format(network=network)]
    if len(rows) != len(reference):
        found.append(
            f"{len(rows)} videos and {len(reference)} of the reference: the bias of FVD depends on "
            "both numbers; KVD has none."
        )
    lengths = sorted({row["frames"] for row in [*rows, *reference]})
    if len(lengths) > 1:
        found.append(
            f"Videos have {lengths[0]} to {lengths[-1]} frames; num_frames={lengths[0]} compares "
            "equal lengths."
        )
    return found


def format_metrics(document: Mapping[str, Any]) -> str:
    """The metrics as a table."""
    has_reference = "reference" in document
    lines = [f"{'':<36}{'videos':>12}" + (f"{'reference':>12}" if has_reference else "")]
    for name in MEANS:
        line = f"{TITLES[name]:<36}{document['videos'][name]:>12.4f}"
        if has_reference:
            line += f"{document['reference'][name]:>12.4f}"
        lines.append(line)
    if has_reference:
        network = document["network"]["name"]
        lines.append(f"{f'FVD of {network}':<36}{document['fvd']:>12.4f}")
        lines.append(f"{f'KVD of {network}':<36}{document['kvd']:>12.4f}")
    lines += document["notes"]
    if "text_following" in document:
        lines += [
            "",
            "text following, by the pixel judge",
            format_rates(document["text_following"]),
        ]
    return "\n".join(lines)
