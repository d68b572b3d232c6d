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
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.held_out import partners
from landiff.data_pipeline.loading.loader import Loader, Sample
from landiff.launchers.config import EvaluateConfig
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

log = logging.getLogger(__name__)

DIFFUSION_PASSES = 4  # for each seed
TABLE_TITLE = "nats per code (lm), squared error (diffusion)"


def evaluate_conditions(config: EvaluateConfig) -> dict[str, Any]:
    """Compares losses under right and wrong conditions, once for each seed.

    Prints a table, writes the results to `config.out`, and returns them.
    """
    device = pick_device(config.device)
    loader = ModelLoader("evaluate loads", 3, config.zoo, device, config.adapters)
    lm = loader.lm(config.lm)
    tokenizer = loader.tokenizer(config.tokenizer)
    diffusion = loader.diffusion(config.diffusion)
    progress = PassCounter(ProgressLine("evaluate", "passes"), config)
    rows: list[dict[str, float]] = []
    readings: list[Reading] = []
    num_samples = 0
    for seed in range(config.seeds):
        samples = draw_samples(config, seed)
        num_samples = len(samples)
        row: dict[str, float] = {"seed": seed}
        row |= lm_losses(config, lm, samples, device, progress)
        inputs = diffusion_inputs(
            config,
            samples,
            tokenizer,
            latent_channels=diffusion.config.transformer.latent_channels,
            latent_frames=diffusion.config.transformer.latent_frames,
            device=device,
            seed=seed,
        )
        row |= diffusion_losses(config, diffusion, inputs, progress)
        rows.append(row)
        if seed == 0:
            swaps = find_swaps([sample.meta.caption for sample in samples])
            progress.expect(num_passes(len(samples), swaps))
            readings = instrument_readings(config, diffusion, inputs, swaps, progress)
            readings += lm_readings(lm, samples, config.lm_text_column, swaps, device, progress)
        progress.finish_seed(seed)
    result = {"samples": num_samples, "rows": rows, "instruments": readings}
    write_text(config.out, json.dumps(result, indent=1))
    print_loss_table(rows)
    print(format_readings(readings))
    return result


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
    """Counts forward passes over all seeds.

    Each seed takes two passes of the language model for each clip and four of the diffusion model.
    The instruments of the diffusion model take `PASSES` more, those of the language model as many
    as `expect` adds.
    """

    def __init__(self, progress: ProgressLine, config: EvaluateConfig) -> None:
        self.progress = progress
        # For one seed; fewer if the data set has fewer clips.
        self.passes_per_seed = 2 * config.samples + DIFFUSION_PASSES
        self.instruments = PASSES
        self.total = config.seeds * self.passes_per_seed + PASSES
        self.done = 0
        self.progress(0, self.total)

    def __call__(self) -> None:
        """Counts one more pass."""
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def expect(self, passes: int) -> None:
        """Adds passes that depend on the clips."""
        self.instruments += passes
        self.total += passes

    def finish_seed(self, seed: int) -> None:
        """Counts all passes of a seed as done, however few clips it had."""
        done = self.instruments + (seed + 1) * self.passes_per_seed
        if self.done < done:
            self.done = done
            self.progress(self.done, self.total)


def draw_samples(config: EvaluateConfig, seed: int) -> list[Sample]:
    """Clips in an order that depends on the seed; at most the whole data set once.

    With `config.validation`, the first held-out clips for every seed.
    """
    columns = ["tokens", "latents", config.lm_text_column, config.diffusion_text_column]
    data = DataConfig(
        manifest=config.data, global_batch_size=1, seed=seed, validation=config.validation
    )
    first = Loader(data, columns, dp_rank=0, dp_size=1)
    if seed == 0:
        warn_of_cut_captions(first.manifest, config)
    if config.validation is not None:
        return first.held_out.first(config.samples)
    size = min(config.samples, first.num_samples)
    data = DataConfig(
        manifest=config.data, global_batch_size=size, micro_batch_size=size, seed=seed
    )
    loader = Loader(data, columns, dp_rank=0, dp_size=1)
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
            total += conditions.code_loss(lm, codes, text_LD, sample.meta.motion_score)
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
    """Inputs of the diffusion model for `samples`, with noise and timesteps drawn from the seed.

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
