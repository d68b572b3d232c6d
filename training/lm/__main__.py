"""`python -m landiff.training.lm <resolved-config.yaml>`: one rank, under torchrun or alone."""

from __future__ import annotations

import logging
import sys
import warnings

from landiff.configs.loader import load
from landiff.data_pipeline.loading.loader import Loader
from landiff.training import distributed
from landiff.training.checks import Launch
from landiff.training.guard import Guard
from landiff.training.lm.checks import check
from landiff.training.lm.config import MUST_MATCH, LMTrainConfig
from landiff.training.loop import fit
from landiff.training.run import Run


def main(config_path: str) -> None:
    config = load(LMTrainConfig, config_path)
    # core says in every module that Transformer Engine and apex are not there, and gives advice for CUDA on the CPU;
    # and of every layer that its MLP (our GatedMLP) is none of core's own
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    from landiff.training.lm.engine import MegatronEngine

    with distributed.start(config.run, config.loop.collective_timeout_s) as world:
        world.require_none(lambda: check(config, Launch(world.size)))
        engine = MegatronEngine(config, Guard(world))
        loader = Loader(config.data, config.columns, dp_rank=engine.dp_rank, dp_size=engine.dp_size)
        fit(engine, loader, Run(config.run, config, world, must_match=MUST_MATCH), config.loop)
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
