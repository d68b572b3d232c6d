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

from landiff.configs import load
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
from landiff.launchers.results.sample import load_models, sampler_options
from landiff.model_zoo import frozen
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
    vision = frozen.build(EfficientNetConfig(blocks=args.vision_blocks), device)
    videos_BTHWC = torch.from_numpy(frames)
    report = attribute(models, vision, config, videos_BTHWC, rows)
    report["probes"] = probes(models, vision, config, videos_BTHWC, rows, args.probe_clips)
    if args.out is not None:
        write_text(Path(args.out), json.dumps(report, indent=1))
    print_report(report)
    return 0


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the rates of each stage, and what the tokens keep."""
    for stage, document in report["stages"].items():
        print(f"== {stage}: {format_rates(document)}")
    for name, value in report["tokenizer"].items():
        print(f"tokenizer: {name} {value:.4f}")
    for name, value in report["probes"].items():
        print(f"probe of decoded tokens: {name} {value:.4f}")


@torch.no_grad()
def attribute(
    models: Models,
    vision: VisionFeatures,
    config: SampleConfig,
    frames_BTHWC: Tensor,
    rows: Sequence[world.Label],
) -> dict[str, Any]:
    """Rates of each stage on true clips of one chunk, and statistics of the tokenizer."""
    captions = [row["caption"] for row in rows]
    device = next(models.lm.parameters()).device
    seeds = [config.seed + number for number in range(len(rows))]
    sampler = sampler_options(config)
    text_BLD, _ = models.diffusion_text(captions)
    features_BTChw = features_of(vision, frames_BTHWC, config.num_latent_frames)
    codes_BK = models.tokenizer.encode(features_BTChw.to(device))
    drawn_BK = draw_codes(
        models.lm,
        models.lm_text(captions),
        config.num_latent_frames,
        config.tokens,
        seeds=seeds,
        motion_score=config.motion_score,
    )
    videos = {"codec": models.codec.decode(models.codec.encode(frames_BTHWC))}
    for stage, stage_BK in {"true tokens": codes_BK, "language model": drawn_BK}.items():
        latents_BTCHW = draw_latents(
            models.diffusion,
            models.schedule,
            text_BLD,
            models.tokenizer.decode(stage_BK, config.num_latent_frames),
            sampler,
            seeds=seeds,
            clean_frames=config.clean_frames,
        )
        videos[stage] = models.codec.decode(latents_BTCHW)
    stages = {"true clips": score_videos(frames_BTHWC, rows)}
    for stage, video_BTHWC in videos.items():
        stages[stage] = score_videos(video_BTHWC.cpu(), rows)
    decoded_BTChw = models.tokenizer.decode(codes_BK, config.num_latent_frames)
    return {
        "stages": stages,
        "tokenizer": statistics(models, features_BTChw, decoded_BTChw, codes_BK),
    }


def features_of(vision: VisionFeatures, frames_BTHWC: Tensor, num_latent_frames: int) -> Tensor:
    """Features of the semantic frames, float32 [B, T, C, h, w]."""
    indices = semantic_frame_indices(frames_BTHWC.shape[1], num_latent_frames)
    parts = [vision(part_BTHWC) for part_BTHWC in frames_BTHWC[:, indices].split(BATCH)]
    return torch.cat(parts)


def score_videos(frames_BTHWC: Tensor, rows: Sequence[world.Label]) -> dict[str, Any]:
    """Rates of videos."""
    found = [judge(frames_THWC.numpy()).found for frames_THWC in frames_BTHWC]
    return rates_document(rates(rows, found))


def statistics(
    models: Models, features_BTChw: Tensor, decoded_BTChw: Tensor, codes_BK: Tensor
) -> dict[str, float]:
    """Variance that the tokens do not explain, of features normalized per channel, and code use."""
    tokenizer = models.tokenizer
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
    frames_BTHWC: Tensor,
    rows: Sequence[world.Label],
    num_clips: int,
) -> dict[str, float]:
    """Fraction of true clips whose attributes a small network reads from decoded tokens.

    The networks are trained on `num_clips` further clips of the training part of the world.
    """
    labels = world.balanced(world.labels(held_out=False), num_clips, config.seed)
    clips = []
    for index, label in enumerate(labels):
        clips.append(world.video(label, (config.seed, 7, index), size=frames_BTHWC.shape[2]))

    def decoded(videos_BTHWC: Tensor) -> Tensor:
        features_BTChw = features_of(vision, videos_BTHWC, config.num_latent_frames)
        codes_BK = models.tokenizer.encode(features_BTChw.to(models.tokenizer.mean.device))
        return models.tokenizer.decode(codes_BK, config.num_latent_frames).cpu()

    train_BTChw = decoded(torch.from_numpy(np.stack(clips)))
    test_BTChw = decoded(frames_BTHWC)
    found = {}
    for name in world.ATTRIBUTES:
        values = world.VALUES[name]
        wanted = torch.tensor([values.index(label[name]) for label in labels])
        expected = torch.tensor([values.index(row[name]) for row in rows])
        network = train_probe(train_BTChw, wanted, len(values))
        answer = network(test_BTChw.flatten(1, 2)).argmax(dim=1)
        found[name] = float((answer == expected).float().mean())
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
