"""Runs one rank of the tokenizer trainer: `python -m landiff.training.tokenizer CONFIG.yaml`.

torchrun starts it on every rank. It also runs alone.
"""

from __future__ import annotations

import sys

from landiff.configs.loader import load
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.training import distributed
from landiff.training.checks import Launch
from landiff.training.loop import fit
from landiff.training.run import Run
from landiff.training.tokenizer.checks import check
from landiff.training.tokenizer.config import TokenizerTrainConfig
from landiff.training.tokenizer.engine import TokenizerEngine


def main(config_path: str) -> None:
    """Train with a resolved config."""
    config = load(TokenizerTrainConfig, config_path)
    distributed.choose_kernels(config.loop)
    with distributed.start(config.run, config.loop.collective_timeout_s) as world:
        world.require_none(lambda: check(config, Launch(world.size)))
        world.start_times.end("checks")
        with PhasedLoader(
            config.data_phases, config.columns, dp_rank=world.rank, dp_size=world.size, ranks=world
        ) as loader:
            world.start_times.end("data")
            engine = TokenizerEngine(config, world)
            world.start_times.end("model")
            fit(engine, loader, Run(config.run, config, world), config.loop)


if __name__ == "__main__":
    main(sys.argv[1])
