"""Metrics of the tokenizer on held-out clips.

Shape letters (docs/glossary.md): B clips of a micro-batch, T semantic frames, C feature channels,
h w rows and columns of the grid, N codes of a clip, K codes of an I and a P frame together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.evaluate.codebook import codebook_use, count_codes
from landiff.model_zoo.tokenizer import SemanticTokenizer, TokenizerOutput
from landiff.training.observe.charts import Charts

CHARTS: Charts = {
    "loss": {
        "loss": ["train/loss", "val(_ema)?/loss"],
        "reconstruction": ["train/reconstruction", "val(_ema)?/reconstruction"],
        "reconstruction of I and P frames": ["val(_ema)?/reconstruction_.*"],
        "cosine similarity": ["val(_ema)?/cosine.*"],
        "variance unexplained": ["val(_ema)?/variance_unexplained"],
        "commitment": ["train/commitment", "val(_ema)?/commitment"],
    },
    "codebook": {
        "perplexity": ["codebook/perplexity", "val/codebook_perplexity.*"],
        "fraction in use": ["codebook/used_fraction", "val/codebook_used_fraction.*"],
        "dead codes": ["val/codebook_dead_codes"],
        "perplexity by position": ["val/position_perplexity_.*"],
        "positions with one code": ["val/position_constant"],
    },
}
KINDS = ("iframe", "pframe")


def zero_sums(config: TokenizerConfig, device: torch.device) -> dict[str, Tensor]:
    """The sums of no clip.

    clips: number of clips, and the sum of their commitment losses.
    errors: for I and P frames, squared error, cosine similarity of cells, and number of cells.
    features: for each channel, sum and sum of squares.
    codes: occurrences of each code at each position of an I frame, then of a P frame.
    """
    positions = config.iframe_tokens + config.pframe_tokens
    shapes = {
        "clips": (2,),
        "errors": (len(KINDS), 3),
        "features": (2, config.feature_channels),
        "codes": (positions, config.codebook_size),
    }
    sums = {}
    for name, shape in shapes.items():
        sums[name] = torch.zeros(shape, dtype=torch.float64, device=device)
    return sums


def clip_sums(
    tokenizer: SemanticTokenizer, features_BTChw: Tensor, output: TokenizerOutput
) -> dict[str, Tensor]:
    """Sums over clips, float64. Errors are on the scale of the loss, normalized if so configured.

    output: of the tokenizer in eval mode.
    """
    config = tokenizer.config
    decoded_BTChw = output.decoded.float()
    if config.normalize_features:
        features_BTChw = tokenizer.normalize(features_BTChw)
        decoded_BTChw = tokenizer.normalize(decoded_BTChw)
    target_BTChw = features_BTChw.to(tokenizer.dtype).double()
    decoded_BTChw = decoded_BTChw.double()
    sums = zero_sums(config, features_BTChw.device)
    clips = len(features_BTChw)
    sums["clips"][0] = clips
    sums["clips"][1] = output.commitment.double() * clips
    squared_BThw = (decoded_BTChw - target_BTChw).square().sum(2)
    cosine_BThw = functional.cosine_similarity(decoded_BTChw, target_BTChw, dim=2)
    for kind, frames in enumerate((slice(0, 1), slice(1, None))):
        sums["errors"][kind, 0] = squared_BThw[:, frames].sum()
        sums["errors"][kind, 1] = cosine_BThw[:, frames].sum()
        sums["errors"][kind, 2] = squared_BThw[:, frames].numel()
    sums["features"][0] = target_BTChw.sum((0, 1, 3, 4))
    sums["features"][1] = target_BTChw.square().sum((0, 1, 3, 4))
    sums["codes"] += position_counts(output.indices, config)
    return sums


def position_counts(codes_BN: Tensor, config: TokenizerConfig) -> Tensor:
    """Occurrences of each code at each position of an I frame, then of a P frame.

    Returns float64 [K, codes]. codes_BN: of one segment, whose P frames count together.
    """
    size = config.codebook_size
    iframe = config.iframe_tokens
    place_N = torch.arange(codes_BN.shape[1], device=codes_BN.device)
    in_pframe_N = iframe + (place_N - iframe) % config.pframe_tokens
    place_N = torch.where(place_N < iframe, place_N, in_pframe_N)
    positions = iframe + config.pframe_tokens
    counts = count_codes(place_N * size + codes_BN, positions * size)
    return counts.view(positions, size).double()


def summarize_sums(sums: Mapping[str, Tensor], config: TokenizerConfig) -> dict[str, float]:
    """Metrics by name, from the sums over the whole split."""
    clips, commitment = sums["clips"].tolist()
    total = sums["errors"].sum(0)
    channels = config.feature_channels
    cells = total[2]
    mean_C = sums["features"][0] / cells
    variance_C = sums["features"][1] / cells - mean_C.square()
    reconstruction = float(total[0] / (cells * channels))
    metrics = {
        "loss": config.commitment_weight * commitment / clips + reconstruction,
        "reconstruction": reconstruction,
        "commitment": commitment / clips,
        "cosine": float(total[1] / cells),
        "variance_unexplained": float(total[0] / cells / variance_C.sum()),
    }
    codes = {
        "": sums["codes"],
        "_iframe": sums["codes"][: config.iframe_tokens],
        "_pframe": sums["codes"][config.iframe_tokens :],
    }
    for number, kind in enumerate(KINDS):
        squared, cosine, count = sums["errors"][number].tolist()
        if count:
            metrics[f"reconstruction_{kind}"] = squared / (count * channels)
            metrics[f"cosine_{kind}"] = cosine / count
    for suffix, counts in codes.items():
        if counts.sum():
            perplexity, used = codebook_use(counts.sum(0))
            metrics[f"codebook_perplexity{suffix}"] = float(perplexity)
            metrics[f"codebook_used_fraction{suffix}"] = float(used)
    metrics["codebook_dead_codes"] = float((sums["codes"].sum(0) == 0).sum())
    at_positions = [float(codebook_use(row)[0]) for row in sums["codes"] if row.sum()]
    metrics["position_perplexity_min"] = min(at_positions)
    metrics["position_perplexity_mean"] = sum(at_positions) / len(at_positions)
    metrics["position_constant"] = float(sum(value < 1 + 1e-9 for value in at_positions))
    return metrics
