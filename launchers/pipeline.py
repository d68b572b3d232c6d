"""The walk as a graph of stages, and the quickstart that runs it here, one stage after the other.

A stage is a `landiff` command line with the names of the stages it waits for; nothing in it is special to
the quickstart. Every command goes on from where it was, so running the graph again continues it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.launchers.local.children import environment
from landiff.launchers.progress import duration
from landiff.training.checkpoint.run_folder import read_metrics


@dataclass(frozen=True)
class PipelineStage:
    """One command of the walk. `run` is the run folder whose losses belong to it, if it trains."""

    name: str
    title: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    run: str | None = None
    look: str = ""  # where a person finds the result


@dataclass
class StageResult:
    name: str
    seconds: float
    exit_code: int
    first_loss: float | None = None
    last_loss: float | None = None
    look: str = ""


def pipeline_stages(
    preset: str, processes: int, prompts: Sequence[str] = ()
) -> list[PipelineStage]:
    """The whole walk (architecture §1) with the packaged configs of a preset, in an order that can be run."""

    def train(stage: str, config: str) -> tuple[str, ...]:
        return ("train", stage, "--config", f"{preset}/{config}", "--nproc", str(processes))

    def convert(run: str, name: str) -> tuple[str, ...]:
        return ("convert", f"runs/{run}", "--name", name)

    behind = ("--", *prompts) if prompts else ()
    return [
        PipelineStage(
            "shards",
            "clips -> raw shards",
            ("shards", "--config", f"{preset}/shards"),
            look="data/manifest.json",
        ),
        PipelineStage(
            "features",
            "vision features",
            ("precompute", "--config", f"{preset}/features"),
            ("shards",),
            look="data/features",
        ),
        PipelineStage(
            "tokenizer",
            "semantic tokenizer, torch DDP",
            train("tokenizer", "tokenizer"),
            ("features",),
            "runs/tokenizer",
            "runs/tokenizer",
        ),
        PipelineStage(
            "export tokenizer",
            "checkpoint -> zoo",
            convert("tokenizer", "tokenizer"),
            ("tokenizer",),
            look="zoo/tokenizer",
        ),
        PipelineStage(
            "columns",
            "tokens, latents, text states",
            ("precompute", "--config", f"{preset}/precompute"),
            ("export tokenizer",),
            look="runs/precompute",
        ),
        PipelineStage(
            "lm",
            "language model, Megatron-core",
            train("lm", "lm"),
            ("columns",),
            "runs/lm",
            "runs/lm",
        ),
        PipelineStage(
            "diffusion main",
            "main transformer, DeepSpeed ZeRO",
            train("diffusion", "diffusion-main"),
            ("columns",),
            "runs/diffusion-main",
            "runs/diffusion-main",
        ),
        PipelineStage(
            "export main",
            "checkpoint -> zoo",
            convert("diffusion-main", "main"),
            ("diffusion main",),
            look="zoo/main",
        ),
        PipelineStage(
            "diffusion control",
            "control branch, main frozen",
            train("diffusion", "diffusion-control"),
            ("export main",),
            "runs/diffusion-control",
            "runs/diffusion-control",
        ),
        PipelineStage(
            "export lm", "checkpoint -> zoo", convert("lm", "lm"), ("lm",), look="zoo/lm"
        ),
        PipelineStage(
            "export diffusion",
            "checkpoint -> zoo",
            convert("diffusion-control", "diffusion"),
            ("diffusion control",),
            look="zoo/diffusion",
        ),
        PipelineStage(
            "evaluate",
            "are the conditions used?",
            ("evaluate", "--config", f"{preset}/evaluate"),
            ("export lm", "export diffusion"),
            look="evaluation.json",
        ),
        PipelineStage(
            "sample",
            "prompts -> mp4",
            ("sample", "--config", f"{preset}/sample", *behind),
            ("export lm", "export diffusion"),
            look="samples",
        ),
    ]


def quickstart(out: Path, prompts: Sequence[str], dry_run: bool) -> int:
    """Run the nano walk in `out`. Returns the exit code of the first stage that fails, or 0."""
    stages = pipeline_stages("nano", processes=2, prompts=prompts)
    if dry_run:
        print(f"cd {out}")
        for stage in stages:
            print("landiff " + " ".join(repr(c) if " " in c else c for c in stage.command))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: list[StageResult] = []
    for number, stage in enumerate(stages, 1):
        print(f"\n== {number}/{len(stages)} {stage.name}: {stage.title}", flush=True)
        result = run_stage(stage, out)
        results.append(result)
        write_summary(out, results, time.monotonic() - started)
        if result.exit_code:
            print(
                f"\nlandiff quickstart: stage {stage.name!r} failed with exit code {result.exit_code}; its own message is above. "
                f"Run the same command again to go on from here.",
                file=sys.stderr,
            )
            return result.exit_code
    print_table(results, time.monotonic() - started)
    print(
        f"\nlook next:  {out}/samples/*.mp4\n            tensorboard --logdir {out}/runs\n            {out}/summary.json"
    )
    return 0


def run_stage(stage: PipelineStage, out: Path) -> StageResult:
    """One stage as its own `landiff` process in `out`; its lines go straight to the person."""
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", "landiff.launchers.cli", *stage.command], cwd=out, env=environment()
    ).returncode
    first, last = losses(out / stage.run) if stage.run else (None, None)
    return StageResult(
        stage.name, round(time.monotonic() - started, 1), code, first, last, stage.look
    )


def losses(run: Path, points: int = 5) -> tuple[float | None, float | None]:
    """Mean over the first and over the last `points` logged losses of a run: a single batch says little."""
    path = run / "metrics.jsonl"
    values = [line["train/loss"] for line in read_metrics(path) if "train/loss" in line]
    return (fmean(values[:points]), fmean(values[-points:])) if values else (None, None)


def write_summary(out: Path, results: Sequence[StageResult], seconds: float) -> None:
    """`summary.json`: the table, plus the evaluation and the videos once they are there."""
    evaluation = out / "evaluation.json"
    document = {
        "seconds": round(seconds, 1),
        "stages": [vars(r) for r in results],
        "evaluation": read_json(evaluation, allow_nonfinite=True) if evaluation.exists() else None,
        "videos": sorted(str(p.relative_to(out)) for p in (out / "samples").glob("*.mp4")),
    }
    write_text(out / "summary.json", json.dumps(document, indent=1))


def print_table(results: Sequence[StageResult], seconds: float) -> None:
    print(f"\n{'stage':<20}{'time':>8}{'first loss':>13}{'last loss':>12}  look at")
    for r in results:
        first = f"{r.first_loss:.4f}" if r.first_loss is not None else ""
        last = f"{r.last_loss:.4f}" if r.last_loss is not None else ""
        print(f"{r.name:<20}{duration(r.seconds):>8}{first:>13}{last:>12}  {r.look}")
    print(f"{'all':<20}{duration(seconds):>8}")
