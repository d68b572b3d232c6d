"""Videos from prompts, chunk by chunk, in memory that does not depend on their length.

Each chunk passes through language model, tokenizer decoder, diffusion model and codec, in this
order. Between chunks only the codes, the last clean latent frames, the features of one chunk and
the state of the codec are kept.

The language model samples the codes of the whole video in one sequence, with a key/value cache of
its length, unless `tokens.context_segments` limits its context or the prompt changes. Then it
samples one segment at a time, conditioned on the previous segments.

Shape letters (docs/glossary.md): B batch (one video per prompt), K codes of a clip, T frames (RGB
frames of videos, latent frames of latents and features), C channels, H, W height and width of RGB
frames or latents, h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.frozen.base import TextEncoder
from landiff.model_zoo.sample.chunks import ChunkConditions, sample_chunks, windows
from landiff.model_zoo.sample.generate import (
    Models,
    MotionScores,
    SampleProgress,
    check_codes,
    check_prompts,
    draw_codes,
    encode_negatives,
    encode_separately,
    motion_scores,
    warn_of_cut_prompts,
)
from landiff.model_zoo.sample.given import Given
from landiff.model_zoo.sample.latents import OnStep, SamplerOptions, SamplerStep, seeded_noise
from landiff.model_zoo.sample.sizes import check_length, num_chunks
from landiff.model_zoo.sample.stream_store import StreamStore
from landiff.model_zoo.sample.texts import (
    Prompt,
    check_schedule,
    chunk_of,
    latent_frame,
    text_at,
    texts_of,
)
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens, seeded_draw
from landiff.model_zoo.tokenizer import Grid, SemanticTokenizer


@dataclass(frozen=True)
class Generated:
    """Videos with the codes and latents that they were decoded from. The frames are uint8."""

    codes_BK: Tensor
    latents_BTCHW: Tensor
    frames_BTHWC: Tensor


@dataclass(frozen=True)
class Chunk:
    """The next frames of a batch of videos.

    latents_BTCHW: new latent frames of the chunk.
    frames_BTHWC: uint8. The last frames of the latents may follow with the next chunk.
    num_frames: RGB frames of the whole video.
    """

    latents_BTCHW: Tensor
    frames_BTHWC: Tensor
    num_frames: int


@dataclass(frozen=True)
class Request:
    """What a batch of videos shows and how it is sampled; the arguments of `generate`."""

    prompts: Sequence[Prompt]
    num_latent_frames: int
    tokens: TokenSamplingConfig
    sampler: SamplerOptions
    seeds: Sequence[int]
    motion_score: MotionScores = None
    negatives: Sequence[str] | None = None
    clean_frames: int = 7
    given: Given = Given()
    grid: Grid | None = None

    def grid_of(self, tokenizer: SemanticTokenizer) -> Grid:
        """Rows and columns of feature cells of the videos."""
        if self.grid is not None:
            return self.grid
        return tokenizer.config.grid_height, tokenizer.config.grid_width

    @property
    def drawn_by_segment(self) -> bool:
        """Whether the language model samples one segment at a time."""
        changing = any(len(texts_of(prompt)) > 1 for prompt in self.prompts)
        return changing or self.tokens.context_segments is not None

    @property
    def texts(self) -> list[str]:
        """All texts of all prompts, in order."""
        found: list[str] = []
        for prompt in self.prompts:
            found += texts_of(prompt).values()
        return found

    def check(self, models: Models) -> None:
        """Raises ConfigError for an empty prompt, a wrong length or models that do not fit."""
        models.check()
        check_prompts(self.texts)
        window = models.diffusion.config.transformer.latent_frames
        check_length(self.num_latent_frames, window, self.clean_frames)
        for prompt in self.prompts:
            check_schedule(
                prompt,
                self.num_latent_frames,
                time=models.codec.time,
                window=window,
                clean=self.clean_frames,
            )
        batch = len(self.prompts)
        self.given.check(models.lm.layout, self.num_latent_frames, window, batch)
        if self.drawn_by_segment and (self.tokens.predict_end or self.tokens.reference_behaviour):
            raise ConfigError(
                "tokens.predict_end and tokens.reference_behaviour need the codes of the whole "
                "video sampled at once: leave out tokens.context_segments and prompts that change"
            )


def generate(
    models: Models,
    prompts: Sequence[Prompt],
    num_latent_frames: int,
    tokens: TokenSamplingConfig,
    sampler: SamplerOptions,
    *,
    seeds: Sequence[int],
    motion_score: MotionScores = None,
    negatives: Sequence[str] | None = None,
    clean_frames: int = 7,
    given: Given | None = None,
    grid: Grid | None = None,
    progress: SampleProgress | None = None,
) -> Generated:
    """Generates one video per prompt.

    Videos longer than the window of the diffusion model are generated in chunks, each of which
    continues the last `clean_frames` latent frames of the one before. A video that the language
    model ends early (`tokens.predict_end`) has the whole chunks before its end.

    A video depends on its own prompt and seed, and on the number of prompts by rounding. It does
    not depend on the other prompts.

    prompts: one text per video, or texts by frame. A text holds from the chunk on that contains
        its frame.
    seeds: one per prompt.
    motion_score: in frame heights per second, one for all prompts or one for each; None means
        DEFAULT_MOTION_SCORE.
    negatives: texts of the unconditional branch of the diffusion model, one per prompt. An empty
        text, like None, is no text.
    given: first frames or tokens of the videos.
    grid: rows and columns of feature cells. None: those of the tokenizer's config.

    Raises ConfigError for an empty prompt, a length that is not a whole number of chunks, or models
    that do not fit each other; UnhealthyError if the codes have collapsed.
    """
    request = Request(
        prompts=prompts,
        num_latent_frames=num_latent_frames,
        tokens=tokens,
        sampler=sampler,
        seeds=seeds,
        motion_score=motion_score,
        negatives=negatives,
        clean_frames=clean_frames,
        given=given or Given(),
        grid=grid,
    )
    stream = VideoStream(models, request, progress=progress)
    chunks = list(stream)
    return Generated(
        stream.codes_BK,
        torch.cat([chunk.latents_BTCHW for chunk in chunks], dim=1),
        torch.cat([chunk.frames_BTHWC for chunk in chunks], dim=1),
    )


class VideoStream:
    """Iterator of the chunks of a batch of videos.

    With a store, codes and latents are saved as they come, and a later stream of the same request
    continues after the last chunk that was saved: it yields the earlier chunks from their latents,
    and then the same chunks as an undisturbed stream.
    """

    def __init__(
        self,
        models: Models,
        request: Request,
        *,
        progress: SampleProgress | None = None,
        on_step: OnStep | None = None,
        store: StreamStore | None = None,
    ) -> None:
        """Errors are those of `generate`. on_step: as in `sample_latents`."""
        request.check(models)
        self.models = models
        self.request = request
        self.store = store
        self._progress = progress
        self._on_step = on_step
        self._window = models.diffusion.config.transformer.latent_frames
        self._codes: list[Tensor] = []  # of consecutive whole segments
        self._lm_states = _TextStates(models.lm_text, request.texts)
        self._diffusion_states = _TextStates(models.diffusion_text, request.texts)
        if store is not None:
            self._codes = [codes.to(self._device) for codes in store.codes()]

    @property
    def codes_BK(self) -> Tensor:
        """Codes sampled so far, int64 [B, K]."""
        return torch.cat(self._codes, dim=1)

    @property
    def _device(self) -> torch.device:
        return next(self.models.lm.parameters()).device

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Chunk]:
        if not self.request.drawn_by_segment:
            self.draw_codes()
        codec = self.models.codec
        num_frames = 1 + codec.time * (self.num_latent_frames - 1)
        waiting: deque[Tensor] = deque()

        def parts() -> Iterator[Tensor]:
            for part_BTCHW in self._latents():
                waiting.append(part_BTCHW)
                yield part_BTCHW

        for frames_BTHWC in codec.decode_stream(parts()):
            latents_BTCHW = torch.cat(list(waiting), dim=1) if waiting else torch.empty(0)
            waiting.clear()
            yield Chunk(latents_BTCHW, frames_BTHWC, num_frames)

    @property
    def num_latent_frames(self) -> int:
        """Length of the videos: as requested, or the whole chunks before an early end."""
        clean = self.request.clean_frames
        total = self._num_semantic_frames
        first = min(self._window, total)
        return first + (self._num_chunks - 1) * (first - clean)

    @property
    def _num_semantic_frames(self) -> int:
        if self.request.drawn_by_segment:
            return self.request.num_latent_frames
        return self.models.lm.layout.num_frames(sum(codes.shape[1] for codes in self._codes))

    @property
    def _num_chunks(self) -> int:
        return num_chunks(self._num_semantic_frames, self._window, self.request.clean_frames)

    # ------------------------------------------------------------------------------------ codes

    def _keep_codes(self, codes_BK: Tensor) -> None:
        """Adds and saves the codes of whole segments."""
        self._codes.append(codes_BK)
        if self.store is not None and self.request.num_latent_frames > self._window:
            self.store.add_codes(codes_BK)

    def _draw_whole(self) -> Tensor:
        """The codes of the whole video."""
        request = self.request
        given = request.given
        if given.num_codes() == self.models.lm.layout.num_codes(request.num_latent_frames):
            assert given.codes_BK is not None
            return given.codes_BK.to(self._device)
        return draw_codes(
            self.models.lm,
            self._lm_text(0),
            request.num_latent_frames,
            request.tokens,
            seeds=request.seeds,
            motion_score=request.motion_score,
            grid=request.grid_of(self.models.tokenizer),
            prefix_codes_BK=given.codes_BK,
            progress=self._progress,
        )

    @torch.no_grad()
    def draw_codes(self) -> Tensor:
        """Draws and saves the codes of the whole videos, int64 [B, K]."""
        if not self.request.drawn_by_segment:
            if not self._codes:
                self._keep_codes(self._draw_whole())
        else:
            frames = self.models.lm.layout.segment_frames
            for segment in range(len(self._codes), -(-self._num_semantic_frames // frames)):
                self._keep_codes(self._draw_segment(segment))
        return self.codes_BK

    def _lm_text(self, segment: int) -> tuple[Tensor, Tensor]:
        """States and lengths of the texts of a segment."""
        time = self.models.codec.time
        frames = self.models.lm.layout.segment_frames
        texts = []
        for prompt in self.request.prompts:
            texts.append(text_at(prompt, segment, lambda at: latent_frame(at, time) // frames))
        return self._lm_states.encode(texts)

    def _draw_segment(self, segment: int) -> Tensor:
        """The codes of one segment, after those of the segments that it sees."""
        lm = self.models.lm
        layout = lm.layout
        request = self.request
        total = request.num_latent_frames
        start = segment * layout.segment_frames
        frames = min(layout.segment_frames, total - start)
        first = layout.num_codes(start) if start else 0  # its first code
        given_BK = self._given_codes(first, layout.num_codes(frames))
        if given_BK.shape[1] == layout.num_codes(frames):
            return given_BK
        told = total
        seen = self._codes[:segment]
        if request.tokens.context_segments is not None:
            seen = seen[max(0, segment - request.tokens.context_segments) :]
            told = min(total, (request.tokens.context_segments + 1) * layout.segment_frames)
        seen_frames = len(seen) * layout.segment_frames
        prefix_BK = None
        if seen or given_BK.shape[1]:
            prefix_BK = torch.cat([*seen, given_BK], dim=1)
        num_given = request.given.num_codes()
        text_BLD, lengths_B = self._lm_text(segment)
        batch = len(text_BLD)
        scores = motion_scores(request.motion_score, batch)
        sampled = sample_tokens(
            lm,
            Prompts(
                text_BLD.to(self._device),
                torch.tensor(scores, device=self._device),
                lengths_B.to(self._device),
                prefix_codes_BK=prefix_BK,
                align_to_rows=batch > 1,
                frames_condition=told,
                span=(max(0, start - seen_frames) / total, (start + frames) / total),
                grid=request.grid_of(self.models.tokenizer),
            ),
            seen_frames + frames,
            request.tokens,
            draw=seeded_draw(
                request.seeds,
                layout.num_codes(total) - num_given,
                self._device,
                skip=max(0, first - num_given),
            ),
        )
        self._report("tokens", layout.body_length(start + frames), layout.body_length(total))
        # A copy, since a view would keep the codes of all segments that were seen.
        codes_BK = sampled.codes_BK[:, -layout.num_codes(frames) :].clone()
        check_codes(codes_BK)
        return codes_BK

    def _given_codes(self, first: int, count: int) -> Tensor:
        """The given ones among `count` codes of a segment, int64 [B, at most count]."""
        codes_BK = self.request.given.codes_BK
        if codes_BK is None:
            return torch.empty(len(self.request.prompts), 0, dtype=torch.int64, device=self._device)
        return codes_BK[:, first : first + count].to(self._device)

    # --------------------------------------------------------------------------------- features

    def _features(self, first_frame: int) -> Iterator[Tensor]:
        """Features of consecutive segments from a frame on, [B, T, C, h, w]."""
        layout = self.models.lm.layout
        total = self._num_semantic_frames
        for start in range(0, total, layout.segment_frames):
            frames = min(layout.segment_frames, total - start)
            segment = start // layout.segment_frames
            if self.request.drawn_by_segment and segment >= len(self._codes):
                self._keep_codes(self._draw_segment(segment))
            if start + frames <= first_frame:
                continue
            codes_BN = self._segment_codes(start, frames)
            features_BTChw = self.models.tokenizer.decode(codes_BN, frames, self.request.grid)
            yield features_BTChw[:, max(0, first_frame - start) :]

    def _segment_codes(self, start: int, frames: int) -> Tensor:
        """Codes of the segment from frame `start` on."""
        layout = self.models.lm.layout
        if self.request.drawn_by_segment:
            return self._codes[start // layout.segment_frames]
        first = layout.num_codes(start) if start else 0
        return self._codes[0][:, first : first + layout.num_codes(frames)]

    # ---------------------------------------------------------------------------------- latents

    def _latents(self) -> Iterator[Tensor]:
        """New latents of each chunk, [B, T, C, H, W]: those of the store, then sampled ones."""
        request = self.request
        clean = request.clean_frames
        # One sequence of numbers for all chunks, and not the one used for sampling the tokens.
        noise = seeded_noise([seed + 1 for seed in request.seeds])
        first = 0
        prefix: Tensor | None = None
        if self.store is not None and self.store.num_chunks:
            for part_BTCHW in self.store.latents():
                yield part_BTCHW.to(self._device)
                joined = part_BTCHW if prefix is None else torch.cat([prefix, part_BTCHW], dim=1)
                prefix = joined[:, -clean:] if clean else None
                first += 1
            noise.restore(self.store.noise_state())
        else:
            prefix = request.given.latents_BTCHW
        total = self._num_chunks * request.sampler.num_steps
        chunk = first

        def report(step: SamplerStep) -> Tensor | None:
            self._report("latents", chunk * request.sampler.num_steps + step.step + 1, total)
            return None if self._on_step is None else self._on_step(step)

        self._report("latents", chunk * request.sampler.num_steps, total)
        parts = sample_chunks(
            self.models.diffusion,
            self.models.schedule,
            self._conditions(first),
            lambda _chunk: noise,
            clean=clean,
            options=request.sampler,
            first=first,
            prefix_BTCHW=None if prefix is None else prefix.to(self._device),
            on_step=report,
        )
        for part_BTCHW in parts:
            if self.store is not None and self._num_chunks > 1:
                self.store.add_chunk(part_BTCHW, noise.state)
            chunk += 1
            yield part_BTCHW

    def _conditions(self, first: int) -> Iterator[ChunkConditions]:
        """Conditions of the chunks from a number on."""
        request = self.request
        window = min(self._window, self._num_semantic_frames)
        stride = window - request.clean_frames

        def part_of(frame: int) -> int:
            latent = latent_frame(frame, self.models.codec.time)
            return chunk_of(latent, window, request.clean_frames)

        features = windows(
            self._features(first * stride),
            self._num_chunks,
            window,
            request.clean_frames,
            first,
        )
        for chunk, features_BTChw in enumerate(features, start=first):
            texts = [text_at(prompt, chunk, part_of) for prompt in request.prompts]
            text_BLD, _ = self._diffusion_states.encode(texts)
            negative_BLD = encode_negatives(self.models.diffusion_text, request.negatives, text_BLD)
            yield ChunkConditions(
                text_BLD.to(features_BTChw),
                features_BTChw,
                None if negative_BLD is None else negative_BLD.to(features_BTChw),
            )


class _TextStates:
    """The last states of a text encoder, which most chunks use again.

    It warns about texts that are too long when it is first used, because it need not be loaded
    before, and not at all if only tokens are sampled or rendered.
    """

    def __init__(self, encoder: TextEncoder, all_texts: list[str]) -> None:
        self._encoder = encoder
        self._all_texts = all_texts
        self._texts: list[str] = []
        self._states: tuple[Tensor, Tensor]

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """States [B, L, D] and lengths [B] of texts."""
        if not self._texts:
            warn_of_cut_prompts(self._encoder, self._all_texts)
        if texts != self._texts:
            self._states = encode_separately(self._encoder, texts)
            self._texts = texts
        return self._states
