"""Shared by the functions behind the commands: checked configs, dry runs, printed results."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from landiff.configs import Config, ConfigError, dump
from landiff.configs.problems import (
    Problem,
    WrongValue,
    check_output_file,
    check_writable,
    require_none,
)
from landiff.configs.secrets import redact
from landiff.launchers.checks import load_checked
from landiff.launchers.project.space import check_job_space
from landiff.training.checks import Launch

C = TypeVar("C", bound=Config)


FILES = {
    "data": ("out",),
    "attribute": ("out",),
    "fit-codec": ("out",),
    "report": ("out",),
    "shapes": ("details",),
}
FOLDERS = {
    "quickstart": ("out",),
    "learn": ("out",),
    "doctor": ("report",),
    "zoo": ("out",),
    "new": ("folder",),
}
"""Command -> its options that name a file or a folder that is written."""


class JobFailed(RuntimeError):
    """A job ended without doing its work. The message says why and what to do."""


def load_for_job(
    args: argparse.Namespace,
    cls: type[C],
    describe: Callable[[C], str],
    *,
    values: Mapping[str, Any] | None = None,
    problems: Sequence[Problem] = (),
) -> C | None:
    """Loads the config of a command and checks everything that can be known before the job starts.

    With --dry-run, prints the config and `describe(config)`, and returns None if the checks pass.
    Raises one ConfigError with all problems, those in `problems` included. `values` replace
    top-level keys of the config without being parsed as YAML.
    """
    stage = args.command
    config, found = load_checked(
        stage, cls, args.config, args.overrides, launch=Launch(), values=values
    )
    if args.dry_run:
        print_dry_run(config, describe(config), found)
    require_none([*problems, *found, *check_job_space(config)])
    return None if args.dry_run else config


def check_outputs(args: argparse.Namespace) -> list[Problem]:
    """Problems with the files and folders that the options of a command name, before it starts.

    Those that are keys of configs belong to the checks of their stages.
    """
    files = list(FILES.get(args.command, ()))
    folders = list(FOLDERS.get(args.command, ()))
    if args.command == "shapes":
        writes_file = args.action in ("score", "show")
        (files if writes_file else folders).append("out")
    problems = []
    for name in files:
        value = getattr(args, name)
        if value is not None:
            problems += check_output_file(f"--{name}", Path(value))
    for name in folders:
        value = getattr(args, name)
        if value is not None:
            key = "FOLDER" if name == "folder" else f"--{name}"
            problems += check_writable(key, Path(value))
    return problems


def print_dry_run(config: Config, plan: str, problems: Sequence[Problem] = ()) -> None:
    """Prints the resolved config and what the command would do, without secrets.

    Prints nothing if `problems` has a wrong value, since the config then has another in its place.
    """
    if any(isinstance(problem, WrongValue) for problem in problems):
        return
    print(redact(f"{dump(config)}\n# {plan}"))


def parse_task(text: str | None, tasks: int | None = None) -> tuple[int, int]:
    """`3/50` -> (3, 50), counted from 0. Without `text`, the task of the SLURM array or (0, 1).

    `tasks` is the number of tasks in all, if the array holds only some of them, as after
    `landiff precompute retry`. Raises ConfigError for anything else.
    """
    if text is None and tasks is not None and "SLURM_ARRAY_TASK_ID" in os.environ:
        text = f"{os.environ['SLURM_ARRAY_TASK_ID']}/{tasks}"
    if text is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        number = int(os.environ["SLURM_ARRAY_TASK_ID"]) - first
        return number, int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    if text is None:
        return 0, 1
    number_text, _, count_text = text.partition("/")
    is_task = number_text.isdigit() and count_text.isdigit()
    if not is_task or int(number_text) >= int(count_text):
        raise ConfigError(f"--task {text} must be I/N with 0 <= I < N, e.g. 0/8")
    return int(number_text), int(count_text)


def print_lines(command: str, lines: Iterable[str]) -> None:
    """Prints result lines of a command, each after the command's name."""
    for line in lines:
        print(f"{command}: {line}")


def format_counts(counts: Mapping[str, int]) -> str:
    """Counts as text, for example `1 empty_caption, 2 too_short`."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
