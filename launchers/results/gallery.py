"""The gallery and the contact sheet of a folder of samples.

gallery.html         every video with its prompt and settings, in one file
contact-sheet.png    a few frames of every video, for a look without a player
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from landiff.configs.files import atomic_file
from landiff.data_pipeline.video.codec import spaced_frames
from landiff.launchers.pages.html import figure, grid, media, section, table, write_page

GALLERY = "gallery.html"
CONTACT_SHEET = "contact-sheet.png"
MAX_PAGE_BYTES = 256 << 20  # of videos in a page
MAX_ROWS = 100  # of a contact sheet
FRAMES_SHOWN = 5  # of each video in a contact sheet
FRAME_HEIGHT = 96  # pixels
TITLE_HEIGHT = 20
FONT_SIZE = 13
MAX_TITLE = 110  # characters

Record = dict[str, Any]
"""What made a video: an object of samples.jsonl."""


def write_gallery(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> None:
    """Write the page of all videos. Videos beyond `MAX_PAGE_BYTES` are listed only."""
    figures = []
    left_out = []
    size = 0
    for record in records:
        path = folder / record["file"]
        size += path.stat().st_size
        if size > MAX_PAGE_BYTES:
            left_out.append([record["file"], record["prompt"]])
            continue
        video = media(path.read_bytes(), "mp4", record["prompt"])
        note = f"{record['file']}, seed {record['seed']}, {record['frames']} frames"
        figures.append(figure(video, record["prompt"], note))
    parts = [section("Videos", grid(figures))]
    if left_out:
        parts.append(
            section("Not shown, to keep the page small", table(["file", "prompt"], left_out))
        )
    rows = [[key, str(value)] for key, value in sorted(settings.items())]
    parts.append(section("Settings", table(["key", "value"], rows)))
    write_page(folder / GALLERY, f"{len(records)} samples", parts)


def write_contact_sheet(folder: Path, records: Sequence[Record]) -> None:
    """Write a picture with evenly spaced frames of each video below its prompt."""
    strips = [_strip(folder / record["file"], _title(record)) for record in records[:MAX_ROWS]]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    with atomic_file(folder / CONTACT_SHEET) as file:
        file.write(data.getvalue())


def _title(record: Record) -> str:
    """Number, seed and prompt."""
    text = f"{record['file'].partition('-')[0]}, seed {record['seed']}: {record['prompt']}"
    return text if len(text) <= MAX_TITLE else f"{text[: MAX_TITLE - 3]}..."


def _strip(path: Path, title: str) -> Image.Image:
    """Frames of one video side by side, below the title."""
    frames_THWC = spaced_frames(path, FRAMES_SHOWN)
    height, width = frames_THWC.shape[1:3]
    shown_width = max(1, round(width * FRAME_HEIGHT / height))
    font = ImageFont.load_default(FONT_SIZE)
    title_width = round(font.getlength(title)) + 8
    strip_width = max(FRAMES_SHOWN * shown_width, title_width)
    strip = Image.new("RGB", (strip_width, TITLE_HEIGHT + FRAME_HEIGHT))
    ImageDraw.Draw(strip).text((4, 2), title, fill="white", font=font)
    for column, frame_HWC in enumerate(frames_THWC):
        frame = Image.fromarray(frame_HWC)
        resized = frame.resize((shown_width, FRAME_HEIGHT), Image.Resampling.NEAREST)
        strip.paste(resized, (column * shown_width, TITLE_HEIGHT))
    return strip
