"""Sample order at full scale, by simulation: 10^8 samples in 10^5 shards, read by 1 024 ranks.

    python -m benchmarks.order
    python -m benchmarks.order --shards 10000 --samples 1000

Writes a manifest of that size with three columns, opens it like a trainer, and measures what each
rank of a large run does: opening, its part of a batch, and seeking to the middle of a late epoch.
Balance is measured in bytes that each rank reads in the same steps, and in shards that are open at
the same time.
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
from landiff.data_pipeline.loading.phases import BatchSizes

COLUMNS = {"tokens": 4_000, "latents": 2_247_000, "text-t5": 1_852_000}  # bytes of a sample
BYTES_OF_TEXT_ROW = 8192


def write_large_manifest(
    folder: Path, shards: int, samples: int, draw: np.random.Generator
) -> None:
    """Writes a manifest of shards with about `samples` samples, some with a rejected one."""
    sizes = draw.integers(samples * 9 // 10, samples * 11 // 10 + 1, shards)
    raw = []
    for number, size in enumerate(sizes):
        sha256 = hashlib.sha256(str(number).encode()).hexdigest()
        raw.append(
            ShardEntry(
                name=f"{number:06d}", samples=int(size), bytes=int(size) * 300_000, sha256=sha256
            )
        )
    columns = {}
    for name, size in COLUMNS.items():
        rejects = draw.random(shards) < 0.1
        entries = []
        for entry, reject in zip(raw, rejects, strict=True):
            missing: tuple[int, ...] = ()
            if reject:
                missing = (7,)
            entries.append(
                ShardEntry(
                    name=entry.name,
                    samples=entry.samples - len(missing),
                    bytes=entry.samples * size,
                    sha256=entry.sha256,
                    missing=missing,
                )
            )
        columns[name] = Column(
            dtype="bfloat16", shape=[1], encoder="none", fingerprint=name, config={}, shards=entries
        )
    write_manifest(folder, Manifest(fingerprint="0" * 16, config={}, shards=raw, columns=columns))


def memory_mb() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """Prints lines with the seconds of CPU time since the line before."""

    def __init__(self) -> None:
        self.last = time.process_time()

    def __call__(self, what: str, note: str = "") -> float:
        """Prints a line. Returns its seconds."""
        seconds = time.process_time() - self.last
        print(f"{what:<44} {seconds:>9.3f} s   {note}")
        self.last = time.process_time()
        return seconds


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000, help="mean number per shard")
    parser.add_argument("--ranks", type=int, default=1_024)
    parser.add_argument(
        "--per-rank", type=int, default=4, help="samples of one rank in a global batch"
    )
    parser.add_argument("--window", type=int, default=16, help="shuffle window, in shards")
    parser.add_argument("--steps", type=int, default=50, help="steps for which balance is measured")
    return parser.parse_args()


def open_order(options: argparse.Namespace, folder: Path) -> tuple[BatchOrder, Stopwatch]:
    """Writes the manifest and opens it, with a line of output for each step."""
    before = memory_mb()
    # A process of its own, so that its memory does not count as that of a rank.
    writer = multiprocessing.get_context("fork").Process(
        target=write_large_manifest,
        args=(folder, options.shards, options.samples, np.random.default_rng(0)),
    )
    writer.start()
    writer.join()
    size = (folder / "manifest.json").stat().st_size
    watch = Stopwatch()
    manifest = read_manifest(folder)
    watch("opening: read the manifest", f"{size / 1e6:.0f} MB of JSON")
    columns = AlignedColumns(folder, manifest, list(COLUMNS))
    order = BatchOrder(
        [OrderedDataset(columns.counts, [shard.bucket for shard in manifest.shards])],
        seed=0,
        window=options.window,
        batch_sizes=BatchSizes.constant(options.ranks * options.per_rank),
    )
    watch(
        "opening: align columns",
        f"{order.num_samples} samples remain; peak memory {memory_mb():.0f} MB, {before:.0f} of it "
        "before",
    )
    return order, watch


def main() -> None:
    """Measures and prints one line per measurement."""
    options = parse_arguments()
    batch = options.ranks * options.per_rank
    with tempfile.TemporaryDirectory() as name:
        order, watch = open_order(options, Path(name))
    everyone = np.arange(batch)
    order.locate(0, everyone[:: options.ranks])
    watch("first batch of an epoch, one rank")
    middle = 7 * (order.num_samples // batch) + order.num_samples // batch // 2
    order.locate(middle, everyone[:: options.ranks])
    watch("seek to the middle of epoch 7, one rank", f"step {middle}")
    for step in range(100):
        order.locate(middle + 1 + step, everyone[:: options.ranks])
    watch("100 batches after it, one rank")
    whole = [order.locate(middle + step, everyone)[1] for step in range(options.steps)]
    seconds = watch(f"{options.steps} batches, all {options.ranks} ranks")
    parts = []
    for rank in range(options.ranks):
        parts.append(order.locate(middle, everyone[rank :: options.ranks])[1].shard)
    watch(f"one batch, {options.ranks} ranks one by one")
    assert np.array_equal(np.sort(np.concatenate(parts)), np.sort(whole[0].shard)), (
        "the parts of the ranks are not the global batch"
    )
    slots = np.concatenate([place.shard * 10_000 + place.slot for place in whole])
    assert len(np.unique(slots)) == len(slots), "a sample occurs twice"
    rate = options.steps * batch / seconds
    print(
        f"order: {rate:,.0f} samples/s; {len(slots)} samples of {options.steps} batches, each once"
    )
    open_shards = max(len(np.unique(place.shard)) for place in whole)
    print(
        f"balance: every rank has {options.per_rank} samples of each batch; shards open at once: "
        f"at most {open_shards} ({options.window} in a window)"
    )
    # The numbers of text rows differ, the sizes of latents do not.
    rows = np.random.default_rng(1).integers(20, 227, (options.steps, batch))
    text_bytes = rows.reshape(options.steps, -1, options.ranks).sum(axis=(0, 1)) * BYTES_OF_TEXT_ROW
    rank_bytes = text_bytes + options.steps * options.per_rank * COLUMNS["latents"]
    print(
        f"balance: bytes of the busiest rank over the mean, {options.steps} steps: "
        f"{rank_bytes.max() / rank_bytes.mean():.3f}"
    )
    print(f"peak memory: {memory_mb():.0f} MB, including the simulation of all ranks")


if __name__ == "__main__":
    main()
