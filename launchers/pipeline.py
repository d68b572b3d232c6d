"""The pipeline as a graph of stages, and `landiff quickstart`, which runs it on this machine.

A stage is a `landiff` command line with the names of the stages it waits for. Every command resumes
where it stopped, so running the graph again continues it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from landiff.configs import load
from landiff.configs.problems import require_none
from landiff.launchers.config import WorldConfig
from landiff.launchers.local.stage_processes import Command, StoppedBySignal, run_commands
from landiff.launchers.local.stage_summary import (
    StageResult,
    first_and_last_loss,
    merge_results,
    print_stage_table,
    read_summary,
    write_summary,
)
from landiff.launchers.project.presets import (
    has_config,
    packaged_presets,
    preset_config,
    require_preset,
)

QUICKSTART_OUT = "runs/quickstart"


@dataclass(frozen=True)
class PipelineStage:
    """One command of the pipeline."""

    name: str
    title: str
    command: tuple[str, ...]  # words after `landiff`
    after: tuple[str, ...] = ()  # names of the stages it waits for
    run: str | None = None  # run folder of a trainer, whose losses belong to the stage
    output: str = ""  # the main result, relative to the working folder


def quickstart_command(args: argparse.Namespace) -> int:
    """Runs the pipeline of a preset. Returns the exit code of the first failed stage, or 0.

    Raises ConfigError with all mistakes of the configs, before anything is started.
    """
    # Imported here, because the command `new` reads the stages and checks nothing.
    from landiff.launchers.project.check import check_preset
    from landiff.launchers.project.selection import names_to_skip

    out = args.out
    if out is None:
        out = QUICKSTART_OUT if args.preset in packaged_presets() else args.preset
    require_preset(args.preset)
    report = check_preset(args.preset, Path(out), args.first, args.skip or ())
    require_none(report.problems)
    for name, reason in report.skipped.items():
        print(f"# {name} is skipped: {reason}")
    stages = local_stages(args.preset, args.prompt or ())
    at_once = stages_at_once(args.preset)
    if args.dry_run:
        print_outlook(report.configs, report.skipped, Path(out), processes_of(args.preset))
    skipped = names_to_skip(report.skipped)
    left = [stage for stage in stages if stage.name not in skipped]
    code = run_pipeline("quickstart", left, Path(out), args.dry_run, at_once)
    if not args.dry_run and code == 0:
        from landiff.launchers.results.pipeline_page import write_quickstart_report

        stages_run = read_summary(Path(out)).stages
        print(f"             open {write_quickstart_report(Path(out), stages_run)}")
    return code


def print_outlook(
    configs: Mapping[str, Any], skipped: Mapping[str, str], out: Path, processes: Mapping[str, int]
) -> None:
    """Prints GPU hours, days and disk of the stages that run. Any: configs of a preset by stem.

    processes: of trainers by stem; others have as many as `landiff train` chooses.
    """
    # Imported here, because it loads torch.
    from landiff.launchers.budget.total import ORDER
    from landiff.launchers.local.gpus import default_processes
    from landiff.launchers.project.outlook import outlook

    left = {stem: config for stem, config in configs.items() if stem not in skipped}
    gpus = {}
    for stem in [stem for stems in ORDER for stem in stems]:
        if stem in left:
            gpus[stem] = processes.get(stem) or default_processes(left[stem])
    for line in outlook(left, gpus, out):
        print(f"# {line}")


def data_stages(preset: str, processes: int | None) -> list[PipelineStage]:
    """Raw shards, the tokenizer, and all columns."""
    return [
        PipelineStage(
            "shards",
            "clips -> raw shards",
            ("shards", "--config", preset_config(preset, "shards")),
            output="data/manifest.json",
        ),
        PipelineStage(
            "features",
            "vision features",
            ("precompute", "--config", preset_config(preset, "features")),
            after=("shards",),
            output="data/features",
        ),
        PipelineStage(
            "tokenizer",
            "semantic tokenizer, torch DDP",
            train_words("tokenizer", preset_config(preset, "tokenizer"), processes),
            after=("features",),
            run="runs/tokenizer",
            output="runs/tokenizer",
        ),
        PipelineStage(
            "export tokenizer",
            "checkpoint -> zoo",
            export_words("runs/tokenizer", "tokenizer"),
            after=("tokenizer",),
            output="zoo/tokenizer",
        ),
        PipelineStage(
            "columns",
            "tokens, latents, text states",
            ("precompute", "--config", preset_config(preset, "precompute")),
            after=("export tokenizer",),
            output="runs/precompute",
        ),
    ]


def model_stages(preset: str, processes: int | None) -> list[PipelineStage]:
    """Training and export of the language model and the diffusion model."""
    return [
        PipelineStage(
            "lm",
            "language model, Megatron-core",
            train_words("lm", preset_config(preset, "lm"), processes),
            after=("columns",),
            run="runs/lm",
            output="runs/lm",
        ),
        PipelineStage(
            "diffusion main",
            "main transformer, DeepSpeed ZeRO",
            train_words("diffusion", preset_config(preset, "diffusion-main"), processes),
            after=("columns",),
            run="runs/diffusion-main",
            output="runs/diffusion-main",
        ),
        PipelineStage(
            "export main",
            "checkpoint -> zoo",
            export_words("runs/diffusion-main", "main"),
            after=("diffusion main",),
            output="zoo/main",
        ),
        PipelineStage(
            "diffusion control",
            "control branch, main frozen",
            train_words("diffusion", preset_config(preset, "diffusion-control"), processes),
            after=("export main",),
            run="runs/diffusion-control",
            output="runs/diffusion-control",
        ),
        PipelineStage(
            "export lm",
            "checkpoint -> zoo",
            export_words("runs/lm", "lm"),
            after=("lm",),
            output="zoo/lm",
        ),
        PipelineStage(
            "export diffusion",
            "checkpoint -> zoo",
            export_words("runs/diffusion-control", "diffusion"),
            after=("diffusion control",),
            output="zoo/diffusion",
        ),
    ]


def result_stages(preset: str, prompts: Sequence[str]) -> list[PipelineStage]:
    """Evaluation and samples."""
    prompt_words = ("--", *prompts) if prompts else ()
    return [
        PipelineStage(
            "evaluate",
            "are the conditions used?",
            ("evaluate", "--config", preset_config(preset, "evaluate")),
            after=("export lm", "export diffusion"),
            output="evaluation.json",
        ),
        PipelineStage(
            "sample",
            "prompts -> mp4",
            ("sample", "--config", preset_config(preset, "sample"), *prompt_words),
            after=("export lm", "export diffusion"),
            output="samples",
        ),
    ]


def train_words(stage: str, config: str, processes: int | None) -> tuple[str, ...]:
    """Words of a `landiff train` command. `processes`: None lets the command choose."""
    words = ("train", stage, "--config", config)
    return words if processes is None else (*words, "--nproc", str(processes))


def export_words(run: str, name: str) -> tuple[str, ...]:
    """Words of the `landiff convert` command that exports a run to the zoo entry `name`."""
    return ("convert", run, "--name", name)


def pipeline_stages(
    preset: str, processes: int | None, prompts: Sequence[str] = ()
) -> list[PipelineStage]:
    """The whole pipeline with the configs of `preset`, in an order that can be run.

    `preset` is packaged or a folder. `processes` is the number of processes of each trainer; None
    lets `landiff train` choose.
    """
    return [
        *data_stages(preset, processes),
        *model_stages(preset, processes),
        *result_stages(preset, prompts),
    ]


# Of a preset with `latents`: processes of the trainers, and stages that others wait for. The main
# transformer reads no tokens, so one process trains it and then the control branch, while another
# trains the tokenizer and then the language model. Two processes were not faster for the control
# branch either: on two cores they took 27 samples a second, one process 34.
BESIDE_PROCESSES = {"tokenizer": 1, "lm": 1, "diffusion-main": 1, "diffusion-control": 1}
BESIDE_AFTER = {
    "diffusion main": ("latents",),
    "diffusion control": ("export main", "columns"),
}


def processes_of(preset: str) -> Mapping[str, int]:
    """Processes of the trainers of a preset by stem. Empty: `landiff train` chooses."""
    if preset == "nano":
        return dict.fromkeys(BESIDE_PROCESSES, 2)  # its language model is divided over two ranks
    return BESIDE_PROCESSES if has_config(preset, "latents") else {}


def stages_at_once(preset: str) -> int:
    """Number of stages of a preset that run at the same time on this machine."""
    return 2 if has_config(preset, "latents") else 1


def local_stages(
    preset: str, prompts: Sequence[str] = (), seed: int | None = None
) -> list[PipelineStage]:
    """The pipeline of a preset as this machine runs it: with clips of moving shapes made first, and
    with latents computed beside the features, if the preset has configs of these stages.

    seed: of all trainings and of the moving shapes, in place of those of the configs.
    """
    processes = processes_of(preset)
    beside = has_config(preset, "latents")
    later = BESIDE_AFTER if beside else {}
    stages = []
    first: tuple[str, ...] = ()
    if has_config(preset, "world"):
        stages.append(world_stage(preset, seed))
        first = (stages[0].name,)
    for stage in pipeline_stages(preset, None, prompts):
        words = list(stage.command)
        stem = stage.name.replace(" ", "-")
        if stem in processes:
            words += ["--nproc", str(processes[stem])]
        if stage.run is not None and seed is not None:
            words.append(f"loop.seed={seed}")
        after = later.get(stage.name, stage.after or first)
        stages.append(replace(stage, command=tuple(words), after=after))
        if beside and stage.name == "features":
            stages.append(latents_stage(preset))
    return stages


def world_stage(preset: str, seed: int | None) -> PipelineStage:
    """Clips of moving shapes."""
    config = load(WorldConfig, preset_config(preset, "world"))
    words = ["shapes", "make", "--out", "world", "--clips", str(config.clips)]
    words += ["--true-clips", str(config.true_clips)]
    words += ["--seed", str(config.seed if seed is None else seed)]
    return PipelineStage("world", "moving shapes with captions", tuple(words), output="world")


def latents_stage(preset: str) -> PipelineStage:
    """The columns that need no tokenizer."""
    return PipelineStage(
        "latents",
        "latents, text states",
        ("precompute", "--config", preset_config(preset, "latents")),
        after=("shards",),
        output="data/latents",
    )


def run_pipeline(
    name: str, stages: Sequence[PipelineStage], out: Path, dry_run: bool, at_once: int = 1
) -> int:
    """Runs stages in `out`, at most `at_once` at a time. Times include those of earlier runs there.

    Returns 0, the exit code of the first failed stage, 1 if a trainer was asked to stop before its
    last step, or 128 + n if signal n stopped the pipeline.
    """
    if dry_run:
        print(f"cd {out}")
        for stage in stages:
            print(f"landiff {shlex.join(stage.command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    earlier = read_summary(out)
    started = time.monotonic() - earlier.seconds
    results: list[StageResult] = []
    stopped: StoppedBySignal | None = None
    try:
        for result in run_stages(stages, out, at_once):
            results.append(result)
            merged = merge_results(earlier.stages, results)
            write_summary(out, merged, time.monotonic() - started)
    except StoppedBySignal as signal:
        stopped = signal
    code, problem = problem_of(results, stopped)
    if problem:
        print(f"\nlandiff {name}: {problem}", file=sys.stderr)
        return code
    print_stage_table(merge_results(earlier.stages, results), time.monotonic() - started)
    print(f"\nnext steps:  play {out}/samples/*.mp4")
    print(f"             tensorboard --logdir {out}/runs")
    print(f"             read {out}/summary.json")
    return 0


def run_stages(stages: Sequence[PipelineStage], out: Path, at_once: int) -> Iterator[StageResult]:
    """Runs stages in `out` and yields each when it has ended. Raises StoppedBySignal."""
    by_name = {stage.name: stage for stage in stages}
    commands = []
    for stage in stages:
        commands.append(Command(stage.name, stage.title, stage.command, stage.after, stage.run))
    for finished in run_commands(commands, out, at_once):
        stage = by_name[finished.name]
        result = StageResult(**vars(finished), look=stage.output)
        if stage.run is not None:
            result.first_loss, result.last_loss = first_and_last_loss(out / stage.run)
        yield result


def problem_of(results: Sequence[StageResult], stopped: StoppedBySignal | None) -> tuple[int, str]:
    """Exit code of a pipeline and why it ended early; 0 and "" if it did not."""
    again = "Run the same command again to resume from this stage."
    if stopped is not None:
        return (
            128 + stopped.number,
            f"stopped by {stopped}; run the same command again to resume",
        )
    for result in results:
        if result.exit_code:
            code = result.exit_code
            return (
                code if code > 0 else 128 - code,  # -n: ended by signal n
                f"stage {result.name!r} failed with exit code {result.exit_code}; its error "
                f"message is above. {again}",
            )
    for result in results:
        if result.unfinished:
            return 1, f"stage {result.name!r} was stopped before its last step. {again}"
    return 0, ""
