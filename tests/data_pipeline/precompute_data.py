"""Raw shards of small clips, a tiny tokenizer and configs for tests of precompute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from landiff.configs import load
from landiff.data_pipeline.format.schema import RAW, Manifest, content_fingerprint
from landiff.data_pipeline.format.shards import ShardWriter, write_manifest
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.video.codec import encode_clip
from landiff.model_zoo import registry
from landiff.model_zoo.config import TokenizerConfig
from tests.data_pipeline.data_sets import raw_sample
from tests.data_pipeline.ingest_helpers import digest

SIZES = [4, 3, 5]
NUM_CLIPS = sum(SIZES)
TOKENIZER = TokenizerConfig(
    feature_channels=112,
    grid_height=4,
    grid_width=4,
    hidden_size=32,
    num_heads=2,
    num_layers=1,
    token_size=16,
    codebook_size=16,
    codebook_dim=4,
    iframe_tokens=12,
    pframe_tokens=4,
    segment_frames=5,
    kmeans_iterations=2,
)
COLUMNS = {
    "features": {"encoder": {"kind": "efficientnet-lite0"}},
    "tokens": {"tokenizer": "tokenizer", "encoder": {"kind": "efficientnet-lite0"}},
    "latents": {"encoder": {"kind": "dct"}},
    "text-minilm": {"encoder": {"kind": "minilm"}},
    "text-minilm-padded": {"encoder": {"kind": "minilm", "padded": True, "max_length": 32}},
}
FAST = ["features", "latents"]  # columns that need no text encoder


def pan(seed: int, frames: int = 17, size: int = 64) -> np.ndarray:
    """A smooth random picture moving sideways, uint8 [T, H, W, 3]."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 255, (8, 16, 3)).astype(np.float32)
    wide = np.kron(coarse, np.ones((size // 8, size // 8, 1), np.float32))
    return np.stack([np.roll(wide, -2 * t, axis=1)[:, :size] for t in range(frames)]).astype(
        np.uint8
    )


def write_clips(
    data: Path,
    sizes: list[int] = SIZES,
    odd: dict[int, np.ndarray] | None = None,
    fingerprint: str = "raw",
) -> Manifest:
    """Raw shards of real clips; `odd` replaces the frames of some."""
    entries, number = [], 0
    for shard, samples in enumerate(sizes):
        with ShardWriter(data / RAW, f"{shard:06d}", fingerprint=fingerprint) as writer:
            for _ in range(samples):
                frames = (odd or {}).get(number, pan(number))
                clip = encode_clip(frames, 8.0, preset="ultrafast")
                meta = raw_sample(
                    key_of(number),
                    caption=f"a picture that moves, number {number // 2}",
                    more_captions=(f"seen again, {number}",) if number < 3 else (),
                    num_frames=len(frames),
                    height=frames.shape[1],
                    width=frames.shape[2],
                    source=fingerprint,
                    video_sha256=hashlib.sha256(clip).hexdigest(),
                )
                writer.add(meta.key, {"mp4": clip, "json": meta.model_dump_json().encode()})
                number += 1
        entries.append(writer.sidecar.entry)
    manifest = Manifest(
        fingerprint=content_fingerprint(fingerprint, [e.sha256 for e in entries]),
        config={},
        shards=entries,
    )
    write_manifest(data, manifest)
    return manifest


def key_of(number: int) -> str:
    """Key of a clip of `write_clips`."""
    return f"clip{number:04d}"


def export_tokenizer(zoo: Path, seed: int, buckets: Sequence[str] = ()) -> registry.ZooEntry:
    """Export a tokenizer with random weights to a zoo. `buckets`: what it was trained on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = registry.build_module("tokenizer", TOKENIZER).train()
        tokenizer(torch.randn(8, 5, 112, 4, 4))  # k-means fills the codebook
    state = tokenizer.state_dict()
    provenance = {"buckets": list(buckets)}
    return registry.export(zoo, "tokenizer", "tokenizer", TOKENIZER, state, provenance)


def copied(clips: Path, data: Path) -> Path:
    """Copy a data folder."""
    for path in clips.rglob("*.*"):
        target = data / path.relative_to(clips)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return data


def config(data: Path, zoo: Path, columns=COLUMNS, **fields) -> PrecomputeConfig:
    """Config for some columns, given by name or with their settings."""
    if not isinstance(columns, dict):
        columns = {name: COLUMNS[name] for name in columns}
    return load(
        PrecomputeConfig,
        {"data": data, "zoo": zoo, "columns": columns, "device": "cpu", "batch_size": 3} | fields,
    )


def contents(data: Path, columns=FAST) -> dict[str, str]:
    """Path -> digest of all files of some columns, hidden ones included."""
    found = {}
    for name in columns:
        for path in sorted((data / name).iterdir()):
            found[str(path.relative_to(data))] = digest(path)
    return found
