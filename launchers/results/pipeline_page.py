"""`report.html` of `landiff quickstart` and `landiff learn`: samples, stages, losses, instruments.

Each sample stands before the training clip that is nearest to it, so that one sees whether a model
repeats clips or makes new ones.

Shape letters: T frames, H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landiff.configs.documents import read_json
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.synthetic.judge import judge
from landiff.data_pipeline.synthetic.world import ATTRIBUTES, parse_caption
from landiff.data_pipeline.video.codec import ClipDecoder
from landiff.launchers.data.shapes import read_rows
from landiff.launchers.data.survey import Survey
from landiff.launchers.local.stage_summary import StageResult, format_loss, shown_output
from landiff.launchers.pages import html
from landiff.launchers.pages.charts import Series, svg
from landiff.launchers.results.instruments import format_readings
from landiff.training.checkpoint.run_folder import METRICS, read_metrics

REPORT = "report.html"
INSTRUMENTS_NOTE = (
    "Loss with the right condition and with a wrong one, such as the caption of another clip; t is "
    "the diffusion timestep. A ratio near 1 means that the model does not use the condition."
)
MAX_VIDEOS = 24
SEARCHED_CLIPS = 2000  # for the nearest training clip of each video
SEARCHED_PIXELS = 1 << 30  # the same, of large clips
SHOWN_HEIGHT = 192  # of the animated pictures, in pixels, about
FPS = 8.0  # of the animated pictures
SAMPLES = Path("samples", "samples.jsonl")


@dataclass(frozen=True)
class Nearest:
    """The training clip that is nearest to a video. RMS difference of pixels, of 255."""

    frames_THWC: np.ndarray
    caption: str
    distance: float


def write_quickstart_report(out: Path, stages: Sequence[StageResult]) -> Path:
    """Writes `report.html` of a folder of `landiff quickstart`. Returns its path.

    stages: of `summary.json`.
    """
    parts = []
    if (out / SAMPLES).is_file():
        figures = sample_figures(out)
        parts.append(html.section("Samples, each beside its nearest training clip", figures))
    evaluation = out / "evaluation.json"
    if evaluation.is_file():
        document = read_json(evaluation, allow_nonfinite=True)
        for bucket, result in document.get("buckets", {"": document}).items():
            title = "Use of the conditions" + (f", clips of {bucket}" if bucket else "")
            readings = format_readings(result.get("instruments", []))
            note = html.element("p", INSTRUMENTS_NOTE, class_="dim")
            parts.append(html.section(title, note, html.preformatted(readings)))
    path = out / REPORT
    html.write_page(
        path,
        "landiff quickstart",
        *parts,
        html.section("Stages", stage_table(stages)),
        html.section("Losses", html.grid(loss_curves(out))),
    )
    return path


def sample_figures(out: Path) -> html.Markup:
    """The samples of a folder of `landiff quickstart`, each beside its nearest training clip."""
    records = read_rows(out / SAMPLES)[:MAX_VIDEOS]
    videos = []
    with ClipDecoder("pyav") as decoder:
        for record in records:
            videos.append(decoder.decode((out / "samples" / record["file"]).read_bytes()))
    found: list[Nearest | None] = [None] * len(videos)
    if videos and (out / "data" / "manifest.json").is_file():
        limit = min(SEARCHED_CLIPS, 1 + SEARCHED_PIXELS // videos[0].size)
        found = nearest_clips(videos, training_clips(out / "data", limit))
    figures = []
    for record, frames_THWC, nearest in zip(records, videos, found, strict=True):
        figures.append(video_figure(frames_THWC, record["prompt"], verdict(record, frames_THWC)))
        if nearest is not None:
            figures.append(nearest_figure(nearest))
    return html.grid(figures)


def verdict(record: Mapping[str, Any], frames_THWC: np.ndarray) -> str:
    """What the pixel judge says of a prompt of the shapes world; empty for other prompts."""
    label = parse_caption(record["prompt"])
    if label is None:
        return ""
    seen = judge(frames_THWC).found
    wrong = [name for name in ATTRIBUTES if seen[name] != label[name]]
    return verdict_text(wrong)


def verdict_text(wrong: Sequence[str]) -> str:
    """A verdict in words. `wrong`: attributes that a video shows wrong."""
    return f"wrong: {', '.join(wrong)}" if wrong else "all five right"


def training_clips(data: Path, limit: int) -> Iterator[tuple[np.ndarray, str]]:
    """Frames and captions of at most `limit` evenly spread clips of a data folder."""
    survey = Survey(data, read_manifest(data))
    try:
        for meta, frames_THWC in survey.clips(limit):
            yield frames_THWC, meta.caption
    finally:
        survey.close()


def nearest_clips(
    videos: Sequence[np.ndarray], clips: Iterable[tuple[np.ndarray, str]]
) -> list[Nearest | None]:
    """The nearest clip of each video, uint8 [T, H, W, 3], by the frames that both have.

    None for a video without a clip of its height and width.
    """
    best: list[Nearest | None] = [None] * len(videos)
    for clip_THWC, caption in clips:
        for number, frames_THWC in enumerate(videos):
            if frames_THWC.shape[1:] != clip_THWC.shape[1:]:
                continue
            shared = min(len(frames_THWC), len(clip_THWC))
            difference = frames_THWC[:shared].astype(np.float32) - clip_THWC[:shared]
            distance = float(np.sqrt(np.square(difference).mean()))
            known = best[number]
            if known is None or distance < known.distance:
                best[number] = Nearest(clip_THWC, caption, distance)
    return best


def nearest_figure(nearest: Nearest) -> html.Markup:
    """The training clip nearest to a video."""
    note = f"nearest training clip, RMS difference {nearest.distance:.0f} of 255"
    return video_figure(nearest.frames_THWC, nearest.caption, note)


def video_figure(frames_THWC: np.ndarray, caption: str, note: str) -> html.Markup:
    """A video as an animated picture in a page."""
    import torch

    from landiff.training.observe.previews import gif

    height = frames_THWC.shape[1]
    step = -(-height // SHOWN_HEIGHT)
    times = max(1, SHOWN_HEIGHT // height)
    shown_THWC = frames_THWC[:, ::step, ::step].repeat(times, axis=1).repeat(times, axis=2)
    data = gif(torch.from_numpy(shown_THWC), FPS)
    return html.figure(html.media(data, "gif", caption), caption, note)


def stage_table(stages: Sequence[StageResult]) -> html.Markup:
    """Times, losses and outputs of stages."""
    rows = []
    for stage in stages:
        losses = [format_loss(stage.first_loss), format_loss(stage.last_loss)]
        times = [f"{stage.seconds:.0f}", f"{stage.cpu_seconds:.0f}"]
        rows.append([stage.name, *times, *losses, shown_output(stage)])
    header = ["stage", "seconds", "CPU seconds", "first loss", "last loss", "output"]
    return html.table(header, rows, (1, 2, 3, 4))


def loss_curves(out: Path) -> list[html.Markup]:
    """Loss curves of all trainers."""
    curves = []
    for metrics in sorted(out.glob(f"runs/*/{METRICS}")):
        points = []
        for line in read_metrics(metrics):
            if "train/loss" in line:
                points.append((float(line["step"]), float(line["train/loss"])))
        if points:
            name = metrics.parent.name
            curves.append(html.figure(svg([Series(name, points)], f"loss of {name}"), name))
    return curves
