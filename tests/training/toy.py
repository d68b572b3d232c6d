"""The smallest real engine and loader: linear regression with gradients averaged over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from landiff.configs.base import Config
from landiff.configs.loader import load
from landiff.data_pipeline.format.schema import Manifest, RawSample
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo import keyed_random
from landiff.training import distributed
from landiff.training.config import LoopConfig, OptimConfig, TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import StepResult, TrainState
from landiff.training.guard import Guard
from landiff.training.loop import fit
from landiff.training.observe.config import TrackerConfig
from landiff.training.observe.previews import Preview
from landiff.training.optim import learning_rate
from landiff.training.run import Run


class ToyModelConfig(Config):
    width: int = 3


class ToyConfig(TrainConfig):
    run: Path
    parent: Path | None = None
    loop: LoopConfig
    model: ToyModelConfig = ToyModelConfig()
    optim: OptimConfig = OptimConfig(lr=0.1)
    trackers: tuple[TrackerConfig, ...] = ()
    global_batch_size: int = 4


class ToyLoader:
    """Samples whose content is a pure function of their index."""

    def __init__(self, config: ToyConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.manifest = Manifest(fingerprint="toy", config={}, shards=[])
        self.step = 0

    def next_batch(self) -> Batch:
        size, width = self.config.global_batch_size, self.config.model.width
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

    def __post_init__(self) -> None:
        self.weight = torch.zeros(self.config.model.width)
        self.momentum = torch.zeros(self.config.model.width)
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
        lr = learning_rate(self.config.optim, batch.step, self.config.loop.steps)
        updating = self.guard.decide(loss, gradient.norm())
        if updating:
            self.momentum = 0.9 * self.momentum + gradient
            self.weight = self.weight - lr * self.momentum
        metrics = {"train/extra": 2.0}
        return StepResult(loss, gradient.norm(), lr, metrics, tokens=7, skipped=not updating)

    def save(self, folder: Path) -> None:
        if self.world.rank == 0:
            save_file(
                {"weight": self.weight, "momentum": self.momentum}, folder / "toy.safetensors"
            )
        (folder / f"rank_{self.world.rank}.txt").write_text(f"{self.world.rank}\n")

    def load(self, folder: Path) -> None:
        state = load_file(folder / "toy.safetensors")
        self.weight, self.momentum = state["weight"], state["momentum"]

    def local_weights(self) -> list[tuple[str, torch.Tensor]]:
        return [("weight", self.weight)]

    def weights(self, ema: bool) -> AbstractContextManager[None]:
        assert not ema
        return nullcontext()

    def preview(self) -> list[Preview]:
        return [Preview("preview/noise", {"noise": torch.zeros(4, 8, 6, 3, dtype=torch.uint8)})]


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
