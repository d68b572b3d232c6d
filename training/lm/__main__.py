"""`python -m training.lm <resolved-config.yaml>`: one rank, under torchrun or alone."""

from __future__ import annotations

import logging
import sys
import warnings

from configs.loader import load
from data_pipeline.loader import Loader
from training import distributed
from training.guard import Guard
from training.lm.config import LMTrainConfig
from training.loop import fit
from training.run import Run

SHAPES_WEIGHTS = ("model", "precision", "vocab_multiple", "head_multiple")  # a checkpoint may not differ in these


def main(config_path: str) -> None:
    config = load(LMTrainConfig, config_path)
    # core says in every module that Transformer Engine and apex are not there, and gives advice for CUDA on the CPU;
    # and of every layer that its MLP (our GatedMLP) is none of core's own
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    from training.lm.batch import check_columns
    from training.lm.engine import MegatronEngine

    with distributed.start(config.run, config.loop.collective_timeout_s) as world:
        engine = MegatronEngine(config, Guard(world))
        loader = Loader(config.data, config.columns, dp_rank=engine.dp_rank, dp_size=engine.dp_size)
        check_columns(loader.manifest, config)
        fit(engine, loader, Run(config.run, config, world, must_match=SHAPES_WEIGHTS), config.loop)
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
