"""Text -> semantic tokens: autoregressive sampling with a key/value cache, guidance and the grammar enforced.

Structural tokens are not drawn but set; a run of known tokens goes through the model in one step. At code
positions ids that are no codes are never drawn. Each row of a batch has random numbers of its own, drawn
once on the CPU: a row's result depends neither on its neighbours nor on the device (but for rounding).

Letters: B batch, R rows of the model (B, or 2 B under guidance: with text, then without), L text tokens,
T text width, P prompt positions (BOS, conditions), N positions of the body from the first SI to EOS
(token_layout.py), K codes, V vocabulary.

`reference_behaviour` replays the reference implementation (specification §4.7): one id is drawn at every
position and thrown away where the token is forced; at code positions structural ids may be drawn, are fed
back as they are, and become the last code at the very end. Ids are drawn by torch's multinomial from a generator
of the model's device, so that a seed gives what it gives there (0, which means unseeded there, is a seed here).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_zoo.config import TokenSamplingConfig
from model_zoo.lm import KVCache, LanguageModel
from model_zoo.token_layout import CODE, SamplingTable

# (float32 probabilities [B, V], step) -> int64 ids [B]. Step 0 is the position behind the first SI.
Draw = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class SampledTokens:
    codes_BK: Tensor  # int64, all within the codebook
    num_frames_B: Tensor  # int64; less than asked for where a row predicted its end: its codes behind that mean nothing


@dataclass(frozen=True)
class Prompts:
    """What a batch is sampled from."""

    text_BLT: Tensor  # states of the text encoder; rows at and past a length are pads
    motion_score_B: Tensor
    text_lengths_B: Tensor | None = None  # all L where None
    prefix_codes_BK: Tensor | None = None  # codes of the first frames, given instead of drawn


@torch.no_grad()
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
    """Codes of `num_frames` semantic frames for each prompt.

    Either `seeds`, one per prompt, or `draw`, which picks the ids. `progress` hears (positions done, of all).
    Runs on the model's device, in the model's dtype or the surrounding autocast's. Raises ValueError for
    shapes, lengths and prefix codes that do not fit.
    """
    batch = len(prompts.text_BLT)
    if (seeds is None) == (draw is None):
        raise ValueError("give either seeds, one per prompt, or draw")
    body = _Body(model, prompts, num_frames, config)
    if draw is None:
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} prompts; give one per prompt")
        draw = reference_draw(seeds, body.device) if config.reference_behaviour else seeded_draw(seeds, len(body.draws), body.device)
    decoder = _Decoder(model, prompts, num_frames, body.length, guided=config.guidance != 1)

    frames_B = torch.full((batch,), num_frames, device=body.device)
    for position in body.draws:
        logits_RV = decoder.logits_behind(body.tokens_BN[:, :position])
        probabilities_BV = body.probabilities(_guided(logits_RV, config.guidance), position)
        ids_B = draw(probabilities_BV, position - 1)
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


def seeded_draw(seeds: Sequence[int], max_draws: int, device: torch.device) -> Draw:
    """Draws by inverting the cumulative distribution at numbers in [0, 1) that depend on a row's seed alone."""
    numbers = [torch.rand(max_draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    uniforms = iter(torch.stack(numbers, dim=1).to(device))  # a row per draw: [B]

    def draw(probabilities_BV: Tensor, _step: int) -> Tensor:
        cumulative_BV = probabilities_BV.double().cumsum(-1)
        threshold_B1 = next(uniforms)[:, None] * cumulative_BV[:, -1:]
        # the first id whose cumulative mass exceeds the threshold: it has a probability above 0
        return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp(max=probabilities_BV.shape[-1] - 1)

    return draw


def reference_draw(seeds: Sequence[int], device: torch.device) -> Draw:
    """Draws as the reference does, whose numbers depend on the device; for each row as if it were alone."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(probabilities_BV: Tensor, _step: int) -> Tensor:
        rows = zip(probabilities_BV, generators, strict=True)
        return torch.cat([torch.multinomial(row_V, 1, generator=generator) for row_V, generator in rows])

    return draw


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for every id below the k-th largest value; ties with it stay."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for every id whose more likely predecessors already hold the mass p. The most likely id stays."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    drop_BV = before_BV >= p
    drop_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -math.inf)


def _guided(logits_RV: Tensor, guidance: float) -> Tensor:
    if guidance == 1:
        return logits_RV
    with_text_BV, without_BV = logits_RV.chunk(2)
    return without_BV + guidance * (with_text_BV - without_BV)


class _Body:
    """The tokens from the first SI to EOS: what is known, what is to be drawn, and what may be drawn there."""

    def __init__(self, model: LanguageModel, prompts: Prompts, num_frames: int, config: TokenSamplingConfig) -> None:
        self.layout, self.config = model.layout, config
        self.device = model.token_embedding.weight.device
        self.table: SamplingTable = self.layout.sampling_table(
            num_frames, predict_end=config.predict_end, reference=config.reference_behaviour)
        self.length = len(self.table.forced_N)
        self.is_code_N = self.table.forced_N == CODE
        self.code_positions = torch.from_numpy(self.is_code_N.nonzero()[0]).to(self.device)
        self.illegal_RV = ~torch.from_numpy(self.table.legal_RV).to(self.device)
        self.tokens_BN = torch.from_numpy(self.table.forced_N).to(self.device).repeat(len(prompts.text_BLT), 1)
        known = self._put_prefix(prompts.prefix_codes_BK, num_frames)
        drawn_N = self.is_code_N.copy()
        if config.predict_end:
            drawn_N |= self.table.may_end_N
        if config.reference_behaviour:
            drawn_N[:] = True
        drawn_N[:known] = False
        self.draws: list[int] = drawn_N.nonzero()[0].tolist()

    def _put_prefix(self, codes_BK: Tensor | None, num_frames: int) -> int:
        """Enter given codes; return the number of positions known from the start (the token behind a prefix too)."""
        if codes_BK is None:
            return 1
        given = self.layout.num_frames(codes_BK.shape[1])
        if len(codes_BK) != len(self.tokens_BN) or given > num_frames:
            raise ValueError(
                f"prefix codes of shape {tuple(codes_BK.shape)} ({given} frames) do not fit "
                f"{len(self.tokens_BN)} prompts and num_frames = {num_frames}"
            )
        for row in codes_BK.cpu().numpy():
            self.layout.check_codes(row)
        self.tokens_BN[:, self.code_positions[: codes_BK.shape[1]]] = codes_BK.to(self.device)
        return self.layout.body_length(given)  # that many, for what is EOS there is a start token here

    def probabilities(self, logits_BV: Tensor, position: int) -> Tensor:
        """Temperature, legal ids, top-k or top-p -> [B, V]."""
        logits_BV = logits_BV / self.config.temperature
        kind = self.table.kind_N[position]
        logits_BV = logits_BV.masked_fill(self.illegal_RV[kind], -math.inf)
        masked = bool(self.table.forced_N[position] != CODE and not self.table.legal_RV[kind].all())
        if self.config.top_k is not None and not masked:
            logits_BV = keep_top_k(logits_BV, self.config.top_k)
        elif self.config.top_p is not None and not masked:
            logits_BV = keep_top_p(logits_BV, self.config.top_p)
        return logits_BV.softmax(-1)

    def record(self, position: int, ids_B: Tensor) -> None:
        """Keep a drawn id where a code belongs; elsewhere the grammar's token stays."""
        if self.is_code_N[position]:
            self.tokens_BN[:, position] = ids_B

    def frames_before(self, position: int) -> int:
        """Whole frames in front of a start token."""
        return self.layout.num_frames(int(self.is_code_N[:position].sum()))

    def codes(self) -> Tensor:
        """[B, K]. Only `reference_behaviour`, or an early end, leaves anything to clamp."""
        return self.tokens_BN[:, self.code_positions].clamp(0, self.layout.codebook_size - 1)


class _Decoder:
    """The model with its cache: feeds what is new and returns the logits behind it.

    Prompts of different lengths are aligned at their end, and the pads in front are attended by nobody. That
    they move a row's positions changes nothing: the rotary embedding knows distances alone.
    """

    def __init__(self, model: LanguageModel, prompts: Prompts, num_frames: int, body_length: int, guided: bool) -> None:
        self.model, self.guided = model, guided
        self.device = model.token_embedding.weight.device
        self.prompt_RPD, self.pads_R = self._embed(prompts, num_frames)
        rows, self.prompt_length, _ = self.prompt_RPD.shape
        self.cache: KVCache = model.new_cache(rows, self.prompt_length + body_length - 1)  # EOS is not fed
        self.fed = 0  # body positions in the cache

    def _embed(self, prompts: Prompts, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """Prompts [R, P, D], aligned at their end, and the pads in front of each [R]; None where nobody has any."""
        text_BLT = prompts.text_BLT.to(self.device)
        batch, longest, _ = text_BLT.shape
        lengths_B = torch.full((batch,), longest) if prompts.text_lengths_B is None else prompts.text_lengths_B.cpu()
        if prompts.motion_score_B.shape != (batch,) or lengths_B.shape != (batch,):
            raise ValueError(
                f"{batch} prompts need as many motion scores and text lengths, not {tuple(prompts.motion_score_B.shape)} "
                f"and {tuple(lengths_B.shape)}"
            )
        if not bool(((lengths_B >= 1) & (lengths_B <= longest)).all()):
            raise ValueError(f"text lengths {lengths_B.tolist()} must lie between 1 and the {longest} rows of the text states")
        motion_B = prompts.motion_score_B.to(self.device)
        frames_B = torch.full((batch,), float(num_frames), device=self.device)
        drop_B = torch.zeros(batch, dtype=torch.bool, device=self.device)
        if self.guided:
            text_BLT, motion_B, frames_B = (torch.cat([x, x]) for x in (text_BLT, motion_B, frames_B))
            lengths_B = torch.cat([lengths_B, lengths_B])
            drop_B = torch.cat([drop_B, ~drop_B])
        used = int(lengths_B.max())
        embedded_RPD = self.model.embed_prompt(text_BLT[:, :used], frames_B, motion_B, drop_B)
        if bool((lengths_B == used).all()):
            return embedded_RPD, None
        pads_R = (used - lengths_B).to(self.device)
        places = torch.arange(embedded_RPD.shape[1], device=self.device)
        source_RP = (places - pads_R[:, None]).clamp(min=0)
        return embedded_RPD.gather(1, source_RP[..., None].expand(-1, -1, embedded_RPD.shape[-1])), pads_R

    def logits_behind(self, tokens_BN: Tensor) -> Tensor:
        """Feed the tokens that are not in the cache yet -> float32 logits [R, V] of the next one."""
        new_BS = tokens_BN[:, self.fed :]
        x_RSD = self.model.embed_tokens(torch.cat([new_BS, new_BS]) if self.guided else new_BS)
        if not self.fed:
            x_RSD = torch.cat([self.prompt_RPD, x_RSD], dim=1)
        self.fed = tokens_BN.shape[1]
        mask = self._mask(self.cache.length, x_RSD.shape[1])
        hidden_RSD = self.model.transform(x_RSD, cache=self.cache, mask=mask)
        return self.model.logits(hidden_RSD[:, -1:])[:, 0]

    def _mask(self, start: int, count: int) -> Tensor | None:
        """bool [R, 1, S, keys] that hides the pads from S new positions; None (causal) without pads."""
        if self.pads_R is None:
            return None
        queries = torch.arange(start, start + count, device=self.device)
        keys = torch.arange(start + count, device=self.device)
        sees_RSK = (keys <= queries[:, None]) & (keys >= self.pads_R[:, None, None])
        sees_RSK |= keys == queries[:, None]  # a pad sees itself: a row of the mask may not be empty
        return sees_RSK[:, None]
