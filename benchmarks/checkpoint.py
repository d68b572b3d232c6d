"""Stall of training by a checkpoint: written by another process, and as in commit dde0a06.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --hidden 1536 --rounds 5 --folder /scratch

A tokenizer with 500 MB of weights and optimizer state trains. In each round it is saved both ways,
to the same disk. That commit wrote the files with `safetensors`, read them back to hash them,
fsynced and renamed the folder, while training waited. After a save in the background, steps are
measured until it is committed, and as many afterwards.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.overhead import TOKENIZER, RandomFeatures
from benchmarks.support.models import device_name, synchronize
from landiff.configs import load
from landiff.configs.files import replace_dir
from landiff.training import distributed
from landiff.training.checkpoint.files import CheckpointState, describe_file, list_files, seal
from landiff.training.checkpoint.run_folder import CHECKPOINTS, step_folder
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.distributed import World
from landiff.training.engine import TrainState
from landiff.training.tokenizer.config import TokenizerTrainConfig
from landiff.training.tokenizer.engine import MODEL, OPTIMIZER, TokenizerEngine

AT_LEAST = 5  # steps that are compared


class Trainer:
    """The tokenizer's engine with its checkpoints."""

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        self.engine = TokenizerEngine(config, world)
        self.loader: Any = RandomFeatures(config, world)
        self.store = CheckpointStore(config.run / CHECKPOINTS, config, world)
        self.state = TrainState()
        self.device = world.device

    def step(self) -> float:
        """One training step. Returns its seconds."""
        synchronize(self.device)
        start = time.perf_counter()
        self.engine.train_step(self.loader.next_batch())
        self.state.step += 1
        self.store.advance(self.state, self.engine)
        synchronize(self.device)
        return time.perf_counter() - start

    def save_in_background(self) -> float:
        """Begin a save. Returns the seconds of the stall."""
        synchronize(self.device)
        start = time.perf_counter()
        self.store.save(self.state, self.engine, self.loader)
        return time.perf_counter() - start

    def save_as_before(self, folder: Path) -> float:
        """Save as commit dde0a06 did. Returns the seconds of the stall."""
        synchronize(self.device)
        start = time.perf_counter()
        self.store._require_finite(self.engine, "the weights hold", "nothing is written")
        temporary = folder / "before.tmp"
        temporary.mkdir()
        engine = self.engine
        save_file(engine.tokenizer.state_dict(), temporary / MODEL)
        moments = {}
        for name, parameter in engine.tokenizer.named_parameters():
            for key, value in engine.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value
        save_file(moments, temporary / OPTIMIZER)
        entries = [describe_file(temporary, name) for name in list_files(temporary)]
        document: CheckpointState = self.store._document(self.state, self.loader)
        seal(temporary, document, engine.config, entries)
        replace_dir(temporary, step_folder(folder, 0))
        return time.perf_counter() - start


def measure(trainer: Trainer, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of stalls and steps, by name."""
    found: dict[str, list[float]] = {"before": [], "stall": [], "written": []}
    found |= {"steps meanwhile": [], "other steps": []}
    for _ in range(AT_LEAST):  # the staging buffer is reserved after the first
        trainer.step()
    for _ in range(rounds):
        found["before"].append(trainer.save_as_before(folder))
        trainer.step()
        begin = time.perf_counter()
        found["stall"].append(trainer.save_in_background())
        meanwhile = [trainer.step()]
        while trainer.store.saver.current is not None:
            meanwhile.append(trainer.step())
        found["written"].append(time.perf_counter() - begin)
        found["steps meanwhile"] += meanwhile
        for _ in range(max(AT_LEAST, len(meanwhile))):
            found["other steps"].append(trainer.step())
    return found


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768, help="width; 768 makes 500 MB")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    parser.add_argument("--folder", type=Path, help="where to write, a temporary folder by default")
    return parser.parse_args()


def settings(run: Path, hidden: int) -> TokenizerTrainConfig:
    """The config of the trainer."""
    values = {
        "run": run,
        "data": {"manifest": run, "global_batch_size": 1, "micro_batch_size": 1},
        "loop": {"steps": 10**9, "save_every": 1000, "keep_last": 1},
        "optim": {"lr": 1e-4},
        "model": {
            **TOKENIZER,
            "hidden_size": hidden,
            "num_heads": 12,
            "num_layers": 3,
        },
    }
    return load(TokenizerTrainConfig, values)


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        distributed.start() as world,
    ):
        folder = Path(name)
        trainer = Trainer(settings(folder, options.hidden), world)
        found = measure(trainer, folder, options.rounds)
        size = sum(file.num_bytes for file in trainer.engine.state_files())
        trainer.store.background.close()
    median = {name: statistics.median(values) for name, values in found.items()}
    slowdown = median["steps meanwhile"] / median["other steps"] - 1
    print(f"\n{size / 1e6:.0f} MB, {device_name(world.device)}, {options.rounds} rounds, medians")
    print(f"stall of commit dde0a06    {median['before']:8.3f} s")
    print(f"stall of a background save {median['stall']:8.3f} s")
    print(f"ratio                      {median['stall'] / median['before']:8.1%}  (goal 5 %)")
    print(f"written after              {median['written']:8.3f} s")
    print(f"step                       {median['other steps']:8.3f} s")
    print(f"step while writing         {median['steps meanwhile']:8.3f} s  ({slowdown:+.0%})")


if __name__ == "__main__":
    main()
