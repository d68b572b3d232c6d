"""Which clips meet `data.where`, and which of its captions a clip has in an epoch.

Conditions are evaluated when a loader is built, each rank for a part of the shards. Afterwards
every rank has the positions of the excluded clips.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.columns import AlignedColumns, FolderReader, RemoteShards
from landiff.data_pipeline.format.schema import content_fingerprint
from landiff.data_pipeline.loading.split import Alone, Ranks
from landiff.data_pipeline.loading.where import METADATA, checked_where, score_columns

DRAW_BYTES = 8


@dataclass(frozen=True)
class ConditionedSet:
    """One data set with its condition.

    name: config key of the condition, e.g. "data.blend.0.where".
    """

    name: str
    where: str
    dataset: AlignedColumns
    folder: Path
    remote: RemoteShards | None = None


Excluded = dict[int, list[int]]  # raw positions by shard


def find_selection(
    sets: Sequence[ConditionedSet | None], ranks: Ranks | None = None, *, adopt: bool = False
) -> list[Excluded]:
    """Positions of the clips that do not meet the condition of their data set.

    None stands for a data set without a condition. Collective; equal on all ranks. Raises
    ConfigError for an unknown name, or if no clip of a data set meets its condition.
    """
    ranks = ranks or Alone()
    own: list[tuple[int, int, list[int]]] = []
    for number, conditioned in enumerate(sets):
        if conditioned is not None:
            scan = _Scan(conditioned, adopt=adopt)
            for shard in range(ranks.rank, len(conditioned.dataset.counts), ranks.size):
                own.append((number, shard, scan.left_out(shard)))
            scan.close()
    excluded: list[Excluded] = [{} for _ in sets]
    for part in ranks.gather(own):
        for number, shard, positions in part:
            if positions:
                excluded[number][shard] = positions
    for conditioned, positions in zip(sets, excluded, strict=True):
        if conditioned is not None and not conditioned.dataset.without(positions).counts.sum():
            raise ConfigError(
                f"{conditioned.name} = {conditioned.where!r}: none of the "
                f"{conditioned.dataset.counts.sum()} clips meets it; `landiff data report` shows "
                "how the values are distributed"
            )
    return excluded


def selection_fingerprint(excluded: Sequence[Excluded]) -> str:
    """Fingerprint of the clips that are left out, "" if there are none."""
    if not any(excluded):
        return ""
    return content_fingerprint([sorted(shards.items()) for shards in excluded])


class _Scan:
    """Evaluates one condition on the clips of a data set."""

    def __init__(self, conditioned: ConditionedSet, *, adopt: bool) -> None:
        manifest = conditioned.dataset.manifest
        self.dataset = conditioned.dataset
        self.name = conditioned.name
        self.where = checked_where(conditioned.name, conditioned.where, manifest, adopt=adopt)
        known = score_columns(list(manifest.columns))
        self.readers: dict[str, FolderReader] = {}
        for name in self.where.names:
            if name in METADATA:
                continue
            column = manifest.columns[known[name]]
            self.readers[name] = FolderReader(
                conditioned.folder,
                known[name],
                "score.safetensors",
                column.shards,
                column=column,
                raw_shards=manifest.shards,
                adopt=adopt,
                keep=1,
                remote=conditioned.remote,
            )

    def left_out(self, shard: int) -> list[int]:
        """Raw positions of the clips of a shard that do not meet the condition."""
        scores = {name: self._scores(reader, shard) for name, reader in self.readers.items()}
        metadata = [name for name in self.where.names if name in METADATA]
        found = []
        for position in range(self.dataset.manifest.shards[shard].samples):
            values: dict[str, float | str | None] = {}
            for name, by_position in scores.items():
                values[name] = by_position.get(position)
            if metadata:
                meta = self.dataset.meta(shard, position)
                values |= {name: METADATA[name](meta) for name in metadata}
            try:
                if not self.where(values):
                    found.append(position)
            except ConfigError as error:
                clip = self.dataset.key(shard, position)
                raise ConfigError(f"{self.name}, clip {clip}: {error}") from None
        return found

    def _scores(self, reader: FolderReader, shard: int) -> dict[int, float]:
        """Scores of a shard by raw position."""
        missing = set(reader.shards[shard].missing)
        samples = self.dataset.manifest.shards[shard].samples
        present = [position for position in range(samples) if position not in missing]
        scores = {}
        for slot, position in enumerate(present):
            scores[position] = float(reader.read_tensor(shard, slot).float().mean())
        return scores

    def close(self) -> None:
        """Close the files."""
        for reader in self.readers.values():
            reader.close()


# ----------------------------------------------------------------------------------------- captions


class CaptionChoice:
    """Chooses the text column of each sample: keyed by seed, epoch and clip, not by rank."""

    def __init__(self, weights: Mapping[str, float], main: str, seed: int) -> None:
        """`weights` by column. `main`: the column under whose name the trainer reads the text."""
        self.main = main
        self.seed = seed
        self._columns = sorted(weights)
        total = sum(weights.values())
        shares = [weights[name] / total for name in self._columns]
        self._ends = list(itertools.accumulate(shares))

    def column(self, epoch: int, clip: str) -> str:
        """The column of a clip in an epoch."""
        text = f"{self.seed}/caption/{epoch}/{clip}"
        digest = hashlib.blake2b(text.encode(), digest_size=DRAW_BYTES).digest()
        draw = int.from_bytes(digest, "little") / 256**DRAW_BYTES
        return self._columns[min(bisect.bisect_right(self._ends, draw), len(self._columns) - 1)]

    def __call__(self, tensors: Mapping[str, Tensor], epoch: int, clip: str) -> dict[str, Tensor]:
        """The columns of a sample, with the chosen text under the name of the main column."""
        chosen = self.column(epoch, clip)
        kept = {name: tensor for name, tensor in tensors.items() if name not in self._columns}
        return kept | {self.main: tensors[chosen]}
