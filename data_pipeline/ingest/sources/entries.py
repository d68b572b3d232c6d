"""The entries of a source: clips, tars of clips, and files that are not used."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from landiff.data_pipeline.ingest.config import ShardsConfig
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
IMAGE_SUFFIXES = frozenset((".jpeg", ".jpg", ".png", ".webp"))  # clips of one frame, if wanted
# In order of preference: the first file that holds a caption is used.
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
COMPRESSIONS = frozenset((".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma"))
MAX_KINDS = 50  # that a tally tells apart
MAX_EXAMPLES = 3  # of each kind
KINDS_SHOWN = 12  # in a message
MAX_SUFFIX = 12  # characters; longer suffixes are of the kind "other"


@dataclass(frozen=True)
class SourceClip:
    """One row of the input: a video, or a span of one, and its caption ("" if it has none)."""

    name: str  # in messages and in the JSON of samples: path below the source, or tar:key
    video: VideoFile
    caption: str
    start_s: float = 0.0  # counted from the first frame
    end_s: float = math.inf
    failure: DecodeFailure | None = None  # known before the video is opened
    more_captions: tuple[str, ...] = ()  # if the row has several
    line: int = 0  # in its table, counted from 1; 0 if there is no table


@dataclass(frozen=True)
class TarFile:
    """A tar of clips. Its members are listed only when they are needed."""

    path: Path


@dataclass(frozen=True)
class IgnoredFiles:
    """A file of a source that no clip uses."""

    kind: str  # its suffix, such as ".part", or a name, such as "link_loop"
    name: str


@dataclass
class Tally:
    """Counts by kind, with the names of the first few of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one item. Kinds after the first `MAX_KINDS` are counted as "other"."""
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
        """Inverse of `as_json`."""
        return cls(Counter(plain["counts"]), dict(plain["examples"]))


def printable(text: str) -> str:
    """Text that can be encoded as UTF-8; what cannot be encoded is escaped.

    File names may contain undecodable bytes, and JSON may contain lone surrogates.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def split_name(name: str) -> tuple[str, str]:
    """Split "a/clip 2.0.MP4" into ("a/clip 2.0", ".mp4"). A leading dot starts no suffix."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix.lower()


def is_apple_double(name: str) -> bool:
    """Whether a path is one of the `._` files in which macOS stores attributes of other files."""
    return name.rpartition("/")[2].startswith("._")


def kind_of(name: str) -> str:
    """The kind under which an ignored file is counted."""
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


def clip_suffixes(config: ShardsConfig) -> frozenset[str]:
    """Suffixes of the files that are clips: videos, and images if a clip shape has one frame."""
    if config.takes_images:
        return VIDEO_SUFFIXES | IMAGE_SUFFIXES
    return VIDEO_SUFFIXES


def hint_for_missing(path: Path) -> str:
    """The end of a message: the file that a name without suffix may mean; "" if there is none."""
    for suffix in sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES):
        candidate = path.with_name(path.name + suffix) if path.name else path
        if os.path.isfile(candidate):  # False also for a name that is too long
            return f"; there is {printable(candidate.name)}: give names of files with their suffix"
    return ""
