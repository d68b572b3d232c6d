"""Lists folders of videos: every file below a folder, with one folder in memory at a time.

Links to folders are followed, unless they lead to a folder that is listed anyway.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from landiff.data_pipeline.ingest.config import ColumnsConfig
from landiff.data_pipeline.ingest.sources.entries import (
    CAPTION_SUFFIXES,
    IgnoredFiles,
    SourceClip,
    TarFile,
    is_apple_double,
    kind_of,
    printable,
    split_name,
)
from landiff.data_pipeline.ingest.sources.text_files import (
    TextError,
    captions_beside,
    read_caption_file,
)
from landiff.data_pipeline.video.codec import DecodeFailure, VideoFile


@dataclass(slots=True)
class Folder:
    """The names in one folder."""

    path: str
    prefix: str  # path below the source: "" or "a/b/"
    names: list[str]  # sorted; names of folders end in "/"
    problems: dict[str, str]  # name -> why it is not a regular file
    links: set[str]  # names of folders that are links

    def siblings(self, stem: str) -> list[tuple[str, str]]:
        """(name, suffix) of the files whose names consist of `stem` and one suffix."""
        start = f"{stem}."
        found = []
        for at in range(bisect_left(self.names, start), len(self.names)):
            name = self.names[at]
            if not name.startswith(start):
                break
            if "." not in name[len(start) :] and not name.endswith("/"):
                found.append((name, name[len(stem) :].lower()))
        return found


@dataclass(frozen=True, slots=True)
class FolderFile:
    """One file below a source."""

    folder: Folder
    name: str  # in its folder
    problem: str  # why it cannot be read; "" if it is a regular file

    @property
    def relative(self) -> str:
        """Path below the source."""
        return self.folder.prefix + self.name

    @property
    def path(self) -> str:
        """Path that can be opened."""
        return f"{self.folder.path}/{self.name}"


def walk_files(root: Path) -> Iterator[FolderFile | SourceClip | IgnoredFiles]:
    """All files below a folder, in the order of their whole paths.

    A folder that cannot be read is a SourceClip with a failure. A link that is not followed is
    IgnoredFiles. Raises OSError if `root` itself cannot be read.
    """
    followed = {os.path.realpath(root)}
    stack = [iter_folder(_read_folder(os.fspath(root), ""))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif not found.name.endswith("/"):
            yield found
        else:
            relative = found.relative
            path = found.path.removesuffix("/")
            problem = ""
            if found.name in found.folder.links:
                problem = _link_problem(found.folder, path, followed)
            if problem:
                yield IgnoredFiles(problem, printable(relative))
                continue
            try:
                stack.append(iter_folder(_read_folder(path, relative)))
            except OSError as error:
                failure = DecodeFailure("unreadable_folder", error.strerror or str(error))
                yield SourceClip(printable(relative), VideoFile(Path(path)), "", failure=failure)


def iter_folder(folder: Folder) -> Iterator[FolderFile]:
    """The entries of one folder, including its subfolders."""
    for name in folder.names:
        yield FolderFile(folder, name, folder.problems.get(name, ""))


def _read_folder(path: str, prefix: str) -> Folder:
    """Read the names in a folder. Raises OSError."""
    folder = Folder(path, prefix, [], {}, set())
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_symlink():
                name = _add_link(folder, entry)
            # with the slash, "a-b/x" is sorted before "a/x", as whole paths are
            elif entry.is_dir(follow_symlinks=False):
                name += "/"
            elif not entry.is_file(follow_symlinks=False):
                folder.problems[name] = "not a regular file"
            folder.names.append(name)
    folder.names.sort()
    return folder


def _add_link(folder: Folder, entry: os.DirEntry[str]) -> str:
    """Record what a link leads to. Returns its name in `folder.names`."""
    try:
        mode = os.stat(entry.path).st_mode
    except OSError as error:
        folder.problems[entry.name] = f"a link that leads nowhere ({error.strerror})"
        return entry.name
    if stat.S_ISDIR(mode):
        folder.links.add(f"{entry.name}/")
        return f"{entry.name}/"
    if not stat.S_ISREG(mode):
        folder.problems[entry.name] = "not a regular file"
    return entry.name


def _link_problem(folder: Folder, path: str, followed: set[str]) -> str:
    """Why a link to a folder is not followed; "" if it is. Its target is then in `followed`."""
    here = os.path.realpath(folder.path)
    target = os.path.realpath(path)
    if f"{here}/".startswith(f"{target.rstrip('/')}/"):
        return "link_loop"
    above = target
    while above not in followed:
        parent = os.path.dirname(above)
        if parent == above:
            followed.add(target)
            return ""
        above = parent
    return "repeated_link"


# ------------------------------------------------------------------------------------------- clips


def folder_entries(
    root: Path, columns: ColumnsConfig, suffixes: Set[str]
) -> Iterator[SourceClip | TarFile | IgnoredFiles]:
    """The entries of a folder without a table: clips with captions beside them, and tars.

    `suffixes`: of the files that are clips.
    """
    for found in walk_files(root):
        if isinstance(found, FolderFile):
            yield from _file_entries(found, columns, suffixes)
        else:
            yield found


def _file_entries(
    file: FolderFile, columns: ColumnsConfig, suffixes: Set[str]
) -> Iterator[SourceClip | TarFile | IgnoredFiles]:
    """The clips, tars and ignored files that one file stands for."""
    stem, suffix = split_name(file.name)
    clip_or_tar = (suffix in suffixes or suffix == ".tar") and not is_apple_double(file.name)
    if clip_or_tar and file.problem:
        failure = DecodeFailure("unreadable_file", file.problem)
        yield SourceClip(printable(file.relative), VideoFile(Path(file.path)), "", failure=failure)
    elif clip_or_tar and suffix == ".tar":
        yield TarFile(Path(file.path))
    elif clip_or_tar:
        yield from _video(file, stem, columns, suffixes)
    elif suffix not in CAPTION_SUFFIXES or not _videos(file.folder.siblings(stem), suffixes):
        yield IgnoredFiles(_kind(file), printable(file.relative))


def _kind(file: FolderFile) -> str:
    """The kind under which an unused file is counted."""
    if "link" in file.problem:
        return "dangling_link"
    return "special_file" if file.problem else kind_of(file.name)


def _videos(siblings: list[tuple[str, str]], suffixes: Set[str]) -> list[str]:
    """Names of the clips among the results of `Folder.siblings`."""
    return [name for name, suffix in siblings if suffix in suffixes]


def _video(
    file: FolderFile, stem: str, columns: ColumnsConfig, suffixes: Set[str]
) -> Iterator[SourceClip | IgnoredFiles]:
    """One video, and the unused caption files beside it."""
    folder = file.folder
    siblings = folder.siblings(stem)
    files: list[str] = []
    unused: list[str] = []
    for suffix in CAPTION_SUFFIXES:
        names = [name for name, found in siblings if found == suffix]
        files += names[-1:]  # .txt is sorted after .TXT
        unused += names[:-1]
    captions = [""]
    used = ""
    failure: DecodeFailure | None = None
    try:
        texts = ((printable(name), read_caption_file(f"{folder.path}/{name}")) for name in files)
        captions, used, detail = captions_beside(texts, columns.caption)
        if detail:
            failure = DecodeFailure("empty_caption", detail)
    except TextError as error:
        failure = error.failure
    yield SourceClip(
        name=printable(file.relative),
        video=VideoFile(Path(file.path)),
        caption=captions[0],
        failure=failure,
        more_captions=tuple(captions[1:]),
    )
    if used:
        unused += [name for name in files if printable(name) != used]
    if unused and file.name == _videos(siblings, suffixes)[0]:
        for name in unused:
            yield IgnoredFiles(kind_of(name), printable(folder.prefix + name))
