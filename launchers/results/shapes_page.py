"""Shows videos of the shapes world to people: an animated picture, and the report of `learn`.

Each video has its caption and what the pixel judge found wrong. The report also shows the nearest
training clip of each video, so that one sees whether a model repeats clips or makes new ones.

Shape letters: T frames, H, W height and width in pixels.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from landiff.configs.files import atomic_file
from landiff.data_pipeline.synthetic.judge import judge
from landiff.data_pipeline.synthetic.world import ATTRIBUTES, COLORS, FPS, GROUNDS
from landiff.launchers.data.shapes import pair_files, read_rows, read_videos
from landiff.launchers.local.stage_summary import StageResult
from landiff.launchers.pages import html
from landiff.launchers.results.pipeline_page import (
    MAX_VIDEOS,
    REPORT,
    SEARCHED_CLIPS,
    loss_curves,
    nearest_clips,
    nearest_figure,
    stage_table,
    verdict_text,
    video_figure,
)

ENLARGED = 2  # times the size of a video
LINE_HEIGHT = 12
FONT_SIZE = 10
RIGHT_COLOR = (60, 170, 80)
WRONG_COLOR = (210, 60, 50)
MIXTURES = 12  # of each object colour with each ground in the palette of an animation


@dataclass(frozen=True)
class Judged:
    """A video with its caption and the names of the attributes that it shows wrong."""

    frames_THWC: np.ndarray
    caption: str
    wrong: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Verdict in words."""
        return verdict_text(self.wrong)


def judged_videos(videos: Path, labels: Path, count: int) -> list[Judged]:
    """`count` videos of a folder, spread evenly, with verdicts."""
    rows = read_rows(labels)
    paths = pair_files(videos, rows)
    picked = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist()
    found = []
    frames = read_videos([paths[index] for index in picked])
    for index, frames_THWC in zip(picked, frames, strict=True):
        seen = judge(frames_THWC).found
        wrong = tuple(name for name in ATTRIBUTES if seen[name] != rows[index][name])
        found.append(Judged(frames_THWC, rows[index]["caption"], wrong))
    return found


def write_animation(path: Path, videos: Sequence[Judged], columns: int) -> None:
    """Writes a GIF in which all videos play side by side, each below its caption.

    A green or red line says whether the judge found all five attributes.
    """
    num_frames = min(len(video.frames_THWC) for video in videos)
    pictures = []
    for number in range(num_frames):
        pictures.append(_grid([_tile(video, number) for video in videos], columns))
    palette = world_palette()
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    data = io.BytesIO()
    frames[0].save(
        data,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / FPS),
        loop=0,
        optimize=True,
    )
    with atomic_file(path) as file:
        file.write(data.getvalue())


def world_palette() -> Image.Image:
    """Palette of the world: mixtures of its object colours with its grounds, black, white, frames.

    One palette for all frames keeps plain grounds from flickering, and a fixed one has the colours
    of small objects as well.
    """
    colors = [RIGHT_COLOR, WRONG_COLOR, (0, 0, 0), (255, 255, 255)]
    for color in COLORS.values():
        for ground in GROUNDS.values():
            for share in np.linspace(0, 1, MIXTURES).tolist():
                mixed = share * np.array(color) + (1 - share) * np.array(ground)
                colors.append(tuple(mixed.round().astype(int).tolist()))
    palette = Image.new("P", (1, 1))
    palette.putpalette(list(itertools.chain.from_iterable(colors)))
    return palette


def _tile(video: Judged, number: int) -> Image.Image:
    """One frame of a video, with its caption in two lines."""
    frame_HWC = video.frames_THWC[number]
    width = frame_HWC.shape[1] * ENLARGED
    height = frame_HWC.shape[0] * ENLARGED
    top = 3 * LINE_HEIGHT + 4
    tile = Image.new("RGB", (width + 6, top + height + 4), "white")
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(FONT_SIZE)
    for line, text in enumerate(_lines(video.caption, width, font)):
        draw.text((3, line * LINE_HEIGHT), text, fill="black", font=font)
    color = WRONG_COLOR if video.wrong else RIGHT_COLOR
    draw.rectangle((2, top - 2, width + 3, top + height + 1), outline=color, width=1)
    enlarged = Image.fromarray(frame_HWC).resize((width, height), Image.Resampling.NEAREST)
    tile.paste(enlarged, (3, top - 1))
    return tile


def _lines(text: str, width: int, font: Any) -> list[str]:
    """Text in lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (width * min(columns, len(tiles)), height * rows), "white")
    for number, tile in enumerate(tiles):
        grid.paste(tile, (number % columns * width, number // columns * height))
    return grid


def write_learn_report(out: Path, stages: Sequence[StageResult], rates: str) -> Path:
    """Writes `report.html` of a folder of `landiff learn`. Returns its path.

    stages: of `summary.json`. rates: of the videos, as text.
    """
    prompts = out / "world" / "prompts-heldout.jsonl"
    videos = judged_videos(out / "samples", prompts, MAX_VIDEOS)
    clips = world_clips(out / "world" / "train")
    found = nearest_clips([video.frames_THWC for video in videos], clips)
    figures = []
    for video, nearest in zip(videos, found, strict=True):
        figures.append(video_figure(video.frames_THWC, video.caption, video.verdict))
        if nearest is not None:
            figures.append(nearest_figure(nearest))
    path = out / REPORT
    html.write_page(
        path,
        "landiff learn",
        html.section("Rates of held-out captions", html.preformatted(rates)),
        html.section("Samples, each beside its nearest training clip", html.grid(figures)),
        html.section("Stages", stage_table(stages)),
        html.section("Losses", html.grid(loss_curves(out))),
    )
    return path


def world_clips(train: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Frames and captions of the first training clips of a world."""
    rows = read_rows(train / "captions.jsonl")[:SEARCHED_CLIPS]
    for row, clip_THWC in zip(rows, read_videos(pair_files(train, rows)), strict=True):
        yield clip_THWC, row["caption"]
