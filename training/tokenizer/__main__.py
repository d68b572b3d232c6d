"""`python -m training.tokenizer <resolved-config.yaml>`: one rank, under torchrun or alone."""

from __future__ import annotations

import sys

from configs.loader import load
from data_pipeline.loader import Loader
from training import distributed
from training.loop import fit
from training.run import Run
from training.tokenizer.config import TokenizerTrainConfig
from training.tokenizer.engine import TokenizerEngine, check_features


def main(config_path: str) -> None:
    config = load(TokenizerTrainConfig, config_path)
    with (
        distributed.start(config.run, config.loop.collective_timeout_s) as world,
        Loader(config.data, config.columns, dp_rank=world.rank, dp_size=world.size) as loader,
    ):
        check_features(config, loader.manifest)
        engine = TokenizerEngine(config, world)
        fit(engine, loader, Run(config.run, config, world), config.loop)


if __name__ == "__main__":
    main(sys.argv[1])
