"""Speed of the data side: the loader against plain webdataset and against reading the bytes; precompute; the trainers' wait.

    python -m benchmarks.data
    python -m benchmarks.data --device cuda --clips 1024

The loader reads samples of paper size (latents, text states and tokens, 4.1 MB together) from the page cache
and hands out tensors of its own; webdataset reads the same three columns as streams and decodes them with
safetensors. Rates are per second of processor time, best of the repeats, so that a busy machine says little
against them. Precompute runs the nano preset on generated clips; a stage's rate is what it would reach alone.
The trainers run the nano preset on what precompute made.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from safetensors.torch import load as load_safetensors

from landiff.configs import dump, load
from landiff.data_pipeline.format.schema import (
    RAW,
    Column,
    Manifest,
    RawSample,
    column_stem,
    content_fingerprint,
)
from landiff.data_pipeline.format.shards import ShardWriter, read_manifest, write_manifest
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.precompute import producers as precompute
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.job import Bench, PrecomputeJob, Producer
from landiff.data_pipeline.video.codec import encode_clip
from landiff.launchers.local import start as local
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig

PASSES = 4  # over the data in one measurement, so that opening is what it is in a long run
SHAPES = {
    "tokens": (1218,),
    "latents": (13, 16, 60, 90),
    "text-t5": (226, 4096),
}  # of the paper's clips


@dataclass(frozen=True)
class Row:
    what: str
    samples_per_s: float | None = None
    megabytes_per_s: float | None = None
    note: str = ""


def write_raw(data: Path, clips: list[list[tuple[RawSample, bytes]]]) -> Manifest:
    entries = []
    for shard, members in enumerate(clips):
        with ShardWriter(data / RAW, f"{shard:06d}", fingerprint="benchmark") as writer:
            for meta, clip in members:
                writer.add(meta.key, {"mp4": clip, "json": meta.model_dump_json().encode()})
        entries.append(writer.sidecar.entry)
    manifest = Manifest(
        fingerprint=content_fingerprint([e.sha256 for e in entries]), config={}, shards=entries
    )
    write_manifest(data, manifest)
    return manifest


def meta_of(number: int, clip: bytes, frames: int, size: int) -> RawSample:
    return RawSample(
        key=f"clip{number:06d}",
        caption=f"a picture that moves, number {number}",
        source="generated",
        source_sha256="0" * 64,
        start_s=0,
        fps=8,
        num_frames=frames,
        height=size,
        width=size,
        motion_score=0.1,
        video_sha256=hashlib.sha256(clip).hexdigest(),
    )


def write_large_columns(data: Path, shards: int, samples: int) -> None:
    """Columns of paper size with random content."""
    raw = [
        [(meta_of(s * samples + i, b"", 49, 480), b"") for i in range(samples)]
        for s in range(shards)
    ]
    manifest = write_raw(data, raw)
    draw = torch.Generator().manual_seed(0)
    columns = {}
    for name, shape in SHAPES.items():
        stem, entries = column_stem(name), []
        for entry, members in zip(manifest.shards, raw, strict=True):
            with ShardWriter(
                data / name, entry.name, fingerprint=name, raw_sha256=entry.sha256
            ) as writer:
                for meta, _ in members:
                    if stem == "tokens":
                        tensor = torch.randint(0, 2048, shape, generator=draw).to(torch.uint16)
                    else:
                        tensor = torch.randn(shape, generator=draw).bfloat16()
                    writer.add(meta.key, {f"{stem}.safetensors": pack_tensor(stem, tensor)})
            entries.append(writer.sidecar.entry)
        columns[name] = Column(
            dtype=str(tensor.dtype),
            shape=list(shape),
            encoder="random",
            fingerprint=name,
            config={},
            shards=entries,
        )
    write_manifest(data, manifest.model_copy(update={"columns": columns}))


def best_cpu_s(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Processor seconds of each, in turns, so that what else the machine does meets them all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for own, work in zip(times, works, strict=True):
            begin = time.process_time()
            work()
            own.append(time.process_time() - begin)
    return [min(own) for own in times]


def forget_cached(path: Path) -> None:
    """Let the next reader fetch the file from the disk, as in training: what was just written lies in the page cache in the
    small pieces in which it came, and is copied at two thirds of the speed of what was read ahead."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def measure_reading(shards: int, samples: int, repeats: int, folder: Path) -> list[Row]:
    write_large_columns(folder, shards, samples)
    tars = {name: sorted((folder / name).glob("*.tar")) for name in SHAPES}
    for path in (path for paths in tars.values() for path in paths):
        forget_cached(path)
    total, batch_size, size = (
        shards * samples,
        8,
        sum(t.stat().st_size for paths in tars.values() for t in paths),
    )
    largest = max(t.stat().st_size for paths in tars.values() for t in paths)
    buffer = memoryview(np.empty(largest, np.uint8))

    def read_bytes() -> None:
        for paths in [*tars.values()] * PASSES:
            for path in paths:
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

    def read_webdataset() -> None:
        streams = [
            iter(webdataset.WebDataset([str(p) for p in paths] * PASSES, shardshuffle=False))
            for paths in tars.values()
        ]
        kept = []
        for together in zip(*streams, strict=True):
            kept = kept[-batch_size + 1 :]  # as many as a batch of the loader keeps in memory
            kept.append(
                [
                    load_safetensors(sample[f"{column_stem(name)}.safetensors"])
                    for name, sample in zip(SHAPES, together, strict=True)
                ]
            )

    def read_loader(ahead: int, **how: object) -> None:
        config = DataConfig(
            manifest=folder,
            global_batch_size=batch_size,
            shuffle_window=shards,
            prefetch_batches=ahead,
            **how,
        )
        with Loader(config, list(SHAPES), dp_rank=0, dp_size=1) as loader:
            for _ in range(
                PASSES * total // batch_size - ahead
            ):  # those that nobody takes are read too
                loader.next_batch()

    works = {
        "reading the bytes": read_bytes,
        "webdataset": read_webdataset,
        "loader": lambda: read_loader(0),
        "loader, reading ahead": lambda: read_loader(1),
        "loader, 2 threads": lambda: read_loader(1, read_threads=2),
        "loader, checksum": lambda: read_loader(0, checksum=True),
    }
    rates = {
        what: PASSES * total / seconds
        for what, seconds in zip(works, best_cpu_s([*works.values()], repeats), strict=True)
    }
    bytes_only, plain = list(rates.values())[:2]
    return [
        Row(
            what,
            rate,
            rate * size / total / 1e6,
            f"{rate / bytes_only:.2f}x of reading the bytes (asked: 0.5x), {rate / plain:.2f}x of webdataset (3x)"
            if what.startswith("loader")
            else "",
        )
        for what, rate in rates.items()
    ]


def write_nano(folder: Path, clips: int) -> None:
    """Raw shards of generated clips in the shape of the nano preset, and an untrained tokenizer in a zoo."""
    config = load(ModelConfig, "nano/model").tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = registry.build_module("tokenizer", config).train()
        tokenizer(
            torch.randn(
                64,
                config.segment_frames,
                config.feature_channels,
                config.grid_height,
                config.grid_width,
            )
        )
    registry.export(folder / "zoo", "tokenizer", "tokenizer", config, tokenizer.state_dict(), {})
    draw = np.random.default_rng(0)
    members = []
    for number in range(clips):
        wide = np.kron(draw.integers(0, 255, (8, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        clip = encode_clip(
            np.stack([np.roll(wide, -2 * t, axis=1)[:, :64] for t in range(17)]),
            8,
            preset="ultrafast",
        )
        members.append((meta_of(number, clip, 17, 64), clip))
    write_raw(folder / "data", [members[at : at + 32] for at in range(0, clips, 32)])


class Clock:
    """Seconds of the wall clock, of this process and its living children, and of the cores that stood idle."""

    def __init__(self) -> None:
        own, cores = psutil.Process(), psutil.cpu_times(percpu=True)
        self.wall = time.perf_counter()
        self.used = sum(sum(one.cpu_times()[:2]) for one in [own, *own.children(recursive=True)])
        self.idle = sum(cores[core].idle + cores[core].iowait for core in os.sched_getaffinity(0))

    def since(self, other: Clock) -> np.ndarray:
        return np.array([self.wall - other.wall, self.used - other.used, self.idle - other.idle])


def measure_precompute(clips: int, device: str, batch_size: int, folder: Path) -> list[Row]:
    """What each stage of the nano preset would reach alone, and the whole job against its stages.

    On a CPU the processor seconds of all stages are set against those that the job took or let lie while it ran: on an
    idle machine these are its cores times the wall clock, on a busy one the time of others is left out.
    """
    write_nano(folder, clips)
    config = load(
        PrecomputeConfig,
        "nano/precompute",
        [
            f"data={folder / 'data'}",
            f"zoo={folder / 'zoo'}",
            f"device={device}",
            f"batch_size={batch_size}",
        ],
    )
    loading = np.zeros(3)

    def build(names: Sequence[str], bench: Bench) -> dict[str, Producer]:
        nonlocal loading
        begin = Clock()
        made = precompute.producers(names, bench)
        loading += Clock().since(begin)
        return made

    begin, job = Clock(), PrecomputeJob(config, read_manifest(config.data), (0, 1), build)
    summary = job.run()
    wall, used, idle = Clock().since(begin) - loading
    precompute.finalize(config)
    # the two text columns share their stage, and each column is written
    counts = {
        "decode": clips,
        "features": clips,
        "tokens": clips,
        "latents": clips,
        "text": 2 * clips,
        "write": 4 * clips,
    }
    on_cpu = job.bench.device.type == "cpu"
    spent = summary.cpu_seconds if on_cpu else summary.stage_seconds
    rows = [Row(f"precompute: {stage}", count / spent[stage]) for stage, count in counts.items()]
    if on_cpu:
        note = (
            f"{sum(spent[stage] for stage in counts) / (used + idle):.2f}x of its stages' CPU seconds over the cores (asked: 0.9x); "
            f"cores idle {idle / wall:.2f}, used {used / wall:.2f}"
        )
    else:
        slowest = max(
            spent[stage] / (config.decode_threads if stage == "decode" else 1) for stage in counts
        )
        note = f"{slowest / wall:.2f}x of its slowest stage (asked: 0.9x)"
    return [
        *rows,
        Row(
            "precompute, whole",
            clips / wall,
            None,
            f"{note}; encoders loaded in {loading[0]:.1f} s before",
        ),
    ]


def measure_waits(steps: int, folder: Path) -> list[Row]:
    """How long the trainers of the nano preset wait for their data, behind the first logged steps."""
    rows = []
    for name, config_class, changes in (
        ("lm", LMTrainConfig, []),
        ("diffusion", DiffusionTrainConfig, ["loop.preview_every=0"]),
    ):
        preset = {"lm": "nano/lm", "diffusion": "nano/diffusion-main"}[name]
        run = folder / name
        config = load(
            config_class,
            preset,
            [
                f"run={run}",
                f"zoo={folder / 'zoo'}",
                f"data.manifest={folder / 'data'}",
                f"loop.steps={steps}",
                f"loop.save_every={steps}",
                *changes,
            ],
        )
        run.mkdir()
        (run / "resolved.yaml").write_text(dump(config))
        processes = 2 if name == "lm" else 1
        with local.own_run(config, name, processes, "benchmarks.data") as owned:
            code = local.run_trainer(
                f"landiff.training.{name}", run / "resolved.yaml", run, processes, owned
            )
        assert code == 0, f"the {name} trainer ended with {code}"
        lines = read_metrics(run / "metrics.jsonl")[1:]
        rate = config.data.global_batch_size / np.mean(
            [1 / line["throughput/steps_per_s"] for line in lines]
        )
        rows.append(
            Row(
                f"{name} trainer",
                float(rate),
                None,
                f"waits for data {np.mean([line['data/wait_fraction'] for line in lines]):.2%} of the step "
                "(asked: 2 % at most)",
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'what':<24} {'samples/s':>10} {'MB/s':>8}"]
    for row in rows:
        numbers = [
            f"{row.samples_per_s:.1f}",
            "-" if row.megabytes_per_s is None else f"{row.megabytes_per_s:.0f}",
        ]
        lines.append(f"{row.what:<24} {numbers[0]:>10} {numbers[1]:>8}  {row.note}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--shards",
        type=int,
        default=4,
        help="of the loader's data set; on disk 4.1 MB * shards * samples",
    )
    parser.add_argument("--samples", type=int, default=16, help="in a shard, a multiple of 8")
    parser.add_argument("--clips", type=int, default=256, help="that precompute works on")
    parser.add_argument("--batch-size", type=int, default=8, help="of precompute")
    parser.add_argument("--steps", type=int, default=60, help="of the trainers")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write the data; default: the system's temporary folder",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        (Path(name) / "nano").mkdir()
        rows = measure_reading(
            options.shards, options.samples, options.repeats, Path(name) / "reading"
        )
        rows += measure_precompute(
            options.clips, options.device, options.batch_size, Path(name) / "nano"
        )
        rows += measure_waits(options.steps, Path(name) / "nano")
    print(table(rows))
    print(f"load average: {os.getloadavg()[0]:.1f}, cores: {len(os.sched_getaffinity(0))}")


if __name__ == "__main__":
    main()
