"""Problems found before a job starts, collected so that they are reported together."""

from __future__ import annotations

import difflib
import itertools
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from landiff.configs.base import ConfigError

SHOWN_PROBLEMS = 20  # at most, in one message
MAX_LISTED_NAMES = 25  # known names are listed in a message if there are fewer
MOST_NAMES = 10_000  # of a folder, among which the nearest to a mistyped one is looked up
LONGEST_NAME = 255  # bytes of one part of a path, on all common file systems


@dataclass(frozen=True)
class Problem:
    """One reason why a job cannot start.

    The text names the key or option, its value and the way out.
    """

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class WrongValue(Problem):
    """A value that a config cannot have. `key` is its dotted key, "" for the whole config."""

    key: str = ""


def problems_of(action: Callable[[], object]) -> list[Problem]:
    """The ConfigError that `action` raises as a list of one problem, else an empty list."""
    try:
        action()
    except ConfigError as error:
        return [Problem(str(error))]
    return []


def require_none(problems: Sequence[Problem], shown: int = SHOWN_PROBLEMS) -> None:
    """Raise one ConfigError with all `problems`, without duplicates, if there are any.

    At most `shown` are listed; the rest is counted.
    """
    texts = list(dict.fromkeys(problem.text for problem in problems))
    if len(texts) == 1:
        raise ConfigError(texts[0])
    if texts:
        lines = [f"  - {text}" for text in texts[:shown]]
        if len(texts) > shown:
            lines.append(f"  - and {len(texts) - shown} more")
        listed = "\n".join(lines)
        raise ConfigError(f"{len(texts)} problems:\n{listed}")


def check_writable(key: str, folder: Path) -> list[Problem]:
    """Problems with creating files in `folder`, or with creating it. `key` is its config key."""
    where = f"{key} = {folder}"
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        return [
            Problem(f"{where} has a name of more than {LONGEST_NAME} bytes; name another folder")
        ]
    place = folder
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        is_folder = stat.S_ISDIR(place.stat().st_mode)
        writable = os.access(place, os.W_OK | os.X_OK)
        read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return [Problem(f"{where} cannot be used: {reason}; name another folder")]
    if not is_folder:
        return [Problem(f"{where} cannot be a folder: {place} is a file; name another folder")]
    if read_only:
        reason = "is on a read-only file system"
    elif not writable:
        reason = "is not writable for this user"
    else:
        return []
    return [Problem(f"{where} cannot be written: {place} {reason}; name another folder")]


def check_output_file(key: str, path: Path) -> list[Problem]:
    """Problems with writing a file. `key` is its config key or option."""
    if path.is_dir():
        return [Problem(f"{key} = {path} is a folder; name a file, for example {path / 'NAME'}")]
    return check_writable(key, path.parent)


def nearest_name(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the nearest known name, or a short list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if known and len(known) < MAX_LISTED_NAMES:
        return f"; known here: {', '.join(sorted(known))}"
    return ""


def nearest_path(path: Path, *, only_folders: bool = False) -> str:
    """End of a message about a path that does not exist: the nearest one that does, or ""."""
    place = path
    rest: list[str] = []
    while not place.is_dir():
        if place == place.parent:
            return ""
        rest.insert(0, place.name)
        place = place.parent
    if not rest:
        return ""
    try:
        with os.scandir(place) as entries:
            names = []
            for entry in itertools.islice(entries, MOST_NAMES):
                is_hidden = entry.name.startswith(".") and not rest[0].startswith(".")
                if not is_hidden and (entry.is_dir() or not only_folders):
                    names.append(entry.name)
    except OSError:
        return ""
    for name in difflib.get_close_matches(rest[0], names, n=1, cutoff=0.6):
        found = place / name
        below = found.joinpath(*rest[1:])
        return f"; did you mean {str(below if below.exists() else found)!r}?"
    return f"; the nearest folder that exists is {str(place)!r}" if place.name else ""
