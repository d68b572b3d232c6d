"""Reads captions and tables as text, and checks their encodings and types for every kind of source.

Text is UTF-8, with or without a byte order mark. A caption is a string or a list of strings.
"""

from __future__ import annotations

import ast
import codecs
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.data_pipeline.ingest.sources.content_kinds import HEAD_BYTES, describe_content
from landiff.data_pipeline.ingest.sources.entries import printable
from landiff.data_pipeline.video.codec import DecodeFailure

MAX_TEXT_BYTES = 16 << 20  # of one caption file, or of one line of a table
# Characters of a Python literal: its syntax tree takes a hundred times as much memory.
MAX_LITERAL = 256 << 10
MAX_DETAIL = 300  # characters of a detail with parts of a file
MAX_VALUE = 60  # characters of a value in a message
# UTF-32 first: its little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
TEXT_REASONS = frozenset(("caption_encoding", "caption_type", "unreadable_caption", "no_file_name"))
NUL_BYTES = "it holds NUL bytes, so it is UTF-16 without a byte order mark, or no text"


class TextError(ValueError):
    """Text that cannot be used as a caption. `failure` is the reason of the rejected clip."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.failure = DecodeFailure(reason, detail)


# ---------------------------------------------------------------------------------------- captions


def decode_caption(data: bytes) -> str:
    """Decode UTF-8 and remove a byte order mark. Raises TextError (caption_encoding)."""
    problem = _other_encoding(data)
    if problem:
        raise TextError("caption_encoding", f"{problem}; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + len(data) - len(error.object)
        detail = f"byte {place} (0x{data[place]:02x}) is not UTF-8; save it as UTF-8"
        raise TextError("caption_encoding", detail) from None


def captions_of(value: Any) -> list[str]:
    """The captions of one clip that are not empty; [""] if all are.

    `value` is text, a list of texts, or None. Text that is the literal of a list of texts, as in
    the CSV files of Panda-70M, is that list. Raises TextError (caption_type) for anything else.
    """
    if isinstance(value, str):
        literal = list_literal(value)
        value = [value] if literal is None else literal
    elif value is None:
        value = []
    elif not isinstance(value, list):
        detail = f"{describe(value)} is not a caption; give text or a list of texts"
        raise TextError("caption_type", detail)
    texts = []
    for text in value:
        if text is None:
            continue
        if not isinstance(text, str):
            detail = f"a list that holds {describe(text)} is not a caption; give a list of texts"
            raise TextError("caption_type", detail)
        texts.append(cleaned(text))
    return [text for text in texts if text] or [""]


def cleaned(text: str) -> str:
    """Text without white space and byte order marks at both ends."""
    return printable(text.strip().strip("\ufeff").strip())


def captions_beside(
    files: Iterable[tuple[str, bytes]], caption_key: str
) -> tuple[list[str], str, str]:
    """(captions, name of the file that holds them, detail) of the caption files of one clip.

    `files` gives names and bytes (at most one more than `MAX_TEXT_BYTES`) in order of preference.
    It is read up to the first file that holds a caption, so an empty file does not hide the next
    one. If no file holds one, captions are [""], the name is "", and the detail says why. Raises
    TextError.
    """
    detail = ""
    for name, data in files:
        if len(data) > MAX_TEXT_BYTES:
            raise TextError("long_caption", f"{name} has more than {MAX_TEXT_BYTES} bytes")
        try:
            text = decode_caption(data)
            if not name.lower().endswith(".json"):
                captions = captions_of(text)
            else:
                captions, detail = _captions_of_json(text, caption_key)
        except TextError as error:
            raise TextError(error.failure.reason, f"{name}: {error.failure.detail}") from None
        if captions != [""]:
            return captions, name, ""
        if detail:
            detail = f"{name} {detail}"
    return [""], "", detail


def _captions_of_json(text: str, caption_key: str) -> tuple[list[str], str]:
    """(captions, detail) of a JSON file; the detail says why there are none."""
    if not text.strip():
        return [""], ""
    try:
        row = parse_object(text)
    except ValueError as error:
        return [""], printable(str(error))[:MAX_DETAIL]
    if caption_key not in row:
        keys = ", ".join(list(row)[:10])
        return [""], f"has no key {caption_key!r}, it has: {keys}"[:MAX_DETAIL]
    return captions_of(row[caption_key]), ""


def read_caption_file(path: str) -> bytes:
    """The bytes of a caption file, at most one more than `MAX_TEXT_BYTES`; b"" if it is gone.

    Raises TextError (unreadable_caption).
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TextError("unreadable_caption", f"{printable(path)}: not a regular file")
            return file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TextError("unreadable_caption", f"{printable(path)}: {error.strerror}") from None


def list_literal(text: str) -> list[Any] | None:
    """The list that `text` is the JSON or Python literal of; None if it is other text."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    parsers: list[Callable[[str], Any]] = [json.loads]
    if len(text) <= MAX_LITERAL:
        parsers.append(ast.literal_eval)
    for parse in parsers:
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def describe(value: Any) -> str:
    """A value of a JSON file as text, for messages."""
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"[:MAX_VALUE]
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    return f"the text {value!r}"[:MAX_VALUE]


# ------------------------------------------------------------------------------------------ tables


def table_lines(path: Path) -> Iterator[str]:
    """The lines of a table, with their line ends. Raises ConfigError if it is not UTF-8 text."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        kind = describe_content(head)
        if head and kind:
            raise ConfigError(f"{path} is {kind}, not a table of captions")
        problem = _other_encoding(head)
        if problem:
            raise ConfigError(f"{path} is not UTF-8 text: {problem}; save it as UTF-8")
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number in itertools.count(1):
                line = file.readline(MAX_TEXT_BYTES)
                if not line:
                    break
                if len(line) >= MAX_TEXT_BYTES:
                    place = f"{path}, line {number}"
                    raise ConfigError(f"{place} is longer than {MAX_TEXT_BYTES} characters")
                if "\0" in line:
                    place = f"{path}, line {number}"
                    raise ConfigError(f"{place}: {NUL_BYTES}; save the table as UTF-8")
                yield line
    except UnicodeDecodeError:
        place = _first_bad_byte(path)
        raise ConfigError(f"{path} is not UTF-8 text{place}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _first_bad_byte(path: Path) -> str:
    """The place of the first byte that is not UTF-8, as part of a message; "" if there is none."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            data = file.readline(MAX_TEXT_BYTES)
            if not data:
                break
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                return f" (line {number}, byte {error.start} of it, 0x{data[error.start]:02x})"
    return ""


def _other_encoding(data: bytes) -> str:
    """Why bytes are not UTF-8; "" if they may be."""
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return f"it begins with the byte order mark of {name}"
    return NUL_BYTES if b"\0" in data else ""


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object. Raises ValueError whose message continues a sentence: "is not ..."."""
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("is not JSON: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}; each line is one object")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of one object as a dict. Raises ValueError if a key occurs twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"has the key {name!r} twice in one object")
        found[name] = value
    return found
