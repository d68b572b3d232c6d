"""Remote shards come before they are wanted: at the end of a window of shards, all of the next one's are new."""

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

ShardKey = tuple[int, int]  # data set, shard


class FetchAhead:
    """Walks ahead of a loader through its order and fetches the shards that its rank will read.

    As far as the caches have room beside what is read now, at most an epoch. What cannot be fetched is left to the
    loader, which says so when it comes there.
    """

    def __init__(
        self,
        sets: Sequence[AlignedColumns],
        rooms: Sequence[int],
        order: BatchOrder,
        positions: np.ndarray,
        threads: int,
    ) -> None:
        """`rooms`: for each data set the bytes of its cache that shards in use or fetched ahead may take; 0 where it is local."""
        self._sets, self._rooms, self._order, self._positions = sets, rooms, order, positions
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        self._moved = threading.Condition()
        self._step = self._walked = (
            0  # what the loader reads next; the first step that was not looked at
        )
        self._until: dict[
            ShardKey, int
        ] = {}  # the last step so far that wants a shard, of those not yet past
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """The loader goes on with `step`: the next one, or where a checkpoint sent it."""
        with self._moved:
            if not self._step <= step <= self._walked:
                self._walked = step
                self._until.clear()
            self._step = step
            self._until = {place: last for place, last in self._until.items() if last >= step}
            self._moved.notify()

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify()
        self._pool.shutdown(cancel_futures=True)
        self._thread.join()

    def _run(self) -> None:
        try:
            while new := self._next_shards():
                start = int(self._positions[0]) % len(
                    new
                )  # ranks that share a cache begin with different shards
                for fetched in [
                    self._pool.submit(self._sets[source].fetch, shard)
                    for source, shard in new[start:] + new[:start]
                ]:
                    fetched.result()
        except ShardError as error:
            if not self._closed:
                log.warning("no more shards are fetched ahead: %s", error)
        except (CancelledError, RuntimeError):  # the pool was shut down
            if not self._closed:
                raise

    def _next_shards(self) -> list[ShardKey]:
        """Those that come into use at the next step where any do, when there is room for them. [] at the end."""
        with self._moved:
            while not self._closed:
                if self._walked - self._step > self._order.num_samples // self._order.batch_size:
                    self._moved.wait()
                    continue
                sources, places = self._order.locate(self._walked, self._positions)
                wanted = [
                    place
                    for place in zip(sources.tolist(), places.shard.tolist(), strict=True)
                    if self._rooms[place[0]]
                ]
                new = [place for place in dict.fromkeys(wanted) if place not in self._until]
                if new and self._walked > self._step and not self._has_room(new):
                    self._moved.wait()
                    continue
                self._until.update(dict.fromkeys(wanted, self._walked))
                self._walked += 1
                if new:
                    return new
        return []

    def _has_room(self, new: Sequence[ShardKey]) -> bool:
        used = [0] * len(self._rooms)
        for source, shard in [*self._until, *new]:
            used[source] += self._sets[source].bytes_of(shard)
        return all(size <= room for size, room in zip(used, self._rooms, strict=True))
