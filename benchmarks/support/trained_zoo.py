"""Trainers that need models to start from, with random ones, for `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import diffusion
from benchmarks.support.case import Case
from benchmarks.support.models import sample_meta
from landiff.configs import load
from landiff.data_pipeline.loading.samples import Batch, Sample
from landiff.model_zoo import registry
from landiff.model_zoo.token_layout import TokenLayout
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.observe.flops import control_flops, tokenizer_flops
from landiff.training.tokenizer.config import TokenizerTrainConfig

TrainStep = Callable[[], object]


def export_random(zoo: Path, name: str, kind: str, config: Any) -> None:
    """Adds a model with random weights to a zoo, unless it is there."""
    if (zoo / name).exists():
        return
    model = registry.build_module(kind, config)
    if isinstance(model, SemanticTokenizer):
        set_random_codebook(model)
    registry.export(zoo, name, kind, config, model.state_dict(), {})


def set_random_codebook(model: nn.Module) -> None:
    """Lets a tokenizer decode without training."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("codebook.embed"):
            tensor.normal_()
        if name.endswith("initted"):
            tensor.fill_(True)


def control_engine(case: Case, folder: Path, changes: Mapping[str, Any]) -> tuple[TrainStep, float]:
    """A step of the diffusion trainer in phase control, and its FLOPs."""
    from landiff.training.diffusion.engine import build_engine

    sizes = case.sizes
    zoo = folder / "zoo"
    export_random(zoo, "main", "transformer", sizes.diffusion.transformer)
    export_random(zoo, "tokenizer", "tokenizer", sizes.tokenizer)
    config = diffusion.train_config(
        sizes.diffusion.transformer,
        sizes.schedule,
        folder,
        case.samples,
        case.precision,
        zoo=zoo,
        phase="control",
        init_from="main",
        tokenizer="tokenizer",
        model=sizes.diffusion.model_dump(),
        **changes,
    )
    batch = diffusion.make_batch(config)
    frames = sizes.diffusion.transformer.latent_frames
    num_codes = TokenLayout.of(sizes.lm).num_codes(frames)
    draw = torch.Generator().manual_seed(0)
    samples = []
    for sample in batch.samples:
        codes = torch.randint(0, sizes.tokenizer.codebook_size, (num_codes,), generator=draw)
        columns = {**sample.tensors, config.tokens_column: codes.to(torch.uint16)}
        samples.append(replace(sample, tensors=columns))
    batch = replace(batch, micro_batches=(tuple(samples),))
    engine = build_engine(config, case.world)
    return lambda: engine.train_step(batch), case.samples * control_flops(sizes.diffusion).total


def tokenizer_engine(
    case: Case, folder: Path, changes: Mapping[str, Any]
) -> tuple[TrainStep, float]:
    """A step of the tokenizer trainer, and its FLOPs."""
    from landiff.training.tokenizer.engine import COLUMN, TokenizerEngine

    sizes = case.sizes.tokenizer
    data = {
        "manifest": "none",
        "global_batch_size": case.samples,
        "micro_batch_size": case.samples,
    }
    values = {
        "run": folder,
        "loop": {"steps": 1000},
        "optim": {"lr": 1e-4, "fused": True},
        "data": data,
        "model": sizes.model_dump(),
        "precision": case.precision,
    }
    config = load(TokenizerTrainConfig, {**values, **changes})
    draw = torch.Generator().manual_seed(0)
    shape = (sizes.segment_frames, sizes.feature_channels, sizes.grid_height, sizes.grid_width)
    samples = []
    for number in range(case.samples):
        features = torch.randn(shape, generator=draw).half()
        samples.append(Sample(f"{number}", 0, number, number, sample_meta("0"), {COLUMN: features}))
    batch = Batch(step=0, global_batch_size=case.samples, micro_batches=(tuple(samples),))
    engine = TokenizerEngine(config, case.world)
    flops = case.samples * tokenizer_flops(sizes, sizes.segment_frames).total
    return lambda: engine.train_step(batch), flops
