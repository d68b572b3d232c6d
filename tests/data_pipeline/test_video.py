import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from landiff.data_pipeline.video.codec import (
    ClipDamaged,
    ClipDecoder,
    DecodeFailure,
    SafeDecoder,
    VideoFile,
    Wanted,
    encode_clip,
    write_mp4,
)
from tests.data_pipeline.video_files import (
    FOREIGN,
    HEIGHT,
    WIDTH,
    X264,
    barcodes,
    encode,
    numbers,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def decoder() -> Iterator[SafeDecoder]:
    with SafeDecoder(timeout_s=20) as decoder:
        yield decoder


@pytest.mark.parametrize("name", FOREIGN)
def test_frame_is_the_one_shown_at_that_time(decoder: SafeDecoder, name: str) -> None:
    data = encode(barcodes(120), **FOREIGN[name])
    starts = [0.0, 0.7, 2.3]  # overlapping spans, starts between frames
    spans = decoder.decode(data, starts, Wanted(17, 8.0, HEIGHT, WIDTH))
    for start, frames in zip(starts, spans, strict=True):
        assert numbers(frames) == [int((start + k / 8) * 24 + 1e-3) for k in range(17)]


@pytest.mark.parametrize(
    "name",
    [
        "h264 closed GOP mp4",
        "h264 open GOP mp4",
        "h264 10 bit mkv",
        "h264 fragmented mp4",
        "hevc open GOP mp4",
        "vp9 webm",
        "mpeg2 mpeg-ts",
    ],
)
def test_far_place_has_the_frames_that_decoding_to_it_gives(
    decoder: SafeDecoder, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "long.bin"
    path.write_bytes(encode(barcodes(1080), **FOREIGN[name]))
    wanted = Wanted(17, 8.0, HEIGHT, WIDTH)
    # with a seek if the container has an index
    far = decoder.decode(VideoFile(path), [41.3, 42.6], wanted)
    decoder.decode(VideoFile(path), [0.0], wanted)
    near = decoder.decode(VideoFile(path), [0.0, 41.3, 42.6], wanted)[1:]
    for start, frames in zip((41.3, 42.6), far, strict=True):
        assert numbers(frames) == [int((start + k / 8) * 24 + 1e-3) for k in range(17)]
    assert np.array_equal(far, near)


def test_what_is_known_of_damage_depends_on_the_group_alone(tmp_path: Path) -> None:
    path, wanted = tmp_path / "long.mp4", Wanted(9, 8.0, HEIGHT, WIDTH)
    data = bytearray(encode(barcodes(1080), **FOREIGN["h264 closed GOP mp4"]))
    with av.open(io.BytesIO(bytes(data))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.is_keyframe][
            2
        ]  # shown at 2 s
    data[packet.pos + packet.size // 2 : packet.pos + packet.size // 2 + 60] = bytes(60)
    path.write_bytes(data)

    def refused(decoder: SafeDecoder, *starts: float) -> list[bool]:
        return [
            isinstance(decoder.decode(VideoFile(path), [start], wanted)[0], DecodeFailure)
            for start in starts
        ]

    with SafeDecoder() as one, SafeDecoder(recycle=2) as recycled:
        assert refused(one, 0.5, 2.0, 20.0, 41.3) == [False, True, True, True]
        assert refused(recycled, 0.5, 2.0, 20.0, 41.3) == [False, True, True, True]
        one.begin()
        recycled.begin()
        assert refused(one, 41.3) == refused(recycled, 41.3) == [False]
        assert (one.process.starts, recycled.process.starts) == (1, 2)


def test_variable_frame_rate_goes_by_time(decoder: SafeDecoder) -> None:
    gaps = np.random.default_rng(0).integers(5, 300, 80)  # milliseconds
    ticks = np.concatenate([[0], np.cumsum(gaps)[:-1]])
    data = encode(
        barcodes(80),
        container="mp4",
        codec="libx264",
        options=X264,
        ticks=ticks.tolist(),
        base=Fraction(1, 1000),
    )
    frames = decoder.decode(data, [0.25], Wanted(33, 8.0, HEIGHT, WIDTH))[0]
    assert numbers(frames) == [int((ticks <= 250 + 125 * k).sum()) - 1 for k in range(33)]


def test_cut_by_an_edit_list_starts_where_the_player_does(decoder: SafeDecoder) -> None:
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(barcodes(72), **FOREIGN["h264 closed GOP mp4"]))) as source,
        av.open(buffer, "w", format="mp4") as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                hidden = int(30 / 24 / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - hidden,
                    packet.dts - hidden,
                    stream,
                )
                output.mux(packet)
    data = buffer.getvalue()
    assert decoder.probe(data).duration_s == pytest.approx(42 / 24, abs=1e-3)
    frames = decoder.decode(data, [0.0], Wanted(14, 8.0, HEIGHT, WIDTH))[0]
    assert numbers(frames) == [30 + 3 * k for k in range(14)]


def test_more_frames_than_the_source_repeats_them(decoder: SafeDecoder) -> None:
    data = encode(barcodes(24), **FOREIGN["h264 closed GOP mp4"])
    frames = decoder.decode(data, [0.0], Wanted(48, 48.0, HEIGHT, WIDTH))[0]
    assert numbers(frames) == [k // 2 for k in range(48)]


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
@pytest.mark.parametrize(("turn", "quarters"), [("90", -1), ("180", 2), ("270", 1)])
def test_rotation_tag_is_applied(
    decoder: SafeDecoder, turn: str, quarters: int, codec: str
) -> None:
    matrices = {"90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0)}
    frames = barcodes(20)
    data = bytearray(
        encode(
            frames,
            container="mp4",
            codec=codec,
            options=X264 if codec == "libx264" else FOREIGN["vp9 webm"]["options"],
        )
    )
    at = data.find(b"tkhd") + 4 + 40  # the matrix of a version 0 track header
    a, b, c, d = (value << 16 for value in matrices[turn])
    data[at : at + 36] = b"".join(
        v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    )
    upright = np.rot90(frames, quarters, (1, 2))
    found = decoder.decode(bytes(data), [0.0], Wanted(5, 24.0, *upright.shape[1:3]))[0]
    assert np.abs(found.astype(int) - upright[:5]).mean() < 4
    assert decoder.probe(bytes(data)).aspect == pytest.approx(upright.shape[2] / upright.shape[1])
    scanned = next(decoder.scan(bytes(data)))
    assert scanned.frames.shape[1] / scanned.frames.shape[2] == pytest.approx(
        upright.shape[1] / upright.shape[2], rel=0.02
    )


def test_spans_that_the_video_does_not_hold_are_too_short(decoder: SafeDecoder) -> None:
    data = encode(barcodes(60), **FOREIGN["h264 closed GOP mp4"])  # 2.5 s
    spans = decoder.decode(data, [0.0, 0.49, 0.51, 9.0], Wanted(17, 8.0, HEIGHT, WIDTH))
    assert [span.reason if isinstance(span, DecodeFailure) else "" for span in spans] == [
        "",
        "",
        "too_short",
        "too_short",
    ]
    assert "2.5" in spans[2].detail


@pytest.mark.parametrize(
    ("container", "duration"), [("mp4", 2.5), ("matroska", 2.5), ("mpegts", 2.5), ("avi", 2.5)]
)
def test_probe_tells_size_rate_and_true_duration(
    decoder: SafeDecoder, container: str, duration: float
) -> None:
    codec = "mpeg4" if container == "avi" else "libx264"
    info = decoder.probe(encode(barcodes(60), container=container, codec=codec))
    assert (info.width, info.height, info.fps) == (WIDTH, HEIGHT, 24.0)
    assert info.duration_s == pytest.approx(duration, abs=0.002)  # matroska counts milliseconds


def test_crop_keeps_the_centre(decoder: SafeDecoder) -> None:
    picture = np.zeros((4, 96, 192, 3), np.uint8)
    picture[:, :, 48:144] = 200
    data = encode(picture, container="mp4", codec="libx264", options=X264)
    frame = decoder.decode(data, [0.0], Wanted(1, 24.0, 48, 48))[0][0]
    assert np.abs(frame[:, 2:-2].astype(int) - 200).max() < 8


# ------------------------------------------------------------------------------------------ colour


def smooth_colors(height: int, width: int, frames: int = 3) -> np.ndarray:
    small = np.random.default_rng(1).integers(20, 236, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)[None].repeat(frames, 0)


@pytest.mark.parametrize(
    ("matrix", "full_range", "tagged", "height"),
    [
        ("bt709", False, True, 96),
        ("bt601", False, True, 96),
        ("bt709", True, True, 96),
        ("bt601", False, False, 96),
        ("bt709", False, False, 720),
    ],
)
def test_colors_are_right_whatever_the_file_says(
    decoder: SafeDecoder, matrix: str, full_range: bool, tagged: bool, height: int
) -> None:
    colors = smooth_colors(height, height * 16 // 9 // 2 * 2)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24, options={"crf": "4", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = colors.shape[2], colors.shape[1], "yuv420p"
        if tagged:
            stream.codec_context.colorspace = (
                Colorspace.ITU709 if matrix == "bt709" else Colorspace.SMPTE170M
            )
            stream.codec_context.color_range = ColorRange.JPEG if full_range else ColorRange.MPEG
        for picture in colors:
            yuv = rgb_to_yuv420(
                picture,
                0.2126 if matrix == "bt709" else 0.299,
                0.0722 if matrix == "bt709" else 0.114,
                full_range,
            )
            output.mux(stream.encode(av.VideoFrame.from_ndarray(yuv, format="yuv420p")))
        output.mux(stream.encode(None))
    found = decoder.decode(buffer.getvalue(), [0.0], Wanted(1, 24.0, *colors.shape[1:3]))[0]
    error = found[0].astype(float) - colors[0]
    assert np.abs(error.mean((0, 1))).max() < 0.6  # a wrong matrix or range is off by 5 and more
    assert np.abs(error).mean() < 1.5


def rgb_to_yuv420(rgb: np.ndarray, red: float, blue: float, full_range: bool) -> np.ndarray:
    """Floating-point reference: [H, W, 3] -> planar uint8 [H * 3 / 2, W]."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    luma, chroma = (
        (luma, chroma) if full_range else (16 + luma * 219 / 255, [c * 224 / 255 for c in chroma])
    )
    small = [128 + c.reshape(c.shape[0] // 2, 2, c.shape[1] // 2, 2).mean((1, 3)) for c in chroma]
    planes = np.concatenate([luma.ravel(), *(c.ravel() for c in small)])
    return np.clip(np.round(planes), 0, 255).astype(np.uint8).reshape(-1, rgb.shape[1])


# --------------------------------------------------------------------------------------- our clips


@pytest.fixture(scope="module", params=["decord", "pyav"])
def clips(request: pytest.FixtureRequest) -> Iterator[ClipDecoder]:
    with ClipDecoder(request.param) as decoder:
        yield decoder


def test_our_clips_come_back_without_colour_bias(clips: ClipDecoder) -> None:
    wide = smooth_colors(64, 128, 1)[0]
    frames = np.stack([wide[:, 2 * k : 2 * k + 96] for k in range(17)])
    found = clips.decode(encode_clip(frames, 8))
    error = found.astype(float) - frames
    assert found.shape == frames.shape
    assert (
        np.abs(error.mean((0, 1, 2))).max() < 0.7
    )  # decord cuts fractions off, what remains is half a level of green
    assert 10 * np.log10(255**2 / (error**2).mean()) > 36


def test_our_clips_keep_every_frame_in_order(clips: ClipDecoder) -> None:
    assert numbers(clips.decode(encode_clip(barcodes(49), 8))) == list(range(49))


def test_frames_stay_as_they_are_while_somebody_holds_them(clips: ClipDecoder) -> None:
    data = [encode_clip(barcodes(60)[first:][:5], 8) for first in range(0, 60, 5)]
    held = [clips.decode(clip)[1:4] for clip in data]  # views; the arrays themselves are gone
    assert [numbers(frames) for frames in held] == [
        [first + 1, first + 2, first + 3] for first in range(0, 60, 5)
    ]
    memories = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        del held[:]
        held += [clips.decode(clip) for clip in data]
    assert len(os.listdir("/proc/self/fd")) <= memories


def test_decoder_of_clips_that_dies_or_hangs_costs_one_clip(clips: ClipDecoder) -> None:
    data = encode_clip(barcodes(9), 8)
    with ClipDecoder(clips.process.backend, timeout_s=3, recycle=4) as decoder:
        decoder.process._start()
        os.kill(decoder.process.pid, signal.SIGSEGV)
        with pytest.raises(ClipDamaged, match="decoder_died: SIGSEGV"):
            decoder.decode(data)
        expected = decoder.decode(data)
        os.kill(decoder.process.pid, signal.SIGSEGV)  # not by what it is asked for now
        assert np.array_equal(decoder.decode(data), expected)
        os.kill(decoder.process.pid, signal.SIGSTOP)
        with pytest.raises(ClipDamaged, match="timeout: more than 3 s"):
            decoder.decode(data)
        for _ in range(5):
            assert np.array_equal(decoder.decode(data), expected)
        assert decoder.process.starts == 5


def test_memory_limit_costs_one_clip(clips: ClipDecoder) -> None:
    large = encode_clip(
        np.zeros((120, 480, 640, 3), np.uint8), 8, preset="ultrafast"
    )  # 110 MB of frames
    with ClipDecoder(clips.process.backend, memory_limit=64 << 20) as decoder:
        with pytest.raises(ClipDamaged, match="out_of_memory|decoder_died"):
            decoder.decode(large)
        assert numbers(decoder.decode(encode_clip(barcodes(5), 8))) == list(range(5))


def test_clips_are_decoded_in_another_process_and_not_kept_there(clips: ClipDecoder) -> None:
    loaded = {
        path.rsplit("/", 1)[-1]
        for path in Path(f"/proc/{clips.process.pid}/maps").read_text().split()
        if "libav" in path
    }
    assert len({name.split(".")[0].split("-")[0] for name in loaded}) == len(loaded), (
        "two FFmpegs in one process"
    )
    large = encode_clip(
        np.zeros((120, 480, 640, 3), np.uint8), 8, preset="ultrafast"
    )  # 110 MB of frames
    assert clips.decode(large).shape == (120, 480, 640, 3)
    clips.decode(encode_clip(barcodes(2), 8))
    time.sleep(0.5)  # a reader that is left idle decodes ahead
    resident = int(Path(f"/proc/{clips.process.pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    assert resident < 200 << 20


def test_damaged_clips_never_hurt_the_parent(clips: ClipDecoder) -> None:
    good, seen = encode_clip(barcodes(17), 8), set()
    generator = np.random.default_rng(2)
    for number in range(24):
        data = bytearray(good[: generator.integers(1, len(good))] if number % 3 == 0 else good)
        for place in generator.integers(0, len(data), number):
            data[place] = generator.integers(256)
        try:
            seen.add(clips.decode(bytes(data)).dtype)
        except ClipDamaged as error:
            seen.add(error.failure.reason)
    assert "damaged" in seen or "invalid_data" in seen
    assert numbers(clips.decode(good)) == list(range(17))


def test_equal_frames_give_equal_bytes() -> None:
    noise = np.random.default_rng(0).normal(size=(17, 64, 64, 3))
    blurred = cv2.normalize(
        np.stack([cv2.GaussianBlur(f, (0, 0), 2) for f in noise]), None, 0, 255, cv2.NORM_MINMAX
    ).astype(np.uint8)
    assert len({encode_clip(blurred, 8) for _ in range(12)}) == 1


def test_our_clips_are_one_closed_group_of_tagged_yuv420p() -> None:
    with av.open(io.BytesIO(encode_clip(barcodes(49), 7.5))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(15, 2), 49)
        assert stream.codec_context.colorspace == Colorspace.ITU709
        frames = list(container.decode(stream))
    assert [frame.key_frame for frame in frames] == [True] + [False] * 48
    assert [frame.time for frame in frames] == pytest.approx([k / 7.5 for k in range(49)])


def test_clip_whose_checksum_differs_is_not_decoded() -> None:
    with ClipDecoder() as clips:
        with pytest.raises(ClipDamaged, match="shard is damaged"):
            clips.decode(encode_clip(barcodes(2), 8), sha256="0" * 64)
        assert clips.process.starts == 0


def test_odd_frames_are_refused_for_clips() -> None:
    with pytest.raises(ValueError, match="63x64"):
        encode_clip(np.zeros((2, 63, 64, 3), np.uint8), 8)


def test_written_video_plays_everywhere(tmp_path: Path, decoder: SafeDecoder) -> None:
    path = tmp_path / "samples" / "sample.mp4"
    frames = smooth_colors(63, 95, 9)
    write_mp4(path, frames, 8)
    assert os.listdir(path.parent) == ["sample.mp4"]
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")  # the player needs no second request
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (96, 64, 9)
    found = decoder.decode(VideoFile(path), [0.0], Wanted(9, 8.0, 64, 96))[0][:, :63, :95]
    assert np.abs(found.astype(int) - frames).mean() < 2


# ----------------------------------------------------------------------------------- hostile input


@pytest.fixture(scope="module")
def good() -> bytes:
    return encode(
        smooth_colors(HEIGHT, WIDTH, 72) + barcodes(72) // 8, **FOREIGN["h264 closed GOP mp4"]
    )


def test_bad_files_give_their_reason(decoder: SafeDecoder, good: bytes) -> None:
    silent = io.BytesIO()
    with av.open(silent, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    wide = encode(
        np.zeros((1, 64, 8192, 3), np.uint8),
        container="mp4",
        codec="libx264",
        options={"preset": "ultrafast"},
    )
    cases = {
        b"": "invalid_data",
        b"\0": "invalid_data",
        b"<html>404 Not Found</html>" * 40: "invalid_data",
        np.random.default_rng(0).bytes(100_000): "invalid_data",
        good[:32]: "invalid_data",
        good[: len(good) // 2]: "invalid_data",  # its index comes last
        silent.getvalue(): "no_video_stream",
    }
    for data, reason in cases.items():
        assert decoder.probe(data).reason == reason
        assert decoder.decode(data, [0.0], Wanted(9, 8.0, 32, 32))[0].reason == reason
    with SafeDecoder(max_pixels=4096 * 100) as strict:
        assert strict.probe(wide).reason == "too_large"
    assert decoder.probe(VideoFile(Path("nowhere.mp4"))).reason == "missing_file"
    assert isinstance(decoder.decode(good, [0.0], Wanted(9, 8.0, 32, 32))[0], np.ndarray)


def test_damage_that_the_codec_would_hide_is_noticed(decoder: SafeDecoder, good: bytes) -> None:
    with av.open(io.BytesIO(good)) as container:
        second = [packet for packet in container.demux(video=0) if packet.is_keyframe][
            1
        ]  # shown at 1 s
        place = second.pos + second.size // 2
    broken = bytearray(good)
    broken[place : place + 60] = bytes(60)
    spans = decoder.decode(bytes(broken), [0.0, 0.9], Wanted(7, 8.0, 32, 32))
    assert isinstance(spans[0], np.ndarray)
    assert spans[1].reason == "corrupt_frame"
    first, last = (
        decoder.decode(data, [0.0], Wanted(7, 8.0, 32, 32))[0] for data in (bytes(broken), good)
    )
    assert np.array_equal(first, last)  # frames before the damage are untouched


HASHED = {
    "container": "mp4",
    "codec": "libx265",
    "options": {
        "preset": "ultrafast",
        "x265-params": "log-level=none:keyint=24:pools=none:frame-threads=1:hash=1",
    },
}


@pytest.mark.parametrize("spec", [FOREIGN["vp9 webm"], HASHED], ids=["vp9", "hevc with hashes"])
def test_no_damage_inside_pictures_is_missed_where_the_stream_lets_one_see_it(
    decoder: SafeDecoder, spec: dict
) -> None:
    data = encode(smooth_colors(HEIGHT, WIDTH, 72) // 2 + barcodes(72) // 8, **spec)
    wanted, starts = Wanted(3, 24.0, HEIGHT, WIDTH), [k / 8 for k in range(24)]
    reference = decoder.decode(data, starts, wanted)
    assert not any(isinstance(span, DecodeFailure) for span in reference)  # no false alarm
    with av.open(io.BytesIO(data)) as container:
        packets = [
            (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 100
        ]
    generator, noticed = np.random.default_rng(4), 0
    for position, size in [packets[k] for k in generator.integers(len(packets), size=12)]:
        broken = bytearray(data)
        for place in generator.integers(position + 30, position + size, 3):
            broken[place] ^= 1 << int(generator.integers(8))
        spans = decoder.decode(bytes(broken), starts, wanted)
        noticed += any(isinstance(span, DecodeFailure) for span in spans)
        assert all(
            isinstance(span, DecodeFailure) or cv2.PSNR(span, good) > 40
            for span, good in zip(spans, reference, strict=True)
        )
    assert noticed >= 10


@pytest.mark.parametrize("name", ["h264 mpeg-ts", "mpeg2 mpeg-ts"])
def test_packets_lost_on_the_way_are_noticed(decoder: SafeDecoder, name: str) -> None:
    data = encode(smooth_colors(HEIGHT, WIDTH, 72) // 2 + barcodes(72) // 8, **FOREIGN[name])
    wanted, starts = Wanted(3, 24.0, HEIGHT, WIDTH), [k / 8 for k in range(23)]
    reference = decoder.decode(data, starts, wanted)
    places = [
        at for at in range(0, len(data), 188) if data[at + 1] & 0x1F == 1 and data[at + 2] == 0
    ]  # PID 256: video
    for at in np.random.default_rng(3).choice(places[2:], 10, replace=False):
        spans = decoder.decode(data[:at] + data[at + 188 :], starts, wanted)
        assert any(isinstance(span, DecodeFailure) for span in spans)
        assert all(
            isinstance(span, DecodeFailure) or cv2.PSNR(span, good) > 40
            for span, good in zip(spans, reference, strict=True)
        )


def test_mutated_files_never_hurt_the_parent(good: bytes) -> None:
    generator = np.random.default_rng(5)
    seen = set()
    with SafeDecoder(timeout_s=10) as decoder:
        for number in range(60):
            data = bytearray(good)
            if number % 3 == 0:
                data = data[: generator.integers(1, len(data))]
            else:
                low, high = (0, len(data)) if number % 3 == 1 else (good.find(b"moov"), len(data))
                for place in generator.integers(low, high, 1 + number // 3):
                    data[place] = generator.integers(256)
            found = decoder.decode(bytes(data), [0.0], Wanted(9, 8.0, 32, 32))[0]
            seen.add(found.reason if isinstance(found, DecodeFailure) else "frames")
        assert isinstance(decoder.decode(good, [0.0], Wanted(9, 8.0, 32, 32))[0], np.ndarray)
    assert {"invalid_data", "corrupt_frame", "frames"} <= seen


def test_playlist_cannot_open_other_files(
    decoder: SafeDecoder, tmp_path: Path, good: bytes
) -> None:
    (tmp_path / "secret.mp4").write_bytes(good)
    playlist = tmp_path / "clip.mp4"
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile 'file:{tmp_path}/secret.mp4'\n",
    ):
        playlist.write_text(text)
        assert isinstance(
            decoder.decode(VideoFile(playlist), [0.0], Wanted(1, 8.0, 32, 32))[0], DecodeFailure
        )


def test_range_of_bytes_is_a_video(decoder: SafeDecoder, tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "many.bin"
    path.write_bytes(b"x" * 1000 + good + b"y" * 1000)
    video = VideoFile(path, 1000, len(good))
    wanted = Wanted(9, 8.0, 32, 32)
    assert np.array_equal(
        decoder.decode(video, [0.0], wanted)[0], decoder.decode(good, [0.0], wanted)[0]
    )


def test_decoder_that_dies_hangs_or_is_used_up_is_replaced(good: bytes) -> None:
    wanted = Wanted(2, 8.0, 32, 32)
    with SafeDecoder(timeout_s=2, recycle=4) as decoder:
        decoder.process._start()
        os.kill(decoder.process.pid, signal.SIGKILL)
        assert decoder.decode(good, [0.0], wanted)[0] == DecodeFailure("decoder_died", "SIGKILL")
        reference = decoder.decode(good, [0.0], wanted)[0]
        os.kill(decoder.process.pid, signal.SIGKILL)  # not by what it is asked for now
        assert np.array_equal(decoder.decode(good, [0.0], wanted)[0], reference)
        os.kill(decoder.process.pid, signal.SIGSTOP)
        assert decoder.decode(good, [0.0], wanted)[0].reason == "timeout"
        for _ in range(5):
            assert np.array_equal(decoder.decode(good, [0.0], wanted)[0], reference)
        assert decoder.process.starts == 5


def test_memory_limit_costs_the_video_only(good: bytes) -> None:
    large = encode(
        np.zeros((2, 2160, 3840, 3), np.uint8),
        container="mp4",
        codec="libx264",
        options={"preset": "ultrafast"},
    )
    with SafeDecoder(memory_limit=20 << 20) as decoder:
        assert isinstance(decoder.decode(good, [0.0], Wanted(2, 8.0, 32, 32))[0], np.ndarray)
        assert isinstance(decoder.decode(large, [0.0], Wanted(1, 8.0, 32, 32))[0], DecodeFailure)
        assert isinstance(decoder.decode(good, [0.0], Wanted(2, 8.0, 32, 32))[0], np.ndarray)


def test_decoder_ends_with_its_parent() -> None:
    script = (
        "import time\n"
        "from landiff.data_pipeline.video.codec import SafeDecoder\n"
        "decoder = SafeDecoder()\n"
        "decoder.probe(b'')\n"
        "print(decoder.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    until = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
