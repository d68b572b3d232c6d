"""Frames for the tests of frozen encoders."""

from pathlib import Path

import av
import torch
from torch import Tensor

from landiff import data_pipeline

CLIPS = Path(data_pipeline.__file__).parent / "assets" / "clips"


def shipped_clip(path: Path, num_frames: int, side: int = 64) -> Tensor:
    """First frames of an included 24 fps clip at 8 fps, uint8 [T, side, side, 3].

    They are resized by area and cropped at the centre.
    """
    frames = []
    with av.open(path) as container:
        video = container.streams.video[0]
        graph = av.filter.Graph()
        width = round(video.width * side / video.height)
        nodes = [
            graph.add_buffer(template=video),
            graph.add("scale", f"{width}:{side}:flags=area+accurate_rnd+full_chroma_int"),
            graph.add("format", "rgb24"),
            graph.add("crop", f"{side}:{side}"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        for index, frame in enumerate(container.decode(video)):
            if index % 3 == 0:
                graph.push(frame)
                frames.append(torch.from_numpy(graph.pull().to_ndarray()))
            if len(frames) == num_frames:
                break
    return torch.stack(frames)


def moving_blobs(num_frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth coloured blobs drifting over a gradient, uint8 [T, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height)[:, None, None]
    x = torch.linspace(0, 1, width)[None, :, None]
    base = 0.3 + 0.3 * y + 0.2 * x * torch.tensor([1.0, 0.5, 0.0])
    frames = []
    starts = torch.rand(4, 2, generator=generator)
    speeds = torch.rand(4, 2, generator=generator) * 0.02
    colours = torch.rand(4, 3, generator=generator) - 0.5
    for t in range(num_frames):
        image = base.clone()
        for (sy, sx), (vy, vx), colour in zip(starts, speeds, colours, strict=True):
            image = image + colour * torch.exp(
                -((y - sy - vy * t) ** 2 + (x - sx - vx * t) ** 2) / 0.02
            )
        frames.append(image)
    return (torch.stack(frames).clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 videos, dB."""
    error = (a.float() - b.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))
