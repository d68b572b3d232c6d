"""The configs of a pipeline, as far as they could be read. Torch-free.

The rules that compare them are in rules.py of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.config import EvaluateConfig, SampleConfig, ShardsJobConfig
from landiff.launchers.project.sizes import ClipSizes
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

EXPORTED = {
    "tokenizer": ("runs/tokenizer", "tokenizer"),
    "lm": ("runs/lm", "lm"),
    "diffusion-main": ("runs/diffusion-main", "main"),
    "diffusion-control": ("runs/diffusion-control", "diffusion"),
}
"""Stage -> run folder and zoo entry that the pipeline exports between its stages."""


class MissingConfig(Exception):
    """A rule needs a config that could not be read. The reason is reported elsewhere."""


@dataclass(frozen=True)
class Chain:
    """The configs of a pipeline by stem. `precompute` holds the columns of all precompute stages.

    Configs that could not be read are missing. Their attributes raise MissingConfig.
    """

    configs: Mapping[str, Any]

    def _config(self, stem: str) -> Any:
        """The config `stem`. Raises MissingConfig. Any: an instance of its class."""
        if stem not in self.configs:
            raise MissingConfig(stem)
        return self.configs[stem]

    @property
    def shards(self) -> ShardsJobConfig:
        """The config of the raw shards."""
        config: ShardsJobConfig = self._config("shards")
        return config

    @property
    def precompute(self) -> PrecomputeConfig:
        """The columns of all precompute stages."""
        config: PrecomputeConfig = self._config("precompute")
        return config

    @property
    def tokenizer(self) -> TokenizerTrainConfig:
        """The config of the tokenizer's trainer."""
        config: TokenizerTrainConfig = self._config("tokenizer")
        return config

    @property
    def lm(self) -> LMTrainConfig:
        """The config of the language model's trainer."""
        config: LMTrainConfig = self._config("lm")
        return config

    @property
    def main(self) -> DiffusionTrainConfig:
        """The config that trains the main transformer."""
        config: DiffusionTrainConfig = self._config("diffusion-main")
        return config

    @property
    def control(self) -> DiffusionTrainConfig:
        """The config that trains the control branch."""
        config: DiffusionTrainConfig = self._config("diffusion-control")
        return config

    @property
    def evaluate(self) -> EvaluateConfig:
        """The config of the evaluation."""
        config: EvaluateConfig = self._config("evaluate")
        return config

    @property
    def sample(self) -> SampleConfig:
        """The config of the sampler."""
        config: SampleConfig = self._config("sample")
        return config

    @property
    def clips(self) -> list[ClipSizes]:
        """The clip shapes whose sizes divide."""
        sizes = [ClipSizes(s.num_frames, s.height, s.width) for s in self.shards.shapes]
        return [size for size in sizes if not size.problems()]

    @property
    def trainers(self) -> dict[str, TokenizerTrainConfig | LMTrainConfig | DiffusionTrainConfig]:
        """The configs of the trainers by stage, without those that could not be read."""
        return {stem: self.configs[stem] for stem in EXPORTED if stem in self.configs}

    @property
    def diffusion(self) -> dict[str, DiffusionTrainConfig]:
        """The same of the trainers of the diffusion model."""
        stems = ("diffusion-main", "diffusion-control")
        return {stem: self.configs[stem] for stem in stems if stem in self.configs}

    def read(self, *stems: str) -> dict[str, Any]:
        """Those of the configs `stems` that could be read. Any: instances of their classes."""
        return {stem: self.configs[stem] for stem in stems if stem in self.configs}

    def columns_of(self, kind: type[Any]) -> dict[str, Any]:
        """The columns of a kind by name. Any: instances of `kind`."""
        columns = self.precompute.columns
        return {name: column for name, column in columns.items() if isinstance(column, kind)}

    def models(self) -> dict[str, Any]:
        """The model sections of the trainers by stage. Any: configs of models."""
        return {stem: config.model for stem, config in self.trainers.items()}
