"""Video that is not progressive SDR, and clocks that containers do not keep."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from landiff.data_pipeline.video.codec import (
    DecodedSpan,
    DecodeFailure,
    SafeDecoder,
    VideoFile,
    Wanted,
)
from tests.data_pipeline.video_files import HEIGHT, WIDTH, barcodes, encode, numbers
from tests.data_pipeline.video_files import X264 as X264_BARCODES
from tests.data_pipeline.video_kinds import (
    PATCHES,
    Color,
    color_video,
    comb,
    interlaced,
    interlaced_video,
    moving_bar,
    quadrants,
)

H, W = 64, 96
TWO_FRAMES = Wanted(2, 24.0, H, W)


@pytest.fixture(scope="module")
def decoder() -> Iterator[SafeDecoder]:
    with SafeDecoder(timeout_s=20) as decoder:
        yield decoder


def decoded(decoder: SafeDecoder, data: bytes, wanted: Wanted = TWO_FRAMES) -> DecodedSpan:
    (span,) = decoder.decode_spans(data, [0.0], wanted)
    assert isinstance(span, DecodedSpan), span
    return span


def errors(frames: np.ndarray, patches: tuple = PATCHES) -> np.ndarray:
    """Largest error in the middle of each quadrant."""
    height, width = frames.shape[1:3]
    expected = np.stack([quadrants(channel, height, width) for channel in np.array(patches).T], -1)
    difference = np.abs(frames.astype(int) - expected)
    margin_y, margin_x = height // 8, width // 8
    largest = []
    for top, left in itertools.product((0, height // 2), (0, width // 2)):
        rows = slice(top + margin_y, top + height // 2 - margin_y)
        columns = slice(left + margin_x, left + width // 2 - margin_x)
        largest.append(difference[:, rows, columns].max())
    return np.array(largest)


# ------------------------------------------------------------------------------------------ colour

CONVERTED = {
    "PQ 10 bit 4:2:0": (Color(16), "smpte2084/bt2020"),
    "PQ 10 bit 4:2:2": (Color(16, pixels="yuv422p10le"), "smpte2084/bt2020"),
    "PQ 10 bit 4:4:4 full range": (
        Color(16, pixels="yuv444p10le", full_range=True),
        "smpte2084/bt2020",
    ),
    "PQ 8 bit": (Color(16, pixels="yuv420p"), "smpte2084/bt2020"),
    "PQ with P3 primaries": (Color(16, primaries=12), "smpte2084/smpte432"),
    "PQ with BT.709 primaries": (Color(16, primaries=1), "smpte2084/bt709"),
    "PQ without primaries and matrix": (Color(16, tagged=(2, 16, 2)), "smpte2084/bt2020"),
    "HLG 10 bit 4:2:0": (Color(18), "arib-std-b67/bt2020"),
    "HLG 8 bit full range": (Color(18, pixels="yuv420p", full_range=True), "arib-std-b67/bt2020"),
    "BT.2020 SDR": (Color(14), "bt2020-10/bt2020"),
    "BT.2020 SDR 8 bit, matrix only": (
        Color(1, pixels="yuv420p", tagged=(2, 2, 9)),
        "unspecified/bt2020",
    ),
    "Display P3": (Color(1, primaries=12, matrix=1, pixels="yuv420p"), "bt709/smpte432"),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_hdr_and_wide_gamut_become_the_sdr_picture_they_were_made_from(
    decoder: SafeDecoder, name: str
) -> None:
    color, conversion = CONVERTED[name]
    data = color_video(color)
    span = decoded(decoder, data)
    is_coarse = (
        color.transfer == 16 and color.pixels == "yuv420p"
    )  # chroma of PQ in 8 bits moves a dark channel by 13
    assert errors(span.frames).max() <= (14 if is_coarse else 4)
    assert span.conversions == (conversion,)
    assert decoder.probe(data).conversions == (conversion,)


@pytest.mark.parametrize("size", [(H, W), (H // 2, W // 2), (H * 2, W * 2)])
def test_converted_colors_do_not_depend_on_the_size(
    decoder: SafeDecoder, size: tuple[int, int]
) -> None:
    assert (
        errors(decoded(decoder, color_video(Color(16)), Wanted(1, 24.0, *size)).frames).max() <= 4
    )


def test_colors_that_only_the_container_names_are_converted(decoder: SafeDecoder) -> None:
    ffv1 = {"container": "matroska", "codec": "ffv1", "options": {"threads": "1"}}
    vp9 = {
        "container": "webm",
        "codec": "libvpx-vp9",
        "options": {"b": "4M", "deadline": "realtime", "cpu-used": "8"},
    }
    for made, color in ((ffv1, Color(16)), (vp9, Color(18, pixels="yuv420p"))):
        span = decoded(decoder, color_video(color, **made))
        assert errors(span.frames).max() <= 8
        assert span.conversions == (
            ("smpte2084" if color.transfer == 16 else "arib-std-b67") + "/bt2020",
        )


def test_vp9_of_ten_bits_is_decoded(decoder: SafeDecoder) -> None:
    data = (Path(__file__).parent / "vp9_pq_10bit.webm").read_bytes()  # PyAV has no encoder for it
    assert errors(decoded(decoder, data).frames).max() <= 8


def test_hevc_and_av1_say_it_in_their_own_headers(decoder: SafeDecoder) -> None:
    x265 = {
        "codec": "libx265",
        "options": {
            "preset": "ultrafast",
            "crf": "4",
            "x265-params": "log-level=none:pools=none:frame-threads=1",
        },
    }
    av1 = {"codec": "libsvtav1", "options": {"preset": "12", "crf": "10", "svtav1-params": "lp=1"}}
    for made, color in ((x265, Color(16)), (av1, Color(18))):
        assert errors(decoded(decoder, color_video(color, **made)).frames).max() <= 6


def test_reference_white_is_sdr_white_and_what_is_brighter_keeps_its_hue(
    decoder: SafeDecoder,
) -> None:
    patches = ((255, 255, 255), (510, 510, 510), (510, 255, 127), (0, 0, 0))
    for transfer in (16, 18):
        frames = decoded(decoder, color_video(Color(transfer), patches=patches)).frames
        assert (
            errors(frames, ((255, 255, 255), (255, 255, 255), (255, 127, 64), (0, 0, 0))).max() <= 4
        )


def test_greys_keep_their_values_whatever_the_primaries(decoder: SafeDecoder) -> None:
    patches = ((30, 30, 30), (90, 90, 90), (160, 160, 160), (255, 255, 255))
    for primaries in (4, 8, 9, 11, 12):
        color = Color(13, primaries=1, matrix=1, pixels="yuv420p", tagged=(primaries, 13, 1))
        assert (
            errors(decoded(decoder, color_video(color, patches=patches)).frames, patches).max() <= 3
        )


SDR = {
    "BT.709": Color(1, primaries=1, matrix=1, pixels="yuv420p"),
    "SD of NTSC": Color(6, primaries=1, matrix=6, pixels="yuv420p", tagged=(6, 6, 6)),
    "SD of PAL": Color(1, primaries=1, matrix=5, pixels="yuv420p", tagged=(5, 1, 5)),
    "SMPTE 240M": Color(7, primaries=1, matrix=7, pixels="yuv420p", tagged=(7, 7, 7)),
    "sRGB": Color(13, primaries=1, matrix=1, pixels="yuv420p"),
    "10 bit BT.709": Color(1, primaries=1, matrix=1),
    "untagged": Color(1, primaries=1, matrix=5, pixels="yuv420p", tagged=(2, 2, 2)),
}


@pytest.mark.parametrize("name", SDR)
def test_sdr_is_decoded_with_its_matrix_and_not_converted(decoder: SafeDecoder, name: str) -> None:
    span = decoded(decoder, color_video(SDR[name]))
    assert errors(span.frames).max() <= 4
    assert span.conversions == ()


UNSUPPORTED = {
    "linear": ((9, 8, 9), "unsupported_transfer"),
    "log100": ((1, 9, 1), "unsupported_transfer"),
    "log316": ((1, 10, 1), "unsupported_transfer"),
    "smpte428": ((1, 17, 1), "unsupported_transfer"),
    "primaries smpte428": ((10, 1, 1), "unsupported_primaries"),
    "bt2020c": ((9, 16, 10), "unsupported_matrix"),
    "ictcp": ((9, 16, 14), "unsupported_matrix"),
    "ycgco": ((1, 1, 8), "unsupported_matrix"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_converted_is_refused_by_name(decoder: SafeDecoder, name: str) -> None:
    tagged, reason = UNSUPPORTED[name]
    data = color_video(Color(1, primaries=1, matrix=1, tagged=tagged))
    for failure in (decoder.probe(data), decoder.decode(data, [0.0], TWO_FRAMES)[0]):
        assert failure.reason == reason
        assert name.split()[-1] in failure.detail


def test_dolby_vision_without_a_base_layer_is_refused(decoder: SafeDecoder) -> None:
    x265 = {
        "codec": "libx265",
        "options": {
            "preset": "ultrafast",
            "x265-params": "log-level=none:pools=none:frame-threads=1",
        },
    }
    profile_5, profile_8 = Color(16, tagged=(2, 2, 2)), Color(16)
    for color, reason in ((profile_5, "dolby_vision"), (profile_8, None)):
        data = color_video(color, **x265).replace(b"hev1", b"dvh1")
        found = decoder.probe(data)
        assert (found.reason if isinstance(found, DecodeFailure) else None) == reason


def test_hdr_and_interlaced_are_refused_where_the_config_says_so() -> None:
    pq, fields = color_video(Color(16)), interlaced_video(interlaced(moving_bar(12)))
    with SafeDecoder(hdr="reject", interlaced="reject") as strict:
        for data, reason, name in (
            (pq, "hdr", "smpte2084/bt2020"),
            (fields, "interlaced", "video.interlaced"),
        ):
            for failure in (strict.probe(data), strict.decode(data, [0.0], TWO_FRAMES)[0]):
                assert failure.reason == reason
                assert name in failure.detail
        assert errors(decoded(strict, color_video(SDR["BT.709"])).frames).max() <= 4


# -------------------------------------------------------------------------------------- interlaced

INTERLACED = {
    "h264 tff": {},
    "h264 bff": {"field": "bff"},
    "h264 10 bit 4:2:2": {"pixels": "yuv422p10le"},
    "mpeg2 tff ts": {
        "container": "mpegts",
        "codec": "mpeg2video",
        "options": {"q": "1", "bf": "2"},
    },
    "mpeg2 bff program stream": {
        "container": "vob",
        "codec": "mpeg2video",
        "field": "bff",
        "options": {"q": "1"},
    },
    "mpeg4 avi": {"container": "avi", "codec": "mpeg4", "options": {"q": "1", "bf": "2"}},
    "prores mkv": {"container": "matroska", "codec": "prores_ks", "pixels": "yuv422p10le"},
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_video_is_deinterlaced_and_keeps_its_times(
    decoder: SafeDecoder, name: str
) -> None:
    made = INTERLACED[name]
    pictures = moving_bar(48)
    frames = interlaced(pictures, top_first=made.get("field") != "bff")
    data = interlaced_video(frames, **made)
    span = decoded(decoder, data, Wanted(24, 24.0, H, W))
    assert comb(frames) > 5
    assert comb(span.frames) < 0.3
    assert span.conversions == decoder.probe(data).conversions == ("bwdif",)
    edges = (span.frames.mean((1, 3)) > 125).argmax(1)
    assert (
        np.abs(edges - (4 + 2 * np.arange(24))).max() <= 1
    )  # frame k shows what the first field of frame k shows
    assert decoder.probe(data).duration_s == pytest.approx(1.0, abs=0.05)


def test_progressive_pictures_in_an_interlaced_stream_stay_what_they_are(
    decoder: SafeDecoder,
) -> None:
    data = interlaced_video(barcodes(48))
    assert numbers(decoded(decoder, data, Wanted(16, 8.0, HEIGHT, WIDTH)).frames) == [
        3 * k for k in range(16)
    ]


def test_only_the_interlaced_part_of_a_mixed_stream_is_deinterlaced(decoder: SafeDecoder) -> None:
    raw = {"container": "mpeg2video", "codec": "mpeg2video", "options": {"q": "1"}}
    pictures = moving_bar(96)
    first = interlaced_video(pictures[:48:2], **raw, field="prog")
    second = interlaced_video(interlaced(pictures[48:]), **raw)
    spans = decoder.decode_spans(first + second, [0.0, 1.25], Wanted(12, 24.0, H, W))
    assert [span.conversions for span in spans] == [(), ("bwdif",)]
    assert max(comb(span.frames) for span in spans) < 0.3
    expected = np.abs(spans[0].frames.astype(int) - pictures[:24:2]).mean()
    assert expected < 3


def test_deinterlaced_frames_do_not_depend_on_where_decoding_began(
    decoder: SafeDecoder, tmp_path: Path
) -> None:
    path = tmp_path / "long.mp4"
    pictures = moving_bar(2160, 32, 48)
    path.write_bytes(interlaced_video(interlaced(pictures), options={"g": "24"}))
    wanted, starts = Wanted(9, 8.0, 32, 48), [41.3, 42.6]
    far = decoder.decode(VideoFile(path), starts, wanted)
    near = decoder.decode(VideoFile(path), [0.0, 1.3, *starts], wanted)[2:]
    alone = [decoder.decode(VideoFile(path), [start], wanted)[0] for start in starts]
    assert np.array_equal(far, near)
    assert np.array_equal(far, alone)


def test_spans_at_the_ends_of_interlaced_video_have_their_frames(decoder: SafeDecoder) -> None:
    alone = interlaced_video(interlaced(moving_bar(2)))
    assert decoded(decoder, alone, Wanted(1, 24.0, H, W)).conversions == ("bwdif",)
    data = interlaced_video(interlaced(moving_bar(48)))
    (last,) = decoder.decode(data, [23 / 24], Wanted(1, 24.0, H, W))
    assert comb(last[None, 0]) < 1


def test_interlaced_png_is_not_video_of_two_fields(decoder: SafeDecoder) -> None:
    data = encode(
        barcodes(8), container="apng", codec="apng", pixels="rgb24", options={"flags": "+ildct"}
    )
    (span,) = decoder.decode_spans(data, [0.001], Wanted(7, 24.0, HEIGHT, WIDTH))
    assert span.conversions == decoder.probe(data).conversions == ()
    assert np.array_equal(span.frames, barcodes(7))


def test_damage_in_the_next_frame_spoils_a_deinterlaced_one(decoder: SafeDecoder) -> None:
    data = bytearray(interlaced_video(interlaced(moving_bar(96)), options={"g": "24", "bf": "0"}))
    with av.open(io.BytesIO(bytes(data))) as container:
        second = [packet for packet in container.demux(video=0) if packet.is_keyframe][1]
    shown_s = float(second.pts * second.time_base)
    middle = second.pos + second.size // 2
    data[middle : middle + 40] = bytes(40)
    before, neighbour = decoder.decode(
        bytes(data), [shown_s - 2 / 24, shown_s - 1 / 24], Wanted(1, 24.0, H, W)
    )
    assert isinstance(before, np.ndarray)
    assert neighbour.reason == "corrupt_frame"


def test_hevc_of_single_fields_is_refused(decoder: SafeDecoder) -> None:
    params = "log-level=none:pools=none:frame-threads=1:interlace=tff"
    data = encode(
        barcodes(12),
        container="mp4",
        codec="libx265",
        options={"preset": "ultrafast", "x265-params": params},
    )
    assert decoder.probe(data).reason == "field_coded"
    assert decoder.decode(data, [0.0], TWO_FRAMES)[0].reason == "field_coded"


def test_hdr_interlaced_and_turned_video_is_all_of_it(decoder: SafeDecoder) -> None:
    options = {
        "preset": "veryfast",
        "crf": "2",
        "flags": "+ilme+ildct",
        "x264-params": "threads=1:tff=1",
    }
    span = decoded(decoder, color_video(Color(18), options=options))
    assert span.conversions == ("arib-std-b67/bt2020", "bwdif")
    assert errors(span.frames).max() <= 4


# ------------------------------------------------------------------------------------------ clocks

REORDERED = {
    "bf=3, pyramid": {**X264_BARCODES, "bf": "3"},
    "bf=2": {**X264_BARCODES, "x264-params": "threads=1:bframes=2:b-pyramid=none:b-adapt=0"},
    "bf=7": {**X264_BARCODES, "x264-params": "threads=1:bframes=7:b-adapt=0:b-pyramid=normal"},
    "open GOP": {
        **X264_BARCODES,
        "x264-params": "threads=1:bframes=4:b-adapt=0:open-gop=1:keyint=24",
    },
    "bf=0": {**X264_BARCODES, "bf": "0"},
}


@pytest.mark.parametrize("name", REORDERED)
def test_avi_with_reordered_frames_is_shown_in_time(decoder: SafeDecoder, name: str) -> None:
    data = encode(barcodes(120), container="avi", codec="libx264", options=REORDERED[name])
    starts = [0.0, 0.7, 2.3]
    spans = decoder.decode(data, starts, Wanted(17, 8.0, HEIGHT, WIDTH))
    for start, frames in zip(starts, spans, strict=True):
        assert numbers(frames) == [int((start + k / 8) * 24 + 1e-3) for k in range(17)]
    assert decoder.probe(data).duration_s == pytest.approx(5.0, abs=0.002)


def test_stream_that_begins_without_reordering_keeps_its_own_times(decoder: SafeDecoder) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=24, options=REORDERED["bf=3, pyramid"])
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, picture in enumerate(barcodes(240)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            if 0 < number < 120:
                frame.pict_type = PictureType.P
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with av.open(io.BytesIO(buffer.getvalue())) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stamps[:64] == sorted(stamps[:64]) and stamps != sorted(stamps)
    (frames,) = decoder.decode(buffer.getvalue(), [0.0], Wanted(230, 24.0, HEIGHT, WIDTH))
    assert numbers(frames) == list(range(230))


X265_RAW = "log-level=none:bframes=2:pools=none:frame-threads=1"


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_stamps_in_decoding_order_are_understood_in_other_containers(
    decoder: SafeDecoder, container: str, codec: str
) -> None:
    options = {"preset": "ultrafast", "x265-params": X265_RAW}
    if codec == "libx264":
        options = REORDERED["bf=3, pyramid"]
    buffer = io.BytesIO()
    source = io.BytesIO(encode(barcodes(1080), container="mp4", codec=codec, options=options))
    with av.open(source) as right, av.open(buffer, "w", format=container) as output:
        stream = output.add_stream_from_template(right.streams.video[0])
        for number, packet in enumerate(right.demux(video=0)):
            if packet.size:
                packet.pts = packet.dts = int(number / 24 / packet.time_base)
                packet.stream = stream
                output.mux(packet)
    for start in (0.3, 41.3):  # the second by a seek
        (frames,) = decoder.decode(buffer.getvalue(), [start], Wanted(9, 8.0, HEIGHT, WIDTH))
        assert numbers(frames) == [int((start + k / 8) * 24 + 1e-3) for k in range(9)]


RAW = {
    "h264": {"container": "h264", "codec": "libx264", "options": {**X264_BARCODES, "bf": "2"}},
    "hevc": {
        "container": "hevc",
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": X265_RAW},
    },
    "mpeg2": {"container": "mpeg2video", "codec": "mpeg2video", "options": {"bf": "2", "q": "4"}},
}


@pytest.mark.parametrize("name", RAW)
def test_raw_stream_is_decoded_at_its_own_rate(decoder: SafeDecoder, name: str) -> None:
    data = encode(barcodes(60), **RAW[name])
    info = decoder.probe(data)
    assert (info.fps, info.duration_s) == (24.0, pytest.approx(2.5, abs=1e-3))
    (frames,) = decoder.decode(data, [0.3], Wanted(17, 8.0, HEIGHT, WIDTH))
    assert numbers(frames) == [int((0.3 + k / 8) * 24 + 1e-3) for k in range(17)]


def test_raw_stream_without_a_rate_is_refused_by_name(decoder: SafeDecoder) -> None:
    options = {"preset": "ultrafast", "x265-params": X265_RAW + ":vui-timing-info=0"}
    streams = [
        encode(barcodes(24), container="hevc", codec="libx265", options=options),
        encode(barcodes(24), container="mjpeg", codec="mjpeg", pixels="yuvj420p"),
    ]
    for data, codec in zip(streams, ("hevc", "mjpeg"), strict=True):
        for failure in (
            decoder.probe(data),
            decoder.decode(data, [0.0], Wanted(2, 8.0, HEIGHT, WIDTH))[0],
        ):
            assert failure.reason == "no_timestamps"
            assert f"raw {codec} stream without timestamps" in failure.detail
