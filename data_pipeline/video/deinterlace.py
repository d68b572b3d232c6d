"""Deinterlacing by bwdif, one frame at a time."""

from __future__ import annotations

from fractions import Fraction

import av
import av.filter


class Deinterlacer:
    """Makes progressive frames of interlaced ones, each at the time of its first field.

    A result depends on the frame and its two neighbours alone, so it is the same whether a video
    was decoded from its start or from a seek.
    """

    def __init__(self, time_base: Fraction) -> None:
        self.time_base = time_base
        self._graph: av.filter.Graph | None = None
        self._held: tuple[
            av.VideoFrame | None, ...
        ] = ()  # the last two frames that the graph was given

    def __call__(
        self, before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None
    ) -> av.VideoFrame:
        """The deinterlaced `frame`; `before` and `after` are None at the ends of the video."""
        before, after = (_neighbour(other, frame) for other in (before, after))
        given = [after]
        if self._graph is None or self._held != (before, frame):
            self._graph = self._build(frame)
            given = [frame, after] if before is None else [before, frame, after]
        result = None
        for one in given:
            self._graph.push(one)  # None: the end
            result = self._pull(result)
        self._held = (frame, after)
        if after is None:
            self._graph, self._held = None, ()
        return result

    def _pull(self, last: av.VideoFrame | None) -> av.VideoFrame | None:
        """The last frame that is ready."""
        while True:
            try:
                last = self._graph.pull()
            except (BlockingIOError, EOFError):
                return last

    def _build(self, frame: av.VideoFrame) -> av.filter.Graph:
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


def _neighbour(other: av.VideoFrame | None, frame: av.VideoFrame) -> av.VideoFrame | None:
    """`other`, where it has the shape and format of `frame`."""
    if other is None or (other.width, other.height) != (frame.width, frame.height):
        return None
    return other if other.format.name == frame.format.name else None
