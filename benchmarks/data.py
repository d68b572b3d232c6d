"""Speed of the data side: the loader, precompute, and the time that trainers wait for data.

    python -m benchmarks.data
    python -m benchmarks.data --device cuda --clips 1024

The loader reads samples of paper size (latents, text states and tokens, 4.1 MB together) from the
page cache and returns tensors of its own. webdataset reads the same three columns as streams and
decodes them with safetensors. Rates are per second of CPU time, the best of several repeats, so
that other load on the machine has little effect. Precompute runs the nano preset on generated
clips, where the rate of a stage is the one that it would reach alone. The trainers run the nano
preset on the output of precompute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.clips import Clip
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.interface import Producer, ProducerContext
from landiff.data_pipeline.precompute.job import PrecomputeTask
from landiff.data_pipeline.precompute.producers import build_producers
from landiff.data_pipeline.video.codec import encode_clip
from landiff.launchers.local.train import explain_exit, own_run, run_trainer
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig

PASSES = 4  # over the data in one measurement, so that opening files counts as in a long run
SHAPES = {"tokens": (1218,), "latents": (13, 16, 60, 90), "text-t5": (226, 4096)}  # paper size
BATCH_SIZE = 8  # of the loader
WORDS = ("a", "small", "rabbit", "runs", "over", "the", "grass", "while", "birds", "watch")


@dataclass(frozen=True)
class Row:
    """Row of the table."""

    what: str
    samples_per_s: float
    megabytes_per_s: float | None = None
    note: str = ""


def write_raw(data: Path, clips: list[list[tuple[RawSample, bytes]]]) -> Manifest:
    """Writes raw shards of the clips, one shard per list."""
    entries = []
    for shard, members in enumerate(clips):
        with ShardWriter(data / RAW, f"{shard:06d}", fingerprint="benchmark") as writer:
            for meta, clip in members:
                writer.add(meta.key, {"mp4": clip, "json": meta.model_dump_json().encode()})
        entries.append(writer.sidecar.entry)
    fingerprint = content_fingerprint([entry.sha256 for entry in entries])
    manifest = Manifest(fingerprint=fingerprint, config={}, shards=entries)
    write_manifest(data, manifest)
    return manifest


def meta_of(number: int, clip: bytes, frames: int, size: int) -> RawSample:
    """Metadata of a generated clip of size x size pixels."""
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
    """Writes columns of paper size with random content."""
    raw = []
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        raw.append([(meta_of(number, b"", 49, 480), b"") for number in numbers])
    manifest = write_raw(data, raw)
    draw = torch.Generator().manual_seed(0)
    columns = {}
    for name, shape in SHAPES.items():
        stem = column_stem(name)
        entries = []
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
    """Smallest CPU seconds of each function, run in turns so that other load affects all."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for own, work in zip(times, works, strict=True):
            begin = time.process_time()
            work()
            own.append(time.process_time() - begin)
    return [min(own) for own in times]


def forget_cached(path: Path) -> None:
    """Drops a file from the page cache, so that the next reader reads it from disk as in training.

    A file that was just written is in the page cache in the small pieces in which it was written.
    Copying it from there has two thirds of the speed of a file that was read ahead.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_bytes(tars: list[Path]) -> None:
    """Reads all files PASSES times, without decoding them."""
    buffer = memoryview(bytearray(max(path.stat().st_size for path in tars)))
    for path in tars * PASSES:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_webdataset(folder: Path) -> None:
    """Reads and decodes all samples PASSES times with webdataset."""
    streams = []
    for name in SHAPES:
        urls = [str(path) for path in sorted((folder / name).glob("*.tar"))]
        streams.append(iter(webdataset.WebDataset(urls * PASSES, shardshuffle=False)))
    kept: list[list[dict[str, torch.Tensor]]] = []
    for together in zip(*streams, strict=True):
        tensors = []
        for name, sample in zip(SHAPES, together, strict=True):
            tensors.append(load_safetensors(sample[f"{column_stem(name)}.safetensors"]))
        kept = kept[-BATCH_SIZE + 1 :]  # as many as a batch of the loader keeps in memory
        kept.append(tensors)


def read_loader(folder: Path, samples: int, ahead: int = 0, **options: Any) -> None:
    """Reads all samples PASSES times with our loader.

    samples: of all shards. ahead: batches that are read ahead.
    """
    config = DataConfig(
        manifest=folder,
        global_batch_size=BATCH_SIZE,
        prefetch_batches=ahead,
        **options,
    )
    with Loader(config, list(SHAPES), dp_rank=0, dp_size=1) as loader:
        # The loader reads the last `ahead` batches too, although nobody takes them.
        for _ in range(PASSES * samples // BATCH_SIZE - ahead):
            loader.next_batch()


def measure_reading(shards: int, samples: int, repeats: int, folder: Path) -> list[Row]:
    """Rates of the loader, of webdataset and of reading the bytes."""
    write_large_columns(folder, shards, samples)
    tars: list[Path] = []
    for name in SHAPES:
        tars += sorted((folder / name).glob("*.tar"))
    for path in tars:
        forget_cached(path)
    total = shards * samples
    megabytes = sum(path.stat().st_size for path in tars) / total / 1e6
    loader = partial(read_loader, folder, total, shuffle_window=shards)
    works = {
        "reading the bytes": partial(read_bytes, tars),
        "webdataset": partial(read_webdataset, folder),
        "loader": loader,
        "loader, reading ahead": partial(loader, ahead=1),
        "loader, 2 threads": partial(loader, ahead=1, read_threads=2),
        "loader, checksum": partial(loader, checksum=True),
    }
    rates = {}
    for what, seconds in zip(works, best_cpu_s([*works.values()], repeats), strict=True):
        rates[what] = PASSES * total / seconds
    rows = []
    for what, rate in rates.items():
        note = ""
        if what.startswith("loader"):
            note = (
                f"{rate / rates['reading the bytes']:.2f}x of reading the bytes (goal: 0.5x), "
                f"{rate / rates['webdataset']:.2f}x of webdataset (goal: 3x)"
            )
        rows.append(Row(what, rate, rate * megabytes, note))
    return rows


def write_nano(folder: Path, clips: int) -> None:
    """Writes generated clips for the nano preset, and a zoo with an untrained tokenizer."""
    config = load(ModelConfig, "nano/model").tokenizer
    grid = (config.grid_height, config.grid_width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = registry.build_module("tokenizer", config).train()
        tokenizer(torch.randn(64, config.segment_frames, config.feature_channels, *grid))
    registry.export(folder / "zoo", "tokenizer", "tokenizer", config, tokenizer.state_dict(), {})
    draw = np.random.default_rng(0)
    members = []
    for number in range(clips):
        wide = np.kron(draw.integers(0, 255, (8, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = [np.roll(wide, -2 * t, axis=1)[:, :64] for t in range(17)]
        clip = encode_clip(np.stack(frames), 8, preset="ultrafast")
        members.append((meta_of(number, clip, 17, 64), clip))
    write_raw(folder / "data", [members[at : at + 32] for at in range(0, clips, 32)])


class Clock:
    """Seconds of wall clock, of this process with its living children, and of idle cores."""

    def __init__(self) -> None:
        own = psutil.Process()
        cores = psutil.cpu_times(percpu=True)
        self.wall = time.perf_counter()
        self.used = 0.0
        for process in [own, *own.children(recursive=True)]:
            self.used += sum(process.cpu_times()[:2])
        self.idle = sum(cores[core].idle + cores[core].iowait for core in os.sched_getaffinity(0))

    def since(self, other: Clock) -> np.ndarray:
        """Differences to another clock: wall, used, idle."""
        return np.array([self.wall - other.wall, self.used - other.used, self.idle - other.idle])


def measure_precompute(clips: int, device: str, batch_size: int, folder: Path) -> list[Row]:
    """The rate that each stage of the nano preset would reach alone, and the rate of the whole job.

    On a CPU the CPU seconds of all stages are divided by those that the job used or left idle. On
    an idle machine these are cores times wall clock; on a busy one the time of other processes is
    left out.
    """
    write_nano(folder, clips)
    overrides = [
        f"data={folder / 'data'}",
        f"zoo={folder / 'zoo'}",
        f"device={device}",
        f"batch_size={batch_size}",
    ]
    config = load(PrecomputeConfig, "nano/precompute", overrides)
    loading = np.zeros(3)

    def build(names: Sequence[str], context: ProducerContext) -> dict[str, Producer]:
        nonlocal loading
        begin = Clock()
        producers = build_producers(names, context)
        loading += Clock().since(begin)
        return producers

    begin = Clock()
    job = PrecomputeTask(config, read_manifest(config.data), (0, 1), build)
    summary = job.run()
    wall, used, idle = Clock().since(begin) - loading
    precompute.finalize(config)
    # The two text columns have one stage, and each of the four columns is written.
    counts = {
        "decode": clips,
        "stack": 3 * clips,  # frames for features and latents, features for tokens
        "features": clips,
        "tokens": clips,
        "latents": clips,
        "text": 2 * clips,
        "write": 4 * clips,
    }
    if job.context.device.type == "cpu":
        spent = summary.cpu_seconds
        total = sum(spent[stage] for stage in counts)
        note = (
            f"{total / (used + idle):.2f}x of its stages' CPU seconds over the cores (goal: 0.9x); "
            f"cores idle {idle / wall:.2f}, used {used / wall:.2f}"
        )
    else:
        spent = summary.stage_seconds
        alone = {**spent, "decode": spent["decode"] / config.decode_threads}
        slowest = max(alone[stage] for stage in counts)
        note = f"{slowest / wall:.2f}x of its slowest stage (goal: 0.9x)"
    rows = [Row(f"precompute: {stage}", count / spent[stage]) for stage, count in counts.items()]
    note = f"{note}; encoders loaded in {loading[0]:.1f} s before"
    rows.append(Row("precompute, whole", clips / wall, None, note))
    return rows


def measure_captions(count: int, batch_size: int, folder: Path) -> Row:
    """CPU time of captions of 5 to 40 words, sorted by length, against the order of the clips."""
    overrides = [f"data={folder / 'data'}", "device=cpu", f"batch_size={batch_size}"]
    config = load(PrecomputeConfig, "nano/precompute", overrides)
    context = ProducerContext.of(config)
    producer = build_producers(["text-minilm"], context)["text-minilm"]
    entry = read_manifest(config.data).shards[0]
    draw = np.random.default_rng(0)
    clips = []
    for number in range(count):
        caption = " ".join(draw.choice(WORDS, draw.integers(5, 41)))
        meta = meta_of(number, b"", 17, 64).model_copy(update={"caption": caption})
        clips.append(Clip(number, meta.key, meta))
    batches = [clips[start : start + batch_size] for start in range(0, count, batch_size)]

    def in_order() -> None:
        for batch in batches:
            producer.begin(entry, batch)(batch, {})

    def by_length() -> None:
        encode = producer.begin(entry, clips)
        for batch in batches:
            encode(batch, {})

    with torch.inference_mode():
        before, after = best_cpu_s([in_order, by_length], 3)
    note = f"{before / after:.2f}x of captions that are encoded in the order of the clips"
    return Row("precompute: captions", count / after, None, note)


def measure_waits(steps: int, folder: Path) -> list[Row]:
    """The time that the trainers of the nano preset wait for data, after the first logged steps."""
    lm = load(LMTrainConfig, "nano/lm", _train_overrides(folder, "lm", steps))
    diffusion = load(
        DiffusionTrainConfig,
        "nano/diffusion-main",
        [*_train_overrides(folder, "diffusion", steps), "loop.preview_every=0"],
    )
    return [
        measure_wait("lm", lm, processes=2),
        measure_wait("diffusion", diffusion, processes=1),
    ]


def _train_overrides(folder: Path, name: str, steps: int) -> list[str]:
    return [
        f"run={folder / name}",
        f"zoo={folder / 'zoo'}",
        f"data.manifest={folder / 'data'}",
        f"loop.steps={steps}",
        f"loop.save_every={steps}",
        # Validation would count as time of steps, and leave few of the clips for training.
        "loop.val_every=0",
        "data.validation=null",
    ]


def measure_wait(name: str, config: LMTrainConfig | DiffusionTrainConfig, processes: int) -> Row:
    """Runs a trainer and reads the time that it waits for data from its metrics."""
    run = config.run
    run.mkdir()
    (run / "resolved.yaml").write_text(dump(config))
    with own_run(config, name, processes, "benchmarks.data") as owned:
        code = run_trainer(f"landiff.training.{name}", run / "resolved.yaml", run, processes, owned)
    assert code == 0, f"the {name} trainer ended: {explain_exit(run, code)}"
    lines = read_metrics(run / "metrics.jsonl")[1:]
    step_s = np.mean([1 / line["throughput/steps_per_s"] for line in lines])
    waiting = np.mean([line["data/wait_fraction"] for line in lines])
    return Row(
        f"{name} trainer",
        float(config.data.global_batch_size / step_s),
        None,
        f"waits for data {waiting:.2%} of the step (goal: at most 2 %)",
    )


def table(rows: Sequence[Row]) -> str:
    """The printed table."""
    lines = [f"{'what':<24} {'samples/s':>10} {'MB/s':>8}"]
    for row in rows:
        megabytes = "-"
        if row.megabytes_per_s is not None:
            megabytes = f"{row.megabytes_per_s:.0f}"
        line = f"{row.what:<24} {row.samples_per_s:>10.1f} {megabytes:>8}  {row.note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="of precompute")
    parser.add_argument(
        "--shards",
        type=int,
        default=4,
        help="of the loader's data; they take 4.1 MB * shards * samples on disk",
    )
    parser.add_argument("--samples", type=int, default=16, help="of a shard, a multiple of 8")
    parser.add_argument("--clips", type=int, default=256, help="of precompute")
    parser.add_argument("--batch-size", type=int, default=8, help="of precompute")
    parser.add_argument("--steps", type=int, default=60, help="of the trainers")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="folder to write in; default: the temporary one"
    )
    return parser.parse_args()


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        nano = Path(name) / "nano"
        nano.mkdir()
        reading = Path(name) / "reading"
        rows = measure_reading(options.shards, options.samples, options.repeats, reading)
        rows += measure_precompute(options.clips, options.device, options.batch_size, nano)
        rows.append(measure_captions(options.clips, options.batch_size, nano))
        rows += measure_waits(options.steps, nano)
    print(table(rows))
    print(f"load average: {os.getloadavg()[0]:.1f}, cores: {len(os.sched_getaffinity(0))}")


if __name__ == "__main__":
    main()
