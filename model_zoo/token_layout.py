"""The token grammar of the language model: the one place that knows ids, lengths, order and what may follow.

A sequence is (specification §4.1, §4.2)

    BOS, frames, motion, text_1 … text_L,                   conditions: vectors, no ids
    SI, I codes, EI, then up to k-1 times (SP, P codes, EP)  one segment of k = `segment_frames` frames
    further segments of the same form, the last may hold fewer frames
    EOS

The part from the first SI to EOS is called the body; its length depends on the number of frames alone.

Letters: S positions of the whole sequence, N positions of the body, R kinds of positions, V vocabulary.
Source: LanDiff (arXiv 2503.04606).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORE = -100  # stands where a position carries a condition vector instead of a token
CODE = -1  # stands in a body template where a code goes
NUM_MICRO_CONDITIONS = 2  # frames, motion score

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


class LayoutSizes(Protocol):
    """What a layout is made of; `LMConfig` and `TokenizerConfig` both have it."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def iframe_tokens(self) -> int: ...
    @property
    def pframe_tokens(self) -> int: ...
    @property
    def segment_frames(self) -> int: ...


@dataclass(frozen=True)
class TrainingRow:
    """One sample, ready to be packed with others. Every array has S entries.

    The shift by one is done: `targets[s]` is the token at position s + 1, and `loss_weights[s]` says whether
    position s is asked to predict it. The last position predicts nothing.
    """

    input_ids: Ids  # IGNORE at condition positions
    targets: Ids  # a valid id everywhere: PAD where the weight is 0
    loss_weights: NDArray[np.float32]  # 1 or 0
    positions: Ids  # 0 … S-1: every sample starts at 0, wherever it stands in a packed row

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class SamplingTable:
    """What may stand at each position of the body, index 0 = the first SI."""

    forced_N: Ids  # the token of a structural position, CODE where one is to be drawn
    kind_N: NDArray[np.int64]  # row of `legal_RV` that holds at the position
    legal_RV: Mask
    may_end_N: Mask  # the video may end here instead: EOS is an alternative to the forced token

    def legal(self, position: int) -> Mask:
        """bool [V] of the ids that may be drawn at body position `position`."""
        return self.legal_RV[self.kind_N[position]]


@dataclass(frozen=True)
class TokenLayout:
    """Ids, lengths and order of the tokens for one codebook and one division of frames into tokens."""

    codebook_size: int
    iframe_tokens: int  # codes of the first frame of a segment
    pframe_tokens: int  # codes of every other frame
    segment_frames: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")

    @classmethod
    def of(cls, config: LayoutSizes) -> TokenLayout:
        return cls(config.codebook_size, config.iframe_tokens, config.pframe_tokens, config.segment_frames)

    # Ids: codes first, then the structural tokens.

    @property
    def eos(self) -> int:
        return self.codebook_size

    @property
    def bos(self) -> int:
        return self.codebook_size + 1

    @property
    def start_iframe(self) -> int:
        return self.codebook_size + 2

    @property
    def end_iframe(self) -> int:
        return self.codebook_size + 3

    @property
    def start_pframe(self) -> int:
        return self.codebook_size + 4

    @property
    def end_pframe(self) -> int:
        return self.codebook_size + 5

    @property
    def pad(self) -> int:
        """Has an id, never stands in a sequence."""
        return self.codebook_size + 6

    @property
    def vocab_size(self) -> int:
        return self.codebook_size + 7

    # Lengths.

    def frame_sizes(self, num_frames: int) -> list[int]:
        """Codes of each frame, in order."""
        self._check_frames(num_frames)
        return [self.pframe_tokens if f % self.segment_frames else self.iframe_tokens for f in range(num_frames)]

    def num_codes(self, num_frames: int) -> int:
        """Codes of a clip of `num_frames` semantic frames."""
        self._check_frames(num_frames)
        segments = -(-num_frames // self.segment_frames)
        return segments * self.iframe_tokens + (num_frames - segments) * self.pframe_tokens

    def num_frames(self, num_codes: int) -> int:
        """The inverse of `num_codes`. Raises ValueError where no whole number of frames has that many codes."""
        return self._frames_of(num_codes, self.iframe_tokens, self.pframe_tokens, f"{num_codes} codes are")

    def body_length(self, num_frames: int) -> int:
        """Positions from the first SI to EOS, both included."""
        return self.num_codes(num_frames) + 2 * num_frames + 1

    def first_start(self, text_length: int) -> int:
        """Position of the first SI: BOS, the micro-conditions and the text stand before it."""
        if text_length < 1:
            raise ValueError(f"text_length = {text_length}: a prompt has at least one token (its end token)")
        return 1 + NUM_MICRO_CONDITIONS + text_length

    def sequence_length(self, num_frames: int, text_length: int) -> int:
        return self.first_start(text_length) + self.body_length(num_frames)

    # Sequences.

    def template(self, num_frames: int) -> Ids:
        """The body as int64 [N]: structural ids, CODE where codes go."""
        self._check_frames(num_frames)
        iframe = [self.start_iframe, *[CODE] * self.iframe_tokens, self.end_iframe]
        pframe = [self.start_pframe, *[CODE] * self.pframe_tokens, self.end_pframe]
        full, rest = divmod(num_frames, self.segment_frames)
        segment = iframe + pframe * (self.segment_frames - 1)
        last = iframe + pframe * (rest - 1) if rest else []
        return np.array(segment * full + last + [self.eos], dtype=np.int64)

    def check_codes(self, codes: ArrayLike) -> Ids:
        """`codes` as int64 [n]. Raises ValueError with the first value outside the codebook and its place."""
        array = np.asarray(codes)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"codes must be a flat array of integers, not {array.dtype} of shape {array.shape}")
        wrong = np.flatnonzero((array < 0) | (array >= self.codebook_size))
        if wrong.size:
            raise ValueError(
                f"code {array[wrong[0]]} at index {wrong[0]} is outside the codebook of {self.codebook_size} codes "
                f"(0 … {self.codebook_size - 1}); {wrong.size} of {array.size} codes are. They come from another tokenizer"
            )
        return array.astype(np.int64)

    def build(self, codes: ArrayLike, text_length: int) -> Ids:
        """The whole sequence as int64 [S], IGNORE at condition positions.

        Raises ValueError for codes outside the codebook and for numbers of codes that fill no whole frames.
        """
        codes = self.check_codes(codes)
        body = self.template(self.num_frames(len(codes)))
        body[body == CODE] = codes
        conditions = np.full(self.first_start(text_length) - 1, IGNORE, dtype=np.int64)
        return np.concatenate([[self.bos], conditions, body])

    def loss_mask(self, num_frames: int, text_length: int) -> Mask:
        """bool [S]: the token at that position counts in the loss (from the first SI to EOS, both included)."""
        mask = np.ones(self.sequence_length(num_frames, text_length), dtype=bool)
        mask[: self.first_start(text_length)] = False
        return mask

    def codes(self, ids: ArrayLike, text_length: int) -> Ids:
        """The inverse of `build`: the codes of a whole sequence. Raises ValueError where it breaks the grammar."""
        ids = np.asarray(ids)
        start = self.first_start(text_length)
        length = len(ids) - start
        num_frames = self._frames_of(length - 1, self.iframe_tokens + 2, self.pframe_tokens + 2,
                                     f"{length} positions after {text_length} of text are")
        template = self.template(num_frames)
        expected = np.concatenate([[self.bos], np.full(start - 1, IGNORE), template])
        is_code = expected == CODE
        wrong = np.flatnonzero(~is_code & (ids != expected))
        if wrong.size:
            raise ValueError(f"position {wrong[0]} holds the id {ids[wrong[0]]} where {expected[wrong[0]]} must stand")
        return self.check_codes(ids[is_code])

    def training_row(self, codes: ArrayLike, text_length: int) -> TrainingRow:
        """Input ids, targets, loss weights and positions of one sample. Raises as `build` does."""
        ids = self.build(codes, text_length)
        predicts = np.zeros(len(ids), dtype=bool)
        predicts[self.first_start(text_length) - 1 : -1] = True  # the last text position predicts the first SI
        return TrainingRow(
            input_ids=ids,
            targets=np.where(predicts, np.append(ids[1:], self.pad), self.pad),
            loss_weights=predicts.astype(np.float32),
            positions=np.arange(len(ids), dtype=np.int64),
        )

    # Sampling.

    def sampling_table(self, num_frames: int, *, predict_end: bool = False, reference: bool = False) -> SamplingTable:
        """What may be drawn at each position of the body.

        Codes alone at code positions, the forced token alone elsewhere. With `predict_end`, EOS as well where a
        frame would start behind the first segment. With `reference`, the looser masks of the reference
        implementation (§4.7): the only positions with a mask are the starts of frames (EOS is legal behind the
        first segment, whether or not it then ends anything) and the EOS of a video of several segments.
        """
        forced = self.template(num_frames)
        starts = (forced == self.start_iframe) | (forced == self.start_pframe)
        behind_first = np.arange(len(forced)) > self._behind_first_segment(num_frames)
        may_end = starts & behind_first
        one_segment = num_frames <= self.segment_frames

        structural = range(self.eos, self.vocab_size)
        free, codes_only, or_end = len(structural), len(structural) + 1, len(structural) + 2
        legal = np.zeros((or_end + len(structural), self.vocab_size), dtype=bool)
        legal[np.arange(len(structural)), structural] = True  # rows 0 …: one structural id alone
        legal[free] = True
        legal[codes_only, : self.codebook_size] = True
        legal[or_end:] = legal[: len(structural)]  # rows or_end …: a structural id or EOS
        legal[or_end:, self.eos] = True

        kind = np.where(forced == CODE, codes_only, forced - self.eos)
        if reference:
            kind[~starts] = free
            kind[-1] = free if one_segment else 0
        if reference or predict_end:
            kind[may_end] += or_end
        return SamplingTable(forced_N=forced, kind_N=kind, legal_RV=legal, may_end_N=may_end)

    def _behind_first_segment(self, num_frames: int) -> int:
        """Body position right behind the first segment: the second SI, or EOS where there is one segment."""
        return self.body_length(min(num_frames, self.segment_frames)) - 1

    def _check_frames(self, num_frames: int) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames = {num_frames} must be at least 1")

    def _frames_of(self, count: int, iframe: int, pframe: int, what: str) -> int:
        segment = iframe + (self.segment_frames - 1) * pframe
        full, rest = divmod(count, segment)
        extra, odd = divmod(rest - iframe, pframe)
        if count < iframe or (rest and (odd or extra < 0)):
            raise ValueError(
                f"{what} no whole number of frames: a segment has {iframe}, then {pframe} for each of up to "
                f"{self.segment_frames - 1} frames more"
            )
        return full * self.segment_frames + (extra + 1 if rest else 0)
