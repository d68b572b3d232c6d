"""YAML + dotted overrides -> one typed config.

A config file holds only what differs from the defaults of its class. Two rules go beyond plain YAML:

* Where a section is expected, a string names another file, or a section of one: `model: nano/model#lm`.
  Names without a suffix are looked up among the packaged files (`configs/nano/model.yaml`); anything that
  ends in .yaml or .yml is a path, relative to the file that names it.
* Overrides are `dotted.key=value`, the value read as YAML, applied after the references are resolved:
  `optim.lr=3e-4 model.num_layers=6`.
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

MAX_LISTED_NAMES = 25  # more known names than that are not listed
SHOWN_VALUE = 200  # characters of a value in an error message
PACKAGED = Path(__file__).resolve().parent

C = TypeVar("C", bound=Config)


def packaged_names() -> list[str]:
    """Names of all packaged config files, e.g. `nano/lm`."""
    return sorted(str(p.relative_to(PACKAGED).with_suffix("")) for p in PACKAGED.rglob("*.yaml"))


def find(name: str, relative_to: Path | None = None) -> Path:
    """The file behind a config name: a path that ends in .yaml/.yml, or a packaged name such as `nano/lm`."""
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
    """Read `source` (packaged name, path or mapping), apply `overrides`, check it as a `cls`.

    Raises ConfigError with the dotted key, the value and the nearest known name; all problems of the file and of
    the overrides together.
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
    """As `load`, but returns the problems instead of raising them.

    The config is there whenever every value has its type, even if some contradict each other: further checks
    can then report their problems together with these. `values` replace top-level keys as they are, without being
    read as YAML. Raises ConfigError where the file itself cannot be read.
    """
    if isinstance(source, Mapping):
        data, folder, origin = dict(source), None, "config"
    else:
        path = find(str(source))
        data, folder, origin = read(path), path.parent, str(source)
    data = _resolve_references(cls, data, folder)
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
    """`data` as a `cls`; every problem of the file in one ConfigError."""
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
    """The JSON file `path` as a `cls`; `advice` says what to do about a damaged one.

    `any_text` is that of `parse_json`. Files above `MAX_JSON_BYTES`, which only programs write, are checked by pydantic alone, four times
    as fast. Raises DocumentError, OSError where the file cannot be opened.
    """
    with advised(advice):
        return parse_json_as(cls, read_bytes(path, limit), path, any_text=any_text)


def parse_json_as(cls: type[C], data: bytes, origin: Path | str, *, any_text: bool = False) -> C:
    """A JSON document as a `cls`; see `read_json_as`. `origin` names the document in errors."""
    if len(data) <= MAX_JSON_BYTES:
        document = parse_json(data, str(origin), any_text=any_text)
        return validate(cls, document, str(origin))
    try:
        return cls.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(_explain_all(cls, str(origin), error)) from None


def dump(config: Config) -> str:
    """The resolved config as YAML text that `load` reads back to an equal config."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110
    )


def write_config(path: Path, config: Config) -> None:
    """Write `dump(config)`; its owner alone may read it where it holds a secret, e.g. in a URL."""
    text = dump(config)
    write_text(path, text, PUBLIC if redact(text) == text else PRIVATE)


def _resolve_references(
    cls: type[BaseModel], data: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    resolved = dict(data)
    for name, field in cls.model_fields.items():
        section = _section_class(field.annotation)
        if section is None or name not in resolved:
            continue
        value, inner = resolved[name], folder
        if isinstance(value, str):
            file, _, part = value.partition("#")
            path = find(file, folder)
            value, inner = read(path), path.parent
            for key in filter(None, part.split(".")):
                if not isinstance(value, dict) or key not in value:
                    raise ConfigError(
                        f"{name}: {resolved[name]!r} names the section {part!r}, which {path} does not have"
                    )
                value = value[key]
        if isinstance(value, dict):
            resolved[name] = _resolve_references(section, value, inner)
    return resolved


def _apply(cls: type[BaseModel], data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form dotted.key=value")
    *parents, last = key.split(".")
    node, owner = data, cls
    for depth, part in enumerate(parents):
        owner = _known(owner, part, ".".join(parents[: depth + 1]))
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section"
            )
    _known(owner, last, key)
    node[last] = parse_yaml(text, f"override {shown(redact(override))}")


def _known(owner: type[BaseModel] | None, part: str, dotted: str) -> type[BaseModel] | None:
    """The section class behind `part`; None below free-form mappings."""
    if owner is None:
        return None
    if part not in owner.model_fields:
        raise ConfigError(
            f"unknown config key {dotted!r}{nearest_name(part, list(owner.model_fields))}"
        )
    return _section_class(owner.model_fields[part].annotation)


def _section_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        found = [c for c in map(_section_class, typing.get_args(annotation)) if c is not None]
        return found[0] if len(found) == 1 else None
    return None


def _explain_all(cls: type[BaseModel], origin: str, error: ValidationError) -> str:
    """A line for each problem, up to `SHOWN_PROBLEMS`."""
    problems = error.errors(include_url=False)
    lines = [_explain(cls, origin, problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"{origin}: and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def _explain(cls: type[BaseModel], origin: str, error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        owner: type[BaseModel] | None = cls
        for part in location[:-1]:
            owner = (
                _section_class(owner.model_fields[part].annotation)
                if owner and part in owner.model_fields
                else None
            )
        return f"{origin}: unknown config key {dotted!r}{nearest_name(location[-1], list(owner.model_fields) if owner else [])}"
    if error["type"] == "missing":
        return f"{origin}: {dotted} is required and not set"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{origin}: {_explain_tag(dotted, error['ctx'])}"
    message = error["msg"].removeprefix("Value error, ")
    where = f"{dotted}: " if dotted else ""
    if dotted and not isinstance(error["input"], dict):
        where = f"{dotted} = {_shown_value(location, error['input'])}: "
    return f"{origin}: {where}{redact(message)}"


def _shown_value(location: Sequence[str], value: Any) -> str:
    """A value for an error message: without secrets, and not longer than `SHOWN_VALUE`."""
    if "env" in location and is_secret_name(location[-1]):
        return REDACTED
    text = redact(repr(value))
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."


def _explain_tag(dotted: str, context: Mapping[str, str]) -> str:
    """A section whose class follows from one of its keys (`kind`), which is missing or unknown."""
    key = f"{dotted}.{context['discriminator'].strip(chr(39))}"
    if "tag" not in context:
        return f"{key} is required and not set; it decides which other keys there are"
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
