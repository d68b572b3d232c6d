"""Token ids of the language model, and which token may follow which.

A sequence is (docs/specification.md §4.1, §4.2)

    BOS, frames, motion score, text_1 … text_L,          conditions: vectors instead of ids
    SI, codes of an I frame, EI,                          a segment of `segment_frames` frames:
        then for each P frame SP, codes of it, EP         one I frame, then P frames
    further segments of the same form, the last may have fewer frames
    EOS

The part from the first SI to EOS is called the body. Its length depends on the number of frames
only.

Shape letters (docs/glossary.md): S positions of the whole sequence, N positions of the body,
G groups of positions with the same legal ids, V vocabulary.

Source: LanDiff (arXiv 2503.04606).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORE = -100  # in place of an id where a position carries a condition vector
CODE = -1  # in a body template, in place of each code
NUM_MICRO_CONDITIONS = 2  # number of frames and motion score

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


class LayoutSizes(Protocol):
    """Sizes that define a layout. `LMConfig` and `TokenizerConfig` have them."""

    @property
    def codebook_size(self) -> int:
        """Number of codes."""

    @property
    def iframe_tokens(self) -> int:
        """Codes of an I frame."""

    @property
    def pframe_tokens(self) -> int:
        """Codes of a P frame."""

    @property
    def segment_frames(self) -> int:
        """Frames of a segment."""


@dataclass(frozen=True)
class TrainingRow:
    """Inputs and targets of one sample, before packing. Every array has S entries.

    The targets are shifted by one: `targets[s]` is the token at position s + 1. The last position
    has no target.

    input_ids: IGNORE at condition positions.
    targets: valid ids everywhere, PAD where the weight is 0.
    loss_weights: 1 where the target counts in the loss, else 0.
    positions: 0 … S - 1 in every sample, wherever it is in a packed row.
    """

    input_ids: Ids
    targets: Ids
    loss_weights: NDArray[np.float32]
    positions: Ids

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.input_ids)


@dataclass(frozen=True)
class SamplingTable:
    """Ids that may be sampled at each position of the body. Index 0 is the first SI.

    forced_N: the token of a structural position, CODE at positions of codes.
    group_N: row of `legal_GV` that applies to the position.
    legal_GV: bool, true for legal ids.
    may_end_N: bool, true where EOS is an alternative to the forced token.
    """

    forced_N: Ids
    group_N: NDArray[np.int64]
    legal_GV: Mask
    may_end_N: Mask

    def legal(self, position: int) -> Mask:
        """Ids that may be sampled at a position of the body, bool [V]."""
        return self.legal_GV[self.group_N[position]]


@dataclass(frozen=True)
class TokenLayout:
    """Ids, lengths and order of the tokens for given sizes.

    codebook_size: number of codes.
    iframe_tokens: codes of an I frame, the first of a segment.
    pframe_tokens: codes of every other frame.
    segment_frames: frames of a full segment.
    """

    codebook_size: int
    iframe_tokens: int
    pframe_tokens: int
    segment_frames: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")

    @classmethod
    def of(cls, config: LayoutSizes) -> TokenLayout:
        """The layout of a model's sizes."""
        return cls(
            codebook_size=config.codebook_size,
            iframe_tokens=config.iframe_tokens,
            pframe_tokens=config.pframe_tokens,
            segment_frames=config.segment_frames,
        )

    # Ids: first the codes, then the structural tokens.

    @property
    def eos(self) -> int:
        """End of sequence."""
        return self.codebook_size

    @property
    def bos(self) -> int:
        """Beginning of sequence."""
        return self.codebook_size + 1

    @property
    def start_iframe(self) -> int:
        """SI, start of an I frame."""
        return self.codebook_size + 2

    @property
    def end_iframe(self) -> int:
        """EI, end of an I frame."""
        return self.codebook_size + 3

    @property
    def start_pframe(self) -> int:
        """SP, start of a P frame."""
        return self.codebook_size + 4

    @property
    def end_pframe(self) -> int:
        """EP, end of a P frame."""
        return self.codebook_size + 5

    @property
    def pad(self) -> int:
        """PAD, which has an id but is in no sequence."""
        return self.codebook_size + 6

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.codebook_size + 7

    # Lengths.

    def frame_sizes(self, num_frames: int) -> list[int]:
        """Codes of each frame, in order."""
        self._check_frames(num_frames)
        sizes = [self.pframe_tokens] * num_frames
        for first in range(0, num_frames, self.segment_frames):
            sizes[first] = self.iframe_tokens
        return sizes

    def num_codes(self, num_frames: int) -> int:
        """Codes of a clip of `num_frames` semantic frames."""
        self._check_frames(num_frames)
        segments = -(-num_frames // self.segment_frames)
        return segments * self.iframe_tokens + (num_frames - segments) * self.pframe_tokens

    def num_frames(self, num_codes: int) -> int:
        """The inverse of `num_codes`.

        Raises ValueError where no whole number of frames has that many codes.
        """
        return self._count_frames(
            num_codes, self.iframe_tokens, self.pframe_tokens, f"{num_codes} codes are"
        )

    def body_length(self, num_frames: int) -> int:
        """Positions from the first SI to EOS, both included."""
        return self.num_codes(num_frames) + 2 * num_frames + 1

    def first_start(self, text_length: int) -> int:
        """Position of the first SI, after BOS, micro-conditions and text."""
        if text_length < 1:
            raise ValueError(
                f"text_length = {text_length}: a prompt has at least one token (its end token)"
            )
        return 1 + NUM_MICRO_CONDITIONS + text_length

    def sequence_length(self, num_frames: int, text_length: int) -> int:
        """Positions of the whole sequence, S."""
        return self.first_start(text_length) + self.body_length(num_frames)

    # Sequences.

    def template(self, num_frames: int) -> Ids:
        """The body as int64 [N]: structural ids, and CODE in place of each code."""
        self._check_frames(num_frames)
        iframe = [self.start_iframe, *[CODE] * self.iframe_tokens, self.end_iframe]
        pframe = [self.start_pframe, *[CODE] * self.pframe_tokens, self.end_pframe]
        body = []
        for frame in range(num_frames):
            if frame % self.segment_frames == 0:
                body += iframe
            else:
                body += pframe
        body.append(self.eos)
        return np.array(body, dtype=np.int64)

    def check_codes(self, codes: ArrayLike) -> Ids:
        """Returns `codes` as int64 [K].

        Raises ValueError with the first value outside the codebook and its index.
        """
        array = np.asarray(codes)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"codes must be a flat array of integers, not {array.dtype} of shape {array.shape}"
            )
        wrong = np.flatnonzero((array < 0) | (array >= self.codebook_size))
        if wrong.size:
            raise ValueError(
                f"code {array[wrong[0]]} at index {wrong[0]} is outside the codebook of "
                f"{self.codebook_size} codes (0 … {self.codebook_size - 1}); {wrong.size} of "
                f"{array.size} codes are. They come from another tokenizer"
            )
        return array.astype(np.int64)

    def build(self, codes: ArrayLike, text_length: int) -> Ids:
        """The whole sequence as int64 [S], IGNORE at condition positions.

        Raises ValueError for codes outside the codebook and for a number of codes that is not that
        of whole frames.
        """
        codes = self.check_codes(codes)
        body = self.template(self.num_frames(len(codes)))
        body[body == CODE] = codes
        conditions = np.full(self.first_start(text_length) - 1, IGNORE, dtype=np.int64)
        return np.concatenate([[self.bos], conditions, body])

    def loss_mask(self, num_frames: int, text_length: int) -> Mask:
        """Positions whose token counts in the loss, from the first SI to EOS, as bool [S]."""
        mask = np.ones(self.sequence_length(num_frames, text_length), dtype=bool)
        mask[: self.first_start(text_length)] = False
        return mask

    def codes(self, ids: ArrayLike, text_length: int) -> Ids:
        """The inverse of `build`: the codes of a whole sequence, int64 [K].

        Raises ValueError for a sequence that `build` does not make.
        """
        ids = np.asarray(ids)
        start = self.first_start(text_length)
        length = len(ids) - start
        num_frames = self._count_frames(
            length - 1,
            self.iframe_tokens + 2,
            self.pframe_tokens + 2,
            f"{length} positions after {text_length} of text are",
        )
        template = self.template(num_frames)
        expected = np.concatenate([[self.bos], np.full(start - 1, IGNORE), template])
        is_code = expected == CODE
        wrong = np.flatnonzero(~is_code & (ids != expected))
        if wrong.size:
            raise ValueError(
                f"position {wrong[0]} holds the id {ids[wrong[0]]} where {expected[wrong[0]]} must "
                "stand"
            )
        return self.check_codes(ids[is_code])

    def training_row(self, codes: ArrayLike, text_length: int) -> TrainingRow:
        """Input ids, targets, loss weights and positions of one sample. Raises as `build` does."""
        ids = self.build(codes, text_length)
        predicts = np.zeros(len(ids), dtype=bool)
        # The last text position predicts the first SI.
        predicts[self.first_start(text_length) - 1 : -1] = True
        return TrainingRow(
            input_ids=ids,
            targets=np.where(predicts, np.append(ids[1:], self.pad), self.pad),
            loss_weights=predicts.astype(np.float32),
            positions=np.arange(len(ids), dtype=np.int64),
        )

    # Sampling.

    def sampling_table(
        self, num_frames: int, *, predict_end: bool = False, reference: bool = False
    ) -> SamplingTable:
        """Ids that may be sampled at each position of the body.

        By default only codes at positions of codes, and elsewhere only the forced token. With
        `predict_end`, EOS is legal as well at each start of a frame after the first segment.

        With `reference`, the masks are those of the reference implementation (§4.7), which
        restricts ids at two kinds of positions: at starts of frames, where EOS is legal as well
        after the first segment, and at the EOS of a video of several segments.
        """
        forced = self.template(num_frames)
        starts = (forced == self.start_iframe) | (forced == self.start_pframe)
        after_first = np.arange(len(forced)) > self._first_segment_end(num_frames)
        may_end = starts & after_first

        # Groups: each structural id alone, all ids, all codes, each structural id or EOS.
        structural = range(self.eos, self.vocab_size)
        free = len(structural)
        codes_only = free + 1
        or_end = free + 2
        legal = np.zeros((or_end + len(structural), self.vocab_size), dtype=bool)
        legal[np.arange(len(structural)), structural] = True
        legal[free] = True
        legal[codes_only, : self.codebook_size] = True
        legal[or_end:] = legal[: len(structural)]
        legal[or_end:, self.eos] = True

        group = np.where(forced == CODE, codes_only, forced - self.eos)
        if reference:
            group[~starts] = free
            if num_frames > self.segment_frames:
                group[-1] = 0  # EOS alone
        if reference or predict_end:
            group[may_end] += or_end
        return SamplingTable(forced_N=forced, group_N=group, legal_GV=legal, may_end_N=may_end)

    def _first_segment_end(self, num_frames: int) -> int:
        """Body position after the first segment: the second SI, or EOS if there is one segment."""
        return self.body_length(min(num_frames, self.segment_frames)) - 1

    def _check_frames(self, num_frames: int) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames = {num_frames} must be at least 1")

    def _count_frames(self, count: int, iframe: int, pframe: int, what: str) -> int:
        """Frames that have `count` positions, where an I frame has `iframe` and a P frame `pframe`.

        Raises ValueError, with `what` as its subject, if no whole number of frames has that many.
        """
        full, rest = divmod(count, iframe + (self.segment_frames - 1) * pframe)
        num_frames = full * self.segment_frames
        remainder = 0
        if rest:
            pframes, remainder = divmod(rest - iframe, pframe)
            num_frames += 1 + pframes
        if count < iframe or remainder or (rest and rest < iframe):
            raise ValueError(
                f"{what} no whole number of frames: a segment has {iframe}, then {pframe} for each "
                f"of up to {self.segment_frames - 1} frames more"
            )
        return num_frames
