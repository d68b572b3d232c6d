"""What a source consists of: clips, tars of clips, and files that are not used."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    )
)
CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # the first of them that holds a caption is used
COMPRESSIONS = frozenset((".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma"))
MAX_KINDS = 50
MAX_EXAMPLES = 3
KINDS_SHOWN = 12
MAX_SUFFIX = 12


@dataclass(frozen=True)
class SourceClip:
    """One row of the input: a video, or a span of one, and its caption ("" where it has none)."""

    name: str  # shown to users and kept in the shard's JSON: path below the source, or tar:key
    video: VideoFile
    caption: str
    start_s: float = 0.0  # counted from the first frame
    end_s: float = math.inf
    failure: DecodeFailure | None = None  # what is known to be wrong with it before it is opened
    more_captions: tuple[str, ...] = ()  # where the row has several
    line: int = 0  # of its table, counted from 1; 0 where there is no table


@dataclass(frozen=True)
class TarFile:
    """A tar of clips. Its members are listed only where they are needed."""

    path: Path


@dataclass(frozen=True)
class IgnoredFiles:
    """A file of a source that no clip uses."""

    kind: str  # its suffix, such as ".part", or a word, such as "link_loop"
    name: str


@dataclass
class Tally:
    """How many things there are of each kind, with the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one. Kinds beyond the first `MAX_KINDS` are counted as "other"."""
        if kind not in self.counts and len(self.counts) >= MAX_KINDS:
            kind = "other"
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name)

    def __add__(self, other: Tally) -> Tally:
        examples = {kind: list(names) for kind, names in self.examples.items()}
        for kind, names in other.examples.items():
            examples[kind] = (examples.get(kind, []) + names)[:MAX_EXAMPLES]
        return Tally(self.counts + other.counts, examples)

    def __str__(self) -> str:
        """The most frequent kinds: "2 .part (a.mp4.part; b.mp4.part), 1 .zip (c.zip)"."""
        most = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        shown = []
        for kind, count in most[:KINDS_SHOWN]:
            names = "; ".join(self.examples.get(kind, ()))
            more = "; ..." if count > MAX_EXAMPLES else ""
            shown.append(f"{count} {kind} ({names}{more})")
        if len(most) > KINDS_SHOWN:
            rest = sum(count for _, count in most[KINDS_SHOWN:])
            shown.append(f"{rest} of {len(most) - KINDS_SHOWN} other kinds")
        return ", ".join(shown) or "none"

    def as_json(self) -> dict[str, Any]:
        """Plain values, sorted by kind."""
        kinds = sorted(self.counts)
        return {
            "counts": {kind: self.counts[kind] for kind in kinds},
            "examples": {kind: self.examples[kind] for kind in kinds},
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Tally:
        return cls(Counter(plain["counts"]), dict(plain["examples"]))


def printable(text: str) -> str:
    """Text that UTF-8 can hold.

    File names may have bytes, and JSON halves of surrogate pairs, that it cannot.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def split_name(name: str) -> tuple[str, str]:
    """("a/clip 2.0", ".mp4") of "a/clip 2.0.MP4". A leading dot starts no suffix."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def is_apple_double(name: str) -> bool:
    """Whether a path is one of the `._` files in which macOS keeps attributes of other files."""
    return name.rpartition("/")[2].startswith("._")


def kind_of(name: str) -> str:
    """Under which kind a file is counted that no clip uses."""
    if is_apple_double(name):
        return "macos_metadata"
    stem, suffix = split_name(name.rpartition("/")[2])
    if not suffix:
        return "hidden_file" if stem.startswith(".") else "no_suffix"
    if not suffix[1:].isalnum() or len(suffix) > MAX_SUFFIX:
        return "other"
    if suffix in COMPRESSIONS and split_name(stem)[1] == ".tar":
        return f".tar{suffix}"
    return printable(suffix)


def hint_for_missing(path: Path) -> str:
    """The end of a message: which file a name without suffix may mean, "" where there is none."""
    for suffix in sorted(VIDEO_SUFFIXES):
        candidate = path.with_name(path.name + suffix) if path.name else path
        if os.path.isfile(candidate):  # False also for a name that is too long
            return f"; there is {printable(candidate.name)}: give names of files with their suffix"
    return ""
