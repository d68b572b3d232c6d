"""The stages of generating a video: language model and diffusion model. Used by stream.py.

Shape letters (docs/glossary.md): B batch (one video per prompt), K codes of a clip, T frames (RGB
frames of videos, latent frames of latents and features), C channels, H, W height and width of RGB
frames or latents, h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen.base import LatentCodec, TextEncoder
from landiff.model_zoo.health import UnhealthyError, collapse
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.chunks import stream_latents
from landiff.model_zoo.sample.latents import (
    OnStep,
    SamplerOptions,
    SamplerStep,
    Stop,
    seeded_noise,
)
from landiff.model_zoo.sample.sizes import Sizes, num_chunks
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import Grid, SemanticTokenizer

log = logging.getLogger(__name__)

DEFAULT_MOTION_SCORE = 0.1  # as in the release's command line

# One score for all videos, or one for each. None means DEFAULT_MOTION_SCORE.
MotionScores = float | None | Sequence[float | None]
# progress(what, done, total) with "tokens" or "latents".
SampleProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Models:
    """Models and frozen encoders that generate a video together, all on one device."""

    lm: LanguageModel
    tokenizer: SemanticTokenizer
    diffusion: ControlledDiffusion
    schedule: NoiseSchedule
    lm_text: TextEncoder
    diffusion_text: TextEncoder
    codec: LatentCodec

    def check(self) -> None:
        """Raises ConfigError if sizes of the models do not fit each other."""
        sizes = Sizes(
            lm=self.lm.config,
            tokenizer=self.tokenizer.config,
            diffusion=self.diffusion.config,
            lm_text_width=self.lm_text.dim,
            diffusion_text_width=self.diffusion_text.dim,
            codec_channels=self.codec.channels,
        )
        differences = sizes.differences()
        if differences:
            raise ConfigError(f"the models do not fit each other: {'; '.join(differences)}")


def encode_separately(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States [B, L, D] and lengths [B] of texts, each encoded as if it were alone.

    Several texts are padded with zeros to the encoder's `max_length`, so that a text's states do
    not depend on the length of the others.
    """
    if len(texts) == 1:
        return encoder(list(texts))
    states = []
    lengths = []
    for text in texts:
        state_1LD, length_1 = encoder([text])
        padding = encoder.max_length - state_1LD.shape[1]
        states.append(nn.functional.pad(state_1LD, (0, 0, 0, padding)))
        lengths.append(length_1)
    return torch.cat(states), torch.cat(lengths)


def encode_negatives(
    encoder: TextEncoder, negatives: Sequence[str] | None, text_BLD: Tensor
) -> Tensor | None:
    """States of the unconditional branch, [B, L, D]: zeros where there is no negative text.

    None if no video has one.
    """
    if negatives is None or not any(negatives):
        return None
    negative_BLD = torch.zeros_like(text_BLD)
    for row, text in enumerate(negatives):
        if text:
            negative_BLD[row] = encoder([text])[0][0].to(negative_BLD)
    return negative_BLD


def warn_of_cut_prompts(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Warns about prompts that are too long for the text encoder, with the text that is cut."""
    for number, cut in enumerate(encoder.cut_off(list(prompts))):
        if cut:
            log.warning(
                "prompt %d is longer than the %d tokens that text encoder %s takes; this part "
                "has no effect: %r",
                number,
                encoder.max_length,
                encoder.name,
                cut,
            )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises ConfigError for an empty prompt, or if there is none."""
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty; describe what the video shows")


def draw_codes(
    lm: LanguageModel,
    text: tuple[Tensor, Tensor],
    num_latent_frames: int,
    tokens: TokenSamplingConfig,
    *,
    seeds: Sequence[int],
    motion_score: MotionScores = None,
    grid: Grid | None = None,
    prefix_codes_BK: Tensor | None = None,
    progress: SampleProgress | None = None,
) -> Tensor:
    """Samples the codes of the videos, int64 [B, K]. K is smaller if the video ends early.

    text: states and lengths from the text encoder of the language model. Several texts are aligned
        at the number of rows of the states.
    motion_score: as in `generate`.
    grid: rows and columns of feature cells of the videos, for a model with `grid_condition`.
    prefix_codes_BK: codes of the first frames, which are not sampled.
    progress: `progress("tokens", done, total)` is called after each sampled position.

    Raises ConfigError if several videos may end early or with `context_segments`, which stream.py
    supports; UnhealthyError if nearly all codes are the same.
    """
    text_BLD, lengths_B = text
    batch = len(text_BLD)
    if tokens.context_segments is not None:
        raise ConfigError(
            f"context_segments = {tokens.context_segments} needs the codes sampled by segment, as "
            "`landiff sample` does; set it to null"
        )
    if tokens.predict_end and batch > 1:
        raise ConfigError(
            f"with predict_end = true each of the {batch} videos may end at another frame; sample "
            "them one at a time"
        )
    device = next(lm.parameters()).device
    motion_score_B = torch.tensor(motion_scores(motion_score, batch), device=device)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("tokens", done, total)

    sampled = sample_tokens(
        lm,
        Prompts(
            text_BLD.to(device),
            motion_score_B,
            lengths_B.to(device),
            prefix_codes_BK=prefix_codes_BK,
            align_to_rows=batch > 1,
            grid=grid,
        ),
        num_latent_frames,
        tokens,
        seeds=seeds,
        progress=report,
    )
    num_codes = lm.layout.num_codes(int(sampled.num_frames_B.max()))
    codes_BK = sampled.codes_BK[:, :num_codes]
    check_codes(codes_BK)
    return codes_BK


def check_codes(codes_BK: Tensor) -> None:
    """Raises UnhealthyError if nearly all codes are the same."""
    problem = collapse(torch.bincount(codes_BK.flatten()).cpu().numpy())
    if problem:
        raise UnhealthyError(f"samples of the language model: {problem}; use another checkpoint")


def motion_scores(motion_score: MotionScores, batch: int) -> list[float]:
    """The motion score of each of `batch` videos, with the default for None."""
    if motion_score is None or isinstance(motion_score, float | int):
        scores: list[float | None] = [motion_score] * batch
    else:
        scores = list(motion_score)
    assert len(scores) == batch, (motion_score, batch)
    return [DEFAULT_MOTION_SCORE if score is None else float(score) for score in scores]


def draw_latents(
    diffusion: ControlledDiffusion,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    sampler: SamplerOptions,
    *,
    seeds: Sequence[int],
    negative_BLD: Tensor | None = None,
    clean_frames: int = 7,
    progress: SampleProgress | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
    start_BTCHW: Tensor | None = None,
    prefix_BTCHW: Tensor | None = None,
) -> Tensor:
    """Samples the latents of the videos, float32 [B, T, C, H, W].

    text_BLD: states from the text encoder of the diffusion model.
    negative_BLD: as in `sample_latents`.
    progress: `progress("latents", done, total)` is called after each sampling step; `total` counts
        the steps of all chunks.
    on_step, stop: as in `sample_latents`.
    start_BTCHW: noise to start from, instead of noise generated from the seeds.
    prefix_BTCHW: first latent frames of the videos, which are given.
    """
    window = diffusion.config.transformer.latent_frames
    chunks = num_chunks(features_BTChw.shape[1], window, clean_frames)
    total = chunks * sampler.num_steps
    parts: list[Tensor] = []
    # One sequence of numbers for all chunks, and not the one used for sampling the tokens.
    seeded = seeded_noise([seed + 1 for seed in seeds])

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        if step == 0 and start_BTCHW is not None:
            return start_BTCHW.float()
        return seeded(step, shape)

    def report(step: SamplerStep) -> Tensor | None:
        if progress is not None:
            progress("latents", len(parts) * sampler.num_steps + step.step + 1, total)
        if on_step is None:
            return None
        return on_step(step)

    if progress is not None:
        progress("latents", 0, total)
    stream = stream_latents(
        diffusion,
        schedule,
        text_BLD.to(features_BTChw),
        features_BTChw,
        lambda _chunk: noise,
        negative_BLD=None if negative_BLD is None else negative_BLD.to(features_BTChw),
        options=sampler,
        window=window,
        clean=clean_frames,
        prefix_BTCHW=prefix_BTCHW,
        on_step=report,
        stop=stop,
    )
    for part_BTCHW in stream:
        parts.append(part_BTCHW)
    return torch.cat(parts, dim=1)
