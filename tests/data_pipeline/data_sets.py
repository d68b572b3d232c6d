"""Small real data sets for tests: raw shards and columns written by `ShardWriter`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from landiff.data_pipeline.format.schema import (
    RAW,
    Column,
    Manifest,
    RawSample,
    ShardEntry,
    column_stem,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import (
    ShardWriter,
    read_manifest,
    read_sidecar,
    write_manifest,
)
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.model_zoo.frozen.clip_shape import ClipShape

VIDEO = b"not a video"


def raw_sample(key: str, **changes: object) -> RawSample:
    """Metadata of a clip."""
    fields = {
        "key": key,
        "caption": f"a clip called {key}",
        "source": "film.mp4",
        "source_sha256": "0" * 64,
        "start_s": 0.0,
        "fps": 8.0,
        "num_frames": 17,
        "height": 64,
        "width": 64,
        "motion_score": 0.05,
        "video_sha256": hashlib.sha256(VIDEO).hexdigest(),
    }
    return RawSample(**(fields | changes))


def keys_of(shard: int, samples: int) -> list[str]:
    """Keys of the samples of a shard that `write_raw` writes."""
    return [hashlib.sha1(f"{shard}/{i}".encode()).hexdigest()[:12] for i in range(samples)]


def write_raw(
    data: Path,
    sizes: list[int],
    mark: str = "raw",
    meta_of: Callable[[str], dict[str, object]] = lambda key: {},
) -> Manifest:
    """Write raw shards of `sizes` samples and their manifest. `mark` is their fingerprint.

    `meta_of`: further metadata of a clip by key.
    """
    entries: list[ShardEntry] = []
    for shard, samples in enumerate(sizes):
        with ShardWriter(data / RAW, f"{shard:06d}", fingerprint=mark) as writer:
            for key in keys_of(shard, samples):
                changes = {"source": mark} | meta_of(key)
                meta = raw_sample(key, **changes).model_dump_json().encode()
                writer.add(key, {"mp4": VIDEO, "json": meta})
        entries.append(writer.sidecar.entry)
    manifest = Manifest(
        fingerprint=content_fingerprint(mark, [e.sha256 for e in entries]),
        config={},
        shards=entries,
    )
    write_manifest(data, manifest)
    return manifest


def value_of(key: str) -> Tensor:
    """A tensor that identifies its clip."""
    return torch.tensor(list(key.encode()), dtype=torch.uint16)


def write_column(
    data: Path,
    name: str,
    *,
    bad: Collection[str] = (),
    mark: str = "column",
    value: Callable[[str], Tensor] = value_of,
    encoder: str = "1111222233334444",
) -> Manifest:
    """Write a column of `value(key)` for clips that are not `bad`, and add it to the manifest."""
    manifest = read_manifest(data)
    entries = []
    for entry in manifest.shards:
        raw = read_sidecar(data / RAW / f"{entry.name}.tar")
        with ShardWriter(
            data / name, entry.name, fingerprint=mark, raw_sha256=entry.sha256
        ) as writer:
            for position, (key, _) in enumerate(raw.index):
                if key in bad:
                    writer.reject(key, name, "not_finite", position=position)
                else:
                    stem = column_stem(name)
                    tensor = value(key)
                    writer.add(key, {f"{stem}.safetensors": pack_tensor(stem, tensor)})
                    writer.shape = list(tensor.shape)
        entries.append(writer.sidecar.entry)
    column = Column(
        dtype="uint16",
        shape=[12],
        encoder="test",
        fingerprint=mark,
        config={"encoders": {"test": encoder}},
        raw_fingerprint=manifest.fingerprint,
        shards=entries,
    )
    manifest = manifest.model_copy(update={"columns": {**manifest.columns, name: column}})
    write_manifest(data, manifest)
    return manifest


def write_buckets(
    data: Path,
    buckets: Sequence[str],
    sizes: list[int],
    mark: str = "mixed",
    meta_of: Callable[[str], dict[str, object]] = lambda key: {},
) -> Path:
    """Write a shard of each size with clips of the bucket beside it, and the column `tokens`.

    The shards are without names of buckets if there is one bucket.
    """
    manifest = write_raw(data, sizes, mark, meta_of)
    several = len(set(buckets)) > 1
    shapes: dict[str, int | None] = {}
    shards = []
    for entry, bucket in zip(manifest.shards, buckets, strict=True):
        shape = ClipShape.parse(bucket)
        shapes = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
        shards.append(replace(entry, bucket=bucket if several else ""))
    if several:
        shapes = dict.fromkeys(shapes)
    write_manifest(data, manifest.model_copy(update={"shards": shards, "config": shapes}))
    write_column(data, "tokens")
    return data
