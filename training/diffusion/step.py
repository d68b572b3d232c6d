"""Inputs and loss of a diffusion micro-batch.

Shape letters (docs/glossary.md): B batch, T latent frames, C latent channels, H W latent height and
width, L text rows, D width of a text state, c h w channels, rows and columns of the semantic
features, N semantic tokens.

Random numbers are keyed by (loop.seed, purpose, sample.index). A sample therefore gets the same
noise, timestep, dropout and prefix for any division into micro-batches and ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.samples import Batch, Sample
from landiff.model_zoo import keyed_random
from landiff.model_zoo.device import to_device
from landiff.model_zoo.frozen.base import posterior_mean, posterior_sample
from landiff.model_zoo.schedule import DenoisingLoss, NoiseSchedule, denoising_loss
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.diffusion.config import DiffusionTrainConfig, PrefixConfig


@dataclass(frozen=True)
class Inputs:
    """Inputs of one micro-batch, on the device. float32 unless noted.

    latents_BTCHW: clean latents.
    timestep_B: int64.
    prefix_B: number of first frames that the model receives without noise, int64.
    prefix_BTCHW: latents from which the prefix frames are taken: the clean ones, or with
        prefix.noise those with a little noise.
    features_BTchw: semantic features. None in phase main.
    """

    latents_BTCHW: Tensor
    noise_BTCHW: Tensor
    timestep_B: Tensor
    prefix_B: Tensor
    prefix_BTCHW: Tensor
    text_BLD: Tensor
    features_BTchw: Tensor | None


def timestep_block(position: int, global_batch_size: int, num_timesteps: int) -> tuple[int, int]:
    """Range [low, high) of timesteps for the sample at `position` of the global batch.

    These are the strata of docs/specification.md §5.6, with the global batch in place of the
    data-parallel ranks: as many blocks of equal size as divide both the timesteps and the batch.
    Neighboring samples have the same block.
    """
    assert 0 <= position < global_batch_size, (position, global_batch_size)
    samples_per_block = 1
    while not _divides(samples_per_block, global_batch_size, num_timesteps):
        samples_per_block += 1
    width = num_timesteps // (global_batch_size // samples_per_block)
    low = position // samples_per_block * width
    return low, low + width


def _divides(samples_per_block: int, global_batch_size: int, num_timesteps: int) -> bool:
    """Whether blocks of this many samples divide the batch and the timesteps evenly."""
    if global_batch_size % samples_per_block != 0:
        return False
    return num_timesteps % (global_batch_size // samples_per_block) == 0


def draw_timestep(
    seed: int, sample: Sample, global_batch_size: int, num_timesteps: int, power: float = 0.0
) -> int:
    """Timestep of a sample, random within its block.

    power: of the timestep in its probability density. Blocks then divide a batch into
        ranges of equal probability.
    """
    low, high = timestep_block(sample.position, global_batch_size, num_timesteps)
    generator = keyed_random.generator(seed, "timestep", sample.index)
    timestep = int(torch.randint(low, high, (), generator=generator))
    if not power:
        return timestep
    # The inverse of the cumulative distribution, (t / num_timesteps) ** (power + 1).
    share = (timestep + float(torch.rand((), generator=generator))) / num_timesteps
    return min(int(share ** (1 / (power + 1)) * num_timesteps), num_timesteps - 1)


def happens(seed: int, purpose: str, sample: Sample, probability: float) -> bool:
    """Bernoulli draw keyed by (seed, purpose, sample index)."""
    generator = keyed_random.generator(seed, purpose, sample.index)
    return float(torch.rand((), generator=generator)) < probability


def draw_prefix(seed: int, sample: Sample, config: PrefixConfig, frames: int) -> int:
    """Latent frames of a sample's prefix, 0 without one.

    Chosen among the lengths that leave some of its `frames` latent frames. Images have no prefix.
    """
    lengths = [length for length in config.lengths if length < frames]
    if not lengths or not happens(seed, "prefix", sample, config.probability):
        return 0
    if len(lengths) == 1:
        return lengths[0]
    generator = keyed_random.generator(seed, "prefix_frames", sample.index)
    return lengths[int(torch.randint(len(lengths), (), generator=generator))]


def draw_window(seed: int, sample: Sample, clip_frames: int, frames: int, prefix: int) -> int:
    """First latent frame of the window of `frames` latent frames in a clip of `clip_frames`.

    Without a prefix the window starts with the clip, as the first chunk of a video does. With one
    it starts anywhere, as a later chunk does.
    """
    if not prefix or clip_frames == frames:
        return 0
    generator = keyed_random.generator(seed, "window", sample.index)
    return int(torch.randint(clip_frames - frames + 1, (), generator=generator))


def prefix_latents(seed: int, sample: Sample, config: PrefixConfig, latents_TCHW: Tensor) -> Tensor:
    """Latents whose first frames are given as the prefix.

    With `config.noise` they have normal noise of a level that is uniform between 0 and
    `config.noise`.
    """
    if not config.noise:
        return latents_TCHW
    generator = keyed_random.generator(seed, "prefix_noise", sample.index)
    level = config.noise * torch.rand((), generator=generator)
    return latents_TCHW + level * torch.randn(latents_TCHW.shape, generator=generator)


class Objective:
    """Computes the inputs of samples and their loss, for one config."""

    def __init__(
        self,
        config: DiffusionTrainConfig,
        device: torch.device,
        tokenizer: SemanticTokenizer | None = None,
    ) -> None:
        """`tokenizer`: frozen, on `device`. Phase control needs it, phase main has none."""
        assert (tokenizer is not None) == (config.phase == "control"), config.phase
        self.config = config
        self.device = device
        self.tokenizer = tokenizer
        self.schedule = NoiseSchedule(config.schedule)
        self.global_batch_size = config.data.global_batch_size

    def at(self, batch: Batch) -> Objective:
        """The objective of one batch: its size, and prefix and text dropout of its phase."""
        objective = copy.copy(self)
        objective.config = self.config.at(batch.step)
        objective.global_batch_size = batch.global_batch_size
        return objective

    def inputs(self, samples: Sequence[Sample]) -> Inputs:
        """Inputs of a micro-batch.

        Raises ConfigError with the sample's key if a sample does not fit the model.
        """
        config = self.config
        seed = config.loop.seed
        window = config.model.transformer.latent_frames
        latents = []
        windows = []
        noise = []
        timesteps = []
        prefixes = []
        given = []
        texts = []
        for sample in samples:
            self.check(sample)
            posterior = keyed_random.generator(seed, "posterior", sample.index)
            clip_TCHW = self.latents(sample, posterior)
            frames = min(window, len(clip_TCHW))
            prefix = draw_prefix(seed, sample, config.prefix, frames)
            start = draw_window(seed, sample, len(clip_TCHW), frames, prefix)
            latents_TCHW = clip_TCHW[start : start + frames]
            generator = keyed_random.generator(seed, "noise", sample.index)
            timestep = draw_timestep(
                seed,
                sample,
                self.global_batch_size,
                config.schedule.num_timesteps,
                config.timestep_power,
            )
            latents.append(latents_TCHW)
            windows.append(start)
            noise.append(torch.randn(latents_TCHW.shape, generator=generator))
            timesteps.append(timestep)
            prefixes.append(prefix)
            given.append(prefix_latents(seed, sample, config.prefix, latents_TCHW))
            texts.append(self._text(sample))
        latents_BTCHW = to_device(torch.stack(latents), self.device)
        prefix_BTCHW = latents_BTCHW
        if config.prefix.noise:
            prefix_BTCHW = to_device(torch.stack(given), self.device)
        return Inputs(
            latents_BTCHW=latents_BTCHW,
            noise_BTCHW=to_device(torch.stack(noise), self.device),
            timestep_B=to_device(torch.tensor(timesteps), self.device),
            prefix_B=to_device(torch.tensor(prefixes), self.device),
            prefix_BTCHW=prefix_BTCHW,
            text_BLD=to_device(torch.stack(texts), self.device),
            features_BTchw=self.features(samples, windows),
        )

    def loss(self, model: nn.Module, inputs: Inputs) -> DenoisingLoss:
        """Squared error of the velocity, averaged over samples, without prefix frames (§5.6).

        `model`: the module, or DeepSpeed's engine around it. It casts its inputs to its own dtype.
        The loss is float32.
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
            fixed_BTCHW=inputs.prefix_BTCHW,
            prediction=self.config.model.transformer.prediction,
            max_snr_weight=self.config.max_snr_weight,
        )

    @torch.no_grad()
    def features(self, samples: Sequence[Sample], starts: Sequence[int]) -> Tensor | None:
        """Features decoded from the tokens, float32 [B, T, c, h, w]. None in phase main.

        Their grid follows from the latents.
        starts: first latent frame that is used of each sample.
        """
        if self.tokenizer is None:
            return None
        column = self.config.tokens_column
        tokens_BN = torch.stack([sample.tensors[column].to(torch.int64) for sample in samples])
        limit = self.tokenizer.config.codebook_size
        for sample, tokens_N in zip(samples, tokens_BN, strict=True):
            largest = int(tokens_N.max())
            if largest >= limit:
                raise ConfigError(
                    f"column {column} of clip {sample.key} holds token {largest}, but the "
                    f"tokenizer's codebook has {limit} codes; precompute the tokens with "
                    f"{self.config.tokenizer}"
                )
        clip_frames, _, height, width = samples[0].tensors[self.config.latents_column].shape
        scale = self.config.model.semantic.scale
        grid = (height // scale, width // scale)
        # `decode` copies the tokens to the device, after it has checked them on the host.
        features_BTchw = self.tokenizer.decode(tokens_BN, clip_frames, grid).float()
        frames = self.config.model.transformer.latent_frames
        pairs = zip(features_BTchw, starts, strict=True)
        return torch.stack([clip_Tchw[start : start + frames] for clip_Tchw, start in pairs])

    def latents(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """Latents of a sample, [T, C, H, W].

        If the column holds mean and log-variance, they are drawn from this distribution with
        `generator`.
        """
        stored = sample.tensors[self.config.latents_column].float()
        channels = self.config.model.transformer.latent_channels
        if stored.shape[-3] == channels:
            return stored
        noise = torch.randn(posterior_mean(stored, channels).shape, generator=generator)
        return posterior_sample(stored, noise)

    def _text(self, sample: Sample) -> Tensor:
        """Text states of a sample, zeros if dropout selects it. Clips always have a caption."""
        text_LD = sample.tensors[self.config.text_column].float()
        if happens(self.config.loop.seed, "text_dropout", sample, self.config.text_dropout):
            return torch.zeros_like(text_LD)
        return text_LD

    def check(self, sample: Sample) -> None:
        """Raise ConfigError if a sample's tensors do not have the model's shapes.

        With `data.buckets` the latents may have any size that patches and features divide.
        """
        model = self.config.model.transformer
        frames = model.latent_frames
        channels = model.latent_channels
        sides = (model.latent_height, model.latent_width)
        clip_frames, _, *clip_sides = sample.tensors[self.config.latents_column].shape
        if self.config.data.buckets is not None:
            frames = min(frames, clip_frames)
            if self.config.fits(*clip_sides):
                sides = (clip_sides[0], clip_sides[1])
        moments = (frames, 2 * channels, *sides)  # mean and log-variance
        if clip_frames > frames:  # a window of it is used
            moments = (clip_frames, *moments[1:])
            frames = clip_frames
        expected = {
            self.config.latents_column: ((frames, channels, *sides), moments),
            self.config.text_column: ((model.text_length, model.text_dim),),
        }
        for column, shapes in expected.items():
            found = tuple(sample.tensors[column].shape)
            if found not in shapes:
                raise ConfigError(
                    f"column {column} of clip {sample.key} has shape {found}, but "
                    f"model.transformer needs {shapes[0]}; precompute the column for this model, "
                    "or choose the model that fits it"
                )
