"""Display times of frames where the container stamps packets in decoding order."""

from __future__ import annotations

import heapq
from collections import deque

import av

LARGEST_DEPTH = 32  # packets between decoding and display: twice what H.264 and HEVC allow


class DisplaySlots:
    """Display times of a stream whose packets are stamped in decoding order.

    The n-th frame that is shown has the n-th smallest timestamp. A packet without a frame (damaged,
    or a picture whose references were cut off) leaves an unused timestamp. It is dropped as soon as
    it is too old for the current frame, since no frame is shown more than `depth` pictures before
    its own place. A timestamp smaller than the previous one proves that timestamps are display
    times: from then on frames keep their own.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._slots: list[int] = []
        # Timestamps of the last packets, in their order.
        self._recent: deque[int] = deque(maxlen=LARGEST_DEPTH)
        self._in_decoding_order = True

    def clear(self) -> None:
        """Forget all timestamps, after a seek."""
        self._slots.clear()
        self._recent.clear()

    def displayed(self, packet: av.Packet, frames: list[av.VideoFrame]) -> list[av.VideoFrame]:
        """The frames that came out of `packet`, with their display times."""
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

    def _earliest(self, own: int | None) -> int:
        """The timestamp `depth` packets before that of the frame's own packet."""
        if own not in self._recent:
            return self._recent[0] if self._recent else 0
        return self._recent[max(0, self._recent.index(own) - self.depth)]
