"""Checks and quotes values that go into a batch script or an `#SBATCH` line. Torch-free.

Three parsers read a script: bash, sbatch with its own rules for `#SBATCH` lines, and SLURM's file
name patterns. Values are quoted for the one that reads them. What cannot be quoted, such as a
newline in an `#SBATCH` line, is rejected with the name of the value.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from landiff.configs.base import ConfigError

MAX_LENGTH = 4096  # characters; the buffer of sbatch for an option has 8 kB
# C0 and C1 control characters, the two Unicode line separators, and bytes that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# The same for text of several lines, where tab and newline are allowed
UNPRINTABLE_IN_LINES = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
PLAIN_OPTION = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # needs no quotes
JOB_ID = re.compile(r"\d+(_\d+)?")


def line_problem(value: str) -> str:
    """Why `value` is not one line of printable text; empty if it is."""
    found = UNPRINTABLE.search(value)
    if found:
        return f"holds {_character(found[0])}; a batch script takes one line of printable text here"
    if not value.strip():
        return "is empty; leave it out or give it a value"
    if len(value) > MAX_LENGTH:
        return f"has {len(value)} characters, more than {MAX_LENGTH}"
    return ""


def check_line(value: str, what: str) -> str:
    """Return `value` if it is one line of printable text. Raises ConfigError that names `what`."""
    problem = line_problem(value)
    if problem:
        raise ConfigError(f"{what} = {value[:80]!r} {problem}")
    return value


def _character(character: str) -> str:
    """Name of a character that cannot be printed."""
    names = {"\n": "a newline", "\r": "a carriage return", "\t": "a tab", "\0": "a null character"}
    return names.get(character, f"the character U+{ord(character):04X}")


def variable_problem(value: str) -> str:
    """Why an environment variable cannot have this value; empty if it can. Newlines are allowed."""
    found = UNPRINTABLE_IN_LINES.search(value)
    if found:
        return f"holds {_character(found[0])}, which a batch script cannot pass on"
    return ""


def check_shell_lines(lines: Sequence[str], what: str) -> None:
    """Raise ConfigError unless the lines are complete bash on their own.

    An open quote, `if` or here-document would swallow the rest of the script.
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
        raise ConfigError(
            f"{what} cannot be checked: bash is not installed or does not answer"
        ) from None
    if done.returncode or done.stderr:
        lines = done.stderr.strip().splitlines() or ["a syntax error"]
        raise ConfigError(f"{what} is not complete bash: {lines[0].removeprefix('bash: ')}")


def check_job_name(name: str, what: str) -> None:
    """Raise ConfigError unless `name` can be the name of a job and of its folder below runs/."""
    check_line(name, what)
    if "/" in name or name in (".", "..") or name != name.strip():
        raise ConfigError(
            f"{what} = {name!r} names a folder, so it must not hold a slash, "
            "nor begin or end with a blank"
        )


def check_folder(folder: Path, what: str, separators: str = ":") -> None:
    """Raise ConfigError for a folder whose name a parser of the script would split at `separators`.

    A colon separates the entries of PYTHONPATH and, like a comma, the parts of container mounts.
    """
    text = check_line(str(folder), what)
    for character in separators:
        if character in text:
            raise ConfigError(
                f"{what} = {text!r} holds {character!r}, at which SLURM, containers or Python's "
                "module path split names; use a folder without it"
            )


def check_job_ids(jobs: Sequence[str], what: str) -> None:
    """Raise ConfigError unless all are ids of SLURM jobs, or of tasks of arrays (12_3)."""
    for job in jobs:
        if not JOB_ID.fullmatch(job):
            raise ConfigError(
                f"{what} {job!r} is not the id of a SLURM job, for example 1234 or 1234_5"
            )


def sbatch_option(option: str) -> str:
    """`option` quoted for an `#SBATCH` line.

    sbatch supports single and double quotes. A backslash is an escape even between them.
    """
    check_line(option, "an #SBATCH option")
    if PLAIN_OPTION.fullmatch(option):
        return option
    escaped = option.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def file_pattern(path: Path) -> str:
    """`path` as part of a SLURM file name pattern, where % introduces a field."""
    return str(path).replace("%", "%%")
