"""Tells the kind of a file from its first bytes, for messages about files with a wrong name."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512
MAGIC_NUMBERS = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x00\x05\x16\x07", "macOS metadata (AppleDouble)"),
    (b"version https://git-lfs", "a Git LFS pointer (the file itself was not downloaded)"),
)
MARKUP = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<head", "an HTML page"),
    (b"<?xml", "an XML document"),
    (b"<error", "an XML document"),
)


def describe_content(head: bytes) -> str | None:
    """The kind of a file whose first `HEAD_BYTES` bytes are `head`; None if it is not known."""
    if not head:
        return "an empty file"
    for magic, kind in MAGIC_NUMBERS:
        if head.startswith(magic):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, kind in MARKUP:
        if text.startswith(start):
            return kind
    if not head.strip(b"\0"):
        return "zeros (perhaps an unfinished download)"
    return None


def describe_file_content(path: Path, offset: int = 0, size: int = -1) -> str | None:
    """`describe_content` of a file, or of `size` bytes of it from `offset` on.

    None also if the file cannot be read. A negative `size` means up to the end.
    """
    if size == 0:
        return describe_content(b"")
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            head_size = min(size, HEAD_BYTES) if size > 0 else HEAD_BYTES
            return describe_content(file.read(head_size))
    except (OSError, ValueError):
        return None
