"""Colour tags of source video, and conversion of HDR and wide gamut to SDR BT.709.

Tags are code points of ITU-T H.273. swscale applies the YUV matrix and range of every video. This
module converts the resulting R'G'B' if its transfer or primaries are not those of SDR BT.709:

- PQ (SMPTE ST 2084) is display light in nits. HLG becomes display light through the OOTF of BT.2100
  at 1000 nits.
- HDR reference white, 203 nits (BT.2408), becomes SDR white. Brighter colours are scaled down until
  their largest channel is white, which keeps their hue. Colours outside BT.709 are clipped.
  Mastering metadata has no influence.
- SDR is display light by BT.1886 (gamma 2.4). SDR with wide primaries keeps its own transfer curve,
  so greys keep their values.

The primaries of SD video (SMPTE 170M, BT.470BG, ...) are close to those of BT.709 and are not
converted. Video that cannot be converted is rejected; the message names its transfer, primaries or
matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import av
import numpy as np

from landiff.data_pipeline.video.protocol import Refused

UNSPECIFIED = 2
RESERVED = frozenset((0, 3))  # of primaries and transfers
REFERENCE_WHITE_NITS = 203.0  # BT.2408
HLG_PEAK_NITS = 1000.0  # BT.2100
HLG_SYSTEM_GAMMA = 1.2  # BT.2100, at the peak above
PQ = 16  # transfer
HLG = 18  # transfer
RGB_MATRIX = 0
BT2020_MATRIX = 9
BT2020_PRIMARIES = 9

TRANSFERS = {
    1: "bt709",
    2: "unspecified",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log100",
    10: "log316",
    11: "iec61966-2-4",
    12: "bt1361",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
UNSUPPORTED_TRANSFERS = frozenset((8, 9, 10, 17))
PRIMARIES = {
    1: "bt709",
    2: "unspecified",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
NEAR_BT709 = frozenset((1, 2, 5, 6, 7, 22))
D65 = (0.3127, 0.3290)
ILLUMINANT_C = (0.310, 0.316)
DCI_WHITE = (0.314, 0.351)
# x, y of red, green, blue and white (ITU-T H.273, table 2)
CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), ILLUMINANT_C),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65),
    8: ((0.681, 0.319), (0.243, 0.692), (0.145, 0.049), ILLUMINANT_C),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), DCI_WHITE),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), D65),
}
MATRICES = {
    0: "gbr",
    1: "bt709",
    2: "unspecified",
    3: "reserved",
    4: "fcc",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020nc",
    10: "bt2020c",
    11: "smpte2085",
    12: "chroma-derived-nc",
    13: "chroma-derived-c",
    14: "ictcp",
    15: "ipt-c2",
    16: "ycgco-re",
    17: "ycgco-ro",
}
UNSUPPORTED_MATRICES = frozenset((8, *range(10, 256)))  # swscale would use BT.601 for them
ROWS_AT_ONCE = 16  # rows converted at once, so that intermediate values stay in the cache
DOLBY_VISION_TAGS = frozenset(("dvh1", "dvhe", "dva1", "dvav", "dav1"))


@dataclass(frozen=True)
class ColorTags:
    """Colour description of a video or a frame, code points of ITU-T H.273."""

    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    matrix: int = UNSPECIFIED

    def or_else(self, other: ColorTags) -> ColorTags:
        """Return these tags, with those of `other` where these are unspecified."""
        return ColorTags(
            _specified(self.primaries, other.primaries),
            _specified(self.transfer, other.transfer),
            other.matrix if self.matrix == UNSPECIFIED else self.matrix,
        )


def tags_of(described: av.VideoFrame | av.video.codeccontext.VideoCodecContext) -> ColorTags:
    """Colour tags of a frame or a stream."""
    return ColorTags(
        int(described.color_primaries), int(described.color_trc), int(described.colorspace)
    )


def _specified(value: int, other: int) -> int:
    """`value`, or `other` if it is unspecified or reserved."""
    if value != UNSPECIFIED and value not in RESERVED:
        return value
    return UNSPECIFIED if other in RESERVED else other


@dataclass(frozen=True)
class ColorConversion:
    """Conversion of the R'G'B' of a video to SDR BT.709."""

    transfer: int
    primaries: int
    unspecified_matrix: bool  # the file names no YUV matrix, which then is that of BT.2020

    @property
    def name(self) -> str:
        """Transfer and primaries of the source, e.g. "smpte2084/bt2020"."""
        return f"{TRANSFERS[self.transfer]}/{PRIMARIES[self.primaries]}"


def find_conversion(tags: ColorTags) -> ColorConversion | None:
    """Return the conversion that a video needs.

    None for SDR with primaries equal or close to those of BT.709. Raises Refused with the reason
    unsupported_transfer, unsupported_primaries or unsupported_matrix if it cannot be converted.
    """
    if tags.transfer not in TRANSFERS or tags.transfer in UNSUPPORTED_TRANSFERS:
        name = TRANSFERS.get(tags.transfer, f"number {tags.transfer}")
        raise Refused("unsupported_transfer", f"transfer {name} cannot be converted to SDR BT.709")
    if tags.primaries != UNSPECIFIED and tags.primaries not in CHROMATICITIES:
        name = PRIMARIES.get(tags.primaries, f"number {tags.primaries}")
        raise Refused("unsupported_primaries", f"primaries {name} cannot be converted to BT.709")
    if tags.matrix in UNSUPPORTED_MATRICES:
        name = MATRICES.get(tags.matrix, f"number {tags.matrix}")
        raise Refused("unsupported_matrix", f"YUV matrix {name} cannot be converted to RGB")
    primaries = tags.primaries
    if primaries == UNSPECIFIED and (tags.transfer in (PQ, HLG) or tags.matrix == BT2020_MATRIX):
        primaries = BT2020_PRIMARIES
    if tags.transfer not in (PQ, HLG) and primaries in NEAR_BT709:
        return None
    unspecified_matrix = tags.matrix == UNSPECIFIED and primaries == BT2020_PRIMARIES
    return ColorConversion(tags.transfer, primaries, unspecified_matrix)


def hdr_detail(conversion: ColorConversion) -> str:
    """Detail of the rejection of a video if `video.hdr` is "reject"."""
    return f"transfer and primaries are {conversion.name}, and video.hdr = reject"


def refuse_dolby_vision(codec_tag: str, has_metadata: bool, tags: ColorTags) -> None:
    """Raise Refused (dolby_vision) if only Dolby Vision's own metadata describe the colours.

    That is the case for profile 5 (IPTPQc2), which leaves the tags unspecified. Other profiles have
    a base layer in PQ, HLG or SDR, which is tagged as such and converted like any other video.
    """
    if not has_metadata and codec_tag not in DOLBY_VISION_TAGS:
        return
    if UNSPECIFIED in (tags.transfer, tags.matrix):
        raise Refused(
            "dolby_vision",
            "Dolby Vision without a base layer in PQ, HLG or SDR (profile 5, IPTPQc2)",
        )


class SdrConverter:
    """Converts R'G'B' pictures to SDR BT.709 with lookup tables and one matrix.

    `white` is the value of the largest nominal signal (1.0) in the pictures.
    """

    def __init__(self, conversion: ColorConversion, white: int) -> None:
        signal = np.minimum(np.arange(65536) / white, 1.0)
        self.to_linear = _linear_light(signal, conversion.transfer).astype(np.float32)
        # indexed by the square root of linear light, which has fine enough steps near black
        code = _encoded(np.linspace(0.0, 1.0, 65536) ** 2, conversion.transfer)
        self.to_code = np.round(code * 255).astype(np.uint8)
        self.luminance = rgb_to_xyz(conversion.primaries)[1].round(6).astype(np.float32)
        self.matrix = to_bt709(conversion.primaries).round(6).astype(np.float32)
        self.display_gain: np.ndarray | None = None  # by the square root of scene luminance
        if conversion.transfer == HLG:
            gain = np.linspace(0.0, 1.0, 65536) ** (2 * (HLG_SYSTEM_GAMMA - 1))
            self.display_gain = (gain * (HLG_PEAK_NITS / REFERENCE_WHITE_NITS)).astype(np.float32)

    def __call__(self, rgb_HWC: np.ndarray) -> np.ndarray:
        """Convert a picture, uint16 [H, W, 3] -> uint8 [H, W, 3]."""
        out_HWC = np.empty(rgb_HWC.shape, np.uint8)
        for top in range(0, len(rgb_HWC), ROWS_AT_ONCE):
            rows = slice(top, top + ROWS_AT_ONCE)
            sdr_CN = self._convert(rgb_HWC[rows].reshape(-1, 3).T)
            out_HWC[rows] = sdr_CN.T.reshape(out_HWC[rows].shape)
        return out_HWC

    def _convert(self, rgb_CN: np.ndarray) -> np.ndarray:
        """Convert pixels, uint16 [3, N] -> uint8 [3, N].

        All operations are exactly rounded, so results are equal on every processor. BLAS and powers
        would not guarantee that.
        """
        linear_CN = self.to_linear[np.ascontiguousarray(rgb_CN)]
        if self.display_gain is not None:
            linear_CN *= self.display_gain[_root_index(_weighted(linear_CN, self.luminance))]
        sdr_CN = np.stack([_weighted(linear_CN, weights) for weights in self.matrix])
        sdr_CN /= np.maximum(sdr_CN.max(0), np.float32(1))
        return self.to_code[_root_index(sdr_CN)]


def _weighted(planes_CN: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of three planes, [N]."""
    red, green, blue = planes_CN
    return red * weights[0] + green * weights[1] + blue * weights[2]


def _root_index(linear: np.ndarray) -> np.ndarray:
    """Table index of the square root of linear light, clipped to 0 ... 1."""
    root = np.sqrt(np.clip(linear, np.float32(0), np.float32(1)))
    return (root * np.float32(65535) + np.float32(0.5)).astype(np.uint16)


def _linear_light(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Linear light of a signal in 0 ... 1. SDR white is 1. For HLG: scene light, at most 1."""
    if transfer == PQ:
        m1 = 2610 / 16384
        m2 = 2523 / 4096 * 128
        c1 = 3424 / 4096
        c2 = 2413 / 4096 * 32
        c3 = 2392 / 4096 * 32
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)  # 1: 10000 nits
        return light * (10000 / REFERENCE_WHITE_NITS)
    if transfer == HLG:
        a = 0.17883277
        b = 0.28466892
        c = 0.55991073
        return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    if transfer == 13:
        return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return signal ** _gamma(transfer)


def _encoded(linear: np.ndarray, transfer: int) -> np.ndarray:
    """SDR signal of linear light, both in 0 ... 1.

    Uses the curve of the source if that is SDR, else BT.1886.
    """
    if transfer == 13:
        return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return linear ** (1 / _gamma(transfer))


def _gamma(transfer: int) -> float:
    """Display gamma of an SDR transfer."""
    return {4: 2.2, 5: 2.8}.get(transfer, 2.4)


@functools.cache
def rgb_to_xyz(primaries: int) -> np.ndarray:
    """Matrix [3, 3] from linear RGB with these primaries to CIE XYZ. White has Y = 1."""
    *corners, white = CHROMATICITIES[primaries]
    columns = np.array([_xyz(x, y) for x, y in corners]).T
    return columns * np.linalg.solve(columns, _xyz(*white))


@functools.cache
def to_bt709(primaries: int) -> np.ndarray:
    """Matrix [3, 3] from linear RGB with these primaries to linear BT.709.

    White stays white (Bradford adaptation).
    """
    bradford = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    source = bradford @ _xyz(*CHROMATICITIES[primaries][3])
    target = bradford @ _xyz(*CHROMATICITIES[1][3])
    adaptation = np.linalg.inv(bradford) @ np.diag(target / source) @ bradford
    return np.linalg.inv(rgb_to_xyz(1)) @ adaptation @ rgb_to_xyz(primaries)


def _xyz(x: float, y: float) -> np.ndarray:
    """CIE XYZ of chromaticity coordinates, with Y = 1."""
    return np.array([x / y, 1.0, (1 - x - y) / y])
