"""Packaged YAML files load as their classes; paper-size models have the paper's parameters."""

from __future__ import annotations

import pytest
import torch

from landiff.configs import Config, dump, load
from landiff.configs.loader import packaged_names
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.config import (
    EvaluateConfig,
    SampleConfig,
    ShardsJobConfig,
    VideoMetricsConfig,
    WorldConfig,
)
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.positions.tables import position_table_numel
from landiff.model_zoo.registry import build_module
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

CLASSES: dict[str, type[Config]] = {
    "model": ModelConfig,
    "world": WorldConfig,
    "shards": ShardsJobConfig,
    "features": PrecomputeConfig,
    "latents": PrecomputeConfig,
    "precompute": PrecomputeConfig,
    "captions": PrecomputeConfig,
    "tokenizer": TokenizerTrainConfig,
    "lm": LMTrainConfig,
    "diffusion-main": DiffusionTrainConfig,
    "diffusion-control": DiffusionTrainConfig,
    "sample": SampleConfig,
    "packaged": SampleConfig,
    "evaluate": EvaluateConfig,
    "videos": VideoMetricsConfig,
    "long-shards": ShardsJobConfig,
    "long-columns": PrecomputeConfig,
    "long-lm": LMTrainConfig,
    "long-sample": SampleConfig,
}


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_config_loads_and_dumps(name, tmp_path):
    folder, stem = name.split("/")
    cls = ClusterConfig if folder == "cluster" else CLASSES[stem]
    config = load(cls, name)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(config))
    assert load(cls, path) == config


def test_the_paper_size_has_what_the_release_tells_of_training_and_sampling():
    """docs/specification.md §3.6, §4.3, §4.7, §5.4-§5.7; it gives no batch sizes and rates."""
    lm = load(LMTrainConfig, "landiff/lm")
    diffusion = load(DiffusionTrainConfig, "landiff/diffusion-control")
    sample = load(SampleConfig, "landiff/sample")
    tokenizer = load(TokenizerTrainConfig, "landiff/tokenizer").model
    assert lm.text_dropout == diffusion.text_dropout == 0.1
    assert (max(diffusion.prefix.lengths), diffusion.phase) == (7, "control")
    tokens = sample.tokens
    assert (tokens.guidance, tokens.temperature) == (7.5, 1.0)
    assert tokens.top_k is None and tokens.top_p is None
    assert not tokens.predict_end and not tokens.reference_behaviour
    assert (sample.steps, sample.guidance, sample.motion_score) == (50, 6.0, 0.1)
    assert (sample.seed, sample.precision) == (42, "bf16")
    assert (sample.num_latent_frames, sample.clean_frames, sample.fps) == (13, 7, 8.0)
    assert (tokenizer.codebook_decay, tokenizer.dead_code_threshold) == (0.8, 2.0)
    assert tokenizer.kmeans_iterations == 10
    assert tokenizer.commitment_weight == 1.0 and not tokenizer.normalize_features
    latents = load(PrecomputeConfig, "landiff/precompute").columns["latents"]
    assert latents.sample_seed is not None, "latents are samples of the posterior, not its mean"


def test_all_presets_are_complete():
    for preset in ("nano", "shapes", "landiff"):
        stems = set(CLASSES) - {"captions", "latents", "packaged", "world"}
        stems = {stem for stem in stems if not stem.startswith("long-")}
        assert {f"{preset}/{stem}" for stem in stems} <= set(packaged_names())


def numel(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_paper_size_models_have_the_counts_of_the_specification():
    config = load(ModelConfig, "landiff/model")
    with torch.device("meta"):
        tokenizer = build_module("tokenizer", config.tokenizer)
        lm = build_module("lm", config.lm)
        diffusion = build_module("diffusion", config.diffusion)
    table = position_table_numel(config.diffusion.transformer)
    assert numel(lm) == 2_049_321_984
    assert numel(tokenizer) == 174_511_120
    assert table == 34_129_920
    assert numel(diffusion.transformer) + table == 1_727_913_792
    assert numel(diffusion.control) + numel(diffusion.semantic) == 945_012_048


def test_what_a_paper_size_trainer_is_made_of_fits_together():
    lm = load(LMTrainConfig, "landiff/lm")
    control = load(DiffusionTrainConfig, "landiff/diffusion-control")
    tokenizer = load(TokenizerTrainConfig, "landiff/tokenizer")
    for key in ("codebook_size", "iframe_tokens", "pframe_tokens", "segment_frames"):
        assert getattr(lm.model, key) == getattr(tokenizer.model, key)
    assert control.model.semantic.feature_channels == tokenizer.model.feature_channels
    assert control.model.transformer.latent_height == 2 * tokenizer.model.grid_height
