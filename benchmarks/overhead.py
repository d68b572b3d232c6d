"""Cost of guard, moving average and metrics, as parts of a step of the tokenizer's trainer.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --hidden 768 --layers 12 --clips 16

The real training loop trains a tokenizer of 10 M parameters with `loop.spikes`, `ema` and the
default `loop.log_every`, and the functions that these features add to a step are timed within it.
Before and after each call the device is waited for, so that work of the step itself does not count.
On several ranks, the guard's decision includes waiting for the slower ones, and each part that of
its device. The cost of the agreement of the ranks alone is measured in a loop of its own:

    torchrun --nproc-per-node 2 -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.models import device_name, sample_meta, synchronize
from landiff.configs import load
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.samples import Batch, Sample
from landiff.training import distributed
from landiff.training.distributed import World
from landiff.training.loop import fit
from landiff.training.run import Run
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig
from landiff.training.tokenizer.engine import TokenizerEngine

TOKENIZER = {  # geometry of the tokenizer; its width and depth are options
    "feature_channels": 128,
    "grid_height": 8,
    "grid_width": 8,
    "segment_frames": 3,
    "iframe_tokens": 64,
    "pframe_tokens": 16,
}

WARM_UP = 3  # steps that are not counted
AGREEMENTS = 1000


class RandomFeatures:
    """Batches of the same random features."""

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        self.manifest = Manifest(fingerprint="random", config={}, shards=[])
        self.size = config.data.global_batch_size
        model = config.model
        shape = (model.segment_frames, model.feature_channels, model.grid_height, model.grid_width)
        draw = torch.Generator().manual_seed(0)
        samples = []
        for position in range(world.rank, self.size, world.size):
            columns = {COLUMN: torch.randn(shape, generator=draw)}
            samples.append(Sample(f"{position}", 0, position, position, sample_meta("0"), columns))
        self.micro_batches = (tuple(samples),)
        self.step = 0

    def next_batch(self) -> Batch:
        """The next global batch."""
        self.step += 1
        return Batch(self.step - 1, self.size, self.micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """Number of batches so far."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many batches."""
        self.step = state["step"]


class Stopwatch:
    """Seconds in each call of some methods, after `WARM_UP` steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def watch(self, part: str, owner: object, method: str) -> None:
        """Replace a method of `owner` by one whose calls are timed under the name `part`."""
        inner: Callable[..., Any] = getattr(owner, method)
        times = self.seconds.setdefault(part, [])

        def timed(*args: Any, **options: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = inner(*args, **options)
            synchronize(self.device)
            times.append(time.perf_counter() - start)
            return result

        setattr(owner, method, timed)


def measure(config: TokenizerTrainConfig, world: World) -> dict[str, float]:
    """Mean seconds of a step and of its parts."""
    engine = TokenizerEngine(config, world)
    run = Run(config.run, config, world)
    stopwatch = Stopwatch(world.device)
    stopwatch.watch("guard: copy of the codebook", engine, "_copy_buffers")
    stopwatch.watch("guard: decision", engine.guard, "decide")
    stopwatch.watch("guard: record", run, "settle")
    stopwatch.watch("moving average", engine.ema, "update")
    stopwatch.watch("metrics: dead codes", engine, "_dead_fraction")
    stopwatch.watch("metrics: log", run, "log")
    stopwatch.watch("step", engine, "train_step")
    loader: Any = RandomFeatures(config, world)
    fit(engine, loader, run, config.loop)
    steps = config.loop.steps - WARM_UP
    means = {}
    for part, times in stopwatch.seconds.items():
        counted = times[WARM_UP:] if len(times) == config.loop.steps else times
        means[part] = sum(counted) / steps
    return means


def agreement_s(world: World) -> float:
    """Mean seconds of an agreement of ranks that do nothing else."""
    world.barrier()
    start = time.perf_counter()
    for _ in range(AGREEMENTS):
        world.agree(0)
    return (time.perf_counter() - start) / AGREEMENTS


def table(means: dict[str, float]) -> str:
    """The printed table."""
    step = means["step"]
    lines = [f"{'part':<28} {'ms/step':>9} {'of a step':>10}"]
    total = 0.0
    for part, seconds in means.items():
        if part != "step":
            total += seconds
            lines.append(f"{part:<28} {1e3 * seconds:>9.3f} {seconds / step:>10.2%}")
    lines.append(f"{'all of them':<28} {1e3 * total:>9.3f} {total / step:>10.2%}")
    lines.append(f"{'step':<28} {1e3 * step:>9.1f}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384, help="width of the transformer blocks")
    parser.add_argument("--layers", type=int, default=3, help="blocks of encoder and of decoder")
    parser.add_argument("--clips", type=int, default=2, help="clips of a step")
    parser.add_argument("--steps", type=int, default=13, help="steps, the first 3 not counted")
    return parser.parse_args()


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder, distributed.start() as world:
        run = Path(world.broadcast(folder))
        values = {
            "run": run,
            "data": {
                "manifest": folder,
                "global_batch_size": options.clips,
                "micro_batch_size": options.clips // world.size,
            },
            "loop": {"steps": options.steps, "spikes": {"action": "skip"}},
            "optim": {"lr": 1e-4},
            "ema": {"decay": 0.999},
            "model": {
                **TOKENIZER,
                "hidden_size": options.hidden,
                "num_heads": 6,
                "num_layers": options.layers,
            },
        }
        config = load(TokenizerTrainConfig, values)
        means = measure(config, world)
        agreement = agreement_s(world)
        if world.rank == 0:
            engine_size = TokenizerEngine(config, World(0, 1, 0, torch.device("cpu"), "gloo"))
            count = sum(parameter.numel() for parameter in engine_size.tokenizer.parameters())
            print(f"\ntokenizer of {count / 1e6:.1f} M parameters, {options.clips} clips a step")
            print(f"{world.size} rank(s), {device_name(world.device)}")
            print(table(means))
            print(f"agreement of {world.size} rank(s): {1e3 * agreement:.3f} ms")


if __name__ == "__main__":
    main()
