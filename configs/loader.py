"""Loads typed configs from YAML files and dotted overrides.

A config file holds only what differs from the defaults of its class. Two rules extend plain YAML:

* In place of a section, a string refers to another file or to a section of one: `model:
  nano/model#lm`. A name without a suffix is a packaged file (`configs/nano/model.yaml`). A name
  that ends in .yaml or .yml is a path relative to the file that refers to it.
* Overrides have the form `dotted.key=value` with the value in YAML, for instance `optim.lr=3e-4
  model.num_layers=6`. They are applied after the references are resolved.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from landiff.configs.base import LENIENT, Config, ConfigError
from landiff.configs.documents import (
    MAX_JSON_BYTES,
    advised,
    parse_json,
    parse_yaml,
    read_bytes,
    read_yaml,
    shown,
)
from landiff.configs.files import PRIVATE, PUBLIC, write_text
from landiff.configs.problems import SHOWN_PROBLEMS, Problem, problems_of, require_none
from landiff.configs.secrets import REDACTED, is_secret_name, redact

MAX_LISTED_NAMES = 25  # known names are listed in an error message if there are fewer
SHOWN_VALUE = 200  # characters of a value in an error message
PACKAGED = Path(__file__).resolve().parent

C = TypeVar("C", bound=Config)


def packaged_names() -> list[str]:
    """Names of all packaged config files, e.g. `nano/lm`."""
    files = PACKAGED.rglob("*.yaml")
    return sorted(str(file.relative_to(PACKAGED).with_suffix("")) for file in files)


def find(name: str, relative_to: Path | None = None) -> Path:
    """The file of a config name: a path that ends in .yaml or .yml, or a packaged name (`nano/lm`).

    Raises ConfigError if there is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if relative_to is not None and not path.is_absolute():
            path = relative_to / path
        if not path.is_file():
            raise ConfigError(f"config file {path} does not exist")
        return path
    path = PACKAGED / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no packaged config is called {name!r}{nearest_name(name, packaged_names())}; "
            f"a file of your own must end in .yaml. Known: {', '.join(packaged_names())}"
        )
    return path


def read(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file."""
    return read_yaml(path)


def load(cls: type[C], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> C:
    """Read `source` (packaged name, path or mapping), apply `overrides` and validate it as a `cls`.

    Raises one ConfigError with all problems of the file and of the overrides. Each names the
    dotted key, the value and the nearest known name.
    """
    config, problems = load_leniently(cls, source, overrides)
    require_none(problems)
    assert config is not None
    return config


def load_leniently(
    cls: type[C],
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> tuple[C | None, list[Problem]]:
    """Like `load`, but returns (config, problems) instead of raising the problems.

    The config is returned if every value has its type, even if some values contradict each other,
    so that further checks can report their problems too. `values` replaces top-level keys by
    Python values. Raises ConfigError if the file cannot be read.
    """
    if isinstance(source, Mapping):
        origin = "config"
        data = _resolve_references(cls, source, None)
    else:
        origin = str(source)
        path = find(origin)
        data = _resolve_references(cls, read(path), path.parent)
    problems: list[Problem] = []
    for override in overrides:
        problems += problems_of(partial(_apply, cls, data, override))
    data |= values or {}
    try:
        return cls.model_validate(data), problems
    except ValidationError as error:
        problems += [Problem(_explain(cls, origin, each)) for each in error.errors()]
    try:
        return cls.model_validate(data, context=LENIENT), problems
    except ValidationError:
        return None, problems


def validate(cls: type[C], data: Mapping[str, Any], origin: str = "config") -> C:
    """`data` as a `cls`. Raises one ConfigError with all problems."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain_all(cls, origin, error)) from None


def read_json_as(
    cls: type[C],
    path: Path,
    *,
    advice: str = "",
    limit: int = MAX_JSON_BYTES,
    any_text: bool = False,
) -> C:
    """The JSON file `path` as a `cls`; `advice` says what to do about a damaged file.

    `any_text` is that of `parse_json`. Files above `MAX_JSON_BYTES`, which only programs write,
    are checked by pydantic alone, which is four times as fast. Raises DocumentError, or OSError if
    the file cannot be opened.
    """
    with advised(advice):
        return parse_json_as(cls, read_bytes(path, limit), path, any_text=any_text)


def parse_json_as(cls: type[C], data: bytes, origin: Path | str, *, any_text: bool = False) -> C:
    """A JSON document as a `cls`, see `read_json_as`. `origin` names the document in errors."""
    if len(data) <= MAX_JSON_BYTES:
        document = parse_json(data, str(origin), any_text=any_text)
        return validate(cls, document, str(origin))
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(_explain_all(cls, str(origin), error)) from None


def dump(config: Config) -> str:
    """The resolved config as YAML text, from which `load` makes an equal config."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110
    )


def write_config(path: Path, config: Config) -> None:
    """Write `dump(config)`; with a secret in it, e.g. in a URL, only its owner can read it."""
    text = dump(config)
    holds_secret = redact(text) != text
    write_text(path, text, PRIVATE if holds_secret else PUBLIC)


def _resolve_references(
    cls: type[BaseModel], data: Mapping[str, Any], folder: Path | None
) -> dict[str, Any]:
    """`data` with references in place of sections replaced by what they refer to.

    `folder` is that of the file of `data`, None for a mapping from code.
    """
    resolved = dict(data)
    for name, field in cls.model_fields.items():
        section = _section_class(field.annotation)
        if section is None or name not in resolved:
            continue
        value = resolved[name]
        section_folder = folder
        if isinstance(value, str):
            path, value = _follow_reference(name, value, folder)
            section_folder = path.parent
        if isinstance(value, dict):
            value = _resolve_references(section, value, section_folder)
        resolved[name] = value
    return resolved


def _follow_reference(key: str, reference: str, folder: Path | None) -> tuple[Path, Any]:
    """(file, value) of a reference such as `nano/model#lm`. Raises ConfigError."""
    file, _, section = reference.partition("#")
    path = find(file, folder)
    value: Any = read(path)
    for part in filter(None, section.split(".")):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(
                f"{key}: {reference!r} names the section {section!r}, which {path} does not have"
            )
        value = value[part]
    return path, value


def _apply(cls: type[BaseModel], data: dict[str, Any], override: str) -> None:
    """Apply one override to `data` in place. Raises ConfigError."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form dotted.key=value")
    *parents, last = key.split(".")
    node = data
    owner: type[BaseModel] | None = cls
    for depth, part in enumerate(parents):
        dotted = ".".join(parents[: depth + 1])
        owner = _known(owner, part, dotted)
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {dotted} is a value, not a section")
    _known(owner, last, key)
    node[last] = parse_yaml(text, f"override {shown(redact(override))}")


def _known(owner: type[BaseModel] | None, part: str, dotted: str) -> type[BaseModel] | None:
    """The class of the section `part` of `owner`; None below free-form mappings."""
    if owner is None:
        return None
    if part not in owner.model_fields:
        raise ConfigError(
            f"unknown config key {dotted!r}{nearest_name(part, list(owner.model_fields))}"
        )
    return _section_class(owner.model_fields[part].annotation)


def _section_class(annotation: Any) -> type[BaseModel] | None:
    """The one config class in a type annotation; None if there is none or more than one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        members = [_section_class(member) for member in typing.get_args(annotation)]
        found = [member for member in members if member is not None]
        return found[0] if len(found) == 1 else None
    return None


def _explain_all(cls: type[BaseModel], origin: str, error: ValidationError) -> str:
    """One line per problem, at most `SHOWN_PROBLEMS`."""
    problems = error.errors(include_url=False)
    lines = [_explain(cls, origin, problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"{origin}: and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def _explain(cls: type[BaseModel], origin: str, error: Any) -> str:
    """Message for one problem that pydantic reports: file, dotted key, value and cause."""
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        meant = nearest_name(location[-1], _known_keys(cls, location[:-1]))
        return f"{origin}: unknown config key {dotted!r}{meant}"
    if error["type"] == "missing":
        return f"{origin}: {dotted} is required and not set"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{origin}: {_explain_tag(dotted, error['ctx'])}"
    message = error["msg"].removeprefix("Value error, ")
    where = f"{dotted}: " if dotted else ""
    if dotted and not isinstance(error["input"], dict):
        where = f"{dotted} = {_shown_value(location, error['input'])}: "
    return f"{origin}: {where}{redact(message)}"


def _known_keys(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Keys of the section at `path` below `cls`; empty if its class is not certain."""
    owner = cls
    for part in path:
        if part.isdecimal():  # of a list, whose items have the class that was found for the list
            continue
        if part not in owner.model_fields:
            return []
        annotation = owner.model_fields[part].annotation
        if typing.get_origin(annotation) in (tuple, list):
            annotation = typing.get_args(annotation)[0]
        section = _section_class(annotation)
        if section is None:
            return []
        owner = section
    return list(owner.model_fields)


def _shown_value(location: Sequence[str], value: Any) -> str:
    """A value for an error message, without secrets and of at most `SHOWN_VALUE` characters."""
    if "env" in location and is_secret_name(location[-1]):
        return REDACTED
    text = redact(repr(value))
    if len(text) > SHOWN_VALUE:
        return f"{text[:SHOWN_VALUE]}..."
    return text


def _explain_tag(dotted: str, context: Mapping[str, str]) -> str:
    """Message for a section whose class depends on a key (`kind`) that is missing or unknown."""
    key = f"{dotted}.{context['discriminator'].strip(chr(39))}"
    if "tag" not in context:
        return f"{key} is required and not set; the other keys depend on it"
    known = [name.strip(" '") for name in context["expected_tags"].split(",")]
    close = difflib.get_close_matches(context["tag"], known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{key} = {context['tag']!r} is unknown; {meant}known here: {', '.join(known)}"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown name: the nearest known name, or a short list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    if known and len(known) < MAX_LISTED_NAMES:
        return f"; known here: {', '.join(sorted(known))}"
    return ""
