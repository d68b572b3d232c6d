"""Deinterlacing with FFmpeg's bwdif, one frame at a time."""

from __future__ import annotations

from fractions import Fraction

import av
import av.filter


class Deinterlacer:
    """Converts interlaced frames to progressive ones, each at the time of its first field.

    A result depends only on the frame and its two neighbours. So it is the same whether a video was
    decoded from its start or from a seek.
    """

    def __init__(self, time_base: Fraction) -> None:
        self.time_base = time_base
        self._graph: av.filter.Graph | None = None
        self._held: tuple[av.VideoFrame | None, ...] = ()  # the last two frames in the graph

    def __call__(
        self, before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None
    ) -> av.VideoFrame:
        """Deinterlace `frame`. `before` and `after` are None at the ends of the video."""
        before = _neighbour(before, frame)
        after = _neighbour(after, frame)
        graph = self._graph
        pushed = [after]
        if graph is None or self._held != (before, frame):
            graph = self._build(frame)
            pushed = [frame, after] if before is None else [before, frame, after]
        result = None
        for one in pushed:
            graph.push(one)  # None flushes the graph
            result = _last_ready(graph, result)
        if after is None:
            self._graph = None
            self._held = ()
        else:
            self._graph = graph
            self._held = (frame, after)
        return result

    def _build(self, frame: av.VideoFrame) -> av.filter.Graph:
        """Build the filter graph for frames of this size and format."""
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self.time_base
        )
        graph.link_nodes(
            source, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")
        )
        graph.configure()
        return graph


def _last_ready(graph: av.filter.Graph, last: av.VideoFrame | None) -> av.VideoFrame | None:
    """Pull all frames that are ready. Returns the last one, `last` if there is none."""
    while True:
        try:
            last = graph.pull()
        except (BlockingIOError, EOFError):
            return last


def _neighbour(other: av.VideoFrame | None, frame: av.VideoFrame) -> av.VideoFrame | None:
    """Return `other` if it has the size and format of `frame`, else None."""
    if other is None or (other.width, other.height) != (frame.width, frame.height):
        return None
    return other if other.format.name == frame.format.name else None
