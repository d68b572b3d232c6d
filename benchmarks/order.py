"""The data order at full scale, by simulation: 10^8 samples in 10^5 shards, read by 1 024 ranks.

    python -m benchmarks.order
    python -m benchmarks.order --shards 10000 --samples 1000

Writes a manifest of that size with three columns, opens it as a trainer does, and measures what every rank of a
large run does: opening, its share of a batch, the seek to the middle of a late epoch. Balance: bytes that each
rank reads in the same stretch of steps, and shards that are open at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.schema import Column, Manifest, ShardEntry
from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.data_pipeline.loading.order import BatchOrder, OrderedDataset

COLUMNS = {"tokens": 4_000, "latents": 2_247_000, "text-t5": 1_852_000}  # bytes of a sample


def write_large_manifest(
    folder: Path, shards: int, samples: int, draw: np.random.Generator
) -> None:
    """Shards of `samples` samples, a tenth more or less, with a reject now and then."""
    sizes = draw.integers(samples * 9 // 10, samples * 11 // 10 + 1, shards)
    sha = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(shards)]
    raw = [
        ShardEntry(name=f"{i:06d}", samples=int(n), bytes=int(n) * 300_000, sha256=sha[i])
        for i, n in enumerate(sizes)
    ]
    columns = {}
    for name, size in COLUMNS.items():
        bad = draw.random(shards) < 0.1
        entries = [
            ShardEntry(
                name=e.name,
                samples=e.samples - int(b),
                bytes=e.samples * size,
                sha256=e.sha256,
                missing=(7,) if b else (),
            )
            for e, b in zip(raw, bad, strict=True)
        ]
        columns[name] = Column(
            dtype="bfloat16", shape=[1], encoder="none", fingerprint=name, config={}, shards=entries
        )
    write_manifest(folder, Manifest(fingerprint="0" * 16, config={}, shards=raw, columns=columns))


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """Prints a line with the seconds since the line before, of processor time."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def __call__(self, what: str, note: str = "") -> float:
        seconds = time.process_time() - self.last
        print(f"{what:<44} {seconds:>9.3f} s   {note}")
        self.last = time.process_time()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000, help="of a shard, about")
    parser.add_argument("--ranks", type=int, default=1_024)
    parser.add_argument(
        "--per-rank", type=int, default=4, help="samples of one rank in a global batch"
    )
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50, help="for balance")
    options = parser.parse_args()
    batch = options.ranks * options.per_rank
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), memory_mb()
        writer = multiprocessing.get_context("fork").Process(  # its memory is not that of a rank
            target=write_large_manifest,
            args=(folder, options.shards, options.samples, np.random.default_rng(0)),
        )
        writer.start()
        writer.join()
        size, watch = (folder / "manifest.json").stat().st_size, Stopwatch()
        manifest = read_manifest(folder)
        watch("opening: read the manifest", f"{size / 1e6:.0f} MB of JSON")
        columns = AlignedColumns(folder, manifest, list(COLUMNS))
        order = BatchOrder(
            [OrderedDataset(columns.counts, [s.bucket for s in manifest.shards])],
            seed=0,
            window=options.window,
            batch_size=batch,
        )
        watch(
            "opening: align columns",
            f"{order.num_samples} samples take part; peak memory {memory_mb():.0f} MB, {before:.0f} of it before",
        )
    everyone = np.arange(batch)
    order.locate(0, everyone[:: options.ranks])
    watch("first batch of an epoch, one rank")
    middle = 7 * (order.num_samples // batch) + order.num_samples // batch // 2
    order.locate(middle, everyone[:: options.ranks])
    watch("seek to the middle of epoch 7, one rank", f"step {middle}")
    for step in range(100):
        order.locate(middle + 1 + step, everyone[:: options.ranks])
    watch("100 batches after it, one rank", "")
    whole = [order.locate(middle + step, everyone)[1] for step in range(options.steps)]
    seconds = watch(f"{options.steps} batches, all {options.ranks} ranks", "")
    places = np.concatenate([p.shard * 10_000 + p.slot for p in whole])
    shared = np.concatenate(
        [order.locate(middle, everyone[r :: options.ranks])[1].shard for r in range(options.ranks)]
    )
    watch(f"one batch, {options.ranks} ranks one by one")
    assert np.array_equal(np.sort(shared), np.sort(whole[0].shard)), (
        "the ranks' shares are not the global batch"
    )
    assert len(np.unique(places)) == len(places), "a sample came twice"
    print(
        f"order: {options.steps * batch / seconds:,.0f} samples/s; {len(places)} samples of {options.steps} batches, each once"
    )
    print(
        f"balance: every rank has {options.per_rank} samples of each batch; shards open at once: "
        f"{max(len(np.unique(p.shard)) for p in whole)} at most ({options.window} in a window)"
    )
    text = np.random.default_rng(1).integers(
        20, 227, (options.steps, batch)
    )  # rows of captions differ, latents don't
    per_rank = (
        text.reshape(options.steps, -1, options.ranks).sum(axis=(0, 1)) * 8192
        + options.steps * options.per_rank * COLUMNS["latents"]
    )
    print(
        f"balance: bytes of the busiest rank over the mean, {options.steps} steps: {per_rank.max() / per_rank.mean():.3f}"
    )
    print(f"peak memory: {memory_mb():.0f} MB, the simulation of all ranks included")


if __name__ == "__main__":
    main()
