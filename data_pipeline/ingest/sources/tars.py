"""Lists the members of WebDataset tars of clips: names, offsets and captions.

Only headers and captions are read. The number of bytes read for a member is bounded, whatever its
header claims.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import BinaryIO

from landiff.data_pipeline.ingest.config import ColumnsConfig
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import (
    CAPTION_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    is_apple_double,
    kind_of,
    printable,
    split_name,
)
from landiff.data_pipeline.ingest.sources.text_files import (
    MAX_TEXT_BYTES,
    TextError,
    captions_beside,
)
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile

MAX_HEADER_BYTES = 1 << 20  # of one member, including extended headers and long names
MAX_PADDING = 1 << 20  # bytes after the end of a tar that are searched for an appended tar
MAX_DETAIL = 160  # characters of the detail of a damaged tar
# Errors that tarfile raises for damaged tars.
DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError)

Place = tuple[int, int]  # (offset, size) of a member's data
NOWHERE = (-1, -1)


class HeaderTooLarge(tarfile.ReadError):
    """The headers of one member are larger than `MAX_HEADER_BYTES`."""


class BoundedReader:
    """A file from which tarfile can read a limited number of bytes for each member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_HEADER_BYTES

    def begin(self) -> None:
        """Allow reading `MAX_HEADER_BYTES` from now on."""
        self._left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Read `size` bytes. Raises HeaderTooLarge."""
        if size < 0 or size > self._left:
            raise HeaderTooLarge(f"the headers of a member take more than {MAX_HEADER_BYTES} bytes")
        self._left -= size
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        """Set the offset of the next read."""
        return self._file.seek(offset)

    def tell(self) -> int:
        """The offset of the next read."""
        return self._file.tell()


def tar_entries(
    path: Path, columns: ColumnsConfig, suffixes: Set[str]
) -> Iterator[SourceClip | IgnoredFiles]:
    """The clips of one tar, in the order of their keys, and its ignored members.

    `suffixes`: of the members that are clips.
    The key of a member is its name up to the last dot. Of a damaged tar, what lies before the
    damage is used, and the rest is one clip with a failure.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                yield from _TarListing(path, file, columns, suffixes).entries()
            else:
                failure = DecodeFailure("unreadable_file", "not a regular file")
                yield _failed(path, path.name, failure)
    except OSError as error:
        failure = DecodeFailure("unreadable_file", error.strerror or str(error))
        yield _failed(path, path.name, failure)


class _TarListing:
    """Lists one open tar."""

    def __init__(
        self, path: Path, file: BinaryIO, columns: ColumnsConfig, suffixes: Set[str]
    ) -> None:
        self.path = path
        self.file = file
        self.columns = columns
        self.suffixes = suffixes
        self.length = os.fstat(file.fileno()).st_size
        self.samples: dict[str, dict[str, Place]] = {}  # key -> suffix -> place
        # (key, suffix) -> name of the member that the link leads to
        self.links: dict[tuple[str, str], str] = {}
        # (name of a video that cannot be used, why)
        self.failed: list[tuple[str, DecodeFailure]] = []

    def entries(self) -> Iterator[SourceClip | IgnoredFiles]:
        """All clips and ignored members."""
        damage: DecodeFailure | None = None
        members = 0
        try:
            for member in _members(self.file, self.length):
                members += 1
                yield from self._add(member)
        except DAMAGE as error:
            detail = printable(f"{type(error).__name__}: {error}")[:MAX_DETAIL]
            damage = DecodeFailure("damaged_tar", detail)
            kind = None if members else describe_file_content(self.path)
            if kind:
                damage = DecodeFailure("not_a_tar", f"it is {kind}")
        yield from self._resolve_links()
        for key, places in self.samples.items():
            yield from self._clips(key, places)
        for name, failure in self.failed:
            yield _failed(self.path, f"{self.path.name}:{name}", failure)
        if damage:
            yield _failed(self.path, self.path.name, damage)
        elif not members:
            yield IgnoredFiles("empty_tar", printable(self.path.name))

    def _add(self, member: tarfile.TarInfo) -> Iterator[IgnoredFiles]:
        """Record one member. Yields it if no clip can use it."""
        name = member.name
        key, suffix = split_name(name)
        if member.isdir():
            return
        is_known = suffix in self.suffixes or suffix in CAPTION_SUFFIXES
        if not is_known or is_apple_double(name):
            yield self._ignored(kind_of(name), name)
            return
        places = self.samples.setdefault(key, {})
        if suffix in places:
            detail = "the tar holds this name twice; the first is used"
            yield from self._refuse(suffix, name, DecodeFailure("duplicate_name", detail))
        elif member.islnk() or member.issym():
            target = member.linkname
            if member.issym():
                target = posixpath.join(posixpath.dirname(name), target)
            places[suffix] = NOWHERE
            self.links[key, suffix] = target
        elif not member.isreg() or member.issparse():
            detail = "it is stored as a sparse file" if member.issparse() else "not a regular file"
            yield from self._refuse(suffix, name, DecodeFailure("unreadable_member", detail))
        else:
            places[suffix] = (member.offset_data, member.size)

    def _refuse(self, suffix: str, name: str, failure: DecodeFailure) -> Iterator[IgnoredFiles]:
        """Record a video as a clip with a failure, or yield a caption as ignored."""
        if suffix in self.suffixes:
            self.failed.append((name, failure))
        else:
            yield self._ignored(failure.reason, name)

    def _ignored(self, kind: str, name: str) -> IgnoredFiles:
        return IgnoredFiles(kind, printable(f"{self.path.name}:{name}"))

    def _resolve_links(self) -> Iterator[IgnoredFiles]:
        """Set the places of links to those of their targets. Yields captions without a target."""
        for (key, suffix), target in self.links.items():
            place = self._find(target)
            if place == NOWHERE:
                del self.samples[key][suffix]
                detail = f"a link to {printable(target)!r}, which the tar does not hold"
                failure = DecodeFailure("unreadable_member", detail)
                yield from self._refuse(suffix, key + suffix, failure)
            else:
                self.samples[key][suffix] = place

    def _find(self, target: str) -> Place:
        """The place of a member by its name; NOWHERE if the tar does not hold it."""
        normal = posixpath.normpath(target)
        for name in (target, normal, f"./{normal}"):
            key, suffix = split_name(name)
            place = self.samples.get(key, {}).get(suffix, NOWHERE)
            if place != NOWHERE:
                return place
        return NOWHERE

    def _clips(self, key: str, places: dict[str, Place]) -> Iterator[SourceClip | IgnoredFiles]:
        """The videos of one key, each with the key's captions."""
        videos = [suffix for suffix in places if suffix in self.suffixes]
        texts = {key + suffix: places[suffix] for suffix in CAPTION_SUFFIXES if suffix in places}
        captions = [""]
        used = ""
        failure: DecodeFailure | None = None
        if videos:
            try:
                files = ((name, self._read(place)) for name, place in texts.items())
                captions, used, detail = captions_beside(files, self.columns.caption)
                if detail:
                    failure = DecodeFailure("empty_caption", detail)
            except TextError as error:
                failure = DecodeFailure(error.failure.reason, printable(error.failure.detail))
        for number, suffix in enumerate(videos):
            name = key + suffix if number else key  # a second video of the same key has its suffix
            place = places[suffix]
            truncated: DecodeFailure | None = None
            if sum(place) > self.length:
                truncated = DecodeFailure("truncated", "the tar ends within it")
            yield SourceClip(
                name=printable(f"{self.path.name}:{name}"),
                video=VideoFile(self.path, *place),
                caption=captions[0],
                failure=truncated or failure,
                more_captions=tuple(captions[1:]),
            )
        if used or not videos:
            for name in texts:
                if name != used:
                    yield self._ignored(kind_of(name), name)

    def _read(self, place: Place) -> bytes:
        """The bytes of a member, at most one more than `MAX_TEXT_BYTES`. Raises TextError."""
        offset, size = place
        if offset + size > self.length:
            raise TextError("truncated", "the tar ends within it")
        return os.pread(self.file.fileno(), min(size, MAX_TEXT_BYTES + 1), offset)


def _failed(path: Path, name: str, failure: DecodeFailure) -> SourceClip:
    """A rejected clip of a tar."""
    return SourceClip(printable(name), VideoFile(path), "", failure=failure)


def _members(file: BinaryIO, length: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of tars that were appended to it.

    Raises the errors in `DAMAGE` if the tar is damaged. The iteration of tarfile itself keeps every
    member in memory and treats a damaged header as the end.
    """
    reader = BoundedReader(file)
    # Reads the first header. A tar that is read is neither written nor closed through `fileobj`.
    tar = tarfile.TarFile(fileobj=reader, mode="r")  # type: ignore[arg-type]
    tar.offset = 0
    while True:
        reader.begin()
        begin = tar.offset
        reader.seek(begin)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            if begin == 0:
                raise
            return  # the file ends without the zeros that mark the end
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            appended = _next_block(file, begin)
            if appended is None:
                return
            tar.offset = appended
            continue
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"byte {begin}: {error}") from None
        if member.size < 0 or tar.offset <= begin:
            raise tarfile.ReadError(f"byte {begin}: a member of {member.size} bytes")
        yield member
        whole = member.isreg() and not member.issparse()
        end = member.offset_data + member.size if whole else tar.offset - tarfile.BLOCKSIZE
        if end > length:
            raise tarfile.ReadError(f"the file ends within {printable(member.name)[:80]!r}")


def _next_block(file: BinaryIO, begin: int) -> int | None:
    """Offset of the first block from `begin` on that is not all zeros; None if there is none."""
    data = os.pread(file.fileno(), MAX_PADDING, begin)
    zeros = len(data) - len(data.lstrip(b"\0"))
    if zeros == len(data):
        return None
    return begin + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
