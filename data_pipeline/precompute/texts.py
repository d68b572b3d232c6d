"""Producer of text states. Each distinct caption of a shard is encoded once.

Captions of similar length are encoded together, so that little of a batch is padding.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

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

# Captions that are sorted by length. Their states are in memory at the same time: at most 1.1 GB,
# if all have 512 tokens of width 4096. With more captions, padding falls only from 3 % to 1 %.
CAPTIONS_SORTED = 256


class TextProducer:
    """Computes the text states of each caption, bfloat16 [L, D]."""

    def __init__(self, column: TextColumn, encoder: TextEncoder, context: ProducerContext) -> None:
        self.encoder = encoder
        self.context = context
        self.caption = column.caption
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
        return ShardCaptions(captions, self, encodes_empty=self.encodes_empty)

    def examine(self, clip: Clip, tensor: Tensor) -> dict[str, float]:
        """Count non-finite values and text rows."""
        return {"bad_values": float((~tensor.isfinite()).sum()), "rows": float(tensor.shape[0])}

    def collapse(self, counts: np.ndarray) -> str:
        """Text states have no codes."""
        return ""

    def states(self, captions: list[str]) -> list[Tensor]:
        """Encode captions to text states, one [L, D] for each."""
        with self.context.encoding("text"):
            states_BLD, lengths_B = self.encoder(captions)
            states_BLD = states_BLD.bfloat16().cpu()
            lengths = lengths_B.tolist()
            pairs = zip(states_BLD, lengths, strict=True)
            return [states_LD[:length].clone() for states_LD, length in pairs]


@dataclass
class SortedCaptions:
    """Captions that are sorted by length and encoded in batches of similar length."""

    captions: list[str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    batches: list[list[str]] | None = None  # those that no thread has begun; None: not yet sorted

    def sort(self, num_tokens: Sequence[int], batch_size: int) -> None:
        """Divide the captions into batches, the longest first, which needs the most memory."""
        pairs = zip(num_tokens, self.captions, strict=True)
        longest_first = [caption for _, caption in sorted(pairs, key=lambda pair: -pair[0])]
        starts = range(0, len(longest_first), batch_size)
        self.batches = [longest_first[start : start + batch_size] for start in starts]


class ShardCaptions:
    """Encodes each distinct caption of a shard once, together with others of similar length.

    The first clips whose captions are not encoded yet encode `CAPTIONS_SORTED` captions, which
    threads share. Later clips find the results. Results are not kept across shards, because the
    bytes of a unit must not depend on what its task computed before.
    """

    def __init__(
        self, captions: Mapping[int, str], producer: TextProducer, *, encodes_empty: bool = False
    ) -> None:
        """`captions` are by the clip's position. `encodes_empty`: empty ones are not rejected."""
        self._captions = captions
        self._producer = producer
        self._truncated: set[str] = set()  # captions longer than the encoder accepts
        self._states: dict[str, Future[Tensor]] = {}
        self._users: Counter[str] = Counter()  # clips that still need the caption
        self._lock = threading.Lock()
        for caption in captions.values():
            if caption or encodes_empty:
                self._states.setdefault(caption, Future())
                self._users[caption] += 1
        self._sorted: dict[str, SortedCaptions] = {}
        distinct = list(self._states)
        for start in range(0, len(distinct), CAPTIONS_SORTED):
            together = SortedCaptions(distinct[start : start + CAPTIONS_SORTED])
            self._sorted.update(dict.fromkeys(together.captions, together))

    def __call__(self, batch: Sequence[Clip], cache: BatchCache) -> list[Result]:
        """Return the text states of a batch's captions."""
        for clip in batch:
            caption = self._captions.get(clip.position)
            if caption in self._sorted:
                self._encode_all(self._sorted[caption])
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

    def _encode_all(self, together: SortedCaptions) -> None:
        """Encode captions until every batch of them was begun by this or another thread.

        An error is published to all clips that wait for these captions.
        """
        try:
            while captions := self._next_batch(together):
                states = self._producer.states(captions)
                with self._lock:
                    for caption, state in zip(captions, states, strict=True):
                        if not self._states[caption].done():  # else another thread failed
                            self._states[caption].set_result(state)
        except BaseException as error:
            with together.lock:
                together.batches = []
            with self._lock:
                for caption in together.captions:
                    if caption in self._states and not self._states[caption].done():
                        self._states[caption].set_exception(error)
            raise

    def _next_batch(self, together: SortedCaptions) -> list[str] | None:
        """Take a batch that no thread has begun. Sorts the captions at first."""
        with together.lock:
            if together.batches is None:
                encoder = self._producer.encoder
                ends = encoder.cut_off(together.captions)
                pairs = zip(together.captions, ends, strict=True)
                self._truncated.update(caption for caption, end in pairs if end)
                batch_size = self._producer.context.config.batch_size
                together.sort(encoder.num_tokens(together.captions), batch_size)
            if not together.batches:
                return None
            return together.batches.pop(0)

    def _result(self, clip: Clip) -> Result:
        """Wait for the states of one clip's caption."""
        if clip.meta is None:
            return clip.required_problem()
        states = self._states.get(self._captions[clip.position])
        if states is None:
            return ClipProblem("empty_caption")
        return finite(states.result())
