"""Previews in TensorBoard: animated GIFs with a legend in its image tab, and their texts.

Shape letters (docs/glossary.md): T frames, H, W height and width in pixels, C colours.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text import metadata as text_plugin
from torch import Tensor
from torch.nn import functional

from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.video.codec import ClipDamaged
from landiff.training.observe.event_file import EventFile

log = logging.getLogger(__name__)

SOURCE = "source"  # title of the panel with the original video
MIN_PANEL_PIXELS = 160  # width of a panel: the titles must fit
MAX_PANEL_PIXELS = 400  # an event file holds all previews of a run
TITLE_PIXELS = 22  # height of the legend
FONT_PIXELS = 13


@dataclass(frozen=True)
class SourceFrames:
    """Frames of a held-out clip that the panels of a preview show.

    clip: its number in `HeldOutClips`.
    first: first frame.
    step: frames of the clip for each frame of the panels.
    """

    clip: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class Preview:
    """Videos of one clip or prompt that belong together.

    tag: in TensorBoard.
    panels: videos uint8 [T, H, W, 3] of equal T and H by title, for example "source", "codec round
        trip" and "prediction". They are shown side by side.
    text: the prompt or caption.
    source: None if the panels show no held-out clip.
    """

    tag: str
    panels: Mapping[str, Tensor]
    text: str = ""
    source: SourceFrames | None = None

    def reduced(self) -> Preview:
        """The preview with panels of the size in which they are shown, on the CPU."""
        panels = {}
        for title, video_THWC in self.panels.items():
            panels[title] = _resized(video_THWC.cpu())
        return replace(self, panels=panels)


def write_preview(writer: EventFile, preview: Preview, step: int, fps: float) -> None:
    """Write a preview: the video under its tag, and its text under "<tag>/text". Raises OSError."""
    write_video(writer, preview.tag, with_legend(preview.panels), step, fps)
    if preview.text:
        write_text(writer, f"{preview.tag}/text", preview.text, step)


def with_legend(panels: Mapping[str, Tensor]) -> Tensor:
    """The panels side by side below their titles, uint8 [T, H, W, 3].

    Small panels are enlarged so that the titles fit, large ones are reduced.
    """
    columns = []
    for title, video_THWC in panels.items():
        video_THWC = _resized(video_THWC.cpu())
        header_HWC = _title(title, video_THWC.shape[2])
        header_THWC = header_HWC.expand(len(video_THWC), *header_HWC.shape)
        columns.append(torch.cat([header_THWC, video_THWC], dim=1))
    return torch.cat(columns, dim=2)


def _resized(video_THWC: Tensor) -> Tensor:
    """The video with a width between the limits, enlarged or reduced by a whole number."""
    width = video_THWC.shape[2]
    if width < MIN_PANEL_PIXELS:
        scale = -(-MIN_PANEL_PIXELS // width)
        return video_THWC.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if width > MAX_PANEL_PIXELS:
        scale = -(-width // MAX_PANEL_PIXELS)
        pooled_TCHW = functional.avg_pool2d(video_THWC.movedim(-1, 1).float(), scale)
        return pooled_TCHW.round().to(torch.uint8).movedim(1, -1)
    return video_THWC


def _title(text: str, width: int) -> Tensor:
    """White text on black, uint8 [H, `width`, 3]."""
    image = Image.new("RGB", (width, TITLE_PIXELS))
    font = ImageFont.load_default(FONT_PIXELS)
    ImageDraw.Draw(image).text((4, 3), text, fill="white", font=font)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(TITLE_PIXELS, width, 3)


def write_video(writer: EventFile, tag: str, video_THWC: Tensor, step: int, fps: float) -> None:
    """Write a video uint8 [T, H, W, 3] under `tag`. Raises OSError."""
    _, height, width, _ = video_THWC.shape
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=gif(video_THWC, fps)
    )
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def write_text(writer: EventFile, tag: str, text: str, step: int) -> None:
    """Write a text under `tag`, for TensorBoard's text tab. Raises OSError."""
    tensor = TensorProto(
        dtype=DT_STRING,
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = text_plugin.create_summary_metadata(tag, "")
    value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    writer.add_summary(Summary(value=[value]), step)


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


class SourcePanels:
    """Adds the original video to previews as their first panel.

    Each clip is decoded once, and kept in the size in which it is shown.
    """

    def __init__(self) -> None:
        self._panels: dict[str, Tensor | None] = {}  # by tag of the preview

    def added(self, previews: Sequence[Preview], clips: HeldOutClips) -> list[Preview]:
        """The previews in the sizes in which they are shown, with the source where they name it.

        A clip that cannot be decoded, or whose raw shard is remote, has no such panel.
        """
        found = []
        for preview in previews:
            preview = preview.reduced()
            if preview.source is not None:
                if preview.tag not in self._panels:
                    self._panels[preview.tag] = _source_panel(preview, clips)
                panel_THWC = self._panels[preview.tag]
                if panel_THWC is not None:
                    panels = {SOURCE: panel_THWC, **preview.panels}
                    preview = replace(preview, panels=panels)
            found.append(preview)
        return found


def _source_panel(preview: Preview, clips: HeldOutClips) -> Tensor | None:
    """The frames of the source that the other panels show, in their size; None without any."""
    source = preview.source
    assert source is not None
    try:
        video = clips.video(source.clip)
    except (ShardError, ClipDamaged) as error:
        log.warning("%s is shown without its original video: %s", preview.tag, error)
        return None
    if video is None:
        return None
    other_THWC = next(iter(preview.panels.values()))
    count, height, width, _ = other_THWC.shape
    indices_T = (source.first + source.step * torch.arange(count)).clamp(max=len(video) - 1)
    frames_TCHW = torch.from_numpy(video)[indices_T].movedim(-1, 1).float()
    sized_TCHW = functional.interpolate(
        frames_TCHW, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return sized_TCHW.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).contiguous()
