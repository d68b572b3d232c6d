"""A data set of images and videos in two sizes, with the columns of a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.model_zoo import keyed_random
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.token_layout import TokenLayout
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw

IMAGE, VIDEO, TALL = "1x32x32", "9x32x32", "9x48x32"
SHARDS = {0: IMAGE, 1: VIDEO, 2: TALL, 3: IMAGE}
SIZES = [30, 9, 6, 15]
BAD = keys_of(1, 9)[5]  # a clip of VIDEO

Values = Callable[[ClipShape, torch.Generator], Tensor]
"""A tensor of a clip of a shape, from a generator of the clip."""


def write_mixed(folder: Path, columns: Mapping[str, Values], bad: str = "") -> Path:
    """Write four shards of three buckets. Every clip is of a video of its own.

    bad: key of a clip that is not finite in columns of real numbers.
    """
    shape_of = {}
    for shard, bucket in SHARDS.items():
        for key in keys_of(shard, SIZES[shard]):
            shape_of[key] = ClipShape.parse(bucket)
    write_raw(folder, SIZES, meta_of=lambda key: {"source_sha256": key, "caption": key})
    manifest = read_manifest(folder)
    shards = []
    for shard, entry in enumerate(manifest.shards):
        shards.append(replace(entry, bucket=SHARDS[shard]))
    write_manifest(folder, manifest.model_copy(update={"shards": shards}))
    for name, values in columns.items():

        def value(key: str, name: str = name, values: Values = values) -> Tensor:
            found = values(shape_of[key], keyed_random.generator(0, f"mixed {name}", key))
            return found * math.nan if key == bad and found.is_floating_point() else found

        write_column(folder, name, value=value)
        _set_shape(folder, name, [0] * value(next(iter(shape_of))).ndim)
    return folder


def _set_shape(folder: Path, name: str, shape: list[int]) -> None:
    """Enter the shape of a column into the manifest; 0 for sizes that differ."""
    manifest = read_manifest(folder)
    column = manifest.columns[name].model_copy(update={"shape": shape})
    write_manifest(
        folder, manifest.model_copy(update={"columns": {**manifest.columns, name: column}})
    )


def features(channels: int) -> Values:
    """Feature maps."""

    def value(shape: ClipShape, draw: torch.Generator) -> Tensor:
        return torch.randn(shape.latent_frames, channels, *shape.grid, generator=draw).half()

    return value


def latents(channels: int) -> Values:
    """Latents."""

    def value(shape: ClipShape, draw: torch.Generator) -> Tensor:
        size = (shape.latent_frames, channels, *shape.latent_size)
        return torch.randn(size, generator=draw).to(torch.bfloat16)

    return value


def tokens(layout: TokenLayout) -> Values:
    """Tokens of a clip."""

    def value(shape: ClipShape, draw: torch.Generator) -> Tensor:
        count = layout.num_codes(shape.latent_frames)
        codes = torch.randint(0, layout.codebook_size, (count,), generator=draw)
        return codes.to(torch.uint16)

    return value


def text(rows: int, width: int) -> Values:
    """Text states."""

    def value(shape: ClipShape, draw: torch.Generator) -> Tensor:
        return torch.randn(rows, width, generator=draw).to(torch.bfloat16)

    return value
