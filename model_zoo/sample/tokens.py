"""Autoregressive sampling of semantic tokens with a key/value cache and guidance.

Structural tokens are set, not sampled, and consecutive known tokens pass through the model in one
step. At positions of codes only codes are sampled. Each row of a batch has its own random numbers,
generated once on the CPU, so that a row's result depends neither on the other rows nor, except for
rounding, on the device.

`reference_behaviour` reproduces the reference implementation (docs/specification.md §4.7). An id is
sampled at every position and discarded where the token is forced. Structural ids may be sampled at
positions of codes; they are fed back and replaced by the last code at the end. Ids are sampled with
torch's multinomial and a generator on the model's device, so that a seed gives the same ids as in
the reference, except for seed 0, which means no seed there.

Shape letters (docs/glossary.md): B batch, R rows of the model (B, or 2 B under guidance: first with
text, then without), L text rows, D width of a vector, P prompt positions (BOS and conditions),
N positions of the body from the first SI to EOS (token_layout.py), S new positions, K codes of a
clip, G groups of positions with the same legal ids, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.lm import KVCache, LanguageModel
from landiff.model_zoo.sample.decode import Decoder, padding_mask
from landiff.model_zoo.token_layout import CODE, SamplingTable
from landiff.model_zoo.tokenizer import Grid

# draw(probabilities_BV, step) returns int64 ids [B]. Step 0 is the position after the first SI.
Draw = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class SampledTokens:
    """Codes of a batch of videos.

    codes_BK: int64, all within the codebook.
    num_frames_B: int64, semantic frames of each video. A video that the model ended early has fewer
        than requested, and the codes after its end have no meaning.
    """

    codes_BK: Tensor
    num_frames_B: Tensor


@dataclass(frozen=True)
class Prompts:
    """Conditions of a batch.

    text_BLD: states of the text encoder, padded at the end.
    motion_score_B: motion scores.
    text_lengths_B: rows of each text without padding; L each if None.
    prefix_codes_BK: codes of the first frames, which are then not sampled.
    align_to_rows: pad all texts to the rows of `text_BLD`, not to the longest one. A row of the
        batch then does not depend on the length of the others.
    frames_condition: number of frames that the model is told, in place of the true one. A part of a
        long video is told the length of the whole.
    span: part of the video that the tokens are, from 0 to 1, for options that change over it.
    grid: rows and columns of feature cells of the videos, for a model with `grid_condition`.
    """

    text_BLD: Tensor
    motion_score_B: Tensor
    text_lengths_B: Tensor | None = None
    prefix_codes_BK: Tensor | None = None
    align_to_rows: bool = False
    frames_condition: int | None = None
    span: tuple[float, float] = (0.0, 1.0)
    grid: Grid | None = None


def sample_tokens(
    model: LanguageModel,
    prompts: Prompts,
    num_frames: int,
    config: TokenSamplingConfig,
    *,
    seeds: Sequence[int] | None = None,
    draw: Draw | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SampledTokens:
    """Samples the codes of `num_frames` semantic frames for each prompt.

    seeds: one per prompt. Instead of seeds, `draw` may be given, which chooses the ids.
    progress: `progress(done, total)` is called after each sampled position of the body.

    Runs on the device of the model, in its dtype or that of a surrounding autocast. Raises
    ValueError for shapes, lengths and prefix codes that do not fit.
    """
    with torch.inference_mode():
        sampled = _sample(model, prompts, num_frames, config, seeds, draw, progress)
    # Tensors that were made in inference mode cannot be used everywhere.
    return SampledTokens(sampled.codes_BK.clone(), sampled.num_frames_B.clone())


def _sample(
    model: LanguageModel,
    prompts: Prompts,
    num_frames: int,
    config: TokenSamplingConfig,
    seeds: Sequence[int] | None,
    draw: Draw | None,
    progress: Callable[[int, int], None] | None,
) -> SampledTokens:
    """The body of `sample_tokens`."""
    batch = len(prompts.text_BLD)
    body = _Body(model, prompts, num_frames, config)
    choose = _draw_function(batch, body, config, seeds, draw)
    guided = config.guidance != 1
    decoder = _Decoder(model, prompts, num_frames, body.length, guided=guided)

    frames_B = torch.full((batch,), num_frames, device=body.device)
    for position in body.draws:
        logits_RV = decoder.next_logits(body.tokens_BN[:, :position])
        logits_BV = _guided(logits_RV, config.guidance)
        ids_B = choose(body.probabilities(logits_BV, position), position - 1)
        body.record(position, ids_B)
        if progress is not None:
            progress(position + 1, body.length)
        if config.predict_end and body.table.may_end_N[position]:
            ends_B = (ids_B == model.layout.eos) & (frames_B == num_frames)
            frames_B = torch.where(ends_B, body.frames_before(position), frames_B)
            if (frames_B < num_frames).all():
                break
    if progress is not None:
        progress(body.length, body.length)
    return SampledTokens(body.codes(), frames_B)


def _draw_function(
    batch: int,
    body: _Body,
    config: TokenSamplingConfig,
    seeds: Sequence[int] | None,
    draw: Draw | None,
) -> Draw:
    """`draw`, or a function that draws with `seeds`. Raises ValueError unless one is given."""
    if (seeds is None) == (draw is None):
        raise ValueError("give either seeds, one per prompt, or draw")
    if seeds is None:
        assert draw is not None
        return draw
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} prompts; give one per prompt")
    if config.reference_behaviour:
        return reference_draw(seeds, body.device)
    return seeded_draw(seeds, len(body.draws), body.device)


def seeded_draw(
    seeds: Sequence[int], max_draws: int, device: torch.device, *, skip: int = 0
) -> Draw:
    """Draws by inverting the cumulative distribution at random numbers in [0, 1).

    The numbers of a row depend on its seed only. They suffice for `max_draws` draws, of which the
    first `skip` were made before.
    """
    numbers = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        numbers.append(torch.rand(max_draws, generator=generator, dtype=torch.float64))
    uniforms = iter(torch.stack(numbers, dim=1)[skip:].to(device))  # one tensor [B] per draw

    def draw(probabilities_BV: Tensor, _step: int) -> Tensor:
        cumulative_BV = probabilities_BV.double().cumsum(-1)
        threshold_B1 = next(uniforms)[:, None] * cumulative_BV[:, -1:]
        # The first id whose cumulative mass exceeds the threshold has a probability above 0.
        ids_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
        return ids_B1[:, 0].clamp(max=probabilities_BV.shape[-1] - 1)

    return draw


def reference_draw(seeds: Sequence[int], device: torch.device) -> Draw:
    """Draws as the reference does, each row as if it were alone.

    The random numbers depend on the device.
    """
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(probabilities_BV: Tensor, _step: int) -> Tensor:
        ids = []
        for row_V, generator in zip(probabilities_BV, generators, strict=True):
            ids.append(torch.multinomial(row_V, 1, generator=generator))
        return torch.cat(ids)

    return draw


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Sets ids below the k-th largest logit to -inf, [B, V]. Ties with it are kept."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Sets ids to -inf whose more likely predecessors have a total probability of p, [B, V].

    The most likely id is always kept.
    """
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    drop_BV = before_BV >= p
    drop_BV[:, 0] = False
    drop_by_id_BV = torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV)
    return logits_BV.masked_fill(drop_by_id_BV, -math.inf)


def _between(start: float, end: float | None, progress: float) -> float:
    """The value at `progress` (0 to 1) of a linear change; `start` if there is no end."""
    if end is None:
        return start
    return start + (end - start) * progress


def _guided(logits_RV: Tensor, guidance: float) -> Tensor:
    """Logits with guidance, [R, V] -> [B, V]."""
    if guidance == 1:
        return logits_RV
    with_text_BV, without_BV = logits_RV.chunk(2)
    return without_BV + guidance * (with_text_BV - without_BV)


class _Body:
    """Tokens from the first SI to EOS: known ones, positions to sample, and legal ids there.

    tokens_BN: tokens so far; at positions not yet sampled, CODE.
    draws: positions to sample, in order.
    """

    def __init__(
        self, model: LanguageModel, prompts: Prompts, num_frames: int, config: TokenSamplingConfig
    ) -> None:
        batch = len(prompts.text_BLD)
        self.layout = model.layout
        self.config = config
        self.span = prompts.span
        self.device = model.token_embedding.weight.device
        self.table: SamplingTable = self.layout.sampling_table(
            num_frames, predict_end=config.predict_end, reference=config.reference_behaviour
        )
        self.length = len(self.table.forced_N)
        self.is_code_N = self.table.forced_N == CODE
        self.code_positions_K = torch.from_numpy(self.is_code_N.nonzero()[0]).to(self.device)
        self.all_legal_G = [bool(legal_V.all()) for legal_V in self.table.legal_GV]
        self.illegal_GV = ~torch.from_numpy(self.table.legal_GV).to(self.device)
        forced_N = torch.from_numpy(self.table.forced_N).to(self.device)
        self.tokens_BN = forced_N.repeat(batch, 1)
        known = self._put_prefix(prompts.prefix_codes_BK, num_frames)
        drawn_N = self.is_code_N.copy()
        if config.predict_end:
            drawn_N |= self.table.may_end_N
        if config.reference_behaviour:
            drawn_N[:] = True
        drawn_N[:known] = False
        self.draws: list[int] = drawn_N.nonzero()[0].tolist()

    def _put_prefix(self, codes_BK: Tensor | None, num_frames: int) -> int:
        """Enters given codes and returns the number of positions that are known from the start."""
        if codes_BK is None:
            return 1
        given = self.layout.num_frames(codes_BK.shape[1])
        if len(codes_BK) != len(self.tokens_BN) or given > num_frames:
            raise ValueError(
                f"prefix codes of shape {tuple(codes_BK.shape)} ({given} frames) do not fit "
                f"{len(self.tokens_BN)} prompts and num_frames = {num_frames}"
            )
        for row_K in codes_BK.cpu().numpy():
            self.layout.check_codes(row_K)
        positions = self.code_positions_K[: codes_BK.shape[1]]
        self.tokens_BN[:, positions] = codes_BK.to(self.device)
        # The body of the prefix alone ends with EOS. Here the start token of the next frame has
        # that position, and it is known too.
        return self.layout.body_length(given)

    def probabilities(self, logits_BV: Tensor, position: int) -> Tensor:
        """Applies temperature, legal ids and top-k or top-p, [B, V] -> [B, V]."""
        config = self.config
        progress = _between(*self.span, position / max(1, self.length - 1))
        logits_BV = logits_BV / _between(config.temperature, config.temperature_end, progress)
        group = self.table.group_N[position]
        logits_BV = logits_BV.masked_fill(self.illegal_GV[group], -math.inf)
        # Restricted structural positions are not filtered further (§4.7).
        if self.is_code_N[position] or self.all_legal_G[group]:
            if config.top_k is not None:
                logits_BV = keep_top_k(logits_BV, config.top_k)
            elif config.top_p is not None:
                logits_BV = keep_top_p(
                    logits_BV, _between(config.top_p, config.top_p_end, progress)
                )
        return logits_BV.softmax(-1)

    def record(self, position: int, ids_B: Tensor) -> None:
        """Stores sampled ids at a position of codes. Elsewhere the forced token is kept."""
        if self.is_code_N[position]:
            self.tokens_BN[:, position] = ids_B

    def frames_before(self, position: int) -> int:
        """Number of whole frames before a start token."""
        return self.layout.num_frames(int(self.is_code_N[:position].sum()))

    def codes(self) -> Tensor:
        """Codes of all frames, int64 [B, K].

        Clamping has an effect only with `reference_behaviour` or after an early end.
        """
        codes_BK = self.tokens_BN[:, self.code_positions_K]
        return codes_BK.clamp(0, self.layout.codebook_size - 1)


def new_cache(
    model: LanguageModel, rows: int, capacity: int, padding_R: Tensor | None
) -> Decoder | KVCache:
    """A decoder with a cache, or a cache for the model itself under autocast.

    padding_R: positions of padding at the begin of each row, which the decoder's mask hides.
    Under autocast, the decoder's matmuls would be cast in other places than the model's.
    """
    if torch.is_autocast_enabled(model.token_embedding.weight.device.type):
        return model.new_cache(rows, capacity)
    return Decoder(model, rows, capacity, padding_R=padding_R)


class _Decoder:
    """The model with its cache. Feeds new tokens and returns the logits of the next one.

    Prompts of different lengths are aligned at their end, and no position attends to the padding in
    front. The padding shifts the positions of a row, which changes nothing, because the rotary
    embedding depends on distances only.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        num_frames: int,
        body_length: int,
        guided: bool,
    ) -> None:
        self.model = model
        self.guided = guided
        self.device = model.token_embedding.weight.device
        self.prompt_RPD, self.pads_R = self._embed(prompts, num_frames)
        rows, prompt_length, _ = self.prompt_RPD.shape
        capacity = prompt_length + body_length - 1  # EOS is not fed
        self.cache = new_cache(model, rows, capacity, self.pads_R)
        self.fed = 0  # positions of the body that are in the cache

    def _embed(self, prompts: Prompts, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """Prompts aligned at their end, [R, P, D], and the padding in front of each, [R].

        The padding is None if there is none.
        """
        text_BLD = prompts.text_BLD.to(self.device)
        batch = len(text_BLD)
        lengths_B = self._text_lengths(prompts)
        motion_B = prompts.motion_score_B.to(self.device)
        told = prompts.frames_condition or num_frames
        frames_B = torch.full((batch,), float(told), device=self.device)
        drop_B = torch.zeros(batch, dtype=torch.bool, device=self.device)
        if self.guided:
            text_BLD = torch.cat([text_BLD, text_BLD])
            motion_B = torch.cat([motion_B, motion_B])
            frames_B = torch.cat([frames_B, frames_B])
            lengths_B = torch.cat([lengths_B, lengths_B])
            drop_B = torch.cat([drop_B, ~drop_B])
        longest = text_BLD.shape[1] if prompts.align_to_rows else int(lengths_B.max())
        grid_B2 = None
        if prompts.grid is not None:
            grid_B2 = torch.tensor([prompts.grid], dtype=torch.float32, device=self.device)
            grid_B2 = grid_B2.expand(len(frames_B), 2)
        embedded_RPD = self.model.embed_prompt(
            text_BLD[:, :longest], frames_B, motion_B, drop_B, grid_B2
        )
        if not prompts.align_to_rows and bool((lengths_B == longest).all()):
            return embedded_RPD, None
        pads_R = (longest - lengths_B).to(self.device)
        positions_P = torch.arange(embedded_RPD.shape[1], device=self.device)
        source_RP = (positions_P - pads_R[:, None]).clamp(min=0)
        source_RPD = source_RP[..., None].expand(-1, -1, embedded_RPD.shape[-1])
        return embedded_RPD.gather(1, source_RPD), pads_R

    def _text_lengths(self, prompts: Prompts) -> Tensor:
        """Rows of each text without padding, int64 [B] on the CPU.

        Raises ValueError where the number of scores or lengths, or a length, does not fit the text.
        """
        batch, rows, _ = prompts.text_BLD.shape
        lengths_B = torch.full((batch,), rows)
        if prompts.text_lengths_B is not None:
            lengths_B = prompts.text_lengths_B.cpu()
        if prompts.motion_score_B.shape != (batch,) or lengths_B.shape != (batch,):
            raise ValueError(
                f"{batch} prompts need as many motion scores and text lengths, not "
                f"{tuple(prompts.motion_score_B.shape)} and {tuple(lengths_B.shape)}"
            )
        if int(lengths_B.min()) < 1 or int(lengths_B.max()) > rows:
            raise ValueError(
                f"text lengths {lengths_B.tolist()} must lie between 1 and the {rows} rows of the "
                "text states"
            )
        return lengths_B

    def next_logits(self, tokens_BN: Tensor) -> Tensor:
        """Logits of the token after `tokens_BN`, float32 [R, V].

        tokens_BN: all tokens of the body so far; those that are not in the cache yet are fed.
        """
        new_BS = tokens_BN[:, self.fed :]
        new_RS = new_BS
        if self.guided:
            new_RS = torch.cat([new_BS, new_BS])
        if isinstance(self.cache, Decoder):
            x_RSD = self.model.token_embedding(new_RS)
        else:
            x_RSD = self.model.embed_tokens(new_RS)
        if not self.fed:
            x_RSD = torch.cat([self.prompt_RPD, x_RSD], dim=1)
        self.fed = tokens_BN.shape[1]
        if isinstance(self.cache, Decoder):
            return self.cache.step(x_RSD)
        mask = self._mask(self.cache.length, x_RSD.shape[1])
        hidden_RSD = self.model.transform(x_RSD, cache=self.cache, mask=mask)
        return self.model.logits(hidden_RSD[:, -1:])[:, 0]

    def _mask(self, start: int, count: int) -> Tensor | None:
        """Mask that hides the padding from `count` new positions, bool [R, 1, count, keys].

        None, which means causal, if there is no padding.
        """
        if self.pads_R is None:
            return None
        positions_S = torch.arange(start, start + count, device=self.device)
        return padding_mask(self.pads_R, positions_S, start + count)
