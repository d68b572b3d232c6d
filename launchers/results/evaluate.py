"""Runs the condition tests of `landiff evaluate` (model_zoo/evaluate) on clips of a data folder.

Letters: B clips, T latent frames, C channels, H W latent sizes, h w feature cells, L text rows,
D text width, K codes of a clip.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.held_out import partners
from landiff.data_pipeline.loading.loader import Loader, Sample
from landiff.launchers.config import EvaluateConfig
from landiff.launchers.evaluation.buckets import evaluate_columns, evaluated_buckets
from landiff.launchers.progress import ProgressLine
from landiff.launchers.results.instruments import (
    PASSES,
    Conditions,
    Reading,
    format_readings,
    read_all,
)
from landiff.launchers.results.lm_instruments import lm_readings, num_passes
from landiff.launchers.results.sampling.loading import ModelLoader
from landiff.launchers.results.swaps import Swap, find_swaps
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.evaluate import conditions
from landiff.model_zoo.frozen.base import posterior_mean
from landiff.model_zoo.frozen.checks import CELL
from landiff.model_zoo.frozen.clip_shape import LATENT_CELL
from landiff.model_zoo.keyed_random import generator
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.lm.batch import grid_of

log = logging.getLogger(__name__)

DIFFUSION_PASSES = 4  # for each seed
TABLE_TITLE = "nats per code (lm), squared error (diffusion)"


@dataclass(frozen=True)
class EvaluatedModels:
    """The three models, on one device."""

    lm: LanguageModel
    tokenizer: SemanticTokenizer
    diffusion: ControlledDiffusion
    device: torch.device


def evaluate_conditions(config: EvaluateConfig) -> dict[str, Any]:
    """Compares losses under right and wrong conditions, once for each seed and clip shape.

    Prints a table, writes the results to `config.out`, and returns them. With several shapes, these
    are the results of each, under `buckets`.
    """
    device = pick_device(config.device)
    loader = ModelLoader("evaluate loads", 3, config.zoo, device, config.adapters)
    models = EvaluatedModels(
        loader.lm(config.lm),
        loader.tokenizer(config.tokenizer),
        loader.diffusion(config.diffusion),
        device,
    )
    manifest = read_manifest(config.data)
    warn_of_cut_captions(manifest, config)
    buckets = evaluated_buckets(config, manifest)
    progress = PassCounter(ProgressLine("evaluate", "passes"), config, len(buckets))
    results = {}
    for bucket in buckets:
        results[bucket] = evaluate_bucket(config, bucket, models, progress)
    document: dict[str, Any] = {"buckets": results}
    if len(buckets) == 1:
        document = results[buckets[0]]
    write_text(config.out, json.dumps(document, indent=1))
    for bucket, result in results.items():
        if len(buckets) > 1:
            print(f"== clips of {bucket}")
        print_loss_table(result["rows"])
        print(format_readings(result["instruments"]))
    return document


def evaluate_bucket(
    config: EvaluateConfig, bucket: str | None, models: EvaluatedModels, progress: PassCounter
) -> dict[str, Any]:
    """Results of clips of one shape: number of clips, losses of each seed, instruments."""
    rows: list[dict[str, float]] = []
    readings: list[Reading] = []
    num_samples = 0
    progress.start_bucket()
    for seed in range(config.seeds):
        samples = draw_samples(config, seed, bucket)
        num_samples = len(samples)
        row: dict[str, float] = {"seed": seed}
        row |= lm_losses(config, models.lm, samples, models.device, progress)
        inputs = diffusion_inputs(
            config,
            samples,
            models.tokenizer,
            latent_channels=models.diffusion.config.transformer.latent_channels,
            latent_frames=models.diffusion.config.transformer.latent_frames,
            device=models.device,
            seed=seed,
        )
        row |= diffusion_losses(config, models.diffusion, inputs, progress)
        rows.append(row)
        if seed == 0:
            swaps = find_swaps([sample.meta.caption for sample in samples])
            progress.expect(num_passes(len(samples), swaps))
            readings = instrument_readings(config, models.diffusion, inputs, swaps, progress)
            readings += lm_readings(
                models.lm, samples, config.lm_text_column, swaps, models.device, progress
            )
        progress.finish_seed()
    return {"samples": num_samples, "rows": rows, "instruments": readings}


def instrument_readings(
    config: EvaluateConfig,
    diffusion: ControlledDiffusion,
    inputs: DiffusionInputs,
    swaps: Sequence[Swap],
    progress: Callable[[], None],
) -> list[Reading]:
    """Readings of the instruments of the diffusion model, on the clips of the first seed."""
    return read_all(
        diffusion,
        NoiseSchedule(config.schedule),
        inputs.latents_BTCHW,
        inputs.noise_BTCHW,
        Conditions(
            text_BLD=inputs.text_BLD,
            wrong_text_BLD=inputs.text_BLD[inputs.wrong],
            features_BTChw=inputs.features_BTChw,
            wrong_features_BTChw=inputs.features_BTChw[inputs.wrong],
            swaps=swaps,
        ),
        progress,
    )


def print_loss_table(rows: Sequence[dict[str, float]]) -> None:
    """Prints a line for each loss and a column for each seed."""
    titles = [f"{'seed ' + str(row['seed']):>10}" for row in rows]
    print(f"{TABLE_TITLE:<48}{''.join(titles)}")
    for name in rows[0]:
        if name != "seed":
            values = [f"{row[name]:>10.4f}" for row in rows]
            print(f"{name:<48}{''.join(values)}")


class PassCounter:
    """Counts forward passes over all seeds and clip shapes.

    Each seed takes two passes of the language model for each clip and four of the diffusion model.
    The instruments of the diffusion model take `PASSES` more for each clip shape, those of the
    language model as many as `expect` adds.
    """

    def __init__(self, progress: ProgressLine, config: EvaluateConfig, num_buckets: int) -> None:
        self.progress = progress
        # For one seed; fewer if there are fewer clips of the shape.
        self.passes_per_seed = 2 * config.samples + DIFFUSION_PASSES
        self.seeds = 0  # that are done
        self.instruments = 0  # of the shapes until now
        self.total = num_buckets * (config.seeds * self.passes_per_seed + PASSES)
        self.done = 0
        self.progress(0, self.total)

    def __call__(self) -> None:
        """Counts one more pass."""
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def start_bucket(self) -> None:
        """Begins the passes of a clip shape."""
        self.instruments += PASSES

    def expect(self, passes: int) -> None:
        """Adds passes that depend on the clips."""
        self.instruments += passes
        self.total += passes

    def finish_seed(self) -> None:
        """Counts all passes of a seed as done, however few clips it had."""
        self.seeds += 1
        done = self.instruments + self.seeds * self.passes_per_seed
        if self.done < done:
            self.done = done
            self.progress(self.done, self.total)


def draw_samples(config: EvaluateConfig, seed: int, bucket: str | None = None) -> list[Sample]:
    """Clips in an order that depends on the seed; at most all clips of the shape once.

    bucket: their shape; None if the data have one shape. With `config.validation`, the first
    held-out clips for every seed. Raises ConfigError if no clip is held out.
    """
    columns = evaluate_columns(config)
    data = DataConfig(
        manifest=config.data,
        global_batch_size=1,
        seed=seed,
        validation=config.validation,
        buckets=None if bucket is None else (bucket,),
    )
    with Loader(data, columns, dp_rank=0, dp_size=1) as first:
        size = min(config.samples, first.num_samples)
        if config.validation is not None:
            samples = first.held_out.first(config.samples)
            if not samples:
                raise ConfigError(
                    f"validation holds out no clip of the shape {bucket or 'of the data'}; name "
                    "other shapes in `buckets`, or hold out more clips"
                )
            return samples
    changes = {"global_batch_size": size, "micro_batch_size": size}
    with Loader(data.model_copy(update=changes), columns, dp_rank=0, dp_size=1) as loader:
        return list(loader.next_batch().samples)


def partners_of(samples: Sequence[Sample]) -> list[int]:
    """For each clip the index of one of another video with another caption.

    Raises ConfigError for a clip without any.
    """
    found = partners([sample.meta for sample in samples], range(len(samples)))
    for number, sample in enumerate(samples):
        if number not in found:
            raise ConfigError(
                f"clip {sample.key} has no wrong condition to compare with: none of the "
                f"{len(samples)} clips is of another video and has another caption; evaluate on "
                "clips of at least two videos with different captions"
            )
    return [found[number] for number in range(len(samples))]


def warn_of_cut_captions(manifest: Manifest, config: EvaluateConfig) -> None:
    """Warns about text columns for which captions were cut to the encoder's length."""
    for name in dict.fromkeys((config.lm_text_column, config.diffusion_text_column)):
        column = manifest.columns[name]
        if column.truncated:
            log.warning(
                "column %s: %d of %d captions are longer than text encoder %s takes; their ends "
                "have no effect",
                name,
                column.truncated,
                manifest.num_samples,
                column.encoder,
            )


def lm_losses(
    config: EvaluateConfig,
    lm: LanguageModel,
    samples: Sequence[Sample],
    device: torch.device,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Nats per code with the clips' own captions, with those of other clips, and without any."""
    wrong = partners_of(samples)
    texts_LD = [sample.tensors[config.lm_text_column].float().to(device) for sample in samples]
    codes_K = [sample.tensors["tokens"].to(torch.int64) for sample in samples]

    def mean_loss(text_of: Sequence[int]) -> float:
        """Mean over clips, clip i with the text of clip `text_of[i]`."""
        total = 0.0
        for i, sample in enumerate(samples):
            text_LD = texts_LD[text_of[i]]
            codes = codes_K[i].numpy()
            total += conditions.code_loss(
                lm, codes, text_LD, sample.meta.motion_score, grid_of(sample.meta)
            )
            progress()
        return total / len(samples)

    codes_BK = torch.stack(codes_K).numpy()
    baseline = conditions.frequency_baseline(codes_BK, lm.layout.codebook_size)
    return {
        "lm": mean_loss(range(len(samples))),
        "lm, another clip's caption": mean_loss(wrong),
        "token frequencies alone": baseline,
    }


@dataclass(frozen=True, kw_only=True)
class DiffusionInputs:
    """A batch of clips for the diffusion model, with the noise and timesteps of one seed."""

    latents_BTCHW: Tensor
    text_BLD: Tensor
    features_BTChw: Tensor  # decoded from the clips' own tokens
    wrong: list[int]  # for each clip, the one whose conditions are wrong for it
    noise_BTCHW: Tensor
    timestep_B: Tensor


@torch.no_grad()
def diffusion_inputs(
    config: EvaluateConfig,
    samples: Sequence[Sample],
    tokenizer: SemanticTokenizer,
    *,
    latent_channels: int,
    latent_frames: int,
    device: torch.device,
    seed: int,
) -> DiffusionInputs:
    """Inputs of the diffusion model for `samples`, with noise and timesteps keyed by the seed.

    Of longer clips, the first `latent_frames` frames are used.
    """
    columns = [sample.tensors for sample in samples]
    latents = [posterior_mean(column["latents"], latent_channels) for column in columns]
    latents_BTCHW = torch.stack(latents).float().to(device)
    text_BLD = torch.stack([column[config.diffusion_text_column] for column in columns])
    tokens_BK = torch.stack([column["tokens"].to(torch.int64) for column in columns])
    frames, _, height, width = latents_BTCHW.shape[1:]
    grid = (height * LATENT_CELL // CELL, width * LATENT_CELL // CELL)
    features_BTChw = tokenizer.decode(tokens_BK.to(device), frames, grid)
    features_BTChw = features_BTChw[:, :latent_frames]
    latents_BTCHW = latents_BTCHW[:, :latent_frames]
    draw = generator(seed, "evaluate")
    noise_BTCHW = torch.randn(latents_BTCHW.shape, generator=draw)
    timestep_B = torch.randint(0, config.schedule.num_timesteps, (len(samples),), generator=draw)
    return DiffusionInputs(
        latents_BTCHW=latents_BTCHW,
        text_BLD=text_BLD.float().to(device),
        features_BTChw=features_BTChw,
        wrong=partners_of(samples),
        noise_BTCHW=noise_BTCHW.to(device),
        timestep_B=timestep_B.to(device),
    )


def diffusion_losses(
    config: EvaluateConfig,
    diffusion: ControlledDiffusion,
    inputs: DiffusionInputs,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Squared errors with right and wrong conditions, and with and without a clean prefix."""
    frames = config.prefix_frames
    right = conditions.ClipConditions(inputs.text_BLD, inputs.features_BTChw)
    wrong = conditions.ClipConditions(
        inputs.text_BLD[inputs.wrong], inputs.features_BTChw[inputs.wrong]
    )
    errors = {}
    for name, given in conditions.variants(
        right, wrong, frames, latent_frames=inputs.latents_BTCHW.shape[1]
    ).items():
        errors[name] = conditions.frame_errors(
            diffusion,
            NoiseSchedule(config.schedule),
            given,
            latents_BTCHW=inputs.latents_BTCHW,
            noise_BTCHW=inputs.noise_BTCHW,
            timestep_B=inputs.timestep_B,
            prediction=diffusion.config.transformer.prediction,
        )
        progress()
    losses = {
        "diffusion": errors["own"].mean().item(),
        "diffusion, another clip's caption": errors["other_caption"].mean().item(),
        "diffusion, another clip's tokens": errors["other_tokens"].mean().item(),
    }
    if "prefix" in errors:  # images have no later frames
        losses["diffusion, later frames"] = errors["own"][:, frames:].mean().item()
        after = errors["prefix"][:, frames:].mean().item()
        losses["diffusion, later frames after a clean prefix"] = after
    return losses
