"""Staging buffer: shared memory with the files of a checkpoint, for the process that writes them.

The buffer is anonymous memory that both processes map. It exists for the whole run, because the
first access to new pages takes longer than the copy: a thread touches them beforehand, and on CUDA
pins them, for copies at full bus speed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from landiff.training.checkpoint.parts import Crc32, StateFile, part_bytes

log = logging.getLogger(__name__)

POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
TOUCHED_AT_ONCE = 64 << 20  # bytes; the thread can be stopped in between
FILE_ALIGNMENT = 64  # of files in the buffer, so that copies are aligned
COPIED_AT_ONCE = 8 << 20  # bytes of host memory that a thread copies before it takes others
COPY_THREADS = 4  # a single core does not use the bandwidth of the memory


class StagingBuffer:
    """Shared memory for the files of one checkpoint of this rank.

    fd: file descriptor of the memory, for the other process.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Reserve memory and begin to touch it in a thread."""
        self.size = max(mmap.PAGESIZE, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        self.device = device
        self.fd = os.memfd_create("landiff-checkpoint")
        try:
            os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(self.fd, self.size)
        except OSError:
            os.close(self.fd)
            raise
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="staging", daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        """Let the kernel allocate all pages, and pin them on CUDA.

        Without support of the kernel for it, the pages are allocated by the first copy.
        """
        libc = ctypes.CDLL(None, use_errno=True)  # calls release Python's lock
        for start in range(0, self.size, TOUCHED_AT_ONCE):
            length = min(TOUCHED_AT_ONCE, self.size - start)
            address = ctypes.c_void_p(self.bytes.data_ptr() + start)
            if self._stop.is_set():
                return
            if libc.madvise(address, ctypes.c_size_t(length), POPULATE_WRITE):
                return
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                error = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.size, 0)
            self._pinned = int(error) == 0
            if not self._pinned:
                log.warning("the staging buffer of checkpoints could not be pinned: %s", error)

    def stage(self, files: Sequence[StateFile]) -> list[dict[str, Any]]:
        """Copy files into the buffer. Returns where they are, as JSON values.

        path, start, bytes: of a file in the buffer.
        crcs: [start, length, positions] of tensors and of the places where their CRC-32 belongs.
        """
        self._thread.join()
        placed = []
        copies: list[tuple[Tensor, Tensor]] = []
        position = 0
        for file in files:
            position = -(-position // FILE_ALIGNMENT) * FILE_ALIGNMENT
            start = position
            tensors: dict[int, tuple[int, int, list[int]]] = {}
            for part in file.parts:
                size = part_bytes(part)
                if isinstance(part, Crc32):
                    tensors[id(part.tensor)][2].append(position)
                elif isinstance(part, Tensor):
                    tensors[id(part)] = (position, size, [])
                    copies.append((self.bytes[position : position + size], part))
                else:
                    self._map[position : position + size] = part
                position += size
            crcs = [list(place) for place in tensors.values() if place[2]]
            placed.append(
                {"path": file.path, "start": start, "bytes": position - start, "crcs": crcs}
            )
        self._copy(copies)
        return placed

    def _copy(self, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy tensors to their places: those on a device at once, those of the host in threads."""
        if self.device.type == "cuda":
            for target, part in copies:
                target.copy_(part, non_blocking=self._pinned)
            torch.cuda.synchronize(self.device)
            return
        pieces: list[tuple[Tensor, Tensor]] = []
        for target, part in copies:
            places = target.split(COPIED_AT_ONCE)
            pieces += zip(places, part.split(COPIED_AT_ONCE), strict=True)
        threads = min(COPY_THREADS, len(os.sched_getaffinity(0)), max(1, len(pieces)))
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(_copy_piece, pieces):  # raises what a thread raised
                pass

    def close(self) -> None:
        """Return the memory, once the other process has ended too."""
        self._stop.set()
        self._thread.join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self.bytes = torch.empty(0, dtype=torch.uint8)  # the mapping ends with its last reader
        os.close(self.fd)


def _copy_piece(piece: tuple[Tensor, Tensor]) -> None:
    target, part = piece
    target.copy_(part)


def staged_bytes(files: Sequence[StateFile]) -> int:
    """Size of the buffer that `files` need."""
    total = 0
    for file in files:
        total = -(-total // FILE_ALIGNMENT) * FILE_ALIGNMENT + file.num_bytes
    return total
