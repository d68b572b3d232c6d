"""Videos that end before the time that their container promises are truncated, not too short."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.video.codec import DecodeFailure, SafeDecoder, Wanted
from tests.data_pipeline.ingest_helpers import shards_config
from tests.data_pipeline.video_files import HEIGHT, WIDTH, barcodes

FRAMES = 48
RATE = 24
FASTSTART = {"movflags": "faststart"}  # the index before the data
KINDS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "mp4": ("mp4", "libx264", FASTSTART, 48),
    "short GOPs": ("mp4", "libx264", FASTSTART, 8),
    "mov": ("mov", "libx264", FASTSTART, 48),
    "mkv": ("matroska", "libx264", {}, 48),
    "webm": ("webm", "libvpx-vp9", {}, 48),
    "avi": ("avi", "mpeg4", {}, 12),
}
"""Container, codec, options of the container, frames of a GOP."""


def write_video(
    path: Path, container: str, codec: str, options: dict[str, str], gop: int, audio_s: float = 0.0
) -> None:
    """Two seconds of video, and silence of another length."""
    with av.open(str(path), "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=RATE)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.bit_rate = 400_000
        sound = output.add_stream("aac", rate=16000) if audio_s else None
        for picture in barcodes(FRAMES):
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                output.mux(packet)
        output.mux(stream.encode())
        if sound is None:
            return
        for number in range(int(audio_s * 16000) // 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            frame.pts = number * 1024
            frame.time_base = Fraction(1, 16000)
            output.mux(sound.encode(frame))
        output.mux(sound.encode())


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    found = {}
    for kind, (container, codec, options, gop) in KINDS.items():
        write_video(folder / "video", container, codec, options, gop)
        found[kind] = (folder / "video").read_bytes()
    return found


@pytest.fixture(scope="module")
def decoder():
    with SafeDecoder() as decoder:
        yield decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.8, 0.6])
def test_the_missing_part_is_known(decoder: SafeDecoder, videos, kind, share) -> None:
    data = videos[kind]
    info = decoder.probe(data[: int(share * len(data))])
    assert not isinstance(info, DecodeFailure)
    if share == 1.0:
        assert info.missing_s == 0.0
        assert info.duration_s == pytest.approx(2.0, abs=0.05)
    else:
        assert info.missing_s == pytest.approx(2.0 - info.duration_s, abs=0.1) and info.missing_s


@pytest.mark.parametrize("kind", KINDS)
def test_frames_after_the_end_are_missing_or_damaged(decoder: SafeDecoder, videos, kind) -> None:
    data = videos[kind]
    half = len(data) // 2
    for damaged in (data[:half], data[:half] + bytes(len(data) - half)):
        decoder.begin()
        (found,) = decoder.decode(damaged, [0.0], Wanted(15, 8.0, HEIGHT, WIDTH))
        assert isinstance(found, DecodeFailure)
        assert found.reason in ("truncated", "invalid_data", "corrupt_frame"), found
    decoder.begin()
    (found,) = decoder.decode(data, [1.5], Wanted(15, 8.0, HEIGHT, WIDTH))
    assert isinstance(found, DecodeFailure) and found.reason == "too_short", "it is complete"


def test_shards_tell_truncated_videos_from_short_ones(videos, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for kind, data in videos.items():
        (source / f"{kind}.mp4").write_bytes(data[: int(0.6 * len(data))])
    (source / "whole.mp4").write_bytes(videos["mp4"])
    write_video(source / "sound.mkv", "matroska", "libx264", {}, 48, audio_s=8.0)
    write_video(source / "sound.mp4", "mp4", "libx264", FASTSTART, 48, audio_s=8.0)
    rows = [f"{path.name},a video,," for path in sorted(source.iterdir())]
    rows += ["mp4.mp4,a short span of a truncated video,0,0.1", "whole.mp4,a short span,0,0.5"]
    rows += [f"sound.{suffix},the last 1.5 s,0.5," for suffix in ("mkv", "mp4")]
    (source / "captions.csv").write_text("\n".join(["file,caption,start_s,end_s", *rows, ""]))
    config = shards_config(source, num_frames=15, max_bad_fraction=1.0)
    make_shards(config, tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    reasons = {(reject.key, reject.reason) for reject in manifest.rejects}
    for kind in videos:
        assert (f"{kind}.mp4", "truncated") in reasons, reasons
    details = [each.detail for each in manifest.rejects if each.key == "avi.mp4"]
    assert "s of the 2.000 s that its header says; copy or download it again" in details[0]
    for name in ("whole.mp4", "sound.mkv", "sound.mp4", "mp4.mp4"):
        assert (name, "too_short") in reasons, reasons
