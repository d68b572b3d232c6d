"""Runs one rank of the language model trainer: `python -m landiff.training.lm CONFIG.yaml`.

torchrun starts it on every rank. It also runs alone.
"""

from __future__ import annotations

import logging
import sys
import warnings

from landiff.configs.loader import load
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.training import distributed
from landiff.training.checks import Launch
from landiff.training.guard import Guard
from landiff.training.lm.checks import check
from landiff.training.lm.config import LMTrainConfig
from landiff.training.loop import fit
from landiff.training.run import Run


def main(config_path: str) -> None:
    """Train with a resolved config."""
    config = load(LMTrainConfig, config_path)
    _silence_megatron()
    from landiff.training.lm.engine import MegatronEngine

    distributed.choose_kernels(config.loop)
    if config.parallel.tensor > 1:
        distributed.keep_launch_order()
    with distributed.start(config.run, config.loop.collective_timeout_s) as world:
        world.require_none(lambda: check(config, Launch(world.size)))
        world.start_times.end("checks")
        engine = MegatronEngine(config, Guard(config.loop, world))
        world.start_times.end("model")
        loader = PhasedLoader(
            config.data_phases,
            config.columns,
            dp_rank=engine.dp_rank,
            dp_size=engine.dp_size,
            ranks=world,
        )
        world.start_times.end("data")
        fit(engine, loader, Run(config.run, config, world), config.loop)
        engine.close()


def _silence_megatron() -> None:
    """Hide warnings that Megatron-core repeats in every module and layer. Call before its import.

    They say that Transformer Engine and apex are missing, give advice for CUDA on the CPU, and
    report that the layers' MLP (`GatedMLP`) is not one of Megatron-core's own.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # Megatron-core's gather of logits, used by validation.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)


if __name__ == "__main__":
    main(sys.argv[1])
