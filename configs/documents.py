"""Bounded readers for the YAML and JSON documents of the project.

Documents that a user or another program may have changed, or that may be damaged, are read here:
configs, overrides, cluster files, and the state of runs, shard sets and the zoo. Size, nesting
depth and the size after expansion of YAML aliases are limited, so reading takes bounded time and
memory. A duplicate key is an error. Every fault raises `DocumentError` with the file, the line
and, if the caller gives one, the way out. Torch-free.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from landiff.configs.base import ConfigError

MAX_YAML_BYTES = 1 << 20  # takes about 4 s to parse
YAML_NODE_COST = 8  # characters that each value counts for, in addition to its text
MAX_JSON_BYTES = 16 << 20
MAX_INDEX_BYTES = 1 << 30  # manifests, sidecars and shard plans, with up to 10^7 entries
MAX_DEPTH = 64
MAX_INTEGER = 1 << 64  # largest magnitude; no size, seed or offset is larger
MAX_NUMBER_LENGTH = 100  # characters
SHOWN_LENGTH = 60  # characters of a value in an error message
TAG = "tag:yaml.org,2002:"
CONTAINERS = (dict, list)
SURROGATE = re.compile("[\ud800-\udfff]")
LARGE_NUMBER = re.compile(r"\d{19}|\d[eE]\+?\d\d")  # may exceed 64 bits or be infinite
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],\n]')


class DocumentError(ConfigError):
    """A document cannot be read. The message names the file, the line and the cause."""


# -------------------------------------------------------------------- files and text


def read_bytes(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises DocumentError if it is not a regular file or is larger, OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, opening a pipe blocks
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise DocumentError(f"{path} is a folder; a file is expected")
        if not stat.S_ISREG(mode):
            raise DocumentError(f"{path} is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise DocumentError(f"{path} is larger than {limit} bytes, the limit for such a file")
    return data


def decode(data: bytes, origin: str) -> str:
    """UTF-8 text, without a byte order mark. Raises DocumentError for any other encoding."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DocumentError(f"{origin} is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DocumentError(
            f"{origin} is not UTF-8 (byte 0x{byte:02x} in line {line}); save it as UTF-8"
        ) from None


def read_text(path: Path, limit: int = MAX_YAML_BYTES) -> str:
    """UTF-8 text of a regular file of at most `limit` bytes. Raises DocumentError, OSError."""
    return decode(read_bytes(path, limit), str(path))


def read_yaml(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    `advice` is appended to every error and says what to do about a damaged file of this kind.
    Raises DocumentError, or OSError if the file cannot be opened.
    """
    with advised(advice):
        document = parse_yaml(read_text(path), str(path))
        return {} if document is None else _mapping(document, str(path))


def read_json(
    path: Path, *, advice: str = "", limit: int = MAX_JSON_BYTES, allow_nonfinite: bool = False
) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; `advice` as in `read_yaml`.

    Raises DocumentError, or OSError if the file cannot be opened.
    """
    with advised(advice):
        text = read_text(path, limit)
        document = parse_json(text, str(path), allow_nonfinite=allow_nonfinite)
        return _mapping(document, str(path))


class advised:
    """Context manager that appends the way out to a ConfigError of its body."""

    def __init__(self, advice: str) -> None:
        self.advice = advice

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Raise DocumentError with the advice instead of a ConfigError."""
        if self.advice and isinstance(error, ConfigError):
            raise DocumentError(f"{error}; {self.advice}") from None


def _mapping(document: Any, origin: str) -> dict[str, Any]:
    """`document` if it is a mapping. Raises DocumentError otherwise."""
    if not isinstance(document, dict):
        raise DocumentError(f"{origin} holds a {_kind_of(document)}; a mapping of keys is expected")
    return document


def _kind_of(value: Any) -> str:
    """Name of a value's type for error messages."""
    names = {list: "list", str: "string", type(None): "null", bool: "boolean"}
    return names.get(type(value), "number")


def shown(text: str) -> str:
    """`text` in quotes, shortened to `SHOWN_LENGTH` characters."""
    if len(text) > SHOWN_LENGTH:
        return f"{text[:SHOWN_LENGTH]!r}... ({len(text)} characters)"
    return repr(text)


# -------------------------------------------------------------------- YAML


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML document: dict, list, str, int, float, bool or None.

    Differs from YAML 1.1: `1e-4` is a number, and dates stay strings. Merge keys (`<<`) and
    aliases are resolved by copying, so no object occurs in two places. Raises DocumentError for
    bad syntax, tags other than those of plain values, keys that are not strings or occur twice,
    NaN, infinity, integers beyond 64 bits, control characters, and documents that are too large,
    nested too deeply or expand too far.
    """
    if len(text) > MAX_YAML_BYTES:
        raise DocumentError(f"{origin} is longer than {MAX_YAML_BYTES} characters, the limit")
    try:
        reader = _YamlReader(text, origin)
        node = reader.get_single_node()
    except DocumentError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise DocumentError(
            f"{origin} is not valid YAML: line {line} holds the character U+{code:04X}, "
            "which is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise DocumentError(f"{origin} is not valid YAML: {_describe(error)}") from None
    except (ValueError, OverflowError):
        raise DocumentError(
            f"{origin} is not valid YAML: an escape or a version number is too large"
        ) from None
    return None if node is None else reader.build(node, 1)


def _describe(error: yaml.MarkedYAMLError) -> str:
    """Place and problem of a YAML syntax error."""
    problem = ", ".join(filter(None, [error.context, error.problem]))
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return problem
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


class _YamlReader(yaml.SafeLoader):
    """Composes a document under limits and builds plain values from it."""

    def __init__(self, text: str, origin: str) -> None:
        self.origin = origin
        self.depth = 0
        self.size = 0  # of the document with aliases expanded, in characters and node costs
        self.sizes: dict[str, int] = {}  # size of each anchored node
        super().__init__(text)

    def fail(self, node: yaml.Node | yaml.Event, problem: str) -> NoReturn:
        """Raise DocumentError with the line of `node`."""
        assert node.start_mark is not None, "PyYAML marks every node and event that it reads"
        raise DocumentError(f"{self.origin}, line {node.start_mark.line + 1}: {problem}")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; checks the expanded size and the depth on the way."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            anchor = event.anchor or ""
            if anchor in self.anchors and anchor not in self.sizes:
                self.fail(event, f"the alias *{anchor} refers to a node that contains it")
            self._grow(event, self.sizes.get(anchor, 0))
            return super().compose_node(parent, index)
        before = self.size
        text = event.value if isinstance(event, yaml.ScalarEvent) else ""
        self._grow(event, YAML_NODE_COST + len(text))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(event, f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.anchor is not None:
            self.sizes[event.anchor] = self.size - before
        return node

    def _grow(self, event: yaml.Event, count: int) -> None:
        """Add to the size of the document. Raises DocumentError above the limit."""
        self.size += count
        if self.size > MAX_YAML_BYTES:
            self.fail(event, "too many values for one document, with aliases expanded")

    def build(self, node: yaml.Node, depth: int) -> Any:
        """The plain value of a node that is nested `depth` levels deep."""
        if depth > MAX_DEPTH:
            self.fail(node, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self._build_mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return [self.build(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode):
            return self._build_scalar(node)
        return self._refuse_tag(node)

    def _refuse_tag(self, node: yaml.Node) -> NoReturn:
        """Raise DocumentError for a node whose tag is not that of a plain value."""
        tag = node.tag.replace(TAG, "!!")
        self.fail(node, f"the tag {shown(tag)} is not allowed; a document holds plain values only")

    def _build_mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        """The dict of a mapping node. Its own keys win over merged ones."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == TAG + "merge"
            key = "<<" if is_merge else self._build_key(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                self.fail(
                    key_node,
                    f"the key {shown(key)} occurs twice, in lines {lines[key]} and {line}; "
                    "keep one",
                )
            lines[key] = line
            if is_merge:
                merged = self._build_merge(value_node, depth)
            else:
                own[key] = self.build(value_node, depth + 1)
        return {**merged, **own}

    def _build_key(self, node: yaml.Node) -> str:
        """A key of a mapping, which must be a string."""
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, "a list or a mapping cannot be a key")
        key = self._build_scalar(node)
        if not isinstance(key, str):
            self.fail(node, f"the key {shown(node.value)} is read as {key!r}; put it in quotes")
        return key

    def _build_merge(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        """The mapping that `<<: *name` or `<<: [*name, *other]` adds; the first alias wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self.fail(node, "<< takes the alias of a mapping, or a list of them")
            for key, value in self._build_mapping(source, depth + 1).items():
                merged.setdefault(key, value)
        return merged

    def _build_scalar(self, node: yaml.ScalarNode) -> Any:
        """The string, number, boolean or None of a scalar node."""
        name = node.tag.removeprefix(TAG)
        convert = SCALARS.get(name)
        if convert is None:
            self._refuse_tag(node)
        if name in ("int", "float") and len(node.value) > MAX_NUMBER_LENGTH:
            self.fail(node, f"a number of {len(node.value)} characters is too long")
        try:
            value = convert(self, node)
        except (ValueError, KeyError, OverflowError, IndexError):
            self.fail(node, f"{shown(node.value)} is not a valid {name}")
        if isinstance(value, str):
            return self._whole_text(node, value)
        problem = number_problem(value)
        if problem:
            self.fail(node, f"{shown(node.value)} {problem}")
        return value

    def _whole_text(self, node: yaml.ScalarNode, text: str) -> str:
        """`text` with surrogate pairs joined. Raises DocumentError for null and lone surrogates."""
        if "\0" in text:
            self.fail(node, "a string holds a null character")
        if SURROGATE.search(text) is None:
            return text
        try:  # JSON escapes a character beyond U+FFFF as a surrogate pair
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.fail(node, "a string holds half of a surrogate pair")


class YamlWriter(yaml.SafeDumper):
    """Writes YAML that `parse_yaml` reads back equal: strings that look like numbers in quotes."""


for _side in (_YamlReader, YamlWriter):
    _side.add_implicit_resolver(
        TAG + "float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _as_written(_reader: _YamlReader, node: yaml.ScalarNode) -> str:
    """The text of a scalar, without conversion."""
    return node.value


SCALARS: dict[str, Callable[[_YamlReader, yaml.ScalarNode], Any]] = {
    "str": _as_written,
    "timestamp": _as_written,
    "value": _as_written,  # a plain =
    "merge": _as_written,  # a << that is not a key
    "null": _YamlReader.construct_yaml_null,
    "bool": _YamlReader.construct_yaml_bool,
    "int": _YamlReader.construct_yaml_int,
    "float": _YamlReader.construct_yaml_float,
}


def number_problem(value: Any) -> str:
    """Why a number is not allowed in a document; empty if it is allowed or `value` is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "is an integer beyond 64 bits"
    return ""


# -------------------------------------------------------------------- JSON


def parse_json(
    text: str | bytes, origin: str, *, allow_nonfinite: bool = False, any_text: bool = False
) -> Any:
    """The value of one JSON document.

    `allow_nonfinite` accepts NaN and Infinity (metrics). `any_text` accepts null characters and
    lone surrogates in strings (names and captions of a source). Raises DocumentError for bad
    syntax, keys that occur twice, integers beyond 64 bits, null characters in strings, and nesting
    deeper than `MAX_DEPTH`.
    """
    if isinstance(text, bytes):
        text = decode(text, origin)
    reader = _JsonReader(origin, text, allow_nonfinite)
    try:
        document = reader.decoder.decode(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise DocumentError(f"{origin} is empty") from None
        raise DocumentError(
            f"{origin} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise DocumentError(f"{origin} is nested deeper than {MAX_DEPTH} levels") from None
    _check_depth(document, origin)
    if "\\u" in text and not any_text:
        _check_strings(document, origin)
    return document


def parse_line(text: str | bytes, origin: str) -> Any:
    """The value of one line of a JSONL file that this project writes.

    Such files may have millions of lines, so only syntax and nesting are checked. Raises
    DocumentError.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{origin} is not valid JSON: {error}") from None


class _JsonReader:
    """Hooks of the JSON decoder that check numbers and keys."""

    def __init__(self, origin: str, text: str, allow_nonfinite: bool) -> None:
        self.origin = origin
        self.text = text
        self.allow_nonfinite = allow_nonfinite
        has_large_numbers = LARGE_NUMBER.search(text) is not None
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self.build_object,
            parse_int=self.build_integer if has_large_numbers else None,
            parse_float=self.build_float if has_large_numbers else None,
            parse_constant=self.build_float,
        )

    def build_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A dict from the pairs of an object. Raises DocumentError for a duplicate key."""
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        key, first, second = _repeated_key(self.text)
        raise DocumentError(
            f"{self.origin}, line {second}: the key {shown(key)} occurs twice, in lines "
            f"{first} and {second}; keep one"
        )

    def build_integer(self, text: str) -> int:
        """An integer. Raises DocumentError beyond 64 bits."""
        if len(text) > MAX_NUMBER_LENGTH or number_problem(int(text)):
            raise DocumentError(f"{self.origin}: {shown(text)} is an integer beyond 64 bits")
        return int(text)

    def build_float(self, text: str) -> float:
        """A float. Raises DocumentError for NaN and infinity, unless they are allowed."""
        value = float(text)
        if not self.allow_nonfinite and not math.isfinite(value):
            raise DocumentError(f"{self.origin}: {shown(text)} is not a finite number")
        return value


def _repeated_key(text: str) -> tuple[str, int, int]:
    """The first key that occurs twice in one object, with both lines: (key, first, second)."""
    line = 1
    levels: list[dict[str, int] | None] = []  # keys of the open objects; None for a list
    expects_key = False
    for match in JSON_TOKEN.finditer(text):
        token = match[0]
        if token == "\n":
            line += 1
        elif token in "{[":
            levels.append({} if token == "{" else None)
            expects_key = token == "{"
        elif token in "}]":
            levels.pop()
            expects_key = False
        elif token == ",":
            expects_key = levels[-1] is not None
        elif expects_key:
            expects_key = False
            key = json.loads(token)
            keys = levels[-1]
            assert keys is not None
            if key in keys:
                return key, keys[key], line
            keys[key] = line
    raise AssertionError("no key occurs twice")


def _check_depth(document: Any, origin: str) -> None:
    """Raise DocumentError where containers are nested deeper than `MAX_DEPTH`."""
    level = [document] if type(document) in CONTAINERS else []
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            below.extend(container.values() if isinstance(container, dict) else container)
        level = [value for value in below if type(value) in CONTAINERS]
        if not level:
            return
    raise DocumentError(f"{origin} is nested deeper than {MAX_DEPTH} levels")


def _check_strings(document: Any, origin: str) -> None:
    """Raise DocumentError for null characters and lone surrogates in keys and values."""
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.keys())
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, str):
            if "\0" in value:
                raise DocumentError(f"{origin}: a string holds a null character")
            if SURROGATE.search(value):
                raise DocumentError(f"{origin}: a string holds half of a surrogate pair")
