"""Describes config keys from their classes: name, type, default and meaning. Torch-free.

Used by the configuration page of the documentation (docs/hooks/pages.py) and by
`landiff config explain`.
"""

from __future__ import annotations

import builtins
import json
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from landiff.configs.base import Config, ConfigError
from landiff.configs.loader import nearest_name

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "any value",
}
COMPARISONS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}

SectionText = Callable[[type[Config]], str]


@dataclass(frozen=True)
class ConfigKey:
    """One key of a config class, as text."""

    name: str
    type: str  # in words, with limits
    default: str  # as written in YAML; "required" if there is none
    meaning: str  # description of the field; "" if it has none
    sections: tuple[builtins.type[Config], ...]  # classes of the sections below the key


def config_keys(cls: type[Config], section_text: SectionText | None = None) -> list[ConfigKey]:
    """The keys of `cls`, in order. `section_text` formats the names of section classes."""
    name_of = section_text or section_name
    keys = []
    for name, field in cls.model_fields.items():
        key = ConfigKey(
            name=name,
            type=type_text(field.annotation, field.metadata, name_of),
            default=default_text(field),
            meaning=" ".join((field.description or "").split()),
            sections=tuple(section_classes(field.annotation)),
        )
        keys.append(key)
    return keys


def explain_field(cls: type[Config], dotted_key: str) -> str:
    """Text about one key of `cls`, e.g. "loop.keep_every": its type, default and meaning.

    The keys of a section are listed. Where a section is one of several classes, the key is
    explained for each class that has it. Names in a mapping and positions in a list may stand
    between the keys ("columns.features.kind"). Raises ConfigError, with the nearest name, for an
    unknown key.
    """
    found = find_key(cls, dotted_key)
    texts = []
    for owner, key in found:
        title = dotted_key
        if len(found) > 1:
            title = f"{dotted_key} ({section_name(owner)})"
        texts.append(key_text(title, key))
    return "\n\n".join(texts)


def find_key(cls: type[Config], dotted_key: str) -> list[tuple[type[Config], ConfigKey]]:
    """The key at a dotted path below `cls`, with the class that it belongs to.

    Several results where a section on the path is one of several classes. Raises ConfigError for an
    unknown key.
    """
    owners = [cls]
    found: list[tuple[type[Config], ConfigKey]] = []
    parts = dotted_key.split(".")
    for depth, part in enumerate(parts):
        matches = _keys_named(part, owners)
        if not matches and _is_item(part, found):
            continue
        if not matches:
            known = [key.name for key in _all_keys(owners)]
            unknown = ".".join(parts[: depth + 1])
            raise ConfigError(f"unknown config key {unknown!r}{nearest_name(part, known)}")
        found = matches
        owners = _sections_below(matches)
    return found


def key_text(title: str, key: ConfigKey) -> str:
    """Lines about one key for a terminal; a section's keys are named."""
    lines = [
        title,
        f"  type:    {key.type}".replace("`", ""),
        f"  default: {key.default}".replace("`", ""),
        f"  meaning: {key.meaning or 'not described'}",
    ]
    for section in key.sections:
        lines.append(f"  keys of {section_name(section)}: {', '.join(section.model_fields)}")
    return "\n".join(lines)


def _keys_named(name: str, owners: Sequence[type[Config]]) -> list[tuple[type[Config], ConfigKey]]:
    """(class, key) for each class in `owners` that has a key of that name."""
    found = []
    for owner in owners:
        for key in config_keys(owner):
            if key.name == name:
                found.append((owner, key))
    return found


def _all_keys(owners: Sequence[type[Config]]) -> list[ConfigKey]:
    """Keys of all classes in `owners`."""
    keys: list[ConfigKey] = []
    for owner in owners:
        keys += config_keys(owner)
    return keys


def _sections_below(matches: Sequence[tuple[type[Config], ConfigKey]]) -> list[type[Config]]:
    """Section classes of the matched keys, each once, in order."""
    sections: list[type[Config]] = []
    for _, key in matches:
        for section in key.sections:
            if section not in sections:
                sections.append(section)
    return sections


def _is_item(part: str, parents: Sequence[tuple[type[Config], ConfigKey]]) -> bool:
    """Whether `part` may be a name in a mapping, or a position in a list, of a parent key."""
    for owner, key in parents:
        annotation = owner.model_fields[key.name].annotation
        for member in [annotation, *typing.get_args(annotation)]:
            origin = typing.get_origin(member)
            if origin is dict or (origin in (list, tuple) and part.isdigit()):
                return True
    return False


def all_sections(roots: Sequence[type[Config]]) -> list[type[Config]]:
    """All section classes below `roots`, each once, breadth first."""
    found: list[type[Config]] = []
    waiting = list(roots)
    while waiting:
        for key in config_keys(waiting.pop(0)):
            for section in key.sections:
                if section not in found and section not in roots:
                    found.append(section)
                    waiting.append(section)
    return found


def section_name(cls: type[Config]) -> str:
    """Readable name of a section class: "OptimConfig" -> "Optim"."""
    return cls.__name__.removesuffix("Config")


def section_classes(annotation: Any) -> Iterator[type[Config]]:
    """Config classes in a type annotation, including those in unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from section_classes(argument)


def type_text(annotation: Any, metadata: Sequence[Any], name_of: SectionText) -> str:
    """A type in words: "integer > 0", "list of text", values of a Literal, name of a section.

    `metadata` holds the bounds of a number, as pydantic stores them. Raises TypeError for a type
    without such words.
    """
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return name_of(annotation)
    if annotation in WORDS:
        return f"{WORDS[annotation]} {limits(metadata)}".strip()
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0], arguments[1:], name_of)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(member, metadata, name_of) for member in arguments)
    if origin is dict:
        return f"mapping of names to {type_text(arguments[1], (), name_of)}"
    if origin in (tuple, list):
        return list_text(arguments, name_of)
    raise TypeError(f"no words for the type {annotation!r} of a config key")


def list_text(members: tuple[Any, ...], name_of: SectionText) -> str:
    """A list or tuple type in words."""
    texts = [type_text(member, (), name_of) for member in members if member is not Ellipsis]
    if Ellipsis in members or len(texts) == 1:
        return f"list of {texts[0]}"
    return f"list of {len(texts)}: {', '.join(texts)}"


def limits(metadata: Sequence[Any]) -> str:
    """Bounds of a number in words, e.g. "≥ 0 and ≤ 1"."""
    found = []
    for item in metadata:
        for kind, (attribute, sign) in COMPARISONS.items():
            if isinstance(item, kind):
                found.append(f"{sign} {getattr(item, attribute):g}")
    return " and ".join(found)


def default_text(field: FieldInfo) -> str:
    """The default as written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return "defaults of the section"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple) and any(isinstance(item, Config) for item in value):
        return f"list of {len(value)} sections"
    return f"`{json.dumps(value)}`"
