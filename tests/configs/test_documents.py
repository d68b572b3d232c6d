"""Hostile and damaged documents, and other encodings: one clear error each, within limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from landiff.configs import Config, ConfigError, load
from landiff.configs.documents import (
    MAX_YAML_BYTES,
    DocumentError,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
)

ROOT = Path(__file__).resolve().parents[2]


def doubling(line: str, first: str, levels: int) -> str:
    """A document in which each of `levels` lines holds the line before it many times."""
    lines = [f"a0: &a0 {first}"]
    lines += [line.format(this=level, last=level - 1) for level in range(1, levels)]
    return "\n".join(lines)


ALIAS_BOMB = doubling("a{this}: &a{this} [" + ", ".join(["*a{last}"] * 9) + "]", "[lol, lol]", 20)
MERGE_BOMB = doubling("a{this}: &a{this} {{<<: [*a{last}, *a{last}]}}", "{x: 1}", 40)
CHAIN = doubling("a{this}: &a{this} [*a{last}]", "[1]", 400)

REFUSED_YAML = [
    (ALIAS_BOMB, "too many values"),
    (MERGE_BOMB, "too many values"),
    (CHAIN, "nested deeper than 64"),
    ("a: &a [*a]", "refers to a node that contains it"),
    ("a: &a {<<: *a}", "refers to a node that contains it"),
    ("[" * 100_000, "nested deeper than 64"),
    ("- " * 100_000, "nested deeper than 64"),
    ("? " * 100_000, "nested deeper than 64"),
    ("x" * (MAX_YAML_BYTES + 1), "longer than"),
    ("[" + "a," * 150_000 + "]", "too many values"),
    ("{", "line 1, column 2"),
    ("a: [1, 2", "line 1"),
    ("\ta: 1", "line 1, column 1"),
    (
        "a: !!python/object/apply:os.system ['x']",
        "line 1: the tag '!!python/object/apply:os.system' is not allowed",
    ),
    ("a: !!python/name:os.system", "the tag"),
    ("a: !!set {b, c}", "the tag '!!set' is not allowed"),
    ("a: !!binary aGk=", "the tag '!!binary' is not allowed"),
    ("!<foo> x", "the tag 'foo' is not allowed"),
    ("a: !!int x", "'x' is not a valid int"),
    ("a: !!float x", "'x' is not a valid float"),
    ("a: !!bool x", "'x' is not a valid bool"),
    ("a: " + "9" * 5000, "a number of 5000 characters is too long"),
    ("a: " + "9" * 30, "is an integer beyond 64 bits"),
    ("a: 0x" + "f" * 30, "is an integer beyond 64 bits"),
    ("a: " + "1:" * 2000 + "1", "is too long"),
    ("a: .nan", "'.nan' is not a finite number"),
    ("a: -.inf", "is not a finite number"),
    ("a: 1e999", "'1e999' is not a finite number"),
    ("a: 1\nb: 2\na: 3", "line 3: the key 'a' occurs twice, in lines 1 and 3"),
    ("x:\n  a: 1\n  'a': 2", "line 3: the key 'a' occurs twice, in lines 2 and 3"),
    ("{a: 1, a: 2}", "occurs twice, in lines 1 and 1"),
    ("yes: 1", "the key 'yes' is read as True; put it in quotes"),
    ("1: 1", "put it in quotes"),
    ("[a]: 1", "cannot be a key"),
    ("{{a: 1}: 1}", "cannot be a key"),
    ("<<: 1", "<< takes the alias of a mapping"),
    ("a: *b", "undefined alias"),
    ("---\na\n---\nb", "another document"),
    ('a: "\\0"', "null character"),
    ('a: "\\ud800"', "half of a surrogate pair"),
    ('a: "\\UFFFFFFFF"', "too large"),
    ("%YAML " + "9" * 5000 + ".1\n--- a", "too large"),
    ("a: \x07", "line 1 holds the character U+0007"),
]
REFUSED_JSON = [
    ("", "is empty"),
    ("  \n", "is empty"),
    ('{"a": ', "line 1, column 7"),
    (
        '{"a": 1,\n "b": {"c": [1, "}"]},\n "a": 2}',
        "line 3: the key 'a' occurs twice, in lines 1 and 3",
    ),
    (
        '[{"a": 1}, {"\\"": "a", "b":\n1, "b": {"b": 1}}]',
        "line 2: the key 'b' occurs twice, in lines 1 and 2",
    ),
    ("[" * 100_000, "nested deeper than 64"),
    ("[" * 500 + "]" * 500, "nested deeper than 64"),
    ('{"a":' * 500 + "1" + "}" * 500, "nested deeper than 64"),
    ("[NaN]", "'NaN' is not a finite number"),
    ("[-Infinity]", "is not a finite number"),
    ("[1e999]", "'1e999' is not a finite number"),
    ("[1" + "0" * 400 + ".5]", "is not a finite number"),
    ("9" * 5000, "is an integer beyond 64 bits"),
    ("[" + "9" * 30 + "]", "is an integer beyond 64 bits"),
    ('"\\u0000"', "null character"),
    ('{"\\ud800": 1}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED_YAML, ids=range(len(REFUSED_YAML)))
def test_yaml_that_is_refused_says_where_and_why(text, says):
    with pytest.raises(DocumentError) as error:
        parse_yaml(text, "x.yaml")
    assert str(error.value).startswith("x.yaml") and says in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("text", "says"), REFUSED_JSON, ids=range(len(REFUSED_JSON)))
def test_json_that_is_refused_says_where_and_why(text, says):
    with pytest.raises(DocumentError) as error:
        parse_json(text, "x.json")
    assert str(error.value).startswith("x.json") and says in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("text", "value"), [
    ("", None),
    ("a: 2024-13-45", {"a": "2024-13-45"}),
    ("a: 2024-01-01 25:61:61", {"a": "2024-01-01 25:61:61"}),
    ("[1e-4, 1.5, 3E5, 1_000, .5]", [1e-4, 1.5, 3e5, 1000, 0.5]),
    ("[0o7, 017, 0x1F, -3]", ["0o7", 15, 31, -3]),
    ("[yes, no, on, off, true, ~, null, '']", [True, False, True, False, True, None, None, ""]),
    ("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}),
    (
        "a: &a {x: 1}\nb: &b {x: 2, z: 3}\nc: {<<: [*a, *b]}",
        {"a": {"x": 1}, "b": {"x": 2, "z": 3}, "c": {"x": 1, "z": 3}},
    ),
    ('"\\ud83d\\ude00 😀"', "😀 😀"),
    ("[=, <<]", ["=", "<<"]),
    (str(2**64), 2**64),
    ("[" * 63 + "1" + "]" * 63, eval("[" * 63 + "1" + "]" * 63)),
])  # fmt: skip
def test_yaml_that_is_accepted(text, value):
    assert parse_yaml(text, "x.yaml") == value


def test_aliases_share_no_object():
    document = parse_yaml("a: &a {x: [1]}\nb: *a", "x.yaml")
    document["a"]["x"].append(2)
    assert document["b"] == {"x": [1]}


def test_json_that_is_accepted():
    assert parse_json('{"a": [1, 2.5, null, true, "\\ud83d\\ude00"]}', "x") == {
        "a": [1, 2.5, None, True, "😀"]
    }
    assert parse_json(f"[{2**64}, 1e300, {'0.' + '1' * 30}]", "x") == [
        2**64,
        1e300,
        float("0." + "1" * 30),
    ]
    assert parse_json("[Infinity]", "x", allow_nonfinite=True) == [float("inf")]
    assert parse_json('"\\udcff"', "x", any_text=True) == "\udcff"


@pytest.mark.parametrize("read", [read_yaml, read_json])
@pytest.mark.parametrize(("data", "says"), [
    (b"\xff\xfea\x00", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff\x00a", "is UTF-16"),
    (b'{"a":\n"gr\xfc\xdfe"}', "is not UTF-8 (byte 0xfc in line 2); save it as UTF-8"),
    (b"[1, 2]", "holds a list; a mapping of keys is expected"),
    (b'"text"', "holds a string"),
    (b"3", "holds a number"),
])  # fmt: skip
def test_files_in_other_encodings_and_of_other_kinds_are_refused_by_name(
    tmp_path, read, data, says
):
    path = tmp_path / "document"
    path.write_bytes(data)
    with pytest.raises(DocumentError) as error:
        read(path, advice="delete it")
    assert str(error.value).startswith(str(path)) and says in str(error.value)
    assert str(error.value).endswith("; delete it")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": "\xe6\xbc\xa2"}')
    assert read_json(tmp_path / "x") == read_yaml(tmp_path / "x") == {"a": "漢"}


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(DocumentError, match="not a regular file|is a folder"):
            read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing")


def test_a_file_of_any_size_costs_no_more_than_the_limit(tmp_path):
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DocumentError, match="is larger than"):
        read_yaml(tmp_path / "large.yaml")


BOUNDED = """
import resource, sys
from landiff.configs.documents import parse_yaml, DocumentError
from tests.configs.test_documents import ALIAS_BOMB, MERGE_BOMB, CHAIN
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
for text in (ALIAS_BOMB, MERGE_BOMB, CHAIN):
    try:
        parse_yaml(text, "x")
    except DocumentError:
        pass
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - used
sys.exit(f"{grown} bytes" if grown > 64 << 20 else 0)
"""


def test_an_alias_bomb_costs_little_memory():
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # it took 203 s and 8 GB

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", BOUNDED], env=environment, preexec_fn=limit, check=True)


class Section(Config):
    width: int = 1
    tags: dict[str, str] = Field(default={})


class Whole(Config):
    name: str = "a"
    one: Section = Section()
    two: Section = Section()


@pytest.mark.parametrize(
    "override",
    ["one={", "name=!!python/object:x {}", "one.width=" + "9" * 5000, "name=[" * 100, "name=\x07"],
)
def test_overrides_are_read_under_the_same_limits(override):
    with pytest.raises(ConfigError, match="override"):
        load(Whole, {}, [override])


def test_an_override_changes_one_of_two_aliases(tmp_path):
    (tmp_path / "x.yaml").write_text("one: &one {tags: {a: b}}\ntwo: *one\n")
    config = load(Whole, tmp_path / "x.yaml", ["one.tags.a=c"])
    assert (config.one.tags, config.two.tags) == ({"a": "c"}, {"a": "b"})


def test_an_error_shows_no_more_than_the_start_of_a_value():
    with pytest.raises(ConfigError) as error:
        load(Whole, {"one": {"width": ["x" * 1000] * 1000}})
    assert len(str(error.value)) < 500


def test_many_problems_are_counted():
    with pytest.raises(ConfigError, match="and 80 more"):
        load(Whole, {f"key{number}": 1 for number in range(100)})
