"""`python -m training.lm <config.yaml>`, under torchrun's environment variables or alone."""

from __future__ import annotations

import sys

from configs import load
from data_pipeline.loader import Loader
from data_pipeline.shards import read_manifest
from training import distributed
from training.lm.batch import check_columns
from training.lm.config import LMTrainConfig
from training.lm.engine import MegatronEngine
from training.loop import fit
from training.run import Run


def main(path: str) -> None:
    config = load(LMTrainConfig, path)
    with distributed.start(config.run) as world:
        check_columns(read_manifest(config.data.manifest), config)
        engine = MegatronEngine(config)
        loader = Loader(config.data, config.columns, dp_rank=engine.dp_rank, dp_size=engine.dp_size)
        run = Run(config.run, config, world, must_match=("model", "precision", "vocab_multiple", "head_multiple"))
        fit(engine, loader, run, config.loop)
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
