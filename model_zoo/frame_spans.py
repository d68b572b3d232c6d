"""Who sees whom in the semantic tokenizer's sequence: its layout, and attention over spans of it.

Letters: B batch, T frames, n visual tokens of a frame, N latent tokens of a clip = iframe_tokens + (T - 1) *
pframe_tokens, S = T * n + N sequence, H heads, K head width.

Sequence: [visual tokens, frame by frame | I latents | P latents of frame 1 | ... | P latents of frame T - 1].
Source: LanDiff (arXiv 2503.04606), semantic tokenizer; masks as in the released code (specification §3.1, §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_zoo.attention import attention


@dataclass(frozen=True)
class Sequence:
    """Where the tokens of a clip stand."""

    num_frames: int
    frame_tokens: int  # n
    iframe_tokens: int
    pframe_tokens: int

    @property
    def num_visual(self) -> int:
        return self.num_frames * self.frame_tokens

    @property
    def num_latent(self) -> int:
        return self.latents_until(self.num_frames - 1)

    @property
    def length(self) -> int:
        return self.num_visual + self.num_latent

    def latents_until(self, frame: int) -> int:
        """Latents of the frames 0..`frame`, that one included."""
        return self.iframe_tokens + frame * self.pframe_tokens if frame >= 0 else 0

    def visual(self, first: int, last: int) -> slice:
        """Visual tokens of the frames `first`..`last`, both included."""
        return slice(first * self.frame_tokens, (last + 1) * self.frame_tokens)

    def latent(self, first: int, last: int) -> slice:
        return slice(self.num_visual + self.latents_until(first - 1), self.num_visual + self.latents_until(last))


@dataclass(frozen=True)
class AttentionSpan:
    """These queries see these keys: all of them or, where `causal`, up to their own place (both end alike).

    A mask that is a list of spans costs one attention call per span over the visible keys alone, which at
    real size is 3-4 times faster than one call with a dense mask of 18 768 x 18 768.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    causal: bool = False


def encoder_spans(sequence: Sequence) -> list[AttentionSpan]:
    """Visual tokens see visual tokens up to their frame; latents see those and, causally, the latents."""
    frames = range(sequence.num_frames)
    visual = [AttentionSpan((sequence.visual(f, f),), (sequence.visual(0, f),)) for f in frames]
    latent = [
        AttentionSpan((sequence.latent(f, f),), (sequence.visual(0, f), sequence.latent(0, f)), causal=True)
        for f in frames
    ]
    return visual + latent


def decoder_spans(sequence: Sequence) -> list[AttentionSpan]:
    """Everything sees everything up to its own frame."""
    return [
        AttentionSpan((sequence.visual(f, f), sequence.latent(f, f)), (sequence.visual(0, f), sequence.latent(0, f)))
        for f in range(sequence.num_frames)
    ]


def encoder_mask(num_frames: int, frame_tokens: int, iframe_tokens: int, pframe_tokens: int) -> Tensor:
    """bool [S, S], true where the row may attend to the column: what the encoder's spans amount to."""
    sequence = Sequence(num_frames, frame_tokens, iframe_tokens, pframe_tokens)
    return dense_mask(encoder_spans(sequence), sequence.length)


def decoder_mask(num_frames: int, frame_tokens: int, iframe_tokens: int, pframe_tokens: int) -> Tensor:
    """bool [S, S], true where the row may attend to the column: what the decoder's spans amount to."""
    sequence = Sequence(num_frames, frame_tokens, iframe_tokens, pframe_tokens)
    return dense_mask(decoder_spans(sequence), sequence.length)


def dense_mask(spans: list[AttentionSpan], length: int) -> Tensor:
    mask = torch.zeros(length, length, dtype=torch.bool)
    places = torch.arange(length)
    for span in spans:
        rows = torch.cat([places[s] for s in span.queries])
        columns = torch.cat([places[s] for s in span.keys])
        visible = torch.ones(len(rows), len(columns), dtype=torch.bool)
        mask[rows[:, None], columns] = visible.tril(len(columns) - len(rows)) if span.causal else visible
    return mask


def span_attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, spans: list[AttentionSpan]) -> Tensor:
    """Attention where the spans, which cover every query once, say who sees whom. Returns BSHK."""
    pieces: dict[int, Tensor] = {}
    for span in spans:
        keys, values = _gather(k_BSHK, span.keys), _gather(v_BSHK, span.keys)
        result = attention(_gather(q_BSHK, span.queries), keys, values, causal=span.causal)
        widths = [place.stop - place.start for place in span.queries]
        pieces.update(zip((place.start for place in span.queries), result.split(widths, dim=1), strict=True))
    return torch.cat([pieces[start] for start in sorted(pieces)], dim=1)


def _gather(x_BSHK: Tensor, places: tuple[slice, ...]) -> Tensor:
    return x_BSHK[:, places[0]] if len(places) == 1 else torch.cat([x_BSHK[:, p] for p in places], dim=1)
