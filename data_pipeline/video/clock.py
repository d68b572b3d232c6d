"""Display times of frames in containers that stamp packets in decoding order."""

from __future__ import annotations

import heapq
from collections import deque

import av

MAX_DEPTH = 32  # packets between decoding and display: twice the limit of H.264 and HEVC


class DisplaySlots:
    """Display times of a stream whose packets are stamped in decoding order.

    The n-th frame in display order has the n-th smallest timestamp. A packet without a frame (a
    damaged one, or one whose reference pictures are missing) leaves an unused timestamp. It is
    dropped once it is too old for the current frame: a frame is displayed at most `depth` pictures
    before its place in decoding order.

    A timestamp that is smaller than the previous one proves that timestamps are display times.
    From then on frames keep their own.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._slots: list[int] = []  # heap of unused timestamps
        self._recent: deque[int] = deque(maxlen=MAX_DEPTH)  # timestamps of the last packets
        self._in_decoding_order = True

    def clear(self) -> None:
        """Forget all timestamps, after a seek."""
        self._slots.clear()
        self._recent.clear()

    def displayed(self, packet: av.Packet, frames: list[av.VideoFrame]) -> list[av.VideoFrame]:
        """Set the display times of the frames that were decoded from `packet`."""
        is_stamped = packet.pts is not None and not packet.is_discard
        if is_stamped and self._recent and packet.pts < self._recent[-1]:
            self._in_decoding_order = False
        if not self._in_decoding_order:
            return frames
        if is_stamped:
            heapq.heappush(self._slots, packet.pts)
            self._recent.append(packet.pts)
        for frame in frames:
            earliest = self._earliest(frame.pts)
            while len(self._slots) > 1 and self._slots[0] < earliest:
                heapq.heappop(self._slots)
            if self._slots:
                frame.pts = heapq.heappop(self._slots)
        return frames

    def _earliest(self, pts: int | None) -> int:
        """Timestamp `depth` packets before the packet that is stamped `pts`."""
        if pts is not None and pts in self._recent:
            return self._recent[max(0, self._recent.index(pts) - self.depth)]
        return self._recent[0] if self._recent else 0
