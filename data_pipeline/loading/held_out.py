"""Held-out clips in a fixed order, divided over data-parallel ranks.

Clip i is read by rank i mod n, so that the first clips of all ranks are the first of the order.
Every rank gets equally many batches of equally many clips, at most `micro_batch_size` of them and
all of one bucket. The last batch of a bucket is padded with clips that do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from landiff.data_pipeline.format.buckets import bucket_names
from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.samples import HeldOutBatch, Sample
from landiff.data_pipeline.loading.split import HeldOutClip, video_hash
from landiff.data_pipeline.video.codec import ClipDecoder


class HeldOutClips:
    """The validated clips of a run. Iterating reads them from disk, in equal order every time."""

    def __init__(
        self,
        sets: Sequence[AlignedColumns] = (),
        clips: Sequence[HeldOutClip] = (),
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch_size: int = 1,
    ) -> None:
        """`sets`: the data sets that the clips number by `source`, complete."""
        self.clips = list(clips)
        self._sets = sets
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._micro_batch_size = micro_batch_size
        metas = [self._sets[clip.source].meta(clip.shard, clip.position) for clip in self.clips]
        self._buckets: dict[str, list[int]] = {}  # numbers of clips
        names = [bucket_names(dataset.manifest) for dataset in sets]
        for number, clip in enumerate(self.clips):
            bucket = names[clip.source][clip.shard]
            self._buckets.setdefault(bucket, []).append(number)
        self._partners: dict[int, int] = {}
        for numbers in self._buckets.values():
            self._partners |= partners(metas, numbers)

    def __len__(self) -> int:
        """Number of clips over all ranks."""
        return len(self.clips)

    def __iter__(self) -> Iterator[HeldOutBatch]:
        """This rank's batches. Raises ShardError."""
        for bucket in sorted(self._buckets):
            numbers = self._buckets[bucket]
            clips_per_rank = -(-len(numbers) // self._dp_size)
            batch_size = min(self._micro_batch_size, clips_per_rank) * self._dp_size
            for start in range(0, len(numbers), batch_size):
                own = range(start + self._dp_rank, start + batch_size, self._dp_size)
                yield self._batch(bucket, own, numbers[start])

    def first(self, count: int) -> list[Sample]:
        """The first clips of the order, equal on all ranks. Raises ShardError."""
        return [self._read(number) for number in range(min(count, len(self.clips)))]

    def video(self, number: int) -> NDArray[np.uint8] | None:
        """All frames of a clip, [T, H, W, 3]. None if its raw shard is not on this machine.

        Raises ShardError and ClipDamaged.
        """
        clip = self.clips[number]
        dataset = self._sets[clip.source]
        encoded = dataset.video(clip.shard, clip.position)
        if encoded is None:
            return None
        meta = dataset.meta(clip.shard, clip.position)
        with ClipDecoder("pyav") as decoder:
            return np.array(decoder.decode(encoded, sha256=meta.video_sha256))

    def _batch(self, bucket: str, places: Sequence[int], first: int) -> HeldOutBatch:
        """The clips at `places` of a bucket. Beyond its end, it is padded with the first clip."""
        numbers = self._buckets[bucket]
        samples = []
        others = []
        for place in places:
            number = numbers[place] if place < len(numbers) else numbers[0]
            partner = self._partners.get(number)
            samples.append(self._read(number))
            others.append(None if partner is None else self._read(partner))
        counted = tuple(place < len(numbers) for place in places)
        return HeldOutBatch(tuple(samples), tuple(others), counted, first, bucket)

    def _read(self, number: int) -> Sample:
        clip = self.clips[number]
        dataset = self._sets[clip.source]
        slot = dataset.slot(clip.shard, clip.position)
        memory = np.empty(dataset.size(clip.shard, slot), dtype=np.uint8)
        meta, tensors = dataset.read(clip.shard, slot, memory)
        return Sample(
            key=meta.key,
            epoch=0,
            index=clip.key_hash >> 1,
            position=number,
            meta=meta,
            tensors=tensors,
        )


def partners(metas: Sequence[RawSample], numbers: Sequence[int]) -> dict[int, int]:
    """For each of `numbers` another one of them, of another video with another caption.

    A clip without any such other clip is left out.
    """
    videos = [video_hash(meta) for meta in metas]
    found = {}
    for place, number in enumerate(numbers):
        for other in [*numbers[place + 1 :], *numbers[:place]]:
            different_caption = metas[other].caption != metas[number].caption
            if videos[other] != videos[number] and different_caption:
                found[number] = other
                break
    return found
