"""Checks and quotes every value that reaches a batch script or an `#SBATCH` line. Torch-free.

Three readers take a script apart: bash, sbatch (which reads `#SBATCH` lines by rules of its own) and
SLURM's file name patterns. Values are quoted for the one that reads them; what cannot be quoted for it,
such as a newline in an `#SBATCH` line, is refused with the name of the value.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from landiff.configs.base import ConfigError

MAX_LENGTH = 4096  # characters; sbatch reads an option into a buffer of 8 kB
# C0 and C1 control characters, the two Unicode line separators, and bytes that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
UNPRINTABLE_IN_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # tab and newline may be
PLAIN_OPTION = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # sbatch reads it as it is
JOB_ID = re.compile(r"\d+(_\d+)?")


def line_problem(value: str) -> str:
    """Why `value` is not one line of printable text; empty where it is."""
    found = UNPRINTABLE.search(value)
    if found:
        return f"holds {_character(found[0])}; a batch script takes one line of printable text here"
    if not value.strip():
        return "is empty; leave it out or give it a value"
    if len(value) > MAX_LENGTH:
        return f"has {len(value)} characters, more than {MAX_LENGTH}"
    return ""


def check_line(value: str, what: str) -> str:
    """`value`, one line of printable text. Raises ConfigError that names `what`."""
    problem = line_problem(value)
    if problem:
        raise ConfigError(f"{what} = {value[:80]!r} {problem}")
    return value


def _character(character: str) -> str:
    names = {"\n": "a newline", "\r": "a carriage return", "\t": "a tab", "\0": "a null character"}
    return names.get(character, f"the character U+{ord(character):04X}")


def variable_problem(value: str) -> str:
    """Why an environment variable cannot have this value; empty where it can. It may have lines."""
    found = UNPRINTABLE_IN_LINES.search(value)
    return f"holds {_character(found[0])}, which a batch script cannot pass on" if found else ""


def check_shell_lines(lines: Sequence[str], what: str) -> None:
    """Raise ConfigError unless the lines are complete bash on their own.

    An open quote, `if` or here-document would take in the script behind it.
    """
    text = "\n".join(lines) + "\n"
    found = UNPRINTABLE_IN_LINES.search(text)
    if found:
        raise ConfigError(f"{what} holds {_character(found[0])}")
    try:
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        raise ConfigError(f"{what} cannot be checked: bash does not answer here") from None
    if done.returncode or done.stderr:
        said = (done.stderr.strip().splitlines() or ["a syntax error"])[0]
        raise ConfigError(f"{what} is not complete bash: {said.removeprefix('bash: ')}")


def check_job_name(name: str, what: str) -> None:
    """Raise ConfigError unless `name` can name a job and its folder below runs/."""
    check_line(name, what)
    if "/" in name or name in (".", "..") or name != name.strip():
        raise ConfigError(
            f"{what} = {name!r} must not hold a slash, nor begin or end with a blank; it names a folder"
        )


def check_folder(folder: Path, what: str, separators: str = ":") -> None:
    """Raise ConfigError for a folder whose name a reader of the script takes apart at `separators`.

    A colon separates the entries of PYTHONPATH and, like a comma, the parts of container mounts.
    """
    text = check_line(str(folder), what)
    for character in separators:
        if character in text:
            raise ConfigError(
                f"{what} = {text!r} holds {character!r}, at which SLURM, containers or Python's module "
                "path take names apart; use a folder without it"
            )


def check_job_ids(jobs: Sequence[str], what: str) -> None:
    """Raise ConfigError unless all are numbers of SLURM jobs, or of tasks of arrays (12_3)."""
    for job in jobs:
        if not JOB_ID.fullmatch(job):
            raise ConfigError(
                f"{what} {job!r} is not the number of a SLURM job, e.g. 1234 or 1234_5"
            )


def sbatch_option(option: str) -> str:
    """`option` quoted for an `#SBATCH` line.

    sbatch knows single and double quotes, and takes a backslash as an escape even between them.
    """
    check_line(option, "an #SBATCH option")
    if PLAIN_OPTION.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def file_pattern(path: Path) -> str:
    """`path` as part of a SLURM file name pattern, where % introduces a field."""
    return str(path).replace("%", "%%")
