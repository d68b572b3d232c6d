"""Child process that decodes clips written by `encode_clip` with decord.

decord contains its own FFmpeg and may crash. Clips are opened by path, because decord can crash on
byte streams. All frames are decoded in order, because its seeking is not exact. The reader is
deleted before the response is sent, because an idle reader decodes ahead and keeps the frames.
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
        """Decode all frames of the clip in the input file."""
        if request.kind != "clip":
            raise ValueError(f"decord decodes only whole clips, not {request.kind!r}")
        try:
            reader = decord.VideoReader(self.path, num_threads=1)
            batch = reader.get_batch(range(len(reader)))
            del reader
            out = output.array(batch.shape)
            for picture, target in zip(pixels(batch), out, strict=True):
                # decord's colour conversion truncates: R, G and B are on average 1.0, 1.5 and 1.0
                # levels too low for any content. Add one level, except to black and white.
                np.add(picture, (picture - np.uint8(1)) < 254, out=target)
            return DecodeResponse(shape=out.shape)
        except decord.DECORDError as error:
            detail = (
                "decord cannot read the clip (it also rejects widths of 8, 16, 24, 48 and 72): "
                f"{str(error).splitlines()[0]}; try decoder = pyav"
            )
            return DecodeResponse(failure=DecodeFailure("damaged", detail))
        except MemoryError as error:
            return DecodeResponse(failure=DecodeFailure("out_of_memory", str(error)))


def pixels(batch: decord.nd.NDArray) -> np.ndarray:
    """View decord's memory as uint8 [T, H, W, 3]. `asnumpy` would copy it."""
    address = ctypes.cast(batch.handle.contents.data, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(address, shape=batch.shape)


def main(parent: int, memory_limit: int, connection_fd: int, input_fd: int) -> None:
    """Serve requests until the connection closes or the parent process ends."""
    serve(DecordServer(input_fd).answer, parent, memory_limit, connection_fd)
