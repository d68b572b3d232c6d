"""A tokenizer of a few thousand parameters, and features with something to learn in them."""

from __future__ import annotations

from pathlib import Path

import torch

from landiff.data_pipeline.format.schema import Column, Manifest, RawSample
from landiff.data_pipeline.format.shards import ShardWriter, write_manifest
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.config import TokenizerConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig
from tests.training.toy import META

MODEL = TokenizerConfig(
    feature_channels=8,
    grid_height=2,
    grid_width=2,
    hidden_size=32,
    num_heads=2,
    num_layers=1,
    token_size=16,
    codebook_size=16,
    codebook_dim=4,
    iframe_tokens=4,
    pframe_tokens=2,
    segment_frames=3,
)


def config(run: Path, model: TokenizerConfig = MODEL, **changes: object) -> TokenizerTrainConfig:
    data = {"manifest": "unused", "global_batch_size": 8, "micro_batch_size": 8}
    optim = {"lr": 3e-3, "warmup_steps": 5}
    sections = {
        "run": run,
        "data": data,
        "loop": {"steps": 60, "log_every": 1},
        "optim": optim,
        "model": model,
    }
    return TokenizerTrainConfig(**(sections | changes))


def features(index: int, model: TokenizerConfig = MODEL) -> torch.Tensor:
    """float16 [T, C, h, w]: one of four patterns with a strength, a function of the index."""
    shape = (model.segment_frames, model.feature_channels, model.grid_height, model.grid_width)
    pattern = torch.randn(*shape, generator=keyed_random.generator(0, "pattern", index % 4))
    strength = 0.75 + 0.5 * torch.rand(1, generator=keyed_random.generator(0, "clip", index % 64))
    return (strength * pattern).half()


def batch(
    step: int, rank: int = 0, size: int = 1, micro_batches: int = 1, global_batch_size: int = 8
) -> Batch:
    """Rank's share of global batch `step`, every size-th sample."""
    samples = []
    for position in range(rank, global_batch_size, size):
        index = step * global_batch_size + position
        samples.append(
            Sample(f"{index:06d}", 0, index, position, META, {"features": features(index)})
        )
    per = len(samples) // micro_batches
    micros = tuple(tuple(samples[i * per : (i + 1) * per]) for i in range(micro_batches))
    return Batch(step, global_batch_size, micros)


def write_data(folder: Path, shards: int = 3, samples_per_shard: int = 6) -> Path:
    """A data folder with those features as a column; the clips themselves are left out."""
    raw, columns = [], []
    for shard in range(shards):
        name = f"{shard:06d}"
        indices = range(shard * samples_per_shard, (shard + 1) * samples_per_shard)
        with ShardWriter(folder / "raw", name, fingerprint="raw") as writer:
            for index in indices:
                writer.add(
                    f"{index:06d}",
                    {
                        "json": RawSample(
                            **META.model_dump()
                            | {"key": f"{index:06d}", "source": f"{index // 2}.mp4"}
                        )
                        .model_dump_json()
                        .encode()
                    },
                )
        raw.append(writer.sidecar.entry)
        with ShardWriter(
            folder / "features", name, fingerprint="features", raw_sha256=raw[-1].sha256
        ) as writer:
            for index in indices:
                writer.add(
                    f"{index:06d}",
                    {"features.safetensors": pack_tensor("features", features(index))},
                )
        columns.append(writer.sidecar.entry)
    column = Column(
        dtype="float16",
        shape=list(features(0).shape),
        encoder="patterns",
        fingerprint="features",
        config={},
        shards=columns,
    )
    write_manifest(
        folder, Manifest(fingerprint="raw", config={}, shards=raw, columns={"features": column})
    )
    return folder
