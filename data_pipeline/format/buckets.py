"""Buckets of a data set: clip shapes by name, and shapes of columns. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import ShardError, read_sidecar

BucketName = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]
"""A clip shape as text, for example "17x64x64"."""


def bucket_names(manifest: Manifest) -> list[str]:
    """The bucket of each shard. In a data set of one shape, all have that of its config.

    "" where the manifest does not tell.
    """
    sizes: list[int] = []
    for name in ("num_frames", "height", "width"):
        size = manifest.config.get(name)
        if isinstance(size, int):
            sizes.append(size)
    only = "x".join(map(str, sizes)) if len(sizes) == 3 else ""
    return [shard.bucket or only for shard in manifest.shards]


def check_buckets(manifests: Sequence[Manifest], wanted: Sequence[str]) -> None:
    """Raise ShardError if a wanted bucket has no clip in any of the data sets."""
    found: set[str] = set()
    for manifest in manifests:
        for name, shard in zip(bucket_names(manifest), manifest.shards, strict=True):
            if shard.samples:
                found.add(name or "a shape that its manifest does not name")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ShardError(
            f"data.buckets: no clip has the shape {' or '.join(missing)}; the data set has "
            f"{', '.join(sorted(found)) or 'no clips'}. Name some of these, or make clips of that "
            "shape (`buckets` of `landiff shards`)"
        )


def column_shapes(folder: Path, manifest: Manifest, column: str) -> dict[str, list[int]]:
    """Shape of one clip's tensor of a column, by bucket, from a sidecar of each.

    Sizes that differ within a bucket are 0. Buckets without clips and shards that are not in
    `folder` are left out.
    """
    found: dict[str, list[int]] = {}
    shards = manifest.columns[column].shards
    for name, shard in zip(bucket_names(manifest), shards, strict=True):
        if name in found or not shard.samples:
            continue
        sidecar = read_sidecar(folder / column / f"{shard.name}.tar")
        if sidecar is not None and sidecar.shape:
            found[name] = list(sidecar.shape)
    return found
