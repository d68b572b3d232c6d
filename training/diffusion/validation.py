"""Metrics of the diffusion model on held-out clips.

The loss of each clip is computed at nine timesteps with fixed noise, which are the same in all
runs, and compared with the loss with another clip's text and tokens, and after a prefix.

Shape letters (docs/glossary.md): B batch, T latent frames, C latent channels, H W latent height and
width. Q stands for the timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.samples import HeldOutBatch, Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.evaluate.conditions import ClipConditions, frame_errors, variants
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.step import Inputs, Objective
from landiff.training.observe.charts import Charts

CHARTS: Charts = {
    "loss": {
        "loss": ["train/loss", "val(_ema)?/loss"],
        "by timestep": ["val/loss_t.*"],
        "by latent frame": ["val/loss_frame_.*"],
    },
    "streaming": {
        "by distance from the prefix": ["val/loss_after_prefix_.*"],
        "by distance from the prefix, in training": ["train/loss_after_prefix_.*"],
        "gain by the prefix": ["val(_ema)?/prefix_gain"],
    },
    "use of conditions": {
        "own conditions and another clip's": ["val/loss", "val/loss_other_.*"],
        "gain by the own caption": ["val(_ema)?/caption_gain"],
        "gain by the own tokens": ["val(_ema)?/tokens_gain"],
    },
}

TENTHS = range(1, 10)  # of the schedule: where the timesteps are
SEED = 0  # of all random numbers, instead of loop.seed: runs with different seeds can be compared


def quantile_timesteps(num_timesteps: int) -> list[int]:
    """The nine timesteps, from 10 % to 90 % of the schedule."""
    return [num_timesteps * tenth // 10 for tenth in TENTHS]


def prefix_frames(config: DiffusionTrainConfig) -> int:
    """Latent frames of the prefix that is validated: the longest of `prefix.frames`.

    config: of the run. That of a step may have other prefixes.
    """
    return min(max(config.prefix.lengths), config.model.transformer.latent_frames - 1)


def clip_sums(
    model: nn.Module, objective: Objective, batch: HeldOutBatch, prefix: int
) -> dict[str, Tensor]:
    """Sums over the counted clips of a batch, float64. Collective with ZeRO-3.

    clips, pairs: number of clips, and of clips with a partner.
    own: squared error of each timestep and latent frame, [Q, T].
    prefix: the same after a prefix of `prefix` latent frames. Missing if that is 0, and if the
        clips are not longer.
    own_of_pairs, other_caption, other_tokens: the same over the clips with a partner, under their
        own conditions, with the partner's text, and with the partner's tokens (phase control).

    Every batch takes the same number of forward passes, whatever counts in it.
    """
    counted_B = torch.tensor(batch.counted, device=objective.device, dtype=torch.float64)
    pairs_B = _weights([other is not None for other in batch.others], counted_B)
    partners = []
    for sample, other in zip(batch.samples, batch.others, strict=True):
        partners.append(other or sample)
    inputs = fixed_inputs(objective, batch.samples)
    foreign = fixed_inputs(objective, partners)
    found = variants(
        ClipConditions(inputs.text_BLD, inputs.features_BTchw),
        ClipConditions(foreign.text_BLD, foreign.features_BTchw),
        prefix,
        latent_frames=inputs.latents_BTCHW.shape[1],
    )
    sums = {"clips": counted_B.sum(), "pairs": pairs_B.sum()}
    for name, conditions in found.items():
        error_QBT = _errors(model, objective, conditions, inputs.latents_BTCHW, batch.samples)
        weight_B = pairs_B if name.startswith("other") else counted_B
        sums[name] = _weighted(error_QBT, weight_B)
        if name == "own":
            sums["own_of_pairs"] = _weighted(error_QBT, pairs_B)
    return sums


def _weights(flags: Sequence[bool], counted_B: Tensor) -> Tensor:
    """`counted_B`, but 0 where the flag is false."""
    return counted_B * torch.tensor(flags, device=counted_B.device)


def _weighted(error_QBT: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted sum over the batch, [Q, T]."""
    return (error_QBT * weight_B[:, None]).sum(dim=1)


def fixed_inputs(objective: Objective, samples: Sequence[Sample]) -> Inputs:
    """Inputs of clips with their own text and tokens, without noise, timestep and prefix.

    Of longer clips, the first frames are used.
    """
    config = objective.config
    frames = config.model.transformer.latent_frames
    latents = []
    for sample in samples:
        objective.check(sample)
        generator = keyed_random.generator(SEED, "validation posterior", sample.key)
        latents.append(objective.latents(sample, generator)[:frames])
    latents_BTCHW = torch.stack(latents).to(objective.device)
    texts = [sample.tensors[config.text_column].float() for sample in samples]
    zeros_B = torch.zeros(len(samples), dtype=torch.int64, device=objective.device)
    return Inputs(
        latents_BTCHW=latents_BTCHW,
        noise_BTCHW=torch.zeros_like(latents_BTCHW),
        timestep_B=zeros_B,
        prefix_B=zeros_B,
        prefix_BTCHW=latents_BTCHW,
        text_BLD=torch.stack(texts).to(objective.device),
        features_BTchw=objective.features(samples, [0] * len(samples)),
    )


def fixed_noise(samples: Sequence[Sample], timestep: int, like_BTCHW: Tensor) -> Tensor:
    """Noise of clips at a timestep, in the shape and on the device of `like_BTCHW`."""
    noise = []
    for sample in samples:
        generator = keyed_random.generator(SEED, "validation noise", sample.key, timestep)
        noise.append(torch.randn(like_BTCHW.shape[1:], generator=generator))
    return torch.stack(noise).to(like_BTCHW.device)


def _errors(
    model: nn.Module,
    objective: Objective,
    conditions: ClipConditions,
    latents_BTCHW: Tensor,
    samples: Sequence[Sample],
) -> Tensor:
    """Squared error of each latent frame at each timestep, float64 [Q, B, T]."""
    errors = []
    for timestep in quantile_timesteps(objective.config.schedule.num_timesteps):
        error_BT = frame_errors(
            model,
            objective.schedule,
            conditions,
            latents_BTCHW=latents_BTCHW,
            noise_BTCHW=fixed_noise(samples, timestep, latents_BTCHW),
            timestep_B=torch.full((len(samples),), timestep, device=objective.device),
            prediction=objective.config.model.transformer.prediction,
        )
        errors.append(error_BT.double())
    return torch.stack(errors)


def summarize_sums(sums: Mapping[str, Tensor], config: DiffusionTrainConfig) -> dict[str, float]:
    """Metrics by name, from the sums over all clips.

    A gain is how much lower the loss is with the right condition than with another clip's.
    """
    clips = float(sums["clips"])
    pairs = float(sums["pairs"])
    own_QT = sums["own"] / clips
    metrics = {"loss": float(own_QT.mean())}
    timesteps = quantile_timesteps(config.schedule.num_timesteps)
    for timestep, error_T in zip(timesteps, own_QT, strict=True):
        metrics[f"loss_t{timestep}"] = float(error_T.mean())
    for frame, error in enumerate(own_QT.mean(dim=0)):
        metrics[f"loss_frame_{frame:02d}"] = float(error)
    if "prefix" in sums:
        metrics |= _prefix_metrics(own_QT, sums["prefix"] / clips, prefix_frames(config))
    for name, gain in (("other_caption", "caption_gain"), ("other_tokens", "tokens_gain")):
        if name in sums and pairs:
            other = float(sums[name].mean() / pairs)
            metrics[f"loss_{name}"] = other
            metrics[gain] = other - float(sums["own_of_pairs"].mean() / pairs)
    return metrics


def _prefix_metrics(own_QT: Tensor, after_QT: Tensor, prefix: int) -> dict[str, float]:
    """Losses of the frames after a prefix, with the prefix and without it."""
    loss = float(after_QT[:, prefix:].mean())
    metrics = {
        "loss_prefix": loss,
        "prefix_gain": float(own_QT[:, prefix:].mean()) - loss,
    }
    for distance, error in enumerate(after_QT[:, prefix:].mean(dim=0), start=1):
        metrics[f"loss_after_prefix_{distance}"] = float(error)
    return metrics
