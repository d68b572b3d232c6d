"""Lists the members of WebDataset tars of clips: names, places and captions.

Only headers are read, a bounded number of bytes for each member, whatever the tar claims.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from landiff.data_pipeline.ingest.config import ColumnsConfig
from landiff.data_pipeline.ingest.sources.content_kinds import describe_file_content
from landiff.data_pipeline.ingest.sources.entries import (
    CAPTION_SUFFIXES,
    VIDEO_SUFFIXES,
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

MAX_HEADER_BYTES = 1 << 20  # of one member: extended headers and long names included
MAX_PADDING = (
    1 << 20
)  # zeros after the end of a tar, in which another tar that was appended is found
DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError)

Place = tuple[int, int]  # (offset, size) of a member's data
NOWHERE = (-1, -1)


class HeaderTooLarge(tarfile.ReadError):
    """The headers of one member are larger than `MAX_HEADER_BYTES`."""


class BoundedReader:
    """A file of which tarfile may read a limited number of bytes for one member."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = MAX_HEADER_BYTES

    def begin(self) -> None:
        """Allow `MAX_HEADER_BYTES` from here."""
        self._left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Read `size` bytes. Raises HeaderTooLarge."""
        if size < 0 or size > self._left:
            raise HeaderTooLarge(f"the headers of a member take more than {MAX_HEADER_BYTES} bytes")
        self._left -= size
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        """Go to a byte of the file."""
        return self._file.seek(offset)

    def tell(self) -> int:
        """The byte that is read next."""
        return self._file.tell()


def tar_entries(path: Path, columns: ColumnsConfig) -> Iterator[SourceClip | IgnoredFiles]:
    """The clips of one tar, in the order of their keys, and its members that no clip uses.

    A member's key is its name up to the last dot. Of a tar that is damaged, what lies before the
    damage; the rest is one clip that failed.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                yield from _TarListing(path, file, columns).entries()
            else:
                yield _failed(
                    path, path.name, DecodeFailure("unreadable_file", "not a regular file")
                )
    except OSError as error:
        yield _failed(
            path, path.name, DecodeFailure("unreadable_file", error.strerror or str(error))
        )


class _TarListing:
    """Reads one open tar."""

    def __init__(self, path: Path, file: BinaryIO, columns: ColumnsConfig) -> None:
        self.path, self.file, self.columns = path, file, columns
        self.length = os.fstat(file.fileno()).st_size
        self.samples: dict[str, dict[str, Place]] = {}  # key -> suffix -> place
        self.links: dict[
            tuple[str, str], str
        ] = {}  # (key, suffix) -> name of the member that it leads to
        self.failed: list[
            tuple[str, DecodeFailure]
        ] = []  # videos that cannot be used: (member, why)

    def entries(self) -> Iterator[SourceClip | IgnoredFiles]:
        """All clips and ignored members."""
        damage, members = None, 0
        try:
            for member in _members(self.file, self.length):
                members += 1
                yield from self._add(member)
        except DAMAGE as error:
            damage = DecodeFailure(
                "damaged_tar", printable(f"{type(error).__name__}: {error}")[:160]
            )
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
        """Note one member; gives it back where no clip can use it."""
        name = member.name
        key, suffix = split_name(name)
        if member.isdir():
            return
        if (suffix not in VIDEO_SUFFIXES and suffix not in CAPTION_SUFFIXES) or is_apple_double(
            name
        ):
            yield self._ignored(kind_of(name), name)
            return
        places = self.samples.setdefault(key, {})
        if suffix in places:
            yield from self._refuse(
                suffix,
                name,
                DecodeFailure("duplicate_name", "the tar holds this name twice; the first is used"),
            )
        elif member.islnk() or member.issym():
            target = member.linkname
            if member.issym():
                target = posixpath.join(posixpath.dirname(name), target)
            places[suffix] = NOWHERE
            self.links[key, suffix] = target
        elif not member.isreg() or member.issparse():
            what = "it is stored as a sparse file" if member.issparse() else "not a regular file"
            yield from self._refuse(suffix, name, DecodeFailure("unreadable_member", what))
        else:
            places[suffix] = (member.offset_data, member.size)

    def _refuse(self, suffix: str, name: str, failure: DecodeFailure) -> Iterator[IgnoredFiles]:
        """A video becomes a clip that failed, a caption is ignored."""
        if suffix in VIDEO_SUFFIXES:
            self.failed.append((name, failure))
        else:
            yield self._ignored(failure.reason, name)

    def _ignored(self, kind: str, name: str) -> IgnoredFiles:
        return IgnoredFiles(kind, printable(f"{self.path.name}:{name}"))

    def _resolve_links(self) -> Iterator[IgnoredFiles]:
        """Give links the places of the members that they lead to."""
        for (key, suffix), target in self.links.items():
            place = self._find(target)
            if place == NOWHERE:
                del self.samples[key][suffix]
                detail = f"a link to {printable(target)!r}, which the tar does not hold"
                yield from self._refuse(
                    suffix, key + suffix, DecodeFailure("unreadable_member", detail)
                )
            else:
                self.samples[key][suffix] = place

    def _find(self, target: str) -> Place:
        """The place of a member by its name."""
        normal = posixpath.normpath(target)
        for name in (target, normal, f"./{normal}"):
            key, suffix = split_name(name)
            place = self.samples.get(key, {}).get(suffix, NOWHERE)
            if place != NOWHERE:
                return place
        return NOWHERE

    def _clips(self, key: str, places: dict[str, Place]) -> Iterator[SourceClip | IgnoredFiles]:
        """The videos of one key, each with the key's captions."""
        videos = [suffix for suffix in places if suffix in VIDEO_SUFFIXES]
        texts = {key + suffix: places[suffix] for suffix in CAPTION_SUFFIXES if suffix in places}
        captions, used, failure = [""], "", None
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
            cut = (
                DecodeFailure("truncated", "the tar ends within it")
                if sum(place) > self.length
                else None
            )
            yield SourceClip(
                name=printable(f"{self.path.name}:{name}"),
                video=VideoFile(self.path, *place),
                caption=captions[0],
                failure=cut or failure,
                more_captions=tuple(captions[1:]),
            )
        if used or not videos:
            for name in texts:
                if name != used:
                    yield self._ignored(kind_of(name), name)

    def _read(self, place: Place) -> bytes:
        offset, size = place
        if offset + size > self.length:
            raise TextError("truncated", "the tar ends within it")
        return os.pread(self.file.fileno(), min(size, MAX_TEXT_BYTES + 1), offset)


def _failed(path: Path, name: str, failure: DecodeFailure) -> SourceClip:
    return SourceClip(printable(name), VideoFile(path), "", failure=failure)


def _members(file: BinaryIO, length: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, and of tars that were appended to it. Raises tarfile's errors on damage.

    tarfile's own iteration keeps every member in memory and takes a damaged header for the end.
    """
    reader = BoundedReader(file)
    tar = tarfile.TarFile(fileobj=reader, mode="r")  # reads the first header
    tar.offset = 0
    while True:
        reader.begin()
        begin = tar.offset
        reader.seek(begin)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EmptyHeaderError:
            if begin == 0:
                raise
            return  # the file ends without the zeros that mark the end
        except tarfile.EOFHeaderError:
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
    """Where the first block lies that holds anything but zeros; None where there is none."""
    data = os.pread(file.fileno(), MAX_PADDING, begin)
    left = len(data.lstrip(b"\0"))
    return begin + (len(data) - left) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE if left else None
