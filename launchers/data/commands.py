"""The commands `landiff shards` and `landiff precompute`.

Heavy modules are imported in the functions that need them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from landiff.configs import ConfigError, load
from landiff.configs.problems import problems_of
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.commands import (
    JobFailed,
    format_counts,
    load_for_job,
    parse_task,
    print_dry_run,
    print_lines,
)
from landiff.launchers.config import ShardsJobConfig
from landiff.launchers.data.processes import run_in_processes
from landiff.launchers.local.gpus import visible_gpus
from landiff.launchers.progress import ProgressLine

if TYPE_CHECKING:
    from landiff.data_pipeline.format.schema import Manifest

PREVIEW_FOLDER = Path("runs/precompute")


# -------------------------------------------------------------------- shards


def shards_command(args: argparse.Namespace) -> int:
    """Makes raw shards, finalizes them or shows their state. Returns the exit code."""
    if args.action == "run":
        problems = problems_of(lambda: parse_task(args.task))
        config = load_for_job(args, ShardsJobConfig, describe_shards, problems=problems)
        if config is not None:
            run_shards(config, parse_task(args.task))
        return 0
    config = load(ShardsJobConfig, args.config, args.overrides)
    if args.dry_run:
        print_dry_run(config, f"would {args.action} the raw shards of {config.data}")
    elif args.action == "status":
        print_shards_status(config)
    else:
        parse_task(args.task)
        finalize_shards(config)
    return 0


def describe_shards(config: ShardsJobConfig) -> str:
    """What `landiff shards` would do, with a summary of the source."""
    from landiff.data_pipeline.ingest.sources import report

    plan = f"would write raw shards to {config.data}"
    try:
        summary = report.summarize_source(config.content)
    except ConfigError:
        return plan  # the checks report why the source cannot be read
    return f"{plan}\n# source: {summary}"


def run_shards(config: ShardsJobConfig, task: tuple[int, int]) -> None:
    """Makes the shards of one task (number, count); the only task also writes the manifest."""
    from landiff.data_pipeline.ingest import job
    from landiff.data_pipeline.ingest.sources import report

    progress = ProgressLine("shards", "clips")
    made = job.make_task_shards(config.content, config.data, task, progress=progress)
    if task == (0, 1):
        finalize_shards(config)
        return
    print(
        f"shards: task {task[0]}/{task[1]} made {made.made} shards, {made.present} were finished "
        f"before, of {made.planned} in all; rejected: {format_counts(made.reject_counts)}; "
        "run `landiff shards finalize` when every task has ended"
    )
    print_lines("shards", report.result_lines(made.rejected, made.ignored))


def finalize_shards(config: ShardsJobConfig) -> None:
    """Writes the manifest of finished shards."""
    from landiff.data_pipeline.ingest import job
    from landiff.data_pipeline.ingest.sources import report

    manifest = job.finalize_raw_shards(config.content, config.data)
    print(
        f"shards: {manifest.num_samples} samples in {len(manifest.shards)} shards of "
        f"{config.data}; rejected: {format_counts(manifest.reject_counts)}"
    )
    print_lines("shards", report.manifest_lines(manifest))


def print_shards_status(config: ShardsJobConfig) -> None:
    """Prints how many videos were probed and how many shards are finished."""
    from landiff.data_pipeline.ingest import job

    status = job.status(config.content, config.data)
    if status is None:
        others = job.other_shards(config.content, config.data)
        print(f"shards: nothing is planned in {config.data} for this source and config{others}")
        return
    if not status.shards:
        print(
            f"shards: {status.probed} of {status.videos} videos were probed; no shard of "
            f"{config.data} is planned yet"
        )
    else:
        print(
            f"shards: {status.finished} of {status.shards} shards of {config.data} are finished, "
            f"with {status.finished_clips} of {status.clips} clips; the plan rejected "
            f"{status.rejected}"
        )
    if status.ignored.counts:
        print(f"shards: ignored: {status.ignored}")


# -------------------------------------------------------------------- precompute


def precompute_command(args: argparse.Namespace) -> int:
    """Computes columns, merges them, or reports on them. Returns the exit code."""
    if args.action in ("run", "estimate", "verify"):
        problems = problems_of(lambda: parse_task(args.task, args.tasks))
        config = load_for_job(args, PrecomputeConfig, describe_precompute, problems=problems)
        if config is None:
            return 0
    else:
        config = load(PrecomputeConfig, args.config, args.overrides)
        if args.dry_run:
            columns = ", ".join(config.columns)
            print_dry_run(config, f"would {args.action} the columns {columns} of {config.data}")
            return 0
    match args.action:
        case "run":
            task = parse_task(args.task, args.tasks)
            gpus = visible_gpus() if config.device == "auto" else 1
            if gpus > 1:
                words = [args.command, "run", "--config", args.config, *args.overrides]
                run_in_processes(words, task, gpus)
            else:
                run_precompute(config, task)
            if task == (0, 1) and not args.no_finalize:
                finalize_precompute(config)
        case "finalize":
            parse_task(args.task, args.tasks)
            finalize_precompute(config)
        case "status":
            print_precompute_status(config)
        case "estimate":
            print_precompute_estimate(config, args.clips)
        case "retry":
            print_missing_tasks(config, args.tasks)
        case "verify":
            verify_precompute(config, parse_fraction(args.sample))
    return 0


def describe_precompute(config: PrecomputeConfig) -> str:
    """What `landiff precompute` would do."""
    return f"would compute {', '.join(config.columns)} for the shards of {config.data}"


def run_precompute(config: PrecomputeConfig, task: tuple[int, int]) -> None:
    """Computes the units of one task (number, count)."""
    from landiff.data_pipeline.precompute import commands

    # SIGTERM is handled like Ctrl-C, so that unfinished units remove their temporary files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = ProgressLine("precompute", "clips", every_s=60.0)
    summary = commands.run(config, task=task, progress=progress)
    print(f"precompute: {summary}")


def finalize_precompute(config: PrecomputeConfig) -> None:
    """Merges finished columns into the manifest and writes a preview of latents."""
    from landiff.data_pipeline.precompute import commands

    manifest: Manifest = commands.finalize(config)
    print(
        f"precompute: the manifest of {config.data} has the columns "
        f"{', '.join(manifest.columns)}; rejected: {format_counts(manifest.reject_counts)}"
    )
    if "latents" not in config.columns:
        return
    from landiff.launchers.results.preview import codec_round_trip

    try:
        codec_round_trip(config, PREVIEW_FOLDER)
    except OSError as error:
        print(
            f"precompute: the columns are complete, but their preview in {PREVIEW_FOLDER} could "
            f"not be written: {error.strerror or error}",
            file=sys.stderr,
        )


def print_precompute_status(config: PrecomputeConfig) -> None:
    """Prints a table of columns: progress, speed, owner, last error."""
    from landiff.data_pipeline.precompute import commands
    from landiff.data_pipeline.precompute.status import format_table

    print(format_table(commands.status(config)))


def print_precompute_estimate(config: PrecomputeConfig, num_clips: int) -> None:
    """Prints disk space and hours, measured on `num_clips` clips."""
    from landiff.data_pipeline.precompute import commands

    print(commands.estimate(config, num_clips))


def print_missing_tasks(config: PrecomputeConfig, num_tasks: int | None) -> None:
    """Prints, for each column, the SLURM array expression of tasks with missing units."""
    from landiff.data_pipeline.precompute import commands

    if not num_tasks:
        raise ConfigError(
            "landiff precompute retry needs --tasks N, the number of tasks of the original array"
        )
    for column, expression in commands.retry(config, num_tasks).items():
        text = f"--array={expression}" if expression else "nothing is missing"
        print(f"{column:<24}{text}")


def verify_precompute(config: PrecomputeConfig, fraction: float) -> None:
    """Recomputes a fraction of the finished units. Raises JobFailed if one differs."""
    from landiff.data_pipeline.precompute import commands

    checks = commands.verify(config, fraction)
    for check in checks:
        print(check)
    if any(check.problems for check in checks):
        raise JobFailed("columns differ from what they should hold; see the lines with WRONG")


# -------------------------------------------------------------------- arguments


def parse_fraction(text: str) -> float:
    """`1%` or `0.01` -> 0.01. Raises ConfigError unless it is above 0 and at most 1."""
    scale = 100 if text.endswith("%") else 1
    try:
        fraction = float(text.removesuffix("%")) / scale
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"--sample {text} must be a fraction above 0 and at most 1, e.g. 1% or 0.5"
        )
    return fraction
