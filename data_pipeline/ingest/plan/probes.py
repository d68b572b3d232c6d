"""What is seen of the videos before spans are laid, kept on disk and shared by all tasks.

    <data>/plan/looks-<mark>.jsonl     what was seen of some videos (hash, length, shots); one line for each

The marks are of the videos' names, sizes and times of change. Any number of processes may look at once: each
starts with its share and goes on with what others have not finished.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from landiff.configs.documents import parse_line
from landiff.configs.files import write_text
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.rows import (
    SourceRow,
    chunks,
    damage_of,
    read_rows,
    videos_of,
)
from landiff.data_pipeline.ingest.shots import Look, Looker
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import hint_for_missing
from landiff.data_pipeline.video.codec import DecodeFailure, SafeDecoder, VideoFile

ProgressCallback = Callable[[int, int, str], None]  # (done, of all, what is being done)
Borrow = Callable[[], AbstractContextManager[SafeDecoder]]


def look_at_all(
    config: ShardsConfig,
    rows: Path,
    task: tuple[int, int],
    executor: Executor,
    look: Callable[[VideoFile], Look],
    progress: ProgressCallback | None,
) -> None:
    """Have a file of looks for each chunk of `rows`."""
    pieces = [piece for piece, _ in chunks(config, rows)]
    total, done, (number, of) = sum(piece.videos for piece in pieces), 0, task
    mine, others = (
        pieces[number::of],
        [piece for at, piece in enumerate(pieces) if at % of != number],
    )
    random.Random(number).shuffle(others)  # two that help out seldom choose the same
    for piece in mine + others:
        path = rows.with_name(piece.looks)
        if not path.exists():
            lines = []
            for found in executor.map(
                look, videos_of(list(read_rows(rows, piece.offset, piece.end)))
            ):
                lines.append(json.dumps(found.as_json()) + "\n")
                if progress:
                    progress(done + len(lines), total, "look")
            write_text(path, "".join(lines))
        done += piece.videos


def seen(config: ShardsConfig, rows: Path) -> Iterator[tuple[SourceRow, Look]]:
    """All rows in order, each with what was seen of its video: an empty look where it is unusable."""
    nothing = Look()
    for piece, members in chunks(config, rows):
        path = rows.with_name(piece.looks)
        with damage_of(path):
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [Look.from_json(parse_line(line, str(path))) for line in lines]
            looks = dict(zip(videos_of(members), found, strict=True))
        for row in members:
            yield row, nothing if row.clip.failure else looks[row.clip.video]


def inspect(looker: Looker, video: VideoFile, borrow: Borrow) -> Look:
    """Hash one video, and look at it."""
    try:
        sha256 = sha256_of(video)
    except ValueError as error:  # a name with a null byte
        return Look(failure=DecodeFailure("unreadable_file", str(error)))
    except FileNotFoundError as error:
        return Look(
            failure=DecodeFailure(
                "unreadable_file", f"{error.strerror}{hint_for_missing(video.path)}"
            )
        )
    except OSError as error:
        return Look(failure=DecodeFailure("unreadable_file", error.strerror or str(error)))
    with borrow() as decoder:
        found = looker.look(decoder, video, sha256)
    kind = describe_file_content(video.path, video.offset, video.size) if found.failure else None
    if kind:
        found = replace(
            found, failure=replace(found.failure, detail=f"it is {kind}; {found.failure.detail}")
        )
    return found


def sha256_of(video: VideoFile) -> str:
    """Raises OSError, also for what is no regular file: reading a pipe would never end."""
    digest = hashlib.sha256()
    with open(os.open(video.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        file.seek(video.offset)
        left = video.size if video.size >= 0 else math.inf
        while left > 0 and (data := file.read(int(min(left, 1 << 20)))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()
