"""The process that decodes our own clips through decord, which brings an FFmpeg of its own and may crash.

Through a path, since decord can crash on byte streams; all frames in order, since its seeking is not exact; the
reader is gone before the answer is, since an idle one decodes ahead and keeps it all.
"""

from __future__ import annotations

import ctypes

import decord
import numpy as np

from landiff.data_pipeline.video.protocol import (
    DecodeFailure,
    DecodeRequest,
    DecodeResponse,
    Output,
    serve,
)


class DecordServer:
    """Answers requests for whole clips."""

    def __init__(self, input_fd: int) -> None:
        self.path = f"/proc/self/fd/{input_fd}"

    def answer(self, request: DecodeRequest, output: Output) -> DecodeResponse:
        if request.kind != "clip":
            raise ValueError(f"decord decodes our own clips only, no {request.kind!r}")
        try:
            reader = decord.VideoReader(self.path, num_threads=1)
            batch = reader.get_batch(range(len(reader)))
            del reader
            out = output.array(batch.shape)
            for picture, place in zip(pixels(batch), out, strict=True):
                # decord's colour conversion cuts off fractions: -1.0, -1.5, -1.0 levels in R, G, B whatever the
                # content. One level back, but for what is black or white.
                np.add(picture, (picture - np.uint8(1)) < 254, out=place)
            return DecodeResponse(shape=out.shape)
        except decord.DECORDError as error:
            return DecodeResponse(
                failure=DecodeFailure(
                    "damaged",
                    f"decord cannot read the clip (it also refuses widths of 8, 16, 24, 48 and 72): "
                    f"{str(error).splitlines()[0]}; the other choice is pyav",
                )
            )
        except MemoryError as error:
            return DecodeResponse(failure=DecodeFailure("out_of_memory", str(error)))


def pixels(batch: decord.nd.NDArray) -> np.ndarray:
    """decord's own memory, uint8 [T, H, W, 3]: `asnumpy` would copy it."""
    address = ctypes.cast(batch.handle.contents.data, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(address, shape=batch.shape)


def main(parent: int, memory_limit: int, connection_fd: int, input_fd: int) -> None:
    """Serve requests until the connection closes or the parent is gone."""
    serve(DecordServer(input_fd).answer, parent, memory_limit, connection_fd)
