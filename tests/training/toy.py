"""The smallest real engine and loader: linear regression with gradients averaged over ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from landiff.configs.base import Config
from landiff.configs.loader import load
from landiff.data_pipeline.format.schema import Manifest, RawSample
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.model_zoo import keyed_random
from landiff.training import distributed
from landiff.training.checkpoint.parts import StateFile, safetensors_file
from landiff.training.config import EmaConfig, LoopConfig, OptimConfig, TrainConfig
from landiff.training.distributed import World
from landiff.training.ema import Ema
from landiff.training.engine import Engine, StepResult, TrainState
from landiff.training.guard import Guard
from landiff.training.loop import fit
from landiff.training.observe.charts import Charts
from landiff.training.observe.config import TrackerConfig
from landiff.training.observe.previews import Preview
from landiff.training.optim import rate_of_step
from landiff.training.phases import PhaseConfig
from landiff.training.run import Run


class ToyModelConfig(Config):
    width: int = 3


class ToyConfig(TrainConfig):
    run: Path
    parent: Path | None = None
    loop: LoopConfig
    model: ToyModelConfig = ToyModelConfig()
    optim: OptimConfig = OptimConfig(lr=0.1)
    ema: EmaConfig | None = None
    trackers: tuple[TrackerConfig, ...] = ()
    phases: tuple[PhaseConfig, ...] = ()
    data: DataConfig = DataConfig(manifest=Path("unused"), global_batch_size=4)


class ToyHeldOut(list[HeldOutBatch]):
    """Held-out clips of which no preview is made."""

    def first(self, count: int) -> list[Sample]:
        return []


class ToyLoader:
    """Samples whose content is a pure function of their index."""

    def __init__(self, config: ToyConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.manifest = Manifest(fingerprint="toy", config={}, shards=[])
        self.held_out = ToyHeldOut(held_out_batches(held_out_samples(), world.rank, world.size))
        self.step = 0

    def next_batch(self) -> Batch:
        size, width = self.config.data.global_batch_size, self.config.model.width
        samples = []
        for position in range(self.world.rank, size, self.world.size):
            index = self.step * size + position
            x = torch.randn(width, generator=keyed_random.generator(0, "toy", index))
            samples.append(Sample(f"{index:06d}", 0, index, position, META, {"x": x}))
        self.step += 1
        return Batch(self.step - 1, size, tuple((sample,) for sample in samples))

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


class BadLoader(ToyLoader):
    """Batches in which a sample holds a bad value. `skips` holds steps that are left out."""

    def __init__(
        self,
        config: ToyConfig,
        world: World,
        bad: Mapping[int, float] | None = None,
        skips: Collection[int] = (),
    ) -> None:
        super().__init__(config, world)
        self.bad = bad or {}
        self.skips = skips

    def next_batch(self) -> Batch:
        while self.step in self.skips:
            self.step += 1
        batch = super().next_batch()
        if batch.step in self.bad:
            batch.micro_batches[0][0].tensors["x"][0] = self.bad[batch.step]
        return batch


def held_out_samples(clips: int = 5) -> list[Sample]:
    """Samples of the toy engine that it does not train on."""
    samples = []
    for number in range(clips):
        x = torch.randn(3, generator=keyed_random.generator(0, "held out", number))
        samples.append(Sample(f"{number:06d}", 0, number, 0, META, {"x": x}))
    return samples


def held_out_batches(
    samples: Sequence[Sample], rank: int, ranks: int, micro_batch_size: int = 1
) -> list[HeldOutBatch]:
    """A rank's part of held-out samples. The partner of each is the one before it."""
    batches = []
    for start in range(0, len(samples), ranks * micro_batch_size):
        numbers = range(start + rank, start + ranks * micro_batch_size, ranks)
        chosen = [number % len(samples) for number in numbers]
        batches.append(
            HeldOutBatch(
                samples=tuple(samples[number] for number in chosen),
                others=tuple(samples[number - 1] for number in chosen),
                counted=tuple(number < len(samples) for number in numbers),
                first=start,
            )
        )
    return batches


def validation_metrics(
    engine: Engine, samples: Sequence[Sample], rank: int, ranks: int, micro_batch_size: int = 1
) -> dict[str, float]:
    """Metrics of all `samples`. Collective over the default process group, if there is one."""
    sums: dict[str, torch.Tensor] = {}
    for batch in held_out_batches(samples, rank, ranks, micro_batch_size):
        for name, value in engine.validate(batch).items():
            sums[name] = sums[name] + value if name in sums else value
    if dist.is_initialized():
        for value in sums.values():
            dist.all_reduce(value)
    return engine.summarize(sums)


META = RawSample(
    key="k",
    caption="c",
    source="s",
    source_sha256="",
    start_s=0,
    fps=8,
    num_frames=17,
    height=64,
    width=64,
    motion_score=0.0,
    video_sha256="",
)


@dataclass
class ToyEngine:
    """Learns to sum its inputs, by gradient descent with momentum."""

    config: ToyConfig
    world: World
    charts: ClassVar[Charts] = {"loss": {"loss": ["train/loss", "val(_ema)?/loss"]}}

    def __post_init__(self) -> None:
        self.weight = torch.zeros(self.config.model.width)
        self.momentum = torch.zeros(self.config.model.width)
        self.ema = Ema(self.config.ema, [self.weight])
        self.seen: list[int] = []
        self.guard = Guard(self.config.loop, self.world)

    def train_step(self, batch: Batch) -> StepResult:
        self.seen += [sample.index for sample in batch.samples]
        x = torch.stack([sample.tensors["x"] for sample in batch.samples])
        error = x @ self.weight - x.sum(1)
        sums = torch.cat([error @ x, error.square().sum()[None]])
        if self.world.size > 1:
            dist.all_reduce(sums)
        gradient, loss = sums[:-1] / batch.global_batch_size, sums[-1] / batch.global_batch_size
        lr = rate_of_step(self.config, batch.step)
        updating = self.guard.decide(loss, gradient.norm())
        if updating:
            self.momentum = 0.9 * self.momentum + gradient
            self.weight -= lr * self.momentum
            self.ema.update(batch.step + 1)
        metrics = {"train/extra": 2.0}
        return StepResult(loss, gradient.norm(), lr, metrics, tokens=7, skipped=not updating)

    def state_files(self) -> list[StateFile]:
        rank = self.world.rank
        files = [StateFile(f"rank_{rank}.txt", [f"{rank}\n".encode()])]
        if rank == 0:
            state = {"weight": self.weight, "momentum": self.momentum}
            files.append(safetensors_file("toy.safetensors", state))
        return files

    def load(self, folder: Path) -> None:
        state = load_file(folder / "toy.safetensors")
        self.weight.copy_(state["weight"])
        self.momentum = state["momentum"]

    def local_weights(self) -> list[tuple[str, torch.Tensor]]:
        return [("weight", self.weight)]

    def weights(self, ema: bool) -> AbstractContextManager[None]:
        return self.ema.applied(ema, lambda: None)

    def validate(self, batch: HeldOutBatch) -> dict[str, torch.Tensor]:
        (sample,) = batch.samples
        x = sample.tensors["x"].double()
        error = (x @ self.weight.double() - x.sum()).square()
        counts = float(batch.counted[0])
        return {"errors": torch.stack([error * counts, torch.tensor(counts).double()])}

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        error, count = sums["errors"].tolist()
        assert count == 5, count
        return {"loss": error / count}

    def preview(self, clips: Sequence[Sample]) -> list[Preview]:
        return [Preview("preview/noise", {"noise": torch.zeros(4, 8, 6, 3, dtype=torch.uint8)})]


def assert_measured(result: StepResult) -> None:
    """Whether an engine has counted the FLOPs of a step and measured its parts."""
    times = result.times
    assert times is not None and result.flops > 0
    assert 0 < times.first_forward_s <= times.forward_backward_s
    assert times.optimizer_s > 0


def train(config: ToyConfig, world: World) -> tuple[TrainState, ToyEngine]:
    engine = ToyEngine(config, world)
    run = Run(config.run, config, world)
    return fit(engine, ToyLoader(config, world), run, config.loop), engine


def alone() -> World:
    """A world of one, without a process group."""
    return World(0, 1, 0, torch.device("cpu"), "gloo")


def main(config_path: str) -> None:
    """Train with a resolved config, as the `__main__` of a trainer does."""
    config = load(ToyConfig, config_path)
    with distributed.start(config.run) as world:
        train(config, world)
