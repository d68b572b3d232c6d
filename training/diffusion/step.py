"""What one sample of a diffusion batch is trained on, and the loss.

Letters: B batch, T latent frames, C latent channels, H W latent height and width, L text rows, D text width,
c h w channels, rows and columns of the semantic features, N semantic tokens.

All chance is keyed by (loop.seed, purpose, sample.index), so a sample sees the same noise, timestep, dropout
and prefix whatever the micro-batches and ranks it is cut into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo.frozen.base import posterior_mean, posterior_sample
from landiff.model_zoo.schedule import DenoisingLoss, NoiseSchedule, denoising_loss
from landiff.training import rng
from landiff.training.diffusion.config import DiffusionTrainConfig


@dataclass(frozen=True)
class Inputs:
    """One micro-batch, on the device. float32, except where noted."""

    latents_BTCHW: Tensor  # clean
    noise_BTCHW: Tensor
    timestep_B: Tensor  # int64
    prefix_B: Tensor  # int64, number of first frames that stay clean
    text_BLD: Tensor
    features_BTchw: Tensor | None  # None in phase main


def timestep_block(position: int, global_batch_size: int, num_timesteps: int) -> tuple[int, int]:
    """[low, high) of the timesteps that the sample at `position` of the global batch is drawn from.

    The strata of specification §5.6, with the global batch in the place of the data-parallel ranks: the most
    equal blocks of timesteps that divide both, samples of one block next to each other.
    """
    assert 0 <= position < global_batch_size, (position, global_batch_size)
    shared = next(
        i
        for i in range(1, global_batch_size + 1)
        if global_batch_size % i == 0 and num_timesteps % (global_batch_size // i) == 0
    )
    width = num_timesteps // (global_batch_size // shared)
    low = position // shared * width
    return low, low + width


def draw_timestep(seed: int, sample: Sample, global_batch_size: int, num_timesteps: int) -> int:
    low, high = timestep_block(sample.position, global_batch_size, num_timesteps)
    return int(
        torch.randint(low, high, (), generator=rng.generator(seed, "timestep", sample.index))
    )


def happens(seed: int, purpose: str, sample: Sample, probability: float) -> bool:
    """A keyed coin."""
    return float(torch.rand((), generator=rng.generator(seed, purpose, sample.index))) < probability


class Objective:
    """Samples -> inputs -> loss, for one config."""

    def __init__(
        self, config: DiffusionTrainConfig, device: torch.device, tokenizer: nn.Module | None = None
    ) -> None:
        """`tokenizer`: the frozen semantic tokenizer, on `device`; needed in phase control."""
        assert (tokenizer is not None) == (config.phase == "control"), config.phase
        self.config = config
        self.device = device
        self.tokenizer = tokenizer
        self.schedule = NoiseSchedule(config.schedule)

    def inputs(self, samples: Sequence[Sample]) -> Inputs:
        """Raises ConfigError for a sample that does not fit the model, with its key."""
        config, seed, size = self.config, self.config.loop.seed, self.config.data.global_batch_size
        for sample in samples:
            self._check(sample)
        latents = [self._latents(s) for s in samples]
        noise = [
            torch.randn(x.shape, generator=rng.generator(seed, "noise", s.index))
            for s, x in zip(samples, latents, strict=True)
        ]
        steps = [draw_timestep(seed, s, size, config.schedule.num_timesteps) for s in samples]
        prefix = [
            config.prefix.frames * happens(seed, "prefix", s, config.prefix.probability)
            for s in samples
        ]
        text = [self._text(s) for s in samples]
        return Inputs(
            latents_BTCHW=torch.stack(latents).to(self.device, non_blocking=True),
            noise_BTCHW=torch.stack(noise).to(self.device, non_blocking=True),
            timestep_B=torch.tensor(steps, device=self.device),
            prefix_B=torch.tensor(prefix, device=self.device),
            text_BLD=torch.stack(text).to(self.device, non_blocking=True),
            features_BTchw=self.features(samples),
        )

    def loss(self, model: nn.Module, inputs: Inputs) -> DenoisingLoss:
        """Squared velocity error, mean over the samples, frames of a prefix left out (§5.6).

        `model` is the module or DeepSpeed's engine around it; it casts its inputs to its own dtype, the loss is float32.
        """
        conditions = () if inputs.features_BTchw is None else (inputs.features_BTchw,)

        def network(noised_BTCHW: Tensor, timestep_B: Tensor) -> Tensor:
            return model(noised_BTCHW, timestep_B, inputs.text_BLD, *conditions)

        return denoising_loss(
            network,
            self.schedule,
            inputs.latents_BTCHW,
            inputs.noise_BTCHW,
            inputs.timestep_B,
            fixed_frames=inputs.prefix_B,
        )

    @torch.no_grad()
    def features(self, samples: Sequence[Sample]) -> Tensor | None:
        """float32 features_BTchw decoded from the samples' semantic tokens; None in phase main."""
        if self.tokenizer is None:
            return None
        column = self.config.tokens_column
        tokens_BN = torch.stack([s.tensors[column].to(torch.int64) for s in samples])
        limit = self.tokenizer.config.codebook_size
        for sample, tokens_N in zip(samples, tokens_BN, strict=True):
            if int(tokens_N.max()) >= limit:
                raise ConfigError(
                    f"column {column} of clip {sample.key} holds token {int(tokens_N.max())}, but the tokenizer's codebook "
                    f"has {limit} codes; precompute the tokens with {self.config.tokenizer}"
                )
        return self.tokenizer.decode(
            tokens_BN.to(self.device), self.config.model.transformer.latent_frames
        ).float()

    def _latents(self, sample: Sample) -> Tensor:
        """As they are stored; of mean and log-variance, one sample that no other epoch sees."""
        stored, channels = (
            sample.tensors[self.config.latents_column].float(),
            self.config.model.transformer.latent_channels,
        )
        if stored.shape[-3] == channels:
            return stored
        noise = torch.randn(
            posterior_mean(stored, channels).shape,
            generator=rng.generator(self.config.loop.seed, "posterior", sample.index),
        )
        return posterior_sample(stored, noise)

    def _text(self, sample: Sample) -> Tensor:
        """Text states of one sample, zeros where they are dropped. Never for lack of a caption: that is set aside earlier."""
        text = sample.tensors[self.config.text_column].float()
        if happens(self.config.loop.seed, "text_dropout", sample, self.config.text_dropout):
            return torch.zeros_like(text)
        return text

    def _check(self, sample: Sample) -> None:
        model = self.config.model.transformer
        frames, channels, *sides = (
            model.latent_frames,
            model.latent_channels,
            model.latent_height,
            model.latent_width,
        )
        expected = {
            self.config.latents_column: (
                (frames, channels, *sides),
                (frames, 2 * channels, *sides),
            ),  # or mean and log-variance
            self.config.text_column: ((model.text_length, model.text_dim),),
        }
        for column, shapes in expected.items():
            found, shape = tuple(sample.tensors[column].shape), shapes[0]
            if found not in shapes:
                raise ConfigError(
                    f"column {column} of clip {sample.key} has shape {found}, but model.transformer wants {shape}; "
                    "precompute the column for this model, or choose the model that fits it"
                )
