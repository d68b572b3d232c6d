"""`landiff data report`: an HTML page about data folders.

Counts by reason, histograms, contact sheets of kept and rejected clips, weights of a blend, disk.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from landiff.configs.base import ConfigError
from landiff.configs.durations import size
from landiff.configs.loader import load
from landiff.configs.problems import check_output_file, require_none
from landiff.data_pipeline.format.schema import RAW, Manifest, RawSample
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.ingest.quarantine import REJECTED
from landiff.data_pipeline.loading.config import DataConfig, SourceConfig
from landiff.launchers.data.survey import Picture, Survey, folder_bytes
from landiff.launchers.help_texts import TRAINERS
from landiff.launchers.pages import html
from landiff.launchers.pages.histogram import histogram, note_of
from landiff.launchers.progress import ProgressLine
from landiff.launchers.show_config import class_names_of
from landiff.launchers.stages import STAGE_CONFIGS

REPORT = "report.html"
MOST_SHAPES = 20  # rows of the table of clip shapes
LONGEST_TITLE = 200  # characters of a caption on a contact sheet

MEASURES: dict[str, Callable[[RawSample], float]] = {
    "length, s": lambda meta: meta.num_frames / meta.fps,
    "motion score, frame heights per second": lambda meta: meta.motion_score,
    "caption length, words": lambda meta: len(meta.caption.split()),
    "captions of a clip": lambda meta: 1 + len(meta.more_captions),
    "frames": lambda meta: meta.num_frames,
    "height, pixels": lambda meta: meta.height,
    "width, pixels": lambda meta: meta.width,
    "frames per second": lambda meta: meta.fps,
}
"""Histograms that are made from metadata. One whose values are all equal is left out."""


def data_command(args: argparse.Namespace) -> int:
    """Writes the report and prints its path. Returns the exit code."""
    sources = sources_of(args.folder, args.config, args.overrides)
    out = Path(args.out) if args.out else folder_of(sources[0]) / REPORT
    require_none(check_output_file("--out", out))
    sections = [html.element("p", f"Written {now()}.", class_="dim")]
    if len(sources) > 1:
        sections.append(blend_section(sources))
    for source in sources:
        folder = folder_of(source)
        parts = folder_sections(folder, args.clips)
        if len(sources) > 1:
            parts = [html.details(str(folder), *parts, is_open=source is sources[0])]
        sections += parts
    html.write_page(out, f"Data in {folder_of(sources[0])}", *sections)
    print(f"data: report: {out}")
    return 0


def now() -> str:
    """The time as text."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def sources_of(
    folder: str | None, config: str | None, overrides: Sequence[str]
) -> tuple[SourceConfig, ...]:
    """The data sets to report on: a folder, or those that a trainer's config blends.

    Raises ConfigError unless there is exactly one of the two.
    """
    if (folder is None) == (config is None):
        raise ConfigError(
            "landiff data report takes either a data folder, e.g. `landiff data report data`, or "
            "the config of a trainer, whose blend it shows: `landiff data report --config nano/lm`"
        )
    if folder is not None:
        return (SourceConfig(manifest=Path(folder)),)
    assert config is not None
    names = [name for name in class_names_of(config) if name in TRAINERS]
    if not names:
        raise ConfigError(f"--config {config} is not the config of a trainer ({TRAINERS})")
    loaded = load(STAGE_CONFIGS[names[0]], config, overrides)
    data: DataConfig = loaded.data  # type: ignore[attr-defined]  # every trainer has this section
    remote = [source.remote for source in data.sources if source.remote]
    if remote:
        raise ConfigError(
            f"--config {config} reads the remote {remote[0]}; run `landiff data report` where "
            "the data folder is"
        )
    return data.sources


def folder_of(source: SourceConfig) -> Path:
    """The data folder of a source."""
    return source.manifest.parent if source.manifest.suffix == ".json" else source.manifest


def blend_section(sources: Sequence[SourceConfig]) -> html.Markup:
    """Weights of the data sets and the share of samples that each has in a run."""
    samples = []
    for source in sources:
        samples.append(read_manifest(source.manifest).num_samples * source.weight)
    rows = []
    for source, count in zip(sources, samples, strict=True):
        clips = read_manifest(source.manifest).num_samples
        share = f"{count / max(1, sum(samples)):.1%}"
        rows.append([str(source.manifest), f"{clips:,}", f"{source.weight:g}", share])
    header = ["data set", "clips", "weight", "share of samples"]
    note = "Clips that a column rejects or `data.validation` holds out are counted here."
    return html.section(
        "Blend", html.table(header, rows, (1, 2, 3)), html.element("p", note, class_="dim")
    )


def folder_sections(data: Path, clips: int) -> list[html.Markup]:
    """The sections about one data folder. `clips`: pictures of each contact sheet."""
    manifest = read_manifest(data)
    survey = Survey(data, manifest)
    progress = ProgressLine("data", "pictures")
    try:
        metas = survey.metadata()
        scores = survey.scores()
        kept: list[Picture] = []
        for picture in survey.kept(clips):
            kept.append(picture)
            progress(len(kept), min(clips, manifest.num_samples))
        rejected = list(survey.rejected(clips))
    finally:
        survey.close()
    sections = [
        summary_section(manifest, metas),
        reject_section(manifest),
        shape_section(manifest, metas),
        histogram_section(metas, [picture.brightness for picture in kept], scores),
        sheet_section("Kept clips", kept, f"{manifest.num_samples:,} clips"),
        sheet_section("Rejected clips", rejected, kept_rejects(data)),
        disk_section(data, manifest),
    ]
    return [section for section in sections if section]


def summary_section(manifest: Manifest, metas: Sequence[RawSample]) -> html.Markup:
    """Clips, hours, captions, columns."""
    seconds = [meta.num_frames / meta.fps for meta in metas]
    length_s = sum(seconds) / max(1, len(metas)) * manifest.num_samples
    length = f"{length_s / 3600:,.2f} hours" if length_s >= 3600 else f"{length_s:.0f} s"
    without = sum(not meta.caption.strip() for meta in metas)
    texts = Counter(meta.caption for meta in metas)
    rows = [
        ["clips", f"{manifest.num_samples:,}"],
        ["shards", f"{len(manifest.shards):,}"],
        ["length of all clips", length],
        ["source videos", f"{len({meta.source_sha256 or meta.source for meta in metas}):,}"],
        ["clips without a caption", f"{without:,}"],
        ["clips with the caption of another clip", f"{len(metas) - len(texts):,}"],
        ["rejected clips", f"{sum(manifest.reject_counts.values()):,}"],
        ["columns", ", ".join(manifest.columns) or "none"],
    ]
    parts: list[html.Markup] = [html.table([], rows)]
    if len(metas) < manifest.num_samples:
        note = f"Videos, captions and histograms: of {len(metas):,} evenly spread clips."
        parts.append(html.element("p", note, class_="dim"))
    return html.section("Summary", parts)


def reject_section(manifest: Manifest) -> html.Markup:
    """Rejected clips and ignored files by reason, the most frequent first."""
    parts: list[html.Markup] = []
    examples: dict[str, str] = {}
    for reject in manifest.rejects:
        text = f"{reject.key}: {reject.detail}" if reject.detail else reject.key
        examples.setdefault(f"{reject.stage}/{reject.reason}", text[:LONGEST_TITLE])
    total = manifest.num_samples + sum(manifest.reject_counts.values())
    rows = []
    for name, count in by_count(manifest.reject_counts):
        stage, _, reason = name.partition("/")
        share = f"{count / total:.1%}"
        rows.append([stage, reason, f"{count:,}", share, examples.get(name, "")])
    if rows:
        header = ["stage", "reason", "clips", "of all", "for example"]
        parts.append(html.table(header, rows, (2, 3)))
    ignored = []
    for kind, count in by_count(manifest.ignored_counts):
        names = ", ".join(manifest.ignored_examples.get(kind, []))
        ignored.append([kind, f"{count:,}", names[:LONGEST_TITLE]])
    if ignored:
        parts.append(html.element("h3", "Ignored files of the source"))
        parts.append(html.table(["kind", "files", "for example"], ignored, (1,)))
    return html.section("Rejected", parts or [html.element("p", "No clip was rejected.")])


def by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Counts, the largest first."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def shape_section(manifest: Manifest, metas: Sequence[RawSample]) -> html.Markup:
    """Clips of each shape, from the metadata that were read."""
    counts = Counter(f"{meta.num_frames} x {meta.height} x {meta.width}" for meta in metas)
    rows = []
    for shape, count in by_count(counts)[:MOST_SHAPES]:
        rows.append([shape, f"{count:,}", f"{count / len(metas):.1%}"])
    header = ["frames x height x width", "clips", "of all"]
    return html.section("Shapes", html.table(header, rows, (1, 2)))


def histogram_section(
    metas: Sequence[RawSample],
    brightness: Sequence[float],
    scores: Mapping[str, Sequence[float]],
) -> html.Markup:
    """Histograms of the clips, without those whose values are all equal."""
    figures = []
    columns = {name: [measure(meta) for meta in metas] for name, measure in MEASURES.items()}
    columns["brightness of the pictured clips"] = list(brightness)
    for name, values in scores.items():
        columns[name.replace("-", " ")] = list(values)
    for name, values in columns.items():
        if len(set(values)) > 1:
            figures.append(html.figure(histogram(values, name), name, note_of(values)))
    if not figures:
        return html.Markup("")
    return html.section("Histograms", html.grid(figures))


def sheet_section(title: str, pictures: Sequence[Picture], count: str) -> html.Markup:
    """A contact sheet: first, middle and last frame of each clip."""
    figures = []
    for picture in pictures:
        content = html.element("p", "no picture", class_="dim")
        if picture.jpeg is not None:
            content = html.media(picture.jpeg, "jpeg", picture.title)
        name = picture.title[:LONGEST_TITLE] or "(no caption)"
        figures.append(html.figure(content, name, picture.note[:LONGEST_TITLE]))
    note = html.element("p", f"{len(figures)} of {count}.", class_="dim")
    return html.section(title, note, html.grid(figures))


def kept_rejects(data: Path) -> str:
    """What the quarantine holds, as text."""
    if not (data / REJECTED).is_dir():
        return "none that were kept; `quarantine.max_mb` and `quarantine.filtered` keep them"
    return "those that `quarantine` kept"


def disk_section(data: Path, manifest: Manifest) -> html.Markup:
    """Bytes of raw shards, columns and quarantine, and what is free."""
    rows = []
    total = sum(shard.bytes for shard in manifest.shards)
    rows.append([RAW, size(total), size(total / max(1, manifest.num_samples))])
    for name, column in manifest.columns.items():
        count = sum(shard.bytes for shard in column.shards)
        samples = sum(shard.samples for shard in column.shards)
        rows.append([name, size(count), size(count / max(1, samples))])
        total += count
    rejected = folder_bytes(data / REJECTED)
    if rejected:
        rows.append([REJECTED, size(rejected), ""])
    rows.append(["all", size(total + rejected), ""])
    rows.append(["free", size(shutil.disk_usage(data).free), ""])
    return html.section("Disk", html.table(["folder", "bytes", "a clip"], rows, (1, 2)))
