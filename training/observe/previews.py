"""Videos in TensorBoard, as animated GIFs in its image tab."""

from __future__ import annotations

import io

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from landiff.training.observe.event_file import EventFile


def write_video(writer: EventFile, tag: str, video_THWC: Tensor, step: int, fps: float) -> None:
    """Write a video uint8 [T, H, W, 3] under `tag`. Raises OSError."""
    _, height, width, _ = video_THWC.shape
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=gif(video_THWC, fps)
    )
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def gif(video_THWC: Tensor, fps: float) -> bytes:
    """An animated GIF, played in a loop, of a video uint8 [T, H, W, 3]. Raises ValueError."""
    if video_THWC.dtype != torch.uint8 or video_THWC.ndim != 4 or video_THWC.shape[-1] != 3:
        raise ValueError(
            f"a video is uint8 [T, H, W, 3], not {video_THWC.dtype} {list(video_THWC.shape)}"
        )
    first, *rest = [Image.fromarray(frame) for frame in video_THWC.cpu().numpy()]
    data = io.BytesIO()
    frame_ms = round(1000 / fps)
    first.save(data, format="GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0)
    return data.getvalue()
