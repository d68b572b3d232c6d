"""Synthetic videos: reproducible, and as their captions say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from landiff.data_pipeline.synthetic.shapes import moving_shape, write_videos
from landiff.data_pipeline.video.codec import SafeDecoder, VideoFile, Wanted


def test_same_seed_and_index_give_the_same_video_and_others_differ() -> None:
    sizes = {"num_frames": 5, "height": 32, "width": 48}
    first, again = moving_shape(3, **sizes), moving_shape(3, **sizes)
    assert np.array_equal(first.frames, again.frames)
    assert first.caption == again.caption
    others = [moving_shape(4, **sizes), moving_shape(3, seed=1, **sizes)]
    assert all(not np.array_equal(first.frames, other.frames) for other in others)


def test_the_shape_moves_as_the_caption_says() -> None:
    for index in range(12):
        video = moving_shape(index, num_frames=3, height=64, width=64)
        words = video.caption.split()
        axis = 2 if words[4] in ("left", "right") else 1
        step = 1 if words[4] in ("right", "down") else -1
        speed = {"slowly": 0.15, "quickly": 0.5}[words[5]] * 64 / 8
        moved = np.roll(video.frames[0], round(2 * step * speed), axis - 1)
        still = np.abs(video.frames[2].astype(int) - video.frames[0]).mean()
        left = np.abs(video.frames[2].astype(int) - moved).mean()
        assert left < 0.5 * still


def test_written_videos_decode_to_what_was_drawn(tmp_path: Path) -> None:
    lines = write_videos(tmp_path, 2, num_frames=9).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    videos = [moving_shape(index, num_frames=9, height=64, width=96) for index in range(2)]
    assert [row["caption"] for row in rows] == [video.caption for video in videos]
    file = VideoFile(tmp_path / rows[1]["file"])
    with SafeDecoder() as decoder:
        frames = decoder.decode(file, [0.0], Wanted(9, 8.0, 64, 96))[0]
    # yuv420p and crf 18 change hard edges
    assert np.abs(frames.astype(int) - videos[1].frames).mean() < 3
