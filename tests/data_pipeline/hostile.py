"""Malicious and damaged files: seeded mutations of videos in many codecs, and single specimens."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.data_pipeline.video_files import FOREIGN, X264, encode

SUFFIXES = {
    "mp4": "mp4",
    "ismv": "mp4",
    "matroska": "mkv",
    "mpegts": "ts",
    "vob": "mpg",
    "avi": "avi",
    "flv": "flv",
    "webm": "webm",
}


def textured(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames of moving blocks of color, uint8 [frames, height, width, 3]."""
    small = np.random.default_rng(seed).integers(
        0, 255, (height // 4, width // 2, 3), dtype=np.uint8
    )
    large = small.repeat(8, 0).repeat(8, 1)
    return np.stack([large[k : k + height, 2 * k : 2 * k + width] for k in range(frames)])


def good_videos(frames: int = 36, height: int = 48, width: int = 64) -> list[tuple[str, bytes]]:
    """(suffix, file) of every codec and container in `FOREIGN`."""
    clip = textured(frames, height, width)
    return [(SUFFIXES[spec["container"]], encode(clip, **spec)) for spec in FOREIGN.values()]


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of `count` damaged files. The n-th does not depend on the count."""
    bases = good_videos()
    kinds: list[Callable[[bytearray, np.random.Generator], bytes]] = [
        flipped,
        flipped_head,
        cut,
        holed,
        repeated,
        swapped,
        sized,
        noise_in_front,
    ]
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        suffix, data = bases[number % len(bases)]
        kind = kinds[generator.integers(len(kinds))]
        yield f"{number:05d}_{kind.__name__}.{suffix}", bytes(kind(bytearray(data), generator))


def flipped(data: bytearray, generator: np.random.Generator) -> bytes:
    """Overwrite random bytes."""
    for place in generator.integers(0, len(data), 1 << int(generator.integers(10))):
        data[place] = generator.integers(256)
    return data


def flipped_head(data: bytearray, generator: np.random.Generator) -> bytes:
    """Overwrite random bytes of the index or the start."""
    start = max(0, data.find(b"moov")) if generator.random() < 0.7 else 0
    for place in generator.integers(
        start, min(len(data), start + 1000), 1 + int(generator.integers(12))
    ):
        data[place] = generator.integers(256)
    return data


def cut(data: bytearray, generator: np.random.Generator) -> bytes:
    """Cut the file at a random place."""
    return data[: generator.integers(len(data))]


def holed(data: bytearray, generator: np.random.Generator) -> bytes:
    """Overwrite a random range with zeros."""
    start = int(generator.integers(len(data)))
    end = min(len(data), start + int(generator.integers(1, 3000)))
    data[start:end] = bytes(end - start)
    return data


def repeated(data: bytearray, generator: np.random.Generator) -> bytes:
    """Repeat or remove a random range."""
    start, end = sorted(map(int, generator.integers(0, len(data), 2)))
    return data[:end] + data[start:]


def swapped(data: bytearray, generator: np.random.Generator) -> bytes:
    """Move a random range to the front."""
    first, second = sorted(map(int, generator.integers(0, len(data), 2)))
    return data[second:] + data[first:second] + data[:first]


def sized(data: bytearray, generator: np.random.Generator) -> bytes:
    """Set 32 bits to an extreme value."""
    place = int(generator.integers(0, min(len(data), 4000) - 4))
    data[place : place + 4] = struct.pack(
        ">I", int(generator.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF]))
    )
    return data


def noise_in_front(data: bytearray, generator: np.random.Generator) -> bytes:
    """Put random bytes in front."""
    return generator.bytes(int(generator.integers(1, 2000))) + data


# --------------------------------------------------------------------------------------- specimens


def png_bomb(side: int) -> bytes:
    """A black picture of side x side in some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def gif_of(width: int, height: int) -> bytes:
    """A GIF whose header claims this size."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\x02\x44\x01\x00\x3b"
    )


def compressed_header(claimed: int) -> bytes:
    """A QuickTime file whose zlib-compressed index claims `claimed` bytes and unpacks to 64 MiB."""

    def box(kind: bytes, *content: bytes) -> bytes:
        body = b"".join(content)
        return struct.pack(">I", len(body) + 8) + kind + body

    packed = struct.pack(">I", claimed) + zlib.compress(bytes(64 << 20), 9)
    return box(b"ftyp", b"qt  ", bytes(4), b"qt  ") + box(
        b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", packed))
    )


def lying_container(width: int, height: int) -> bytes:
    """A small video whose container claims another size."""
    data = bytearray(encode(textured(24, 48, 64), container="mp4", codec="libx264", options=X264))
    at = data.find(b"avc1", data.find(b"stsd")) + 28
    data[at : at + 4] = struct.pack(">HH", width, height)
    return bytes(data)


def million_samples() -> bytes:
    """An index that claims a million samples more than there are."""
    data = bytearray(encode(textured(24, 48, 64), container="mp4", codec="libx264", options=X264))
    at = data.find(b"stsz") + 12
    data[at : at + 4] = struct.pack(">I", 1_000_000)
    return bytes(data)


def hostile_tar(path: Path, good: bytes) -> None:
    """Write a tar with good and malicious members."""

    def add(tar: tarfile.TarFile, name: str, data: bytes, **changes: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in changes.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a/b.c/clip.mp4", good)
        add(tar, "a/b.c/clip.txt", b"good, with dots and slashes in its name")
        add(tar, "gefährlich/日本.mp4", good + b"\0")
        add(tar, "gefährlich/日本.txt", "schön".encode())
        add(tar, "packed.mp4", gzip.compress(bytes(32 << 20)))
        add(tar, "packed.txt", b"a bomb")
        add(tar, "header.mp4", compressed_header(0xFFFFFFF0))
        add(tar, "header.txt", b"a bomb in the header")
        add(tar, "png.mp4", png_bomb(8192))
        add(tar, "png.txt", b"8k x 8k")
        add(tar, "long.mp4", good + b"\0\0")
        add(tar, "long.txt", b"x" * (20 << 20))
        add(tar, "bad.mp4", good + b"\0\0\0")
        add(tar, "bad.json", b"[" * 100_000)
        add(tar, "link.mp4", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "device.mp4", b"", type=tarfile.CHRTYPE)
        add(tar, "../../escape.mp4", good + b"\0\0\0\0")
        add(tar, "../../escape.txt", b"a name that climbs")
    data = bytearray(path.read_bytes().rstrip(b"\0") + bytes(512))
    data = data[: -(len(data) % 512) or None]
    info = tarfile.TarInfo("huge.mp4")
    info.size = 1 << 40  # a terabyte that the tar does not hold
    path.write_bytes(data + info.tobuf(tarfile.GNU_FORMAT) + b"only this")


def special_files(folder: Path) -> None:
    """Create special files and links with names of videos."""
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "nowhere.mp4").symlink_to("not_there.mp4")
    (folder / "itself.mp4").symlink_to("itself.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
