"""`landiff evaluate`: joins the data set, the zoo and the condition tests of model_zoo/evaluate."""

from __future__ import annotations

import json
import logging
from functools import partial

import torch

from landiff.configs.files import write_text
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader, Sample
from landiff.launchers.config import EvaluateConfig
from landiff.launchers.progress import Progress
from landiff.launchers.results.sample import load_all, load_part
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.evaluate import conditions
from landiff.model_zoo.frozen.base import posterior_mean
from landiff.model_zoo.keyed_random import generator
from landiff.model_zoo.schedule import NoiseSchedule

log = logging.getLogger(__name__)
DIFFUSION_PASSES = 4  # of one seed


def evaluate_conditions(config: EvaluateConfig) -> dict:
    """Compare losses under right and wrong conditions for every seed; print a table, write `config.out`."""
    device = pick_device(config.device)
    kinds = ("lm", "tokenizer", "diffusion")
    loads = [partial(load_part, config.zoo, getattr(config, kind), kind, device) for kind in kinds]
    lm, tokenizer, diffusion = load_all(
        "evaluate loads", [config.lm, config.tokenizer, config.diffusion], loads
    )
    schedule = NoiseSchedule(config.schedule)
    progress = Passes(Progress("evaluate", "passes"), config)
    rows = []
    for seed in range(config.seeds):
        samples = draw(config, seed)
        rows.append(
            {
                "seed": seed,
                **lm_row(config, lm, samples, device, progress),
                **diffusion_row(
                    config, diffusion, tokenizer, schedule, samples, device, seed, progress
                ),
            }
        )
        progress.finish_seed(seed)
    write_text(config.out, json.dumps({"samples": len(samples), "rows": rows}, indent=1))
    names = [name for name in rows[0] if name != "seed"]
    print(
        f"{'nats per code (lm), squared error (diffusion)':<48}"
        + "".join(f"{'seed ' + str(r['seed']):>10}" for r in rows)
    )
    for name in names:
        print(f"{name:<48}" + "".join(f"{row[name]:>10.4f}" for row in rows))
    return {"rows": rows}


class Passes:
    """Counts forward passes over all seeds: two for each clip of the language model, four of the diffusion model."""

    def __init__(self, progress: Progress, config: EvaluateConfig) -> None:
        self.progress = progress
        self.each = (
            2 * config.samples + DIFFUSION_PASSES
        )  # of one seed; fewer where the data set has fewer clips
        self.total = config.seeds * self.each
        self.done = 0
        self.progress(0, self.total)

    def __call__(self) -> None:
        """One more pass is done."""
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def finish_seed(self, seed: int) -> None:
        """All passes of a seed are done, however few clips it had."""
        done = (seed + 1) * self.each
        if self.done < done:
            self.done = done
            self.progress(self.done, self.total)


def draw(config: EvaluateConfig, seed: int) -> list[Sample]:
    """Clips in an order of this seed's own; at most the whole data set once."""
    columns = ["tokens", "latents", config.lm_text_column, config.diffusion_text_column]
    first = Loader(
        DataConfig(manifest=config.data, global_batch_size=1, seed=seed),
        columns,
        dp_rank=0,
        dp_size=1,
    )
    if seed == 0:
        warn_of_cut_captions(first.manifest, config)
    size = min(config.samples, first.num_samples)
    loader = Loader(
        DataConfig(manifest=config.data, global_batch_size=size, micro_batch_size=size, seed=seed),
        columns,
        dp_rank=0,
        dp_size=1,
    )
    return list(loader.next_batch().samples)


def warn_of_cut_captions(manifest: Manifest, config: EvaluateConfig) -> None:
    """Warn about text columns for which captions were cut to the encoder's length."""
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


def lm_row(
    config: EvaluateConfig, lm, samples: list[Sample], device: torch.device, progress: Passes
) -> dict[str, float]:
    wrong = conditions.wrong_partners([s.meta.caption for s in samples])
    texts = [s.tensors[config.lm_text_column].float().to(device) for s in samples]
    codes = [s.tensors["tokens"].to(torch.int64).numpy() for s in samples]

    def loss(text_of) -> float:
        total = 0.0
        for i, sample in enumerate(samples):
            total += conditions.lm_code_loss(
                lm,
                codes[i],
                texts[text_of(i)],
                lm.layout.num_frames(len(codes[i])),
                sample.meta.motion_score,
            )
            progress()
        return total / len(samples)

    baseline = conditions.frequency_baseline(
        torch.tensor([c.tolist() for c in codes]).numpy(), lm.layout.codebook_size
    )
    return {
        "lm": loss(lambda i: i),
        "lm, another clip's caption": loss(lambda i: wrong[i]),
        "token frequencies alone": baseline,
    }


def diffusion_row(
    config: EvaluateConfig,
    diffusion,
    tokenizer,
    schedule: NoiseSchedule,
    samples: list[Sample],
    device: torch.device,
    seed: int,
    progress: Passes,
) -> dict[str, float]:
    channels = diffusion.config.transformer.latent_channels
    latents = (
        torch.stack([posterior_mean(s.tensors["latents"], channels) for s in samples])
        .float()
        .to(device)
    )
    text = (
        torch.stack([s.tensors[config.diffusion_text_column] for s in samples]).float().to(device)
    )
    tokens = torch.stack([s.tensors["tokens"].to(torch.int64) for s in samples]).to(device)
    with torch.no_grad():
        features = tokenizer.decode(tokens, latents.shape[1])
    wrong = features[conditions.wrong_partners([s.meta.source_sha256 for s in samples])]
    draw = generator(seed, "evaluate")
    noise = torch.randn(latents.shape, generator=draw).to(device)
    timesteps = torch.randint(0, config.schedule.num_timesteps, (len(samples),), generator=draw).to(
        device
    )

    def loss(features, **prefix) -> float:
        result = conditions.diffusion_loss(
            diffusion,
            schedule,
            latents,
            text,
            features,
            noise_BTCHW=noise,
            timestep_B=timesteps,
            **prefix,
        )
        progress()
        return result

    k = config.prefix_frames
    return {
        "diffusion": loss(features),
        "diffusion, another clip's tokens": loss(wrong),
        "diffusion, later frames": loss(features, skip=k),
        "diffusion, later frames after a clean prefix": loss(features, prefix=k, skip=k),
    }
