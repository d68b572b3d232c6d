"""What checkpoints of the LM trainer must satisfy, for any combination of its layout options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from landiff.configs import load
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron_optimizer import MASTERS, STATE
from landiff.training.checkpoint.parts import write_files
from landiff.training.lm import checkpoint
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import megatron_device
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from tests.training import saving
from tests.training.lm.samples import evaluate as validation_loss
from tests.training.lm.samples import tiny_batch, tiny_config

STEPS = 3  # before the checkpoint; one more follows


@dataclass(frozen=True)
class Options:
    """How weights are stored and written. `data` is the number of copies of the model."""

    tensor: int
    pipeline: int
    data: int
    distributed: bool
    overlap: bool
    bf16: bool

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def config(self, folder: Path) -> LMTrainConfig:
        parallel = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "sequence": self.tensor > 1,
            "distributed_optimizer": self.distributed,
            "overlap": self.overlap,
        }
        return tiny_config(folder, parallel, precision="bf16" if self.bf16 else "fp32")

    def __str__(self) -> str:
        kind = "distributed" if self.distributed else "plain"
        overlap = "overlap" if self.overlap else "no-overlap"
        precision = "bf16" if self.bf16 else "fp32"
        return f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-{kind}-{overlap}-{precision}"


def shipped_config(folder: Path, name: str) -> LMTrainConfig:
    """The options of a packaged config with the tiny model and data."""
    shipped = load(LMTrainConfig, name)
    tiny = tiny_config(folder)
    kept = {"run", "zoo", "data", "loop", "model", "text_column", "tokenizer"}
    fields = [key for key in LMTrainConfig.model_fields if key not in kept]
    update = {key: getattr(shipped, key) for key in fields}
    # Compiled layers have tests of their own; this one needs no compiler.
    return tiny.model_copy(update=update | {"compile_blocks": False})


@dataclass(frozen=True)
class Found:
    """Results of one rank: (loss, gradient norm) of the step after the checkpoint, evaluations."""

    straight: tuple[float, float]
    resumed: tuple[float, float]
    evaluated: float  # after the last step
    evaluated_from_file: float  # of the same weights, loaded


def train(engine: MegatronEngine, first: int, end: int) -> tuple[float, float]:
    """Steps `first` to `end` - 1 -> (loss, gradient norm) of the last one."""
    for step in range(first, end):
        result = engine.train_step(tiny_batch(engine.config, step, engine.dp_rank, engine.dp_size))
    return float(result.loss), float(result.grad_norm)


def evaluate(engine: MegatronEngine) -> float:
    return validation_loss(engine, tiny_batch(engine.config, 0, engine.dp_rank, engine.dp_size))


def fresh(config: LMTrainConfig) -> MegatronEngine:
    """An engine with other weights than those that training starts from."""
    engine = MegatronEngine(config)
    engine.load_weights(InitialWeights(config.model, 99))
    return engine


def make_folder(folder: Path) -> Path:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    return folder


def save(engine: MegatronEngine, folder: Path) -> None:
    saving.save(engine, make_folder(folder))
    dist.barrier()


def save_unsynchronized(engine: MegatronEngine, folder: Path) -> None:
    """As older versions did, which left the weights of the last step ungathered with `overlap`."""
    with megatron_device():
        files = checkpoint.state_files(
            engine._files, engine.chunks, engine.optimizer, engine.averages, engine.device
        )
    write_files(make_folder(folder), files)
    dist.barrier()


def save_and_resume(config: LMTrainConfig, folder: Path) -> Found:
    """Writes `folder`/before, and one step later after (trained on) and resumed (from the file)."""
    engine = MegatronEngine(config)
    train(engine, 0, STEPS)
    save(engine, folder / "before")
    straight = train(engine, STEPS, STEPS + 1)
    evaluated = evaluate(engine)  # first, while no save has gathered the weights
    save(engine, folder / "after")
    engine.close()
    engine = fresh(config)
    engine.load(folder / "before")
    resumed = train(engine, STEPS, STEPS + 1)
    save(engine, folder / "resumed")
    engine.load(folder / "after")
    found = Found(straight, resumed, evaluated, evaluate(engine))
    engine.close()
    return found


def all_of(world: Any, folder: Path, combinations: list[Options]) -> list[Found]:
    """`save_and_resume` for each of them in one set of processes."""
    return [
        save_and_resume(options.config(folder), folder / str(options)) for options in combinations
    ]


def all_shipped(world: Any, folder: Path, names: list[str]) -> list[Found]:
    """The same for packaged configs."""
    return [save_and_resume(shipped_config(folder, name), folder / name) for name in names]


def assert_whole_and_resumed(found: Found, folder: Path) -> None:
    """Weights in the files are the cast masters, and the resumed run is bit-equal."""
    assert found.resumed == found.straight, (folder, found)
    assert found.evaluated == found.evaluated_from_file, (folder, found)
    before, after, resumed = (tensors_of(folder / name) for name in ("before", "after", "resumed"))
    assert_weights_are_cast_masters(before)
    assert_weights_are_cast_masters(after)
    assert_equal(resumed, after)
    assert not torch.equal(before["output_layer.weight"], after["output_layer.weight"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    reader = DistReader(folder)
    return {key: reader.read(key) for key in reader.entries}


def stale_weights(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that differ from their float32 copies, cast."""
    weights = [key for key in tensors if not key.startswith("optimizer.")]
    masters = {}
    for name in MASTERS.values():
        prefix = f"{STATE}{name}."
        masters |= {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    assert not masters or sorted(masters) == sorted(weights)
    return [
        key
        for key in masters
        if not torch.equal(tensors[masters[key]].to(tensors[key].dtype), tensors[key])
    ]


def assert_weights_are_cast_masters(tensors: dict[str, torch.Tensor]) -> None:
    stale = stale_weights(tensors)
    assert stale == [], f"{len(stale)} weights differ from their float32 copies: {stale}"


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in found if not torch.equal(found[key], expected[key])]
    assert different == [], f"{len(different)} tensors differ: {different}"
