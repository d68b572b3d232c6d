"""Runs one rank of the diffusion trainer: `python -m landiff.training.diffusion CONFIG.yaml`.

torchrun starts it on every rank. It also runs alone.
"""

from __future__ import annotations

import sys

from landiff.configs.loader import load
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.training import distributed
from landiff.training.checks import Launch
from landiff.training.diffusion.checks import check
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.engine import build_engine
from landiff.training.layout import data_rank
from landiff.training.loop import fit
from landiff.training.run import Run


def main(config_path: str) -> None:
    """Train with a resolved config."""
    config = load(DiffusionTrainConfig, config_path)
    distributed.choose_kernels(config.loop)
    with distributed.start(config.run, config.loop.collective_timeout_s) as world:
        world.require_none(lambda: check(config, Launch(world.size)))
        world.start_times.end("checks")
        engine = build_engine(config, world)
        world.start_times.end("model")
        dp_rank, dp_size = data_rank(config, world.rank, world.size)
        loader = PhasedLoader(
            config.data_phases, config.columns, dp_rank=dp_rank, dp_size=dp_size, ranks=world
        )
        world.start_times.end("data")
        fit(engine, loader, Run(config.run, config, world), config.loop)


if __name__ == "__main__":
    main(sys.argv[1])
