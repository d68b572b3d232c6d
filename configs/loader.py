"""Loads typed configs from YAML files and dotted overrides.

A config file holds only what differs from the defaults of its class. Three rules extend plain YAML:

* In place of a section, a string refers to another file or to a section of one: `model:
  nano/model#lm`. A name without a suffix is a packaged file (`configs/nano/model.yaml`). A name
  that ends in .yaml or .yml is a path relative to the file that refers to it.
* `extends: nano/lm` at the top level starts from the values of another file. Sections are merged
  key by key; all other values, lists included, are replaced. A section whose `kind` differs is
  replaced as a whole, since its other keys belong to the kind.
* Overrides have the form `dotted.key=value` with the value in YAML, for instance `optim.lr=3e-4
  model.num_layers=6`. They are applied after the references are resolved. A reference in an
  override, `model=my/model.yaml#lm`, is relative to the working folder.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import (
    MAX_JSON_BYTES,
    YamlWriter,
    advised,
    parse_json,
    parse_yaml,
    read_bytes,
    read_yaml,
    shown,
)
from landiff.configs.files import PRIVATE, PUBLIC, write_text
from landiff.configs.problems import (
    Problem,
    WrongValue,
    nearest_name,
    problems_of,
    require_none,
)
from landiff.configs.secrets import redact
from landiff.configs.wrong_values import dotted_key, explain, explain_all, repaired

PACKAGED = Path(__file__).resolve().parent

EXTENDS = "extends"  # top-level key that names the file whose values a file starts from
_ABSENT = object()

C = TypeVar("C", bound=Config)


class _NoSection(ConfigError):
    """A file lacks the section that a reference names."""


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


def config_name(path: Path) -> str:
    """The name of a packaged file, e.g. `nano/lm`; the path of any other."""
    if path.is_absolute() and path.is_relative_to(PACKAGED):
        return str(path.relative_to(PACKAGED).with_suffix(""))
    return str(path)


def _find_base(extended: Any, path: Path | None) -> Path:
    """The file that `path` extends. Raises ConfigError."""
    where = "config" if path is None else config_name(path)
    if not isinstance(extended, str):
        raise ConfigError(
            f"{where}: {EXTENDS} = {extended!r} must be one name of a config, e.g. nano/lm"
        )
    try:
        return find(extended, None if path is None else path.parent)
    except ConfigError as error:
        raise ConfigError(f"{where}: {EXTENDS} = {extended!r}: {error}") from None


def top_level_keys(path: Path) -> set[str]:
    """The keys that a file sets, with those of the files that it extends."""
    return set(_Files().load(None, path))


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

    With problems, the config only serves further checks, which can report theirs too. It has other
    values in place of wrong ones (`wrong_values.repaired`), and is None if a required one is
    missing. `values` replaces top-level keys by Python values. Raises ConfigError if the file
    cannot be read.
    """
    files = _Files()
    if isinstance(source, Mapping):
        origin = "config"
        data = files.merge_base(cls, dict(source), None, (), ())
    else:
        origin = str(source)
        data = files.load(cls, find(origin))
    problems: list[Problem] = []
    for override in overrides:
        problems += problems_of(partial(_apply, cls, data, override, files))
    data |= values or {}
    for key in values or {}:
        files.forget((key,))
    try:
        return cls.model_validate(data), problems
    except ValidationError as error:
        for each in error.errors():
            place = files.describe(origin, each["loc"])
            text = explain(cls, data, place, each)
            problems.append(WrongValue(text, ".".join(dotted_key(data, each["loc"]))))
    return repaired(cls, data, files.earlier), problems


def validate(cls: type[C], data: Mapping[str, Any], origin: str = "config") -> C:
    """`data` as a `cls`. Raises one ConfigError with all problems."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain_all(cls, data, origin, error)) from None


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
        raise ConfigError(explain_all(cls, None, str(origin), error)) from None


def dump(config: Config) -> str:
    """The resolved config as YAML text, from which `load` makes an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=YamlWriter,
        sort_keys=False,
        allow_unicode=True,
        width=110,
    )


def write_config(path: Path, config: Config) -> None:
    """Write `dump(config)`; with a secret in it, e.g. in a URL, only its owner can read it."""
    text = dump(config)
    holds_secret = redact(text) != text
    write_text(path, text, PRIVATE if holds_secret else PUBLIC)


Key = tuple[str, ...]
"""A dotted key as its parts."""


class _Files:
    """Reads config files with what they extend and refer to, and remembers where values are from.

    `origins` maps the key of each value to its file, for error messages. `earlier` maps the key of
    each value that replaced another one to the value that it replaced.
    """

    def __init__(self) -> None:
        self.origins: dict[Key, Path] = {}
        self.earlier: dict[Key, Any] = {}

    def load(
        self,
        cls: type[BaseModel] | None,
        path: Path,
        section: Key = (),
        key: Key = (),
        chain: Sequence[Path] = (),
    ) -> Any:
        """The value of `section` in the file `path`, which has the class `cls`, all resolved.

        `key` is its place in the config, `chain` the files that led to this one. Raises ConfigError
        for a cycle and for a file or section that does not exist.
        """
        place = path.resolve()
        if place in chain:
            names = " -> ".join(config_name(file) for file in (*chain, place))
            raise ConfigError(f"these config files extend or refer to each other: {names}")
        return self.merge_base(cls, read(path), path, section, key, (*chain, place))

    def merge_base(
        self,
        cls: type[BaseModel] | None,
        data: dict[str, Any],
        path: Path | None,
        section: Key,
        key: Key,
        chain: Sequence[Path] = (),
    ) -> Any:
        """`section` of `data`, the content of `path`, on top of that of the file it extends.

        `path` is None for a mapping from code.
        """
        folder = None if path is None else path.parent
        extended = data.pop(EXTENDS, None)
        base: Any = _ABSENT
        if extended is not None:
            base_path = _find_base(extended, path)
            try:
                base = self.load(cls, base_path, section, key, chain)
            except _NoSection:
                base = _ABSENT
        value: Any = data
        for depth, part in enumerate(section):
            if isinstance(value, str):
                value = f"{value}{'.' if '#' in value else '#'}{'.'.join(section[depth:])}"
                break
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is _ABSENT and base is _ABSENT:
            raise _NoSection(f"names the section {'.'.join(section)!r}, which {path} does not have")
        if value is _ABSENT:
            return base
        if isinstance(value, str) and section:
            value = self.follow(cls, value, folder, key, chain)
        elif isinstance(value, dict):
            value = self.resolve_sections(cls, value, path, key, chain)
        return self.merge(base, value, key)

    def resolve_sections(
        self,
        cls: type[BaseModel] | None,
        data: Mapping[str, Any],
        path: Path | None,
        key: Key,
        chain: Sequence[Path],
    ) -> dict[str, Any]:
        """`data` of the file `path` with references in place of sections replaced."""
        resolved = dict(data)
        folder = None if path is None else path.parent
        for name, value in resolved.items():
            own_key = (*key, name)
            section = None
            if cls is not None and name in cls.model_fields:
                section = _section_class(cls.model_fields[name].annotation)
            if section is not None and isinstance(value, str):
                resolved[name] = self.follow(section, value, folder, own_key, chain)
            elif isinstance(value, dict):
                resolved[name] = self.resolve_sections(section, value, path, own_key, chain)
            elif path is not None:
                self.origins[own_key] = path
        return resolved

    def follow(
        self,
        cls: type[BaseModel] | None,
        reference: str,
        folder: Path | None,
        key: Key,
        chain: Sequence[Path] = (),
    ) -> Any:
        """What a reference such as `nano/model#lm` stands for. Raises ConfigError."""
        name, _, section = reference.partition("#")
        path = find(name, folder)
        parts = tuple(filter(None, section.split(".")))
        try:
            return self.load(cls, path, parts, key, chain)
        except _NoSection as error:
            raise ConfigError(f"{'.'.join(key)}: {reference!r} {error}") from None

    def merge(self, base: Any, own: Any, key: Key) -> Any:
        """`own` on top of `base`: sections key by key, everything else replaced."""
        is_section = isinstance(base, dict) and isinstance(own, dict)
        if is_section:
            kinds = (base.get("kind"), own.get("kind"))
            is_section = None in kinds or kinds[0] == kinds[1]
        if not is_section:
            if base is not _ABSENT:
                self.earlier[key] = base
            return own
        merged = dict(base)
        for name, value in own.items():
            merged[name] = self.merge(base.get(name, _ABSENT), value, (*key, name))
        return merged

    def forget(self, key: Key) -> None:
        """Forget the files of a key and of the keys below it, whose value is from elsewhere."""
        below = [known for known in self.origins if known[: len(key)] == key]
        for known in below:
            del self.origins[known]

    def describe(self, origin: str, location: Sequence[object]) -> str:
        """`origin`, followed by the other files that the value or section at `location` is from."""
        parts = tuple(str(part) for part in location)
        found = []
        for known, path in self.origins.items():
            shared = min(len(known), len(parts))
            if parts and known[:shared] == parts[:shared]:
                found.append(config_name(path))
        own = config_name(Path(origin))
        names = [name for name in dict.fromkeys(found) if name not in (own, origin)]
        return f"{origin} (from {', '.join(names)})" if names else origin


def _apply(cls: type[BaseModel], data: dict[str, Any], override: str, files: _Files) -> None:
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
    section = _known(owner, last, key)
    value = parse_yaml(text, f"override {shown(redact(override))}")
    files.forget((*parents, last))
    if section is not None and isinstance(value, str):
        value = files.follow(section, value, None, (*parents, last))
    if last in node:
        files.earlier[(*parents, last)] = node[last]
    node[last] = value


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
