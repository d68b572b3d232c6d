"""Reads what a report about a data folder shows: metadata and pictures of some of its clips.

Work and memory are bounded: of large data sets, clips
that are evenly spread over the shards stand for all.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import RAW, Manifest, RawSample, column_stem
from landiff.data_pipeline.format.shards import ShardError, read_sidecar
from landiff.data_pipeline.ingest.filters import brightness
from landiff.data_pipeline.ingest.quarantine import REJECTED, QuarantineEntry
from landiff.data_pipeline.video.codec import ClipDamaged, ClipDecoder, SafeDecoder, ScanFailed

MAX_METADATA = 20_000  # clips whose metadata are read
STRIP_FRAMES = 3  # of a clip on a contact sheet: first, middle, last
STRIP_HEIGHT = 112  # pixels
LARGEST_REJECT = 64 << 20  # bytes of a rejected video that is decoded for its picture
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    """A clip on a contact sheet. `jpeg` is None if it cannot be decoded; `note` says why."""

    title: str
    note: str
    jpeg: bytes | None
    brightness: float = float("nan")


def spread(total: int, limit: int) -> list[int]:
    """At most `limit` of range(total), evenly spread."""
    if total <= limit:
        return list(range(total))
    return [number * total // limit for number in range(limit)]


class Survey:
    """Reads clips of one data folder. Close it after use."""

    def __init__(self, data: Path, manifest: Manifest) -> None:
        self.data = data
        self.manifest = manifest
        self._ends = np.cumsum([shard.samples for shard in manifest.shards])
        self._json = FolderReader(data, RAW, "json", manifest.shards, keep=2)
        self._mp4 = FolderReader(data, RAW, "mp4", manifest.shards, keep=2)

    def place(self, number: int) -> tuple[int, int]:
        """(shard, position) of a clip of the data set."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self.manifest.shards[shard].samples

    def metadata(self, limit: int = MAX_METADATA) -> list[RawSample]:
        """Metadata of evenly spread clips. Clips that cannot be read are left out."""
        found = []
        for number in spread(self.manifest.num_samples, limit):
            with suppress(ShardError, ValidationError):
                found.append(self._meta(*self.place(number)))
        return found

    def _meta(self, shard: int, position: int) -> RawSample:
        return RawSample.model_validate_json(self._json.read(shard, position).tobytes())

    def scores(self, limit: int = MAX_METADATA) -> dict[str, list[float]]:
        """Values of all columns of scores, of at most about `limit` evenly spread clips."""
        found: dict[str, list[float]] = {}
        for name, column in self.manifest.columns.items():
            if column_stem(name) != "score":
                continue
            reader = FolderReader(self.data, name, "score.safetensors", column.shards, keep=1)
            every = max(1, -(-self.manifest.num_samples // limit))
            values = []
            for shard, entry in enumerate(column.shards):
                for slot in range(0, entry.samples, every):
                    values.append(float(reader.read_tensor(shard, slot).float().mean()))
            reader.close()
            found[name] = values
        return found

    def clips(self, limit: int) -> Iterator[tuple[RawSample, np.ndarray]]:
        """Metadata and frames, uint8 [T, H, W, 3], of evenly spread clips that can be read."""
        with ClipDecoder("pyav") as decoder:
            for number in spread(self.manifest.num_samples, limit):
                shard, position = self.place(number)
                with suppress(ShardError, ValidationError, ClipDamaged):
                    meta = self._meta(shard, position)
                    video = self._mp4.read(shard, position).tobytes()
                    yield meta, decoder.decode(video, sha256=meta.video_sha256)

    def kept(self, limit: int) -> Iterator[Picture]:
        """Pictures of evenly spread clips of the shards."""
        with ClipDecoder("pyav") as decoder:
            for number in spread(self.manifest.num_samples, limit):
                shard, position = self.place(number)
                try:
                    meta = self._meta(shard, position)
                    video = self._mp4.read(shard, position).tobytes()
                    frames_THWC = decoder.decode(video, sha256=meta.video_sha256)
                except (ShardError, ValidationError, ClipDamaged) as error:
                    yield Picture(f"clip {number}", str(error), None)
                    continue
                yield Picture(
                    meta.caption,
                    f"{meta.key}, motion {meta.motion_score:.3f}",
                    strip(frames_THWC),
                    brightness(frames_THWC),
                )

    def rejected(self, limit: int) -> Iterator[Picture]:
        """Pictures of evenly spread rejected clips, as far as the quarantine keeps them."""
        entries = []
        for tar in sorted((self.data / REJECTED).glob("*.tar")):
            sidecar = read_sidecar(tar)
            if sidecar is not None:
                entries += [(tar, parts) for _key, parts in sidecar.index]
        with SafeDecoder() as decoder:
            for number in spread(len(entries), limit):
                yield _rejected_picture(decoder, *entries[number])

    def close(self) -> None:
        """Close all files."""
        self._json.close()
        self._mp4.close()


def _rejected_picture(
    decoder: SafeDecoder, tar: Path, parts: dict[str, tuple[int, int]]
) -> Picture:
    """The picture of one member of the quarantine."""
    entry = QuarantineEntry.model_validate_json(_read(tar, *parts["json"]))
    title = f"{entry.reason}: {entry.key}"
    suffix = next(name for name in parts if name != "json")
    offset, size = parts[suffix]
    if size > LARGEST_REJECT:
        return Picture(title, f"{entry.detail} (too large for a picture)", None)
    pictures = []
    with suppress(ScanFailed):  # it was rejected because it is damaged
        for scanned in decoder.scan(_read(tar, offset, size), keyframes=suffix != "mp4"):
            pictures += list(scanned.frames)
    if not pictures:
        return Picture(title, entry.detail, None)
    return Picture(title, entry.detail, strip(np.stack(pictures)))


def _read(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def strip(frames_THWC: np.ndarray) -> bytes:
    """First, middle and last frame side by side, as a JPEG of `STRIP_HEIGHT` pixels height."""
    from PIL import Image

    count = min(STRIP_FRAMES, len(frames_THWC))
    chosen = np.linspace(0, len(frames_THWC) - 1, count).round().astype(int)
    frame_HWC = np.concatenate(list(frames_THWC[chosen]), axis=1)
    image = Image.fromarray(frame_HWC)
    image.thumbnail((STRIP_FRAMES * 4 * STRIP_HEIGHT, STRIP_HEIGHT))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def folder_bytes(folder: Path) -> int:
    """Bytes of the tars in a folder of shards."""
    return sum(tar.stat().st_size for tar in folder.glob("*.tar"))
