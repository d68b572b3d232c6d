"""Tiny LM configs and samples for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn import functional

from landiff.configs import load
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.batch import grid_of, motion_condition, text_is_dropped
from landiff.training.lm.config import LMTrainConfig

if TYPE_CHECKING:
    from landiff.training.lm.engine import MegatronEngine

MODEL = {
    "codebook_size": 40,
    "iframe_tokens": 9,
    "pframe_tokens": 4,
    "segment_frames": 4,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_size": 80,
    "max_positions": 512,
    "text_dim": 20,
    "max_text_tokens": 16,
    "micro_hidden_size": 24,
    "micro_frequency_dim": 16,
}


def tiny_config(
    folder: Path, parallel: dict[str, Any] | None = None, **changes: Any
) -> LMTrainConfig:
    data = {
        "manifest": folder / "data",
        "global_batch_size": 4,
        "micro_batch_size": 2,
    } | changes.pop("data", {})
    return load(
        LMTrainConfig,
        {
            "run": folder / "run",
            "zoo": folder / "zoo",
            "data": data,
            "loop": changes.pop("loop", {"steps": 5, "seed": 7}),
            "optim": {"lr": 3e-3, "weight_decay": 0.1} | changes.pop("optim", {}),
            "model": MODEL | changes.pop("model", {}),
            "parallel": parallel or {},
            "precision": "fp32",
            "text_column": "text-minilm",
            "vocab_multiple": 8,
            "validation_samples": 5,
            **changes,
        },
    )


def tiny_sample(config: LMTrainConfig, index: int, position: int = 0) -> Sample:
    """Sample `index` of an endless stream: 1 to 4 frames, 1 to 6 text rows, fixed by `index`."""
    random = torch.Generator().manual_seed(1000 + index)
    layout = TokenLayout.of(config.model)
    frames, words = 1 + index % 4, 1 + index % 6
    tokens = torch.randint(
        0, layout.codebook_size, (layout.num_codes(frames),), generator=random
    ).to(torch.uint16)
    text = torch.randn(words, config.model.text_dim, generator=random).to(torch.bfloat16)
    meta = RawSample(
        key=f"{index:06d}",
        caption="a",
        source="s",
        source_sha256="",
        start_s=0.0,
        fps=8,
        num_frames=4 * frames - 3,
        height=16 * (1 + index % 3),
        width=32,
        motion_score=0.1 * (index % 7),
        video_sha256="",
    )
    return Sample(
        key=meta.key,
        epoch=0,
        index=index,
        position=position,
        meta=meta,
        tensors={config.tokens_column: tokens, config.text_column: text},
    )


def longest_sample(config: LMTrainConfig) -> Sample:
    """All frames and all text that a row can have."""
    sample, layout = tiny_sample(config, 0), TokenLayout.of(config.model)
    tokens = torch.zeros(layout.num_codes(config.model.segment_frames), dtype=torch.uint16)
    text = torch.zeros(config.model.max_text_tokens, config.model.text_dim, dtype=torch.bfloat16)
    meta = sample.meta.model_copy(update={"num_frames": 4 * config.model.segment_frames - 3})
    return replace(
        sample, meta=meta, tensors={config.tokens_column: tokens, config.text_column: text}
    )


def evaluate(engine: MegatronEngine, batch: Batch) -> float:
    """Validation loss of a batch of which every data-parallel rank has its part. Collective."""
    sums: dict[str, torch.Tensor] = {}
    for samples in batch.micro_batches:
        count = len(samples)
        part = HeldOutBatch(samples, (None,) * count, (True,) * count)
        for name, value in engine.validate(part).items():
            sums[name] = sums[name] + value if name in sums else value
    for value in sums.values():
        dist.all_reduce(value)
    return engine.summarize(sums)["loss"]


def tiny_batch(config: LMTrainConfig, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
    """This rank's share of global batch `step`; the union over ranks is always the same."""
    sizes = batch_sizes(config.data_phases)
    size, micro = sizes.at(step).global_batch_size, sizes.at(step).micro_batch_size
    first = sizes.samples_before(step)
    mine = [tiny_sample(config, first + p, p) for p in range(size)][dp_rank::dp_size]
    return Batch(
        step=step,
        global_batch_size=size,
        micro_batches=tuple(tuple(mine[i : i + micro]) for i in range(0, len(mine), micro)),
    )


def plain_loss(model: LanguageModel, batch: Batch, config: LMTrainConfig) -> torch.Tensor:
    """Mean loss over all targets, one sample at a time: without packing and Megatron."""
    total, count = torch.zeros(()), torch.zeros(())
    for sample in batch.samples:
        text = sample.tensors[config.text_column].float()
        row = model.layout.training_row(sample.tensors[config.tokens_column].numpy(), len(text))
        frames = model.layout.num_frames(sample.tensors[config.tokens_column].numel())
        logits = model(
            torch.from_numpy(row.input_ids)[None],
            text[None],
            torch.tensor([float(frames)]),
            torch.tensor([motion_condition(sample.meta.motion_score)]),
            torch.tensor([text_is_dropped(config.loop.seed, sample.index, config.text_dropout)]),
            torch.tensor([grid_of(sample.meta)], dtype=torch.float32),
        )[0]
        losses = functional.cross_entropy(logits, torch.from_numpy(row.targets), reduction="none")
        total = total + (losses * torch.from_numpy(row.loss_weights)).sum()
        count = count + torch.from_numpy(row.loss_weights).sum()
    return total / count


def steps(engine: MegatronEngine, first: int, end: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps `first` to `end` - 1."""
    found = []
    for step in range(first, end):
        batch = tiny_batch(engine.config, step, engine.dp_rank, engine.dp_size)
        result = engine.train_step(batch)
        found.append((float(result.loss), float(result.grad_norm)))
    return found
