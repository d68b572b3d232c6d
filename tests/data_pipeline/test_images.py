"""Images as clips of one frame, alone and beside videos: folders, tars and tables."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.ingest.sources.report import summarize_source
from landiff.data_pipeline.video.codec import ClipDecoder
from tests.data_pipeline.ingest_helpers import raw_parts, raw_samples, shards_config, write_rows
from tests.data_pipeline.video_files import X264, encode

ORIENTATION = 0x0112  # the Exif tag
TURNED = 6  # displayed after a quarter turn to the right
TALL = {"num_frames": 1, "height": 48, "width": 32}
WIDE = {"num_frames": 1, "height": 32, "width": 48}
VIDEO = {"num_frames": 9, "height": 32, "width": 48}


def picture(number: int, height: int = 32, width: int = 48) -> Image.Image:
    """A picture with a bright upper left quarter, different for each number."""
    pixels = np.full((height, width, 3), 10 + number, np.uint8)
    pixels[: height // 2, : width // 2] = 220
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def phone_video() -> bytes:
    """Nine upright frames that are stored lying, with a matrix that turns them."""
    frames = np.stack([np.asarray(picture(number)) for number in range(9)])
    data = bytearray(encode(frames, container="mp4", codec="libx264", options=X264))
    at = data.find(b"tkhd") + 4 + 40
    matrix = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    return bytes(data)


def image_files() -> dict[str, bytes]:
    """One file of each kind, with different pictures."""
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    frames = [picture(number) for number in range(20, 32)]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 100}
    return {
        "still.png": saved(picture(0), "png"),
        "alpha.png": saved(picture(1).convert("RGBA"), "png"),
        "photo.JPG": saved(picture(2), "jpeg", quality=95),
        "phone.jpeg": saved(picture(3), "jpeg", quality=95, exif=exif),
        "web.webp": saved(picture(4), "webp", lossless=True),
        "still.gif": saved(picture(5), "gif"),
        "moving.gif": saved(frames[0], "gif", **moving),
        "moving.webp": saved(frames[0], "webp", lossless=True, **moving),
        "cut.png": saved(picture(6), "png")[:60],
    }


def clips_of(source: Path, data: Path, **changes: object) -> dict[str, tuple[tuple, np.ndarray]]:
    """Source of each clip -> shape in its metadata, and its frames."""
    make_shards(shards_config(source, max_bad_fraction=0.5, **changes), data)
    found = {}
    with ClipDecoder("pyav") as decoder:
        for meta, parts in zip(raw_samples(data), raw_parts(data), strict=True):
            shape = (meta.num_frames, meta.height, meta.width)
            found[meta.source] = (shape, decoder.decode(parts["mp4"]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and a video, each with a caption."""
    source = tmp_path_factory.mktemp("mixed")
    for name, data in {**image_files(), "walk.mp4": phone_video()}.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(f"caption of {name}")
    return source


def test_images_are_clips_of_one_frame_in_upright_colours(folder: Path, tmp_path: Path) -> None:
    shape = {"num_frames": 1, "height": 32, "width": 48, "filters": {"motion_min": 0.1}}
    clips = clips_of(folder, tmp_path, max_spans=1, **shape)
    assert sorted(clips) == sorted({*image_files(), "walk.mp4"} - {"moving.webp", "cut.png"})
    for name, (meta, frames) in clips.items():
        assert meta == (1, 32, 48) and frames.shape == (1, 32, 48, 3)
        if name in ("phone.jpeg", "walk.mp4"):  # the bright quarter is at the right after the turn
            bright, dark = frames[0, 4:12, 30:44], frames[0, 4:12, 4:20]
        else:
            bright, dark = frames[0, 2:14, 2:22], frames[0, 18:, 26:]
        # x264 and JPEG change pixels by a few levels.
        assert bright.mean() > 210 and dark.mean() < 50, name
    manifest = (tmp_path / "manifest.json").read_text()
    assert "animated WebP" in manifest and "cut.png" in manifest


def test_images_and_videos_fill_buckets_of_their_length_and_aspect(
    folder: Path, tmp_path: Path
) -> None:
    changes = {"num_frames": None, "height": None, "width": None}
    buckets = [WIDE, TALL, VIDEO, {**VIDEO, "height": 48, "width": 32}]
    clips = clips_of(folder, tmp_path, buckets=buckets, max_spans=4, fps=24, **changes)
    shapes = {name: shape for name, (shape, _) in clips.items()}
    assert shapes.pop("phone.jpeg") == (1, 48, 32)
    # A video gives no images, also not of what is left after its clips.
    assert shapes.pop("walk.mp4") == (9, 48, 32)
    assert shapes.pop("moving.gif") == (9, 32, 48)
    assert set(shapes.values()) == {(1, 32, 48)}
    assert len(raw_samples(tmp_path)) == len(clips) + 2  # the GIF of 1.2 s is three clips


def test_tars_and_tables_of_images(tmp_path: Path) -> None:
    files = image_files()
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in ("still.png", "photo.JPG", "web.webp"):
            caption = f"{name.partition('.')[0]}.txt"
            for member, data in ((name, files[name]), (caption, b"a picture")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (tmp_path / "web.webp").write_bytes(files["web.webp"])
    write_rows(tmp_path / "table.jsonl", [{"file": "web.webp", "caption": "a picture"}])
    shape = {"num_frames": 1, "height": 32, "width": 48}
    assert len(clips_of(tmp_path / "images.tar", tmp_path / "tar", **shape)) == 3
    assert list(clips_of(tmp_path / "table.jsonl", tmp_path / "csv", **shape)) == ["web.webp"]


def test_without_a_shape_of_one_frame_images_are_ignored_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_files()["still.png"])
    with pytest.raises(ConfigError, match="images are clips of one frame: num_frames=1"):
        summarize_source(shards_config(tmp_path))
    (tmp_path / "b.mp4").write_bytes(phone_video())
    config: ShardsConfig = shards_config(tmp_path)
    assert str(summarize_source(config)).endswith("ignored: 1 .png (a.png)")
    with_images = summarize_source(shards_config(tmp_path, num_frames=1))
    assert not with_images.ignored.counts
