"""Which clips are held out of training, and which of them are validated.

Videos are held out as a whole: no video is used for both training and validation. Whether a video
is held out by `fraction` depends only on its content (a hash of its SHA-256), in every data set of
a blend, so it does not change when data are added. Of so few videos that none has a hash below
`fraction`, the one with the lowest is held out.

The source of a clip is stored in its metadata only, so the metadata of all clips are read once when
a loader is built, by each rank for a part of the shards. Afterwards every rank has the positions of
the held-out clips only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.buckets import bucket_names
from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.schema import RawSample, content_fingerprint
from landiff.data_pipeline.loading.config import ValidationConfig

log = logging.getLogger(__name__)

NAMES_SHOWN = 3  # in a message

Hashes = NDArray[np.uint64]


class Ranks(Protocol):
    """Processes that find the split together. `landiff.training.distributed.World` is one."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """The JSON-serializable `value` of every rank on all ranks. Collective."""
        ...


class Alone:
    """One process, as `Ranks`."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """Only the own value."""
        return [value]


@dataclass(frozen=True, order=True)
class HeldOutClip:
    """Place of a validated clip. Clips are ordered by the hash of their key.

    source: number of the training data set; the separate data set follows the last.
    position: in the raw shard.
    """

    key_hash: int
    key: str
    source: int
    shard: int
    position: int


@dataclass(frozen=True)
class Split:
    """What is held out of each data set.

    positions: for each training data set, raw positions by shard.
    clips: the validated clips, in the order of their hashes.
    videos: hashes of the held-out videos, sorted; with a fraction, of those that it does not hold
        out by the hash itself, or None.
    """

    positions: list[dict[int, list[int]]]
    clips: list[HeldOutClip]
    videos: Hashes | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of what is left out of training."""
        return content_fingerprint([sorted(shards.items()) for shards in self.positions])


def video_hash(meta: RawSample) -> int:
    """64-bit hash of the source video of a clip."""
    return _hash(f"video/{meta.source_sha256 or meta.source}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def find_split(
    config: ValidationConfig,
    sets: Sequence[AlignedColumns],
    separate: AlignedColumns | None = None,
    ranks: Ranks | None = None,
    first: Split | None = None,
    buckets: Sequence[str] | None = None,
) -> Split:
    """Find the held-out clips of the data sets `sets`. Collective; equal on all ranks.

    `separate`: the opened `config.data_set`.
    `first`: the split of the data that the run began with, if these are those of a later phase.
        Its videos are held out here too. It is validated on, so these data need not have any.
    `buckets`: clip shapes that are validated. None: all.

    Raises ConfigError if nothing is held out, if nothing remains for training, or if an entry of
    `clips` does not exist.
    """
    search = _Search(config, sets, separate, ranks or Alone(), buckets)
    is_held_out = search.held_out_hashes(first)
    positions, held_out, total = search.positions(is_held_out)
    clips = search.clips(is_held_out)
    if not clips and first is None and config.fraction is not None:
        is_held_out = search.lowest_video()
        positions, held_out, total = search.positions(is_held_out)
        clips = search.clips(is_held_out)
        if clips and search.ranks.rank == 0:
            log.warning(
                "%s holds out none of so few videos; the one with the lowest hash is held out, "
                "with %d clips",
                _described(config),
                len(clips),
            )
    if not clips and first is None:
        shapes = f" and one of the shapes {', '.join(buckets)}" if buckets else ""
        raise ConfigError(
            f"{_described(config)} holds out none of the {total} clips that has all "
            f"columns{shapes}; "
            "raise the fraction, list clips in data.validation.clips, or train on all clips with "
            "data.validation=null loop.val_every=0"
        )
    if held_out == total:
        raise ConfigError(
            f"{_described(config)} holds out all {total} clips, so none remains to train on; "
            "hold out fewer, or validate on another data set (data.validation.data_set)"
        )
    return Split(positions, clips, is_held_out)


def _described(config: ValidationConfig) -> str:
    """The key and value that determine the split."""
    if config.fraction is not None:
        return f"data.validation.fraction = {config.fraction:g}"
    if config.data_set is not None:
        return f"data.validation.data_set.manifest = {config.data_set.manifest}"
    if config.clips_file is not None:
        return f"data.validation.clips_file = {config.clips_file}"
    return f"data.validation.clips ({len(config.clips)} entries)"


@dataclass(frozen=True)
class _Shard:
    """One shard of the search: hashes of the source videos of its clips, in raw order."""

    source: int
    shard: int
    videos: Hashes


class _Search:
    """This rank's part of the shards."""

    def __init__(
        self,
        config: ValidationConfig,
        sets: Sequence[AlignedColumns],
        separate: AlignedColumns | None,
        ranks: Ranks,
        buckets: Sequence[str] | None,
    ) -> None:
        """Read the metadata of all clips in this rank's shards."""
        self.buckets = buckets
        self.config = config
        self.sets = [*sets, separate] if separate is not None else list(sets)
        self.num_training = len(sets)
        self._bucket_names = [bucket_names(dataset.manifest) for dataset in self.sets]
        self.ranks = ranks
        self.wanted = config.read_clips()
        self._found: set[str] = set()  # entries of `wanted`
        self._listed: list[HeldOutClip] = []
        self._listed_videos: set[int] = set()
        self._shards = [self._scan(source, shard) for source, shard in self._own_shards()]

    def _own_shards(self) -> Iterator[tuple[int, int]]:
        """(data set, shard) of every shard that this rank reads."""
        number = 0
        for source, dataset in enumerate(self.sets):
            for shard in range(len(dataset.counts)):
                if number % self.ranks.size == self.ranks.rank:
                    yield source, shard
                number += 1

    def _scan(self, source: int, shard: int) -> _Shard:
        """Hash the videos of one shard and note the listed clips."""
        dataset = self.sets[source]
        count = dataset.manifest.shards[shard].samples
        videos = np.empty(count, dtype=np.uint64)
        for position in range(count):
            meta = dataset.meta(shard, position)
            videos[position] = video_hash(meta)
            entries = self.wanted & {meta.key, meta.source}
            if entries:
                self._found |= entries
                self._listed_videos.add(video_hash(meta))
                self._listed += self._candidate(source, shard, position, meta.key)
        return _Shard(source, shard, videos)

    def _candidate(self, source: int, shard: int, position: int, key: str) -> list[HeldOutClip]:
        """A clip that can be validated: in a list, which is empty if it lacks a column.

        It is empty too if the clip has another shape than those that are validated.
        """
        if not self.sets[source].present(shard, position):
            return []
        if self.buckets is not None and self._bucket_names[source][shard] not in self.buckets:
            return []
        return [HeldOutClip(_hash(f"clip/{key}"), key, source, shard, position)]

    def held_out_hashes(self, first: Split | None) -> Hashes | None:
        """Hashes of the held-out videos, sorted. With `fraction`, those of `first`, or None.

        Raises ConfigError for entries of `clips` that no clip has, unless there is a `first` split.
        """
        if self.config.fraction is not None:
            return None if first is None else first.videos
        own = self._listed_videos
        for part in self._shards:
            if part.source == self.num_training:
                own = own | set(part.videos.tolist())
        videos: set[int] = set()
        if first is not None and first.videos is not None:
            videos.update(first.videos.tolist())
        found: set[str] = set()
        for its_videos, its_found in self.ranks.gather([sorted(own), sorted(self._found)]):
            videos.update(its_videos)
            found.update(its_found)
        missing = sorted(self.wanted - found)
        if missing and first is None:
            shown = ", ".join(missing[:NAMES_SHOWN])
            raise ConfigError(
                f"{_described(self.config)}: {len(missing)} entries are neither keys of clips nor "
                f"source videos of the data: {shown}; correct or remove them"
            )
        return np.array(sorted(videos), dtype=np.uint64)

    def lowest_video(self) -> Hashes:
        """The lowest hash of a video with clips that can be validated; empty if there is none."""
        own = []
        for part in self._shards:
            for position, video in enumerate(part.videos.tolist()):
                key = self.sets[part.source].key(part.shard, position)
                if self._candidate(part.source, part.shard, position, key):
                    own.append(video)
        lowest = [part for part in self.ranks.gather(min(own, default=None)) if part is not None]
        return np.array(sorted(lowest)[:1], dtype=np.uint64)

    def _is_held_out(self, videos: Hashes, hashes: Hashes | None) -> NDArray[np.bool_]:
        found = np.zeros(len(videos), dtype=np.bool_)
        if self.config.fraction is not None:
            found |= videos < np.uint64(int(self.config.fraction * 2**64))
        if hashes is not None:
            found |= np.isin(videos, hashes)
        return found

    def positions(self, hashes: Hashes | None) -> tuple[list[dict[int, list[int]]], int, int]:
        """Held-out raw positions of each training data set, how many clips they are, and of all.

        Both numbers count the clips that have all columns.
        """
        own = []
        held_out = 0
        for part in self._shards:
            if part.source == self.num_training:
                continue
            found = np.flatnonzero(self._is_held_out(part.videos, hashes)).tolist()
            dataset = self.sets[part.source]
            held_out += sum(dataset.present(part.shard, position) for position in found)
            if found:
                own.append([part.source, part.shard, found])
        positions: list[dict[int, list[int]]] = [{} for _ in range(self.num_training)]
        count = 0
        for its_own, its_count in self.ranks.gather([own, held_out]):
            count += its_count
            for source, shard, found in its_own:
                positions[source][shard] = found
        total = sum(int(dataset.counts.sum()) for dataset in self.sets[: self.num_training])
        return positions, count, total

    def clips(self, hashes: Hashes | None) -> list[HeldOutClip]:
        """The validated clips: at most `max_clips`, those with the lowest hashes of their keys."""
        own = self._listed
        if not self.wanted:
            own = []
            separate = len(self.sets) > self.num_training
            for part in self._shards:
                if separate and part.source < self.num_training:
                    continue
                for position in np.flatnonzero(self._is_held_out(part.videos, hashes)).tolist():
                    key = self.sets[part.source].key(part.shard, position)
                    own += self._candidate(part.source, part.shard, position, key)
        limit = self.config.max_clips
        lowest = [_values(clip) for clip in sorted(own)[:limit]]
        clips: dict[str, HeldOutClip] = {}  # a blend may hold a clip twice
        for part in self.ranks.gather(lowest):
            for values in part:
                clip = HeldOutClip(*values)
                clips[clip.key] = min(clip, clips.get(clip.key, clip))
        return sorted(clips.values())[:limit]


def _values(clip: HeldOutClip) -> list[int | str]:
    return [clip.key_hash, clip.key, clip.source, clip.shard, clip.position]
