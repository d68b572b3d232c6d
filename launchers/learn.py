"""`landiff learn`: the pipeline of the preset `shapes`, from generated clips to scored videos.

With `--long`, a second language model is trained on clips of two segments as well, and continues
videos of four chunks.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from landiff.configs.documents import read_json
from landiff.launchers.local.stage_summary import read_summary
from landiff.launchers.pipeline import (
    PipelineStage,
    export_words,
    local_stages,
    run_pipeline,
    stages_at_once,
    train_words,
)

LEARN_PRESET = "shapes"
RATES = "rates.json"
LONG_FOLDER = "long"
LONG_CHUNKS = 4
LONG_CLIPS = 1500
LONG_FRAMES = 37  # two segments, the second of which follows the first
LONG_SEED = 1000  # is added to the seed, so that long clips do not begin like the short ones


def learn_command(args: argparse.Namespace) -> int:
    """Trains on the shapes world from scratch and scores the result. Returns the exit code."""
    out = Path(args.out)
    stages = learn_stages(args.seed, long=args.long)
    code = run_pipeline("learn", stages, out, args.dry_run, stages_at_once(LEARN_PRESET))
    if not args.dry_run and code == 0:
        from landiff.launchers.results.shapes_page import write_learn_report

        rates = rates_text(out)
        print(f"\n{rates}")
        print(f"report: {write_learn_report(out, read_summary(out).stages, rates)}")
    return code


def learn_stages(seed: int, *, long: bool = False) -> list[PipelineStage]:
    """The pipeline of the preset `shapes`, and its scores. long: with `long_stages`."""
    stages = []
    for stage in local_stages(LEARN_PRESET, seed=seed):
        if stage.name == "sample":
            words = (*stage.command, "--prompts", "world/prompts-heldout.txt")
            stage = replace(stage, command=words)
        stages.append(stage)
    labels = "world/labels-true-heldout.jsonl"
    words = ("attribute", "--config", "shapes/sample", "--videos", "world/true-heldout")
    stages += [
        PipelineStage(
            "attribute",
            "which stage loses what",
            (*words, "--labels", labels, "--out", "attribution.json"),
            after=("export lm", "export diffusion"),
            output="attribution.json",
        ),
        score_stage("score", "sample", "samples", RATES),
    ]
    if not long:
        return stages
    # Those that the other stages do not wait for come last, so that they fill idle cores.
    return [*stages, *long_stages(seed)]


def long_stages(seed: int) -> list[PipelineStage]:
    """A language model for videos of several chunks, and what it makes."""
    world = f"{LONG_FOLDER}/world"
    make = ("shapes", "make", "--out", world, "--clips", str(LONG_CLIPS), "--true-clips", "0")
    sample = ("sample", "--config", "shapes/long-sample", "--prompts", "world/prompts-heldout.txt")
    run = "runs/lm-long"
    return [
        PipelineStage(
            "long world",
            "moving shapes, two segments each",
            (*make, "--frames", str(LONG_FRAMES), "--seed", str(seed + LONG_SEED)),
            after=("lm",),
            output=world,
        ),
        PipelineStage(
            "long shards",
            "clips -> raw shards",
            ("shards", "--config", "shapes/long-shards"),
            after=("long world",),
            output=f"{LONG_FOLDER}/data/manifest.json",
        ),
        PipelineStage(
            "long columns",
            "tokens, text states",
            ("precompute", "--config", "shapes/long-columns"),
            after=("long shards",),
            output=f"{LONG_FOLDER}/data/tokens",
        ),
        PipelineStage(
            "long lm",
            "language model, clips of both lengths",
            (*train_words("lm", "shapes/long-lm", 1), f"loop.seed={seed}"),
            after=("long columns",),
            run=run,
            output=run,
        ),
        PipelineStage(
            "export long lm",
            "checkpoint -> zoo",
            export_words(run, "lm-long"),
            after=("long lm",),
            output="zoo/lm-long",
        ),
        PipelineStage(
            "long sample",
            f"prompts -> mp4 of {LONG_CHUNKS} chunks",
            sample,
            after=("export long lm", "export diffusion"),
            output=f"{LONG_FOLDER}/samples",
        ),
        score_stage(
            "long score",
            "long sample",
            f"{LONG_FOLDER}/samples",
            f"{LONG_FOLDER}/{RATES}",
            chunks=LONG_CHUNKS,
        ),
    ]


def score_stage(name: str, after: str, videos: str, out: str, chunks: int = 1) -> PipelineStage:
    """Rates of the videos of held-out captions. chunks: of a video, compared with each other."""
    words = ["shapes", "score", "--videos", videos, "--labels", "world/prompts-heldout.jsonl"]
    words += ["--out", out]
    if chunks > 1:
        words += ["--chunks", str(chunks)]
    return PipelineStage(name, "videos -> rates", tuple(words), after=(after,), output=out)


def rates_text(out: Path) -> str:
    """Rates of the samples, and of those of several chunks, if there are any."""
    from landiff.launchers.data.shapes import format_rates

    text = f"held-out prompts: {format_rates(read_json(out / RATES))}"
    long = out / LONG_FOLDER / RATES
    if long.exists():
        text += f"\nthe same prompts in {LONG_CHUNKS} chunks: {format_rates(read_json(long))}"
    return text
