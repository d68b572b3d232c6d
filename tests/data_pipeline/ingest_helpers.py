"""Helpers for tests of ingest: a small config, captions of a source, samples of a data folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from landiff.configs.loader import load
from landiff.data_pipeline.format.schema import RAW, RawSample
from landiff.data_pipeline.format.shards import read_manifest, read_sidecar
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.video.codec import ClipDecoder

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 9
SIDE = 32


def shards_config(source: Path | str, **changes: object) -> ShardsConfig:
    """Clips of 9 frames of 32 x 32 at 8 fps, two spans per video and four clips per shard."""
    values = {
        "source": str(source),
        "num_frames": FRAMES,
        "fps": 8,
        "height": SIDE,
        "width": SIDE,
        "max_spans": 2,
        "samples_per_shard": 4,
        "encoding": {"preset": "veryfast"},
    }
    return load(ShardsConfig, values | changes)


def digest(path: Path) -> str:
    """SHA-256 of a file. Unlike its content, an assertion can show it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Path below the folder -> digest, of every file in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = digest(path)
    return found


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_of(tar: Path) -> dict[str, dict[str, bytes]]:
    """Key -> part -> bytes of the samples of a tar, in its order."""
    data = tar.read_bytes()
    samples: dict[str, dict[str, bytes]] = {}
    for key, places in read_sidecar(tar).index:
        samples[key] = {}
        for part, (offset, size) in places.items():
            samples[key][part] = data[offset : offset + size]
    return samples


def raw_parts(data: Path) -> list[dict[str, bytes]]:
    """Parts of all raw samples of a data folder, in the order of its manifest."""
    found: list[dict[str, bytes]] = []
    for entry in read_manifest(data).shards:
        found += parts_of(data / RAW / f"{entry.name}.tar").values()
    return found


def raw_samples(data: Path) -> list[RawSample]:
    """The JSON of all raw samples of a data folder."""
    return [RawSample.model_validate_json(parts["json"]) for parts in raw_parts(data)]


def decoded_samples(data: Path) -> list[tuple[RawSample, np.ndarray]]:
    """JSON and frames of all raw samples of a data folder."""
    found = []
    with ClipDecoder() as decoder:
        for parts in raw_parts(data):
            sample = RawSample.model_validate_json(parts["json"])
            found.append((sample, decoder.decode(parts["mp4"])))
    return found
