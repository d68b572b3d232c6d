"""`landiff evaluate vbench`: sample the standard prompts, run the official VBench, score it.

VBench pins versions of numpy and transformers that this project cannot use, so it runs in a Python
interpreter of its own, given by path. The folder of an evaluation holds

    videos/          PROMPT-0.mp4 to PROMPT-4.mp4 of every prompt, the official names
    results/         what VBench writes: DIMENSION_eval_results.json
    scores.json      results, scores, and what was compared
    scores.html      the same beside published models

Everything resumes: videos and dimensions that are finished are kept.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.documents import parse_json, read_bytes
from landiff.configs.files import write_text
from landiff.launchers.commands import JobFailed
from landiff.launchers.config import SampleConfig
from landiff.launchers.pages.html import element, section, table, write_page
from landiff.launchers.results.prompts import SampleUnit
from landiff.launchers.results.sample_folder import read_record
from landiff.model_zoo.evaluate.vbench import DIMENSIONS, PUBLISHED, Scores, aggregate

VIDEOS_PER_PROMPT = 5
LONG_SECONDS = 5.0  # longer videos are for VBench-Long
MAX_INFO_BYTES = 64 << 20
MAX_NAME_BYTES = 255  # of a file on Linux
VIDEOS = "videos"
RESULTS = "results"
FIND_INFO = (
    "import importlib.util as u; s = u.find_spec('vbench'); "
    "print(s.origin if s and s.origin else '')"
)
RUN_STANDARD = """
import sys
import torch
from vbench import VBench
info, videos, out, dimension = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBench(device, info, out).evaluate(videos, dimension, dimension_list=[dimension])
"""
RUN_LONG = """
import sys
import torch
from vbench2_beta_long import VBenchLong
info, videos, out, dimension = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBenchLong(device, info, out).evaluate(
    videos,
    dimension,
    dimension_list=[dimension],
    mode="long_vbench_standard",
    use_semantic_splitting=False,
    clip_length_config="clip_length_mix.yaml",
    num_of_samples_per_prompt=5,
    slow_fast_eval_config="configs/slow_fast_params.yaml",
    sb_clip2clip_feat_extractor="dino",
    bg_clip2clip_feat_extractor="clip",
    w_inclip=1.0,
    w_clip2clip=0.0,
    static_filter_flag=False,
    dev_flag=False,
)
"""


@dataclass(frozen=True)
class VBenchPrompt:
    """A prompt of the standard set and the dimensions that it is for."""

    text: str
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Results of VBench for one set of videos.

    results: from 0 to 1 by dimension.
    long: whether VBench-Long made them.
    """

    results: Mapping[str, float]
    scores: Scores
    long: bool


# -------------------------------------------------------------------- prompts


def find_info(python: Path) -> Path:
    """VBench_full_info.json of the VBench that an interpreter has. Raises ConfigError."""
    try:
        done = subprocess.run(
            [str(python), "-c", FIND_INFO], capture_output=True, text=True, timeout=120
        )
    except OSError as error:
        raise ConfigError(f"--vbench-python {python} cannot be run: {error.strerror}") from None
    origin = done.stdout.strip()
    if done.returncode or not origin:
        raise ConfigError(
            f"--vbench-python {python} has no package vbench; make an environment for it: "
            "see docs/evaluation.md"
        )
    return Path(origin).parent / "VBench_full_info.json"


def read_prompts(info: Path) -> list[VBenchPrompt]:
    """The prompts of a VBench_full_info.json, each once with all its dimensions.

    Raises ConfigError for a file of another form, or a prompt that cannot be a file name.
    """
    entries = _read_json(info)
    if not isinstance(entries, list):
        raise ConfigError(f"{info} is not a list of prompts")
    found: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        is_prompt = isinstance(entry, dict) and isinstance(entry.get("prompt_en"), str)
        if not is_prompt or not isinstance(entry.get("dimension"), list):
            raise ConfigError(f"{info}, entry {number}, has no prompt_en and dimension")
        text = entry["prompt_en"]
        if "/" in text or len(video_name(text, 0).encode()) > MAX_NAME_BYTES:
            raise ConfigError(f"{info}, entry {number}: {text!r} cannot be the name of a file")
        dimensions = found.setdefault(text, [])
        dimensions.extend(name for name in entry["dimension"] if name not in dimensions)
    return [VBenchPrompt(text, tuple(dimensions)) for text, dimensions in found.items()]


def _read_json(path: Path) -> Any:
    """The value of a JSON file of VBench. Raises ConfigError."""
    try:
        return parse_json(read_bytes(path, MAX_INFO_BYTES), str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def video_name(prompt: str, number: int) -> str:
    """The official name of a video."""
    return f"{prompt}-{number}.mp4"


def chosen(prompts: Iterable[VBenchPrompt], dimensions: Sequence[str]) -> list[VBenchPrompt]:
    """The prompts of some dimensions."""
    return [prompt for prompt in prompts if set(prompt.dimensions) & set(dimensions)]


def read_augmented(path: Path) -> dict[str, str]:
    """Augmented prompts by official prompt, from a JSON object. Raises ConfigError."""
    try:
        document = parse_json(read_bytes(path, MAX_INFO_BYTES), str(path))
    except OSError as error:
        raise ConfigError(f"--augmented {path}: {error.strerror}") from None
    is_mapping = isinstance(document, dict) and document
    if not is_mapping or not all(isinstance(text, str) for text in document.values()):
        raise ConfigError(f"--augmented {path} is not an object of official to augmented prompts")
    return document


def check_augmented(
    texts: Mapping[str, str], official: Sequence[VBenchPrompt], sampled: Sequence[VBenchPrompt]
) -> None:
    """Raises ConfigError unless `texts` are of official prompts, and of all that are sampled.

    Otherwise some videos would be generated from official prompts without notice.
    """
    known = {prompt.text for prompt in official}
    foreign = [text for text in texts if text not in known]
    missing = [prompt.text for prompt in sampled if not texts.get(prompt.text, "").strip()]
    for what, wrong in (("of no official prompt", foreign), ("missing", missing)):
        if wrong:
            raise ConfigError(
                f"--augmented: {len(wrong)} text(s) {what}, such as {wrong[0]!r}; its keys must be "
                "the official prompts of all dimensions to evaluate"
            )


def vbench_units(
    config: SampleConfig, prompts: Sequence[VBenchPrompt], texts: Mapping[str, str] | None = None
) -> list[SampleUnit]:
    """Five videos for each prompt, with the official names.

    texts: the augmented prompt to generate from, by official prompt. Names keep the official one.
    """
    units = []
    for number, prompt in enumerate(prompts):
        for repetition in range(VIDEOS_PER_PROMPT):
            unit = SampleUnit(
                number=number,
                prompt=(texts or {}).get(prompt.text, prompt.text),
                seed=config.seed + repetition,
                num_latent_frames=config.num_latent_frames,
                motion_score=config.motion_score,
                file=video_name(prompt.text, repetition),
            )
            units.append(unit)
    return units


# -------------------------------------------------------------------- the official program


def run_dimension(
    python: Path, info: Path, videos: Path, results: Path, dimension: str, *, long: bool
) -> None:
    """Run VBench for one dimension, unless its result is there. Raises JobFailed."""
    path = result_path(results, dimension)
    if path.exists():
        return
    results.mkdir(parents=True, exist_ok=True)
    program = RUN_LONG if long else RUN_STANDARD
    words = [str(python), "-c", program, str(info), str(videos), str(results), dimension]
    log = results / f"{dimension}.log"
    with open(log, "w", encoding="utf-8") as output:
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode
    if code or not path.exists():
        raise JobFailed(f"VBench failed for {dimension} with exit code {code}; see {log}")


def result_path(results: Path, dimension: str) -> Path:
    """The file that VBench writes for a dimension."""
    return results / f"{dimension}_eval_results.json"


# -------------------------------------------------------------------- results


def read_result(
    path: Path, dimension: str, prompts: Sequence[VBenchPrompt], *, long: bool = False
) -> float:
    """The result of one dimension, from 0 to 1.

    Raises ConfigError if the file does not cover exactly the videos of the dimension's prompts.
    """
    document = _read_json(path)
    entry: Any = document.get(dimension) if isinstance(document, dict) else None
    if not _is_result(entry):
        raise ConfigError(f"{path} holds no result of {dimension} in the format of VBench")
    names = [video_of(row, path) for row in entry[1]]
    if long:
        names = list(dict.fromkeys(names))  # there are several clips of each video
    expected = set()
    for prompt in prompts:
        if dimension in prompt.dimensions:
            expected |= {video_name(prompt.text, i) for i in range(VIDEOS_PER_PROMPT)}
    problems = differences(names, expected)
    if problems:
        raise ConfigError(f"{path} does not cover the videos of {dimension}: {problems}")
    return float(entry[0])


def _is_result(entry: Any) -> bool:
    """Whether a value has the form [number, list of rows]."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
        return False
    return isinstance(entry[0], int | float) and not isinstance(entry[0], bool)


def video_of(row: Any, path: Path) -> str:
    """The video that a row of a result is about: of a clip of VBench-Long, that it is from."""
    if not isinstance(row, dict) or not isinstance(row.get("video_path"), str):
        raise ConfigError(f"{path} has a row without video_path")
    video = Path(row["video_path"])
    if "split_clip" in video.parts:
        return f"{video.parent.name}.mp4"
    return video.name


def differences(names: Sequence[str], expected: set[str]) -> str:
    """What is missing, doubled or foreign among names; empty if nothing is."""
    found = set(names)
    counted = {name: names.count(name) for name in found} if len(found) < len(names) else {}
    doubled = sorted(name for name, count in counted.items() if count > 1)
    texts = []
    for what, wrong in (
        ("missing", sorted(expected - found)),
        ("doubled", doubled),
        ("of no prompt", sorted(found - expected)),
    ):
        if wrong:
            texts.append(f"{len(wrong)} {what}, such as {wrong[0]!r}")
    return "; ".join(texts)


def is_long(frames: int, fps: float) -> bool:
    """Whether videos of this length are for VBench-Long."""
    return frames / fps > LONG_SECONDS


def read_results(
    results: Path, dimensions: Sequence[str], prompts: Sequence[VBenchPrompt], *, long: bool
) -> Evaluation:
    """The results of some dimensions, and their scores. Raises ConfigError."""
    found = {}
    for name in dimensions:
        found[name] = read_result(result_path(results, name), name, prompts, long=long)
    return Evaluation(found, aggregate(found), long)


def check_lengths(videos: Path, names: Iterable[str]) -> int:
    """Frames of the videos. Raises ConfigError if a video is missing or of another length."""
    lengths: dict[int, str] = {}
    for name in names:
        record = read_record(videos / name)
        if record is None:
            raise ConfigError(f"{videos / name} is no video of `landiff sample`; sample it again")
        lengths.setdefault(record["frames"], name)
    if len(lengths) != 1:
        shown = ", ".join(f"{name} has {frames}" for frames, name in sorted(lengths.items()))
        raise ConfigError(f"the videos of {videos} differ in length: frames: {shown}")
    return next(iter(lengths))


# -------------------------------------------------------------------- table


def comparison(evaluation: Evaluation, name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: this model and the published ones, in percent."""
    header = ["dimension", name, *[row.model for row in PUBLISHED]]
    rows = []
    for number, dimension in enumerate(DIMENSIONS):
        result = evaluation.results.get(dimension)
        others = [f"{row.results[number]:.2f}" for row in PUBLISHED]
        rows.append([dimension.replace("_", " "), _percent(result, 100), *others])
    scores = evaluation.scores
    for title, own, key in (
        ("quality score", scores.quality, "quality"),
        ("semantic score", scores.semantic, "semantic"),
        ("total score", scores.total, "total"),
    ):
        others = [f"{getattr(row, key):.2f}" for row in PUBLISHED]
        rows.append([title, _percent(own, 1), *others])
    return header, rows


def summary(evaluation: Evaluation) -> str:
    """The scores in one line."""
    scores = evaluation.scores
    parts = []
    for title, value in (
        ("quality", scores.quality),
        ("semantic", scores.semantic),
        ("total", scores.total),
    ):
        parts.append(f"{title} {_percent(value, 1)}")
    return f"vbench: {', '.join(parts)}"


def _percent(value: float | None, scale: float) -> str:
    return "not run" if value is None else f"{value * scale:.2f}"


def notes(evaluation: Evaluation, *, augmented: bool) -> list[str]:
    """What limits the comparison."""
    found = []
    missing = [name for name in DIMENSIONS if name not in evaluation.results]
    if missing:
        found.append(f"Without {', '.join(missing)} there is no score of their group and no total.")
    if evaluation.long:
        found.append("VBench-Long: its results are not those of VBench on short videos.")
    if augmented:
        found.append("Videos were generated from augmented prompts.")
    if "temporal_flickering" in evaluation.results:
        found.append(
            "temporal flickering: the static filter of the official repository was not applied."
        )
    for row in PUBLISHED:
        for text in row.inconsistencies():
            found.append(f"{row.model}: {text} from its own numbers.")
    found.append("Published rows are those of the public leaderboard, in percent.")
    return found


def write_scores(folder: Path, evaluation: Evaluation, name: str, *, augmented: bool) -> None:
    """Write scores.json and scores.html."""
    limits = notes(evaluation, augmented=augmented)
    scores = evaluation.scores
    document = {
        "results": dict(evaluation.results),
        "quality": scores.quality,
        "semantic": scores.semantic,
        "total": scores.total,
        "vbench_long": evaluation.long,
        "augmented_prompts": augmented,
        "notes": limits,
    }
    write_text(folder / "scores.json", json.dumps(document, indent=1) + "\n")
    header, rows = comparison(evaluation, name)
    numbers = list(range(1, len(header)))
    items = [element("p", text) for text in limits]
    write_page(
        folder / "scores.html",
        f"VBench of {name}",
        section("Scores in percent", table(header, rows, numbers)),
        section("Notes", items),
    )
