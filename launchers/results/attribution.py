"""Error attribution in the shapes world: which stage of the chain loses what.

True clips pass through a growing part of the chain, and the pixel judge scores what comes out:

    codec            frames -> latents -> frames
    true tokens      frames -> features -> tokens -> features -> control branch -> frames
    language model   caption -> tokens -> features -> control branch -> frames

Probes, small networks that read attributes from features, show what tokens keep before the
diffusion model sees it. They are trained on clips of the training part of the world.

Shape letters (docs/glossary.md): B clips, T frames, C feature channels, h, w feature cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from landiff.configs import ConfigError, load
from landiff.configs.files import write_text
from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.synthetic.judge import judge, rates
from landiff.launchers.config import SampleConfig
from landiff.launchers.data.shapes import (
    format_rates,
    pair_files,
    rates_document,
    read_rows,
    read_videos,
)
from landiff.launchers.results.sample import sampler_options
from landiff.launchers.results.sampling.loading import load_models
from landiff.model_zoo import frozen
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.evaluate.codebook import codebook_use, count_codes
from landiff.model_zoo.frozen.base import VisionFeatures
from landiff.model_zoo.frozen.config import EfficientNetConfig, semantic_frame_indices
from landiff.model_zoo.sample.generate import Models, draw_codes, draw_latents

PROBE_WIDTH = 64
PROBE_EPOCHS = 12
BATCH = 64


def attribute_command(args: argparse.Namespace) -> int:
    """Runs the chain on true clips. Returns the exit code."""
    config = load(SampleConfig, args.config, args.overrides)
    rows = read_rows(Path(args.labels))
    frames = np.stack(list(read_videos(pair_files(Path(args.videos), rows))))
    device = pick_device(config.device)
    models = load_models(config, device)
    models.check()
    vision = build_vision(args, models.tokenizer.config, device)
    videos_BTHWC = torch.from_numpy(frames)
    codes = codes_of(models, vision, config, videos_BTHWC, rows)
    report = attribute(models, config, videos_BTHWC, rows, codes)
    report["tokenizer"] = statistics(models, vision, config, videos_BTHWC)
    report["probes"] = probes(models, vision, config, codes, rows, args.probe_clips)
    if args.out is not None:
        write_text(Path(args.out), json.dumps(report, indent=1))
    print_report(report)
    return 0


def build_vision(
    args: argparse.Namespace, tokenizer: TokenizerConfig, device: torch.device
) -> VisionFeatures:
    """The vision encoder of the options. Raises ConfigError if the tokenizer takes others."""
    options = {"blocks": args.vision_blocks, "pooling": args.vision_pooling}
    vision = frozen.build(load(EfficientNetConfig, options), device)
    if vision.channels != tokenizer.feature_channels:
        raise ConfigError(
            f"--vision-blocks {args.vision_blocks} --vision-pooling {args.vision_pooling} makes "
            f"features of {vision.channels} channels, and the tokenizer takes "
            f"{tokenizer.feature_channels}; name the encoder that it was trained on"
        )
    return vision


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the rates of each stage, and what the tokens keep."""
    for stage, document in report["stages"].items():
        print(f"== {stage}: {format_rates(document)}")
    for name, value in report["tokenizer"].items():
        print(f"tokenizer: {name} {value:.4f}")
    for source, found in report["probes"].items():
        text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"probes of {source}: {text}")


@torch.no_grad()
def codes_of(
    models: Models,
    vision: VisionFeatures,
    config: SampleConfig,
    frames_BTHWC: Tensor,
    rows: Sequence[world.Label],
) -> dict[str, Tensor]:
    """Codes of the true clips and of the language model for their captions, int64 [B, K]."""
    features_BTChw = features_of(vision, frames_BTHWC, config.num_latent_frames)
    drawn_BK = draw_codes(
        models.lm,
        models.lm_text([row["caption"] for row in rows]),
        config.num_latent_frames,
        config.tokens,
        seeds=seeds_of(config, rows),
        motion_score=config.motion_score,
        grid=(models.tokenizer.config.grid_height, models.tokenizer.config.grid_width),
    )
    return {"true tokens": models.tokenizer.encode(features_BTChw), "language model": drawn_BK}


def seeds_of(config: SampleConfig, rows: Sequence[world.Label]) -> list[int]:
    """A seed for each clip."""
    return [config.seed + number for number in range(len(rows))]


@torch.no_grad()
def attribute(
    models: Models,
    config: SampleConfig,
    frames_BTHWC: Tensor,
    rows: Sequence[world.Label],
    codes: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Rates of each stage on true clips of one chunk."""
    text_BLD, _ = models.diffusion_text([row["caption"] for row in rows])
    stages = {
        "true clips": score_videos(frames_BTHWC, rows),
        "codec": score_videos(models.codec.decode(models.codec.encode(frames_BTHWC)), rows),
    }
    for stage, codes_BK in codes.items():
        latents_BTCHW = draw_latents(
            models.diffusion,
            models.schedule,
            text_BLD,
            models.tokenizer.decode(codes_BK, config.num_latent_frames),
            sampler_options(config),
            seeds=seeds_of(config, rows),
            clean_frames=config.clean_frames,
        )
        stages[stage] = score_videos(models.codec.decode(latents_BTCHW), rows)
    return {"stages": stages}


def features_of(vision: VisionFeatures, frames_BTHWC: Tensor, num_latent_frames: int) -> Tensor:
    """Features of the semantic frames, float32 [B, T, C, h, w]."""
    indices = semantic_frame_indices(frames_BTHWC.shape[1], num_latent_frames)
    parts = [vision(part_BTHWC) for part_BTHWC in frames_BTHWC[:, indices].split(BATCH)]
    return torch.cat(parts)


def score_videos(frames_BTHWC: Tensor, rows: Sequence[world.Label]) -> dict[str, Any]:
    """Rates of videos."""
    found = [judge(frames_THWC.numpy()).found for frames_THWC in frames_BTHWC.cpu()]
    return rates_document(rates(rows, found))


@torch.no_grad()
def statistics(
    models: Models, vision: VisionFeatures, config: SampleConfig, frames_BTHWC: Tensor
) -> dict[str, float]:
    """Variance that the tokens do not explain, of features normalized per channel, and code use."""
    tokenizer = models.tokenizer
    features_BTChw = features_of(vision, frames_BTHWC, config.num_latent_frames)
    codes_BK = tokenizer.encode(features_BTChw)
    decoded_BTChw = tokenizer.decode(codes_BK, config.num_latent_frames)
    mean_C = features_BTChw.mean(dim=(0, 1, 3, 4))
    std_C = features_BTChw.std(dim=(0, 1, 3, 4)) + 1e-8
    error_BTChw = (decoded_BTChw - features_BTChw) / std_C[:, None, None]
    spread_BTChw = (features_BTChw - mean_C[:, None, None]) / std_C[:, None, None]
    counts = count_codes(codes_BK, tokenizer.config.codebook_size).double()
    perplexity, used = codebook_use(counts)
    return {
        "unexplained variance": float(error_BTChw.square().mean() / spread_BTChw.square().mean()),
        "perplexity": float(perplexity),
        "codes in use": float(used),
    }


@torch.no_grad()
def probes(
    models: Models,
    vision: VisionFeatures,
    config: SampleConfig,
    codes: Mapping[str, Tensor],
    rows: Sequence[world.Label],
    num_clips: int,
) -> dict[str, dict[str, float]]:
    """Fraction of clips whose attributes small networks read from decoded codes, by their source.

    The networks are trained on `num_clips` further clips of the training part of the world.
    """
    labels = world.balanced(world.labels(held_out=False), num_clips, config.seed)
    size = models.tokenizer.config.grid_height * vision.cell
    clips = []
    for index, label in enumerate(labels):
        clips.append(world.video(label, (config.seed, 7, index), size=size))
    features_BTChw = features_of(
        vision, torch.from_numpy(np.stack(clips)), config.num_latent_frames
    )
    decode = models.tokenizer.decode
    train_BTChw = decode(models.tokenizer.encode(features_BTChw), config.num_latent_frames)
    found: dict[str, dict[str, float]] = {source: {} for source in codes}
    for name in world.ATTRIBUTES:
        values = world.VALUES[name]
        wanted = torch.tensor([values.index(label[name]) for label in labels])
        expected = torch.tensor([values.index(row[name]) for row in rows])
        network = train_probe(train_BTChw.cpu(), wanted, len(values))
        for source, codes_BK in codes.items():
            test_BTChw = decode(codes_BK, config.num_latent_frames).cpu()
            answer = network(test_BTChw.flatten(1, 2)).argmax(dim=1)
            found[source][name] = float((answer == expected).float().mean())
    return found


def train_probe(features_BTChw: Tensor, wanted_B: Tensor, num_values: int) -> nn.Module:
    """One convolution over all frames, and a linear layer on its mean: reads one attribute."""
    x_BChw = features_BTChw.flatten(1, 2)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.BatchNorm2d(x_BChw.shape[1]),
            nn.Conv2d(x_BChw.shape[1], PROBE_WIDTH, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(PROBE_WIDTH, num_values),
        )
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
        for _ in range(PROBE_EPOCHS):
            for rows in torch.randperm(len(x_BChw)).split(BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(network(x_BChw[rows]), wanted_B[rows]).backward()
                optimizer.step()
    return network.eval()
