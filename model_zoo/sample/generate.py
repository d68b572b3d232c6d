"""Prompts -> video frames: language model, tokenizer decoder, control diffusion, latent codec, in that order.

Letters: B prompts, K codes, T latent frames, F video frames, C H W latent sizes, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen.base import LatentCodec, TextEncoder
from landiff.model_zoo.health import UnhealthyError, collapse
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.latents import (
    OnStep,
    SamplerOptions,
    SamplerStep,
    Stop,
    seeded_noise,
    stream_latents,
)
from landiff.model_zoo.sample.sizes import Sizes, check_length, num_chunks
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import SemanticTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The parts that make a video, all on one device."""

    lm: LanguageModel
    tokenizer: SemanticTokenizer
    diffusion: ControlledDiffusion
    schedule: NoiseSchedule
    lm_text: TextEncoder
    diffusion_text: TextEncoder
    codec: LatentCodec

    def check(self) -> None:
        """Raise ConfigError where the parts were not made for each other."""
        sizes = Sizes(
            self.lm.config,
            self.tokenizer.config,
            self.diffusion.config,
            self.lm_text.dim,
            self.diffusion_text.dim,
            self.codec.channels,
        )
        wrong = sizes.differences()
        if wrong:
            raise ConfigError(f"these models were not made for each other: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Generated:
    codes_BK: Tensor
    latents_BTCHW: Tensor
    frames_BFHWC: Tensor  # uint8


DEFAULT_MOTION_SCORE = 0.1  # the release's command line's

Note = Callable[[str, int, int], None]  # ("tokens" or "latents", how many are done, of how many)


@torch.no_grad()
def generate(
    models: Models,
    prompts: Sequence[str],
    num_latent_frames: int,
    tokens: TokenSamplingConfig,
    sampler: SamplerOptions,
    seeds: Sequence[int],
    motion_score: float | None = None,
    clean_frames: int = 7,
    progress: Note | None = None,
) -> Generated:
    """One video per prompt. Videos longer than the diffusion model's window are streamed in chunks that keep
    `clean_frames` latents of the one before; one that ends early (`tokens.predict_end`) keeps its whole chunks.
    Raises ConfigError for an empty prompt, a length that chunks don't make, or models that don't fit.
    """
    models.check()
    check_prompts(prompts)
    check_length(num_latent_frames, models.diffusion.config.transformer.latent_frames, clean_frames)
    warn_of_cut_prompts(models.lm_text, prompts)
    warn_of_cut_prompts(models.diffusion_text, prompts)
    codes_BK = draw_codes(
        models.lm,
        models.lm_text(list(prompts)),
        num_latent_frames,
        tokens,
        seeds,
        motion_score,
        progress,
    )
    features = models.tokenizer.decode(codes_BK, models.lm.layout.num_frames(codes_BK.shape[1]))
    states_BLD, _ = models.diffusion_text(list(prompts))
    latents = draw_latents(
        models.diffusion,
        models.schedule,
        states_BLD,
        features,
        sampler,
        seeds,
        clean_frames,
        progress,
    )
    return Generated(codes_BK, latents, models.codec.decode(latents))


def warn_of_cut_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Warn about prompts that are longer than the text encoder takes, with the text that is cut."""
    for number, cut in enumerate(encoder.cut_off(list(prompts))):
        if cut:
            log.warning(
                "prompt %d is longer than the %d tokens that text encoder %s takes; this part has no "
                "effect: %r",
                number,
                encoder.max_length,
                encoder.name,
                cut,
            )


def check_prompts(prompts: Sequence[str]) -> None:
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty; say what the video shows")


def draw_codes(
    lm: LanguageModel,
    text: tuple[Tensor, Tensor],
    num_latent_frames: int,
    tokens: TokenSamplingConfig,
    seeds: Sequence[int],
    motion_score: float | None = None,
    progress: Note | None = None,
) -> Tensor:
    """`text`: states and lengths of the language model's encoder -> codes_BK, of fewer frames where the video ends early."""
    text_BLD, lengths_B = text
    if tokens.predict_end and len(text_BLD) > 1:
        raise ConfigError(
            f"predict_end = true lets each of the {len(text_BLD)} videos end where it likes; ask for one at a time"
        )
    device = next(lm.parameters()).device
    motion_score_B = torch.full(
        (len(text_BLD),),
        DEFAULT_MOTION_SCORE if motion_score is None else motion_score,
        device=device,
    )
    sampled = sample_tokens(
        lm,
        Prompts(text_BLD.to(device), motion_score_B, lengths_B.to(device)),
        num_latent_frames,
        tokens,
        seeds=seeds,
        progress=None if progress is None else lambda done, total: progress("tokens", done, total),
    )
    codes_BK = sampled.codes_BK[:, : lm.layout.num_codes(int(sampled.num_frames_B.max()))]
    problem = collapse(torch.bincount(codes_BK.flatten()).cpu().numpy())
    if problem:
        raise UnhealthyError(f"samples of the language model: {problem}; use another checkpoint")
    return codes_BK


def draw_latents(
    diffusion: ControlledDiffusion,
    schedule: NoiseSchedule,
    states_BLD: Tensor,
    features_BTChw: Tensor,
    sampler: SamplerOptions,
    seeds: Sequence[int],
    clean_frames: int = 7,
    progress: Note | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
    start_BTCHW: Tensor | None = None,
) -> Tensor:
    """`states`: of the diffusion model's text encoder -> latents_BTCHW. `start`: noise to begin with instead of the seeds'.

    `progress("latents", done, total)` is called after each sampler step; total is all steps of all chunks.
    """
    window = diffusion.config.transformer.latent_frames
    chunks = num_chunks(features_BTChw.shape[1], window, clean_frames)
    parts = []
    drawn = seeded_noise(
        [seed + 1 for seed in seeds]
    )  # runs on from chunk to chunk; not the tokens' numbers

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        return drawn(step, shape) if step or start_BTCHW is None else start_BTCHW.float()

    def report(step: SamplerStep) -> Tensor | None:
        if progress is not None:
            progress(
                "latents",
                len(parts) * sampler.num_steps + step.step + 1,
                chunks * sampler.num_steps,
            )
        return None if on_step is None else on_step(step)

    if progress is not None:
        progress("latents", 0, chunks * sampler.num_steps)
    for part in stream_latents(
        diffusion,
        schedule,
        states_BLD.to(features_BTChw),
        features_BTChw,
        lambda _chunk: noise,
        sampler,
        window,
        clean_frames,
        report,
        stop,
    ):
        parts.append(part)
    return torch.cat(parts, dim=1)
