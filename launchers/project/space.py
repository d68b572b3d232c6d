"""Whether the file systems have room for what stages write: clips, columns, checkpoints, models.

Torch-free. Sizes are estimates that are rather too low, so that nothing that fits is refused: of a
source that was not read yet, each video counts as one clip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from landiff.configs import Config, ConfigError
from landiff.configs.durations import size
from landiff.configs.problems import Problem
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute.config import (
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    TextColumn,
    TokensColumn,
)
from landiff.launchers.budget.budget_plan import checkpoint_bytes, kept_checkpoints
from landiff.launchers.budget.precompute import CAPTION_TOKENS
from landiff.launchers.config import ShardsJobConfig
from landiff.launchers.project.weight_counts import weight_counts
from landiff.launchers.stages import AnyTrainConfig
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.frozen.checks import width_of
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.checkpoint.run_folder import CHECKPOINTS

LEAST_FREE = 1 << 30  # bytes; the quickstart writes about half of that
CLIP_BYTES = 5_000  # of an MP4 without its pictures
PIXEL_BYTES = 0.04  # of a pixel of one frame at crf 14, measured on clips of 480 x 720
ELEMENT_BYTES = 2  # of columns, which are float16, bfloat16 or uint16
WEIGHT_BYTES = 4  # of exported models
MOST_ENTRIES = 20_000  # of a source that are counted
RELEASED_WIDTHS = {"theia": 768, "cogvideox-vae": 16, "flan-t5": 4096, "t5-v1.1": 4096}
"""Widths of encoders whose files are not on this machine."""
SMALL_SHARE = 0.02  # parts below this share of the whole are not listed


@dataclass(frozen=True)
class DiskUse:
    """What one part of a job will write. way_out: how it becomes smaller, with the config key."""

    folder: Path
    bytes: float
    what: str
    way_out: str


def check_preset_space(configs: Mapping[str, Any], left: Iterable[str]) -> list[Problem]:
    """Problems of the file systems that are too small for the stages `left` of a preset.

    Paths are relative to the current folder. Any: configs by stem, as far as they could be read.
    """
    return check_space(preset_uses(configs, left), "the pipeline")


def check_job_space(config: Config) -> list[Problem]:
    """Problems of the file system that is too small for one job: a trainer or `landiff shards`."""
    if isinstance(config, AnyTrainConfig):
        return check_space(training_uses(config, export=False), "this run")
    if isinstance(config, ShardsJobConfig):
        return check_space(shards_uses(config, count_clips(config, {})), "this job")
    return []


def check_space(uses: Sequence[DiskUse], who: str) -> list[Problem]:
    """Problems of the file systems that are too small. Folders on one file system are added up.

    who: what needs the space, in messages.
    """
    problems = []
    by_device: dict[int, list[DiskUse]] = {}
    for use in uses:
        with contextlib.suppress(OSError):  # reported as a folder that cannot be written
            by_device.setdefault(os.stat(existing_folder(use.folder)).st_dev, []).append(use)
    for found in by_device.values():
        place = existing_folder(found[0].folder)
        free = free_bytes(place)
        needed = sum(use.bytes for use in found)
        if needed > free:
            problems.append(Problem(_too_small(place, free, needed, found, who)))
    return problems


def check_least_space(folder: Path) -> list[Problem]:
    """A problem if the file system of a folder is all but full."""
    free = free_bytes(existing_folder(folder))
    if free >= LEAST_FREE:
        return []
    return [
        Problem(
            f"{folder.absolute()} has {size(free)} of free space, and even the smallest pipeline "
            f"needs {size(LEAST_FREE)}; free some, or choose another folder with --out"
        )
    ]


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system of an existing folder."""
    return shutil.disk_usage(folder).free


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    place = path.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return place


def _too_small(place: Path, free: float, needed: float, uses: Sequence[DiskUse], who: str) -> str:
    """Message about a file system that is too small: what takes how much, the largest first."""
    parts = []
    rest = 0.0
    for use in sorted(uses, key=lambda use: -use.bytes):
        if use.bytes < SMALL_SHARE * needed:
            rest += use.bytes
        else:
            parts.append(f"{use.folder} {size(use.bytes)} ({use.what}; {use.way_out})")
    if rest:
        parts.append(f"others {size(rest)}")
    return (
        f"the file system of {place} has {size(free)} free, but {who} needs about {size(needed)} "
        f"more: {', '.join(parts)}; free some space, or use a larger file system"
    )


# -------------------------------------------------------------------- what stages write


def preset_uses(configs: Mapping[str, Any], left: Iterable[str]) -> list[DiskUse]:
    """What the stages `left` of a preset will write. Any: configs by stem."""
    stems = [stem for stem in left if stem in configs]
    uses = []
    if "shards" in configs:
        shards: ShardsJobConfig = configs["shards"]
        clips = count_clips(shards, configs)
        if "shards" in stems:
            uses += shards_uses(shards, clips)
        if "tokenizer" in configs:
            for stem in ("features", "latents", "precompute"):
                if stem in stems:
                    model = configs["tokenizer"].model
                    uses += column_uses(configs[stem], clips, smallest_shape(shards), model)
    for stem in stems:
        if isinstance(configs[stem], AnyTrainConfig):
            uses += training_uses(configs[stem], export=True)
    return list(dict.fromkeys(uses))


def shards_uses(config: ShardsJobConfig, clips: int) -> list[DiskUse]:
    """The raw shards of so many clips, unless they are complete."""
    if finished(config.data) is not None:
        return []
    shape = smallest_shape(config)
    each = CLIP_BYTES + PIXEL_BYTES * shape.num_frames * shape.height * shape.width
    what = f"{clips:,} clips or more of {shape.name}"
    way_out = "choose fewer videos in shards.source, or smaller clips"
    return [DiskUse(config.data, clips * each, what, way_out)]


def column_uses(
    config: PrecomputeConfig, clips: int, shape: ClipShape, tokenizer: TokenizerConfig
) -> list[DiskUse]:
    """The columns that are not complete. tokenizer: sizes of the one that makes tokens."""
    manifest = finished(config.data)
    uses = []
    for name, column in config.columns.items():
        if manifest is not None and name in manifest.columns:
            continue
        count = clips * ELEMENT_BYTES * column_elements(column, shape, tokenizer)
        what = f"the column {name} of {clips:,} clips or more"
        way_out = f"choose fewer or smaller clips, or remove columns.{name}"
        uses.append(DiskUse(config.data, count, what, way_out))
    return uses


def column_elements(column: Any, shape: ClipShape, tokenizer: TokenizerConfig) -> int:
    """Elements of one clip in a column, 0 for captions and scores. Any: a column's config."""
    frames = shape.latent_frames
    if isinstance(column, TokensColumn):
        sized = tokenizer.sized(*shape.grid)
        return sized.iframe_tokens + (frames - 1) * sized.pframe_tokens
    if not isinstance(column, FeaturesColumn | LatentsColumn | TextColumn):
        return 0
    width = width_of(column.encoder) or RELEASED_WIDTHS.get(column.encoder.kind, 0)
    if isinstance(column, FeaturesColumn):
        return frames * width * shape.grid[0] * shape.grid[1]
    if isinstance(column, LatentsColumn):
        means = frames * width * shape.latent_size[0] * shape.latent_size[1]
        return 2 * means if column.moments else means
    is_padded = getattr(column.encoder, "padded", column.encoder.kind == "t5-v1.1")
    rows = column.encoder.max_length
    return width * (rows if is_padded else min(rows, CAPTION_TOKENS) // 2)


def training_uses(config: AnyTrainConfig, *, export: bool) -> list[DiskUse]:
    """The checkpoints of a training, without those that are there, and with `export` its model."""
    weights, trained = weight_counts(config)
    each = checkpoint_bytes(config, weights, trained)
    kept = kept_checkpoints(config.loop, config.loop.steps)
    there = folder_bytes(config.run / CHECKPOINTS)
    what = f"{kept} checkpoints of {size(each.own)}, and one more while it is written"
    way_out = "lower loop.keep_last"
    if config.loop.keep_every:
        way_out = "lower loop.keep_last, or raise loop.keep_every"
    uses = [DiskUse(config.run, max(0.0, each.of(kept + 1) - there), what, way_out)]
    if export and trained:
        model = "the exported model"
        uses.append(DiskUse(config.zoo, WEIGHT_BYTES * weights, model, "choose a smaller model"))
    return uses


def count_clips(config: ShardsJobConfig, configs: Mapping[str, Any]) -> int:
    """Clips of the data folder, or at least as many as there will be. Any: configs by stem."""
    manifest = finished(config.data)
    if manifest is not None:
        return manifest.num_samples
    if "world" in configs:
        count: int = configs["world"].clips
        return count
    # Imported here, because it loads PyAV.
    from landiff.data_pipeline.ingest.sources.entries import SourceClip
    from landiff.data_pipeline.ingest.sources.listing import list_source

    try:
        entries = islice(list_source(config.content).entries(), MOST_ENTRIES)
        return sum(isinstance(entry, SourceClip) for entry in entries)
    except (ConfigError, OSError):
        return 0  # reported by the check of the shards


def finished(data: Path) -> Manifest | None:
    """The manifest of a data folder, None if there is none that can be read."""
    try:
        return read_manifest(data)
    except (ConfigError, OSError):
        return None


def smallest_shape(config: ShardsJobConfig) -> ClipShape:
    """The clip shape that takes the least space."""
    shapes = [ClipShape(shape.num_frames, shape.height, shape.width) for shape in config.shapes]
    return min(shapes, key=lambda shape: shape.num_frames * shape.height * shape.width)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder; hard links of a file count once."""
    found = {}
    for path in _files(folder):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found[status.st_ino] = status.st_size
    return sum(found.values())


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder."""
    for place, _folders, names in os.walk(folder):
        for name in names:
            yield os.path.join(place, name)
