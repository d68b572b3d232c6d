"""The length that a container promises, to tell a truncated video from a short one.

Runs in the child process that decodes (`landiff.data_pipeline.video.pyav_child`).
"""

from __future__ import annotations

import av

ESTIMATED = frozenset(("mpegts", "mpeg", "h264", "hevc", "mpegvideo", "m4v", "rawvideo"))
"""Formats without a length: FFmpeg estimates one from the file as it is."""
LEAST_SHARE = 0.1  # of the promised length; containers are often wrong by less
LEAST_FRAMES = 4


def promised_s(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> float:
    """Length of a video in seconds according to the header of its container, 0.0 if unknown."""
    if container.format.name in ESTIMATED:
        return 0.0
    if container.format.name == "avi":  # FFmpeg shortens the duration of a truncated AVI file
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = _seconds(stream.metadata.get("DURATION", ""))  # of Matroska and WebM
    if tag:
        return tag
    only_stream = len(container.streams) == 1  # else another stream may be longer
    if only_stream and container.duration:
        return container.duration / av.time_base
    return 0.0


def missing_s(promised: float, found: float, rate: float) -> float:
    """Seconds that a video lacks, 0.0 if it is about as long as promised.

    found: its length in s. rate: frames per second, 0.0 if unknown.
    """
    missing = promised - found
    least = max(LEAST_SHARE * promised, LEAST_FRAMES / (rate or 24))
    return missing if missing > least else 0.0


def truncated_detail(found: float, promised: float) -> str:
    """Detail of the failure of a truncated video."""
    return (
        f"ends after {found:.3f} s of the {promised:.3f} s that its header says; copy or download "
        "it again"
    )


def _seconds(text: str) -> float:
    """`00:00:02.000000000` -> 2.0; 0.0 for other texts."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0
