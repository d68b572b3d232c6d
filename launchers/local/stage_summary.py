"""`summary.json` of a pipeline: time, exit code and losses of its stages, over all runs there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from landiff.configs.documents import read_json
from landiff.configs.durations import duration
from landiff.configs.files import write_text
from landiff.launchers.slurm.snapshot import describe_code
from landiff.training.checkpoint.run_folder import METRICS, read_metrics

SUMMARY = "summary.json"


@dataclass
class StageResult:
    """Time, exit code and losses of a stage. One entry of `summary.json`."""

    name: str
    seconds: float
    cpu_seconds: float
    exit_code: int
    unfinished: bool = False  # a trainer that stopped before its last step
    first_loss: float | None = None
    last_loss: float | None = None
    look: str = ""  # PipelineStage.output
    earlier_run: bool = False  # of an earlier run of the pipeline; this one did not reach the stage


@dataclass(frozen=True)
class Summary:
    """What `summary.json` of a folder holds: seconds and stages of all runs of the pipeline."""

    seconds: float
    stages: tuple[StageResult, ...]


def read_summary(out: Path) -> Summary:
    """The summary of a folder; one without stages if no pipeline has run there."""
    if not (out / SUMMARY).exists():
        return Summary(0.0, ())
    document = read_json(out / SUMMARY)
    return Summary(document["seconds"], tuple(StageResult(**one) for one in document["stages"]))


def merge_results(
    earlier: Iterable[StageResult], results: Sequence[StageResult]
) -> list[StageResult]:
    """The results of a run with the times of earlier runs added.

    Stages that only earlier runs have reached follow, marked as such.
    """
    by_name = {result.name: result for result in earlier}
    merged = []
    for result in results:
        before = by_name.pop(result.name, None)
        if before is not None:
            seconds = round(result.seconds + before.seconds, 1)
            cpu_seconds = round(result.cpu_seconds + before.cpu_seconds, 1)
            result = replace(result, seconds=seconds, cpu_seconds=cpu_seconds)
        merged.append(result)
    for before in by_name.values():
        merged.append(replace(before, earlier_run=True))
    return merged


def first_and_last_loss(run: Path, points: int = 5) -> tuple[float | None, float | None]:
    """Mean of the first and of the last `points` logged losses of a run, to average out noise."""
    values = []
    for line in read_metrics(run / METRICS):
        if "train/loss" in line:
            values.append(line["train/loss"])
    if not values:
        return None, None
    return fmean(values[:points]), fmean(values[-points:])


def write_summary(out: Path, results: Sequence[StageResult], seconds: float) -> None:
    """Writes `summary.json`: origin of the code, stages, evaluation and names of videos."""
    evaluation = out / "evaluation.json"
    document = {
        "code": describe_code()[0],
        "seconds": round(seconds, 1),
        "stages": [vars(result) for result in results],
        "evaluation": None,
        "videos": sorted(str(path.relative_to(out)) for path in out.glob("samples/*.mp4")),
    }
    if evaluation.exists():
        document["evaluation"] = read_json(evaluation, allow_nonfinite=True)
    write_text(out / SUMMARY, json.dumps(document, indent=1))


def print_stage_table(results: Sequence[StageResult], seconds: float) -> None:
    """Prints time, CPU time, losses and output of each stage."""
    print(f"\n{'stage':<20}{'time':>8}{'CPU':>8}{'first loss':>13}{'last loss':>12}  output")
    for result in results:
        first = format_loss(result.first_loss)
        last = format_loss(result.last_loss)
        times = f"{duration(result.seconds):>8}{duration(result.cpu_seconds):>8}"
        print(f"{result.name:<20}{times}{first:>13}{last:>12}  {shown_output(result)}")
    cpu_seconds = sum(result.cpu_seconds for result in results)
    print(f"{'all':<20}{duration(seconds):>8}{duration(cpu_seconds):>8}")


def format_loss(loss: float | None) -> str:
    """A loss with four decimals; "" if there is none."""
    return "" if loss is None else f"{loss:.4f}"


def shown_output(result: StageResult) -> str:
    """The output of a stage, with a note if an earlier run of the pipeline made it."""
    return f"{result.look} (earlier run)".lstrip() if result.earlier_run else result.look
