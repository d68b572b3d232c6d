"""Downloads remote shards before the loader needs them.

When the loader moves to the next shuffle window, it needs all shards of that window.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np

from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.loading.order import BatchOrder

log = logging.getLogger(__name__)

ShardKey = tuple[int, int]  # (data set, shard)


class FetchAhead:
    """Downloads the shards that this rank will read, in the order of a loader, in the background.

    It stays at most one epoch ahead, and within the part of each cache that it may use. Shards that
    cannot be downloaded are left to the loader, which raises the error when it needs them.
    """

    def __init__(
        self,
        sets: Sequence[AlignedColumns],
        cache_bytes: Sequence[int],
        order: BatchOrder,
        *,
        dp_rank: int,
        dp_size: int,
        end_step: int | None,
        threads: int,
    ) -> None:
        """Start the background threads.

        Args:
            sets: The data sets of the loader.
            cache_bytes: For each data set, the bytes of its cache for shards in use or downloaded
                ahead; 0 for a local data set.
            order: The order of the loader.
            dp_rank: This rank.
            dp_size: Number of data-parallel ranks.
            end_step: Step from which on another loader is used, or None.
            threads: Number of simultaneous downloads.
        """
        self._sets = sets
        self._cache_bytes = cache_bytes
        self._order = order
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._end_step = end_step
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._changed = threading.Condition()
        self._step = 0  # that the loader reads next
        self._planned = 0  # first step whose shards are not known yet
        self._last_use: dict[ShardKey, int] = {}  # last planned step that reads a shard
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """Continue from `step`: the next step of the loader, or that of a loaded checkpoint."""
        with self._changed:
            if not self._step <= step <= self._planned:
                self._planned = step
                self._last_use.clear()
            self._step = step
            self._last_use = {shard: last for shard, last in self._last_use.items() if last >= step}
            self._changed.notify()

    def close(self) -> None:
        """End the background threads; downloads in progress are waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._pool.shutdown(cancel_futures=True)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                shards = self._next_shards()
                if not shards:
                    return
                self._fetch(shards)
        except ShardError as error:
            if not self._closed:
                log.warning("no more shards are downloaded ahead: %s", error)
        except (CancelledError, RuntimeError):  # the pool was shut down
            if not self._closed:
                raise

    def _fetch(self, shards: list[ShardKey]) -> None:
        """Download shards. Raises ShardError."""
        # Ranks that share a cache start with different shards.
        start = self._dp_rank % len(shards)
        downloads = []
        for source, shard in shards[start:] + shards[:start]:
            downloads.append(self._pool.submit(self._sets[source].fetch, shard))
        for download in downloads:
            download.result()

    def _next_shards(self) -> list[ShardKey]:
        """New shards of the next step that needs any; waits for space. Empty after `close`."""
        with self._changed:
            while not self._closed:
                batch_size = self._order.sizes_at(self._planned).global_batch_size
                epoch_steps = self._order.num_samples // batch_size
                far = self._planned - self._step > epoch_steps
                if far or self._planned == self._end_step:
                    self._changed.wait()
                    continue
                used = self._remote_shards(self._planned)
                new = [shard for shard in dict.fromkeys(used) if shard not in self._last_use]
                if new and self._planned > self._step and not self._fits(new):
                    self._changed.wait()
                    continue
                self._last_use.update(dict.fromkeys(used, self._planned))
                self._planned += 1
                if new:
                    return new
        return []

    def _remote_shards(self, step: int) -> list[ShardKey]:
        """The remote shard of each sample that this rank reads in a step."""
        batch_size = self._order.sizes_at(step).global_batch_size
        positions = np.arange(self._dp_rank, batch_size, self._dp_size)
        sources, places = self._order.locate(step, positions)
        shards = zip(sources.tolist(), places.shard.tolist(), strict=True)
        return [(source, shard) for source, shard in shards if self._cache_bytes[source]]

    def _fits(self, new: Sequence[ShardKey]) -> bool:
        """Whether the caches hold the shards in use and `new`."""
        sizes = [0] * len(self._cache_bytes)
        for source, shard in [*self._last_use, *new]:
            sizes[source] += self._sets[source].bytes_of(shard)
        return all(size <= limit for size, limit in zip(sizes, self._cache_bytes, strict=True))
