"""Probes of the videos of a source, stored on disk and computed by all tasks together.

    <data>/plan/looks-<fingerprint>.jsonl    probes of some videos, one line each (`VideoProbe`)

The fingerprint covers names, sizes and modification times of the videos. Any number of processes
may probe at once: each starts with its own part and then continues with what the others have not
finished.
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
from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.ingest.plan.rows import (
    SourceRow,
    explain_damage,
    iter_chunks,
    read_rows,
    videos_of,
)
from landiff.data_pipeline.ingest.shots import VideoProbe, VideoProber
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import hint_for_missing
from landiff.data_pipeline.video.codec import DecodeFailure, SafeDecoder, VideoFile

HASH_BLOCK_BYTES = 1 << 20

BorrowDecoder = Callable[[], AbstractContextManager[SafeDecoder]]


def probe_all(
    config: ShardsConfig,
    rows: Path,
    *,
    task: tuple[int, int],
    executor: Executor,
    probe: Callable[[VideoFile], VideoProbe],
    progress: ProgressCallback | None,
) -> None:
    """Write the missing files of probes, one for each chunk of `rows`.

    Args:
        task: (number, of). A task starts with every of-th chunk.
        executor: Runs `probe` for the videos of a chunk.
        probe: Probes one video.
        progress: Called as `progress(videos probed, videos, what)`.
    """
    chunks = [chunk for chunk, _ in iter_chunks(config, rows)]
    total = sum(chunk.videos for chunk in chunks)
    number, of = task
    own = chunks[number::of]
    others = [chunk for index, chunk in enumerate(chunks) if index % of != number]
    # in random order, so that two tasks that help out seldom probe the same chunk
    random.Random(number).shuffle(others)
    done = 0
    for chunk in own + others:
        path = rows.with_name(chunk.probes_file)
        if not path.exists():
            lines = []
            videos = videos_of(list(read_rows(rows, chunk.offset, chunk.end)))
            for found in executor.map(probe, videos):
                lines.append(json.dumps(found.as_json()) + "\n")
                if progress:
                    progress(done + len(lines), total, "probing videos")
            write_text(path, "".join(lines))
        done += chunk.videos


def read_probes(config: ShardsConfig, rows: Path) -> Iterator[tuple[SourceRow, VideoProbe]]:
    """All rows in order, each with the probe of its video; unusable rows have an empty probe."""
    empty = VideoProbe()
    for chunk, members in iter_chunks(config, rows):
        path = rows.with_name(chunk.probes_file)
        with explain_damage(path):
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [VideoProbe.from_json(parse_line(line, str(path))) for line in lines]
            probes = dict(zip(videos_of(members), found, strict=True))
        for row in members:
            yield row, empty if row.clip.failure else probes[row.clip.video]


def probe_video(prober: VideoProber, video: VideoFile, borrow_decoder: BorrowDecoder) -> VideoProbe:
    """Hash one video and probe it. A failure says what the file really is, if that can be told."""
    try:
        sha256 = sha256_of(video)
    except ValueError as error:  # a name with a null byte
        return VideoProbe(failure=DecodeFailure("unreadable_file", str(error)))
    except FileNotFoundError as error:
        detail = f"{error.strerror}{hint_for_missing(video.path)}"
        return VideoProbe(failure=DecodeFailure("unreadable_file", detail))
    except OSError as error:
        detail = error.strerror or str(error)
        return VideoProbe(failure=DecodeFailure("unreadable_file", detail))
    with borrow_decoder() as decoder:
        found = prober.probe(decoder, video, sha256)
    if found.failure is None:
        return found
    kind = describe_file_content(video.path, video.offset, video.size)
    if kind is None:
        return found
    failure = replace(found.failure, detail=f"it is {kind}; {found.failure.detail}")
    return replace(found, failure=failure)


def sha256_of(video: VideoFile) -> str:
    """SHA-256 of the bytes of a video.

    Raises OSError also if it is not a regular file: reading a pipe would never end.
    """
    digest = hashlib.sha256()
    with open(os.open(video.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        file.seek(video.offset)
        bytes_left = video.size if video.size >= 0 else math.inf
        while bytes_left > 0:
            data = file.read(int(min(bytes_left, HASH_BLOCK_BYTES)))
            if not data:
                break
            digest.update(data)
            bytes_left -= len(data)
    return digest.hexdigest()
