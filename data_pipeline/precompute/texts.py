"""Producer of text states. Each distinct caption of a shard is encoded once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
from torch import Tensor

from landiff.data_pipeline.format.schema import ShardEntry
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute.captions import StoredCaptions
from landiff.data_pipeline.precompute.clips import Clip, ClipProblem, Result, finite
from landiff.data_pipeline.precompute.config import TextColumn
from landiff.data_pipeline.precompute.interface import BatchCache, Encode, ProducerContext
from landiff.data_pipeline.precompute.units import ColumnCard
from landiff.model_zoo.frozen.base import TextEncoder


class TextProducer:
    """Computes the text states of each caption, bfloat16 [L, D]."""

    def __init__(self, column: TextColumn, encoder: TextEncoder, context: ProducerContext) -> None:
        self.encoder = encoder
        self.context = context
        self.caption = column.caption
        self.cut_off = encoder.cut_off
        self.stored: StoredCaptions | None = None
        # Clips of shards made with missing_captions=none have the states of an empty text.
        shards = read_manifest(context.config.data).config
        self.encodes_empty = shards.get("missing_captions") == "none" and column.captions is None
        parts = {"encoders": {encoder.name: encoder.fingerprint}, "dtype": "bfloat16"}
        if column.captions is not None:
            self.stored = StoredCaptions(context.config.data, column.captions)
            parts["captions"] = self.stored.fingerprint
        self.card = ColumnCard.of(encoder.name, parts, column.model_dump(mode="json"))

    def prepare(self, entry: ShardEntry) -> bool:
        """Text states need no frames."""
        return False

    def begin(self, entry: ShardEntry, clips: Sequence[Clip]) -> Encode:
        """Return the encoder of a shard's captions."""
        captions: dict[int, str] = {}
        written = self.stored.read(entry) if self.stored is not None else {}
        for clip in clips:
            if clip.meta is None:
                continue
            if self.stored is None:
                captions[clip.position] = clip.meta.caption_number(self.caption).strip()
            else:
                own = written.get(clip.key, [""])
                captions[clip.position] = own[min(self.caption, len(own) - 1)]
        return ShardCaptions(captions, self._states, self.cut_off, encodes_empty=self.encodes_empty)

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count non-finite values and text rows."""
        return {"bad_values": float((~tensor.isfinite()).sum()), "rows": float(tensor.shape[0])}

    def collapse(self, counts: np.ndarray) -> str:
        """Text states have no codes."""
        return ""

    def _states(self, captions: list[str]) -> list[Tensor]:
        """Encode captions to text states, one [L, D] for each."""
        with self.context.timer("text"):
            states_BLD, lengths_B = self.encoder(captions)
            states_BLD = states_BLD.bfloat16().cpu()
            lengths = lengths_B.tolist()
            pairs = zip(states_BLD, lengths, strict=True)
            return [states_LD[:length].clone() for states_LD, length in pairs]


class ShardCaptions:
    """Encodes each distinct caption of a shard once.

    A caption is encoded with the batch of the first clip that has it; later batches wait for the
    result. Results are not kept across shards, because the bytes of a unit must not depend on what
    its task computed before.
    """

    def __init__(
        self,
        captions: Mapping[int, str],
        encode: Callable[[list[str]], list[Tensor]],
        cut_off: Callable[[list[str]], list[str]],
        *,
        encodes_empty: bool = False,
    ) -> None:
        """`captions` are by the clip's position; `cut_off` returns the ends that are truncated.

        `encodes_empty`: empty captions are encoded, not rejected.
        """
        self._captions = captions
        self._encode = encode
        self._cut_off = cut_off
        self._truncated: set[str] = set()  # captions longer than the encoder accepts
        self._states: dict[str, Future[Tensor]] = {}
        self._new: dict[int, str] = {}  # caption by position of the first clip that has it
        self._users: Counter[str] = Counter()  # clips that still need the caption
        self._lock = threading.Lock()
        for position, caption in captions.items():
            if not caption and not encodes_empty:
                continue
            if caption not in self._states:
                self._states[caption] = Future()
                self._new[position] = caption
            self._users[caption] += 1

    def __call__(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Return the text states of a batch's captions."""
        new = [self._new[clip.position] for clip in batch if clip.position in self._new]
        if new:
            self._encode_captions(new)
        results = [self._result(clip) for clip in batch]
        with self._lock:
            for clip in batch:
                self._release(self._captions.get(clip.position))
        return results

    @property
    def truncated(self) -> int:
        """Clips whose caption is longer than the encoder accepts, valid after the last batch."""
        return sum(caption in self._truncated for caption in self._captions.values())

    def _release(self, caption: str | None) -> None:
        """Free the states of a caption after its last clip."""
        if caption is None or caption not in self._states:
            return
        self._users[caption] -= 1
        if not self._users[caption]:
            del self._states[caption]

    def _encode_captions(self, captions: list[str]) -> None:
        """Encode new captions and publish their states, or the error, to waiting batches."""
        try:
            for caption, end in zip(captions, self._cut_off(captions), strict=True):
                if end:
                    self._truncated.add(caption)
            states = self._encode(captions)
        except BaseException as error:
            for caption in captions:
                self._states[caption].set_exception(error)
            raise
        for caption, state in zip(captions, states, strict=True):
            self._states[caption].set_result(state)

    def _result(self, clip: Clip) -> Result:
        """Wait for the states of one clip's caption."""
        if clip.meta is None:
            return clip.required_problem()
        states = self._states.get(self._captions[clip.position])
        if states is None:
            return ClipProblem("empty_caption")
        return finite(states.result())
