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
from PIL.PngImagePlugin import PngInfo

from landiff.configs.documents import read_json
from landiff.configs.files import atomic_file
from landiff.data_pipeline.video.codec import spaced_frames
from landiff.launchers.pages.html import (
    Markup,
    details,
    element,
    figure,
    grid,
    media,
    section,
    table,
    write_page,
)

GALLERY = "gallery.html"
CONTACT_SHEET = "contact-sheet.png"
MAX_PAGE_BYTES = 256 << 20  # of videos in a page
MAX_ROWS = 100  # of a contact sheet
FRAMES_SHOWN = 5  # of each video in a contact sheet
FRAME_HEIGHT = 96  # pixels
TITLE_HEIGHT = 20
FONT_SIZE = 13
MAX_TITLE = 110  # characters
DRIFT = "drift"  # folder of the reports of long videos
SHOWN = "samples"  # key of the metadata of a contact sheet: fingerprint of what the pages show
DRIFT_NOTE = (
    "Motion is the mean difference between neighbouring frames of a chunk, join that between its "
    "first frame and the one before, both of 255; a join of 1 times the motion is not seen. PSNR "
    "(dB), colour (red, green, blue, of 255) and features compare the mean of a chunk with that of "
    "the first."
)

Record = dict[str, Any]
"""What made a video: an object of samples.jsonl."""


def write_gallery(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> None:
    """Write the page of all videos. Videos beyond `MAX_PAGE_BYTES` are listed only."""
    figures = []
    left_out = []
    drifts = []
    size = 0
    for record in records:
        path = folder / record["file"]
        drift = drift_path(folder, record["file"])
        if drift.exists():
            drifts.append(drift_table(record["file"], read_json(drift)["chunks"]))
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
    if drifts:
        parts.append(section("Joins and drift of long videos", element("p", DRIFT_NOTE), *drifts))
    rows = [[key, str(value)] for key, value in sorted(settings.items())]
    parts.append(section("Settings", table(["key", "value"], rows)))
    write_page(folder / GALLERY, f"{len(records)} samples", parts)


def drift_path(folder: Path, name: str) -> Path:
    """The report of the chunks of a video."""
    return folder / DRIFT / name.replace(".mp4", ".json")


def drift_table(name: str, chunks: Sequence[dict[str, Any]]) -> Markup:
    """The chunks of a long video, folded, with the worst join in the title."""
    header = [
        "chunk",
        "from frame",
        "motion",
        "join",
        "join / motion",
        "PSNR",
        "colour",
        "features",
    ]
    rows = []
    for number, chunk in enumerate(chunks):
        row = [str(number), str(chunk["first_frame"])]
        for key in ("inner_difference", "join_difference", "join_ratio", "psnr_to_first"):
            row.append(_number(chunk[key]))
        row.append(" ".join(_number(value) for value in chunk["colour_to_first"]))
        row.append(_number(chunk["feature_distance"]))
        rows.append(row)
    ratios = [chunk["join_ratio"] for chunk in chunks if chunk["join_ratio"] is not None]
    worst = f", joins up to {_number(max(ratios))} times the motion" if ratios else ""
    columns = range(len(header))
    return details(f"{name}: {len(chunks)} chunks{worst}", table(header, rows, columns))


def _number(value: float | None) -> str:
    """A measured number in few digits; a dash for none."""
    return "-" if value is None else f"{value:.3g}"


def pages_show(folder: Path, shown: str) -> bool:
    """Whether gallery and contact sheet were written for the videos of fingerprint `shown`."""
    if not (folder / GALLERY).exists():
        return False
    try:
        with Image.open(folder / CONTACT_SHEET) as sheet:
            return sheet.info.get(SHOWN) == shown
    except (OSError, SyntaxError):  # missing or damaged
        return False


def write_contact_sheet(folder: Path, records: Sequence[Record], shown: str) -> None:
    """Write a picture with evenly spaced frames of each video below its prompt.

    It is written after the gallery. `shown`: fingerprint of the records, kept in its metadata.
    """
    strips = [_strip(folder / record["file"], _title(record)) for record in records[:MAX_ROWS]]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    data = io.BytesIO()
    metadata = PngInfo()
    metadata.add_text(SHOWN, shown)
    sheet.save(data, format="PNG", pnginfo=metadata)
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
