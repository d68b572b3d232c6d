"""Wrong values in configs: messages about them, and what is left of a config without them.

A config without its wrong values serves no job, only further checks, so that all mistakes are found
at once. `without_consequences` removes what merely follows from a wrong value.
"""

from __future__ import annotations

import copy
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from landiff.configs.base import LENIENT, Config
from landiff.configs.problems import SHOWN_PROBLEMS, Problem, WrongValue, nearest_name
from landiff.configs.secrets import REDACTED, is_secret_name, redact

C = TypeVar("C", bound=Config)
Key = tuple[str, ...]

SHOWN_VALUE = 200  # characters of a value in an error message
MAX_ROUNDS = 4  # a value in place of a wrong one may be wrong too
NAMED_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)+|[\w-]+(?= = )")
"""A dotted key in a message, or a key followed by its value."""


# -------------------------------------------------------------------- messages


def explain_all(cls: type[BaseModel], data: Any, origin: str, error: ValidationError) -> str:
    """One line per problem, at most `SHOWN_PROBLEMS`. Arguments are those of `explain`."""
    problems = error.errors(include_url=False)
    lines = [explain(cls, data, origin, problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"{origin}: and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(lines)


def explain(cls: type[BaseModel], data: Any, origin: str, error: Any) -> str:
    """Message for one problem that pydantic reports: file, dotted key, value and cause.

    data: the values that were validated as a `cls`. error: one of pydantic's `errors()`.
    """
    location = dotted_key(data, error["loc"])
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        meant = nearest_name(location[-1], _known_keys(cls, error["loc"][:-1]))
        return f"{origin}: unknown config key {dotted!r}{meant}"
    if error["type"] == "missing":
        if data is not None:
            dotted = ".".join([*location, str(error["loc"][-1])])
        return f"{origin}: {dotted} is required and not set"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{origin}: {_explain_tag(dotted, error['ctx'])}"
    message = error["msg"].removeprefix("Value error, ")
    where = f"{dotted}: " if dotted else ""
    if dotted and not isinstance(error["input"], dict):
        where = f"{dotted} = {_shown_value(location, error['input'])}: "
    return f"{origin}: {where}{redact(message)}"


def dotted_key(data: Any, location: Sequence[int | str]) -> list[str]:
    """The parts of `location` that are keys of `data`, or all parts if `data` is None.

    pydantic inserts the kind of a section, and the type of a value that may have several.
    """
    if data is None:
        return [str(part) for part in location]
    found = []
    node = data
    for part in location:
        try:
            node = node[part]
        except (LookupError, TypeError):
            continue
        found.append(str(part))
    return found


def _known_keys(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys of the section at a location that pydantic reports; empty if it is no section."""
    annotation: Any = cls
    for part in location:
        annotation = _below(annotation, part)
    section = _only_class(annotation)
    return [] if section is None else list(section.model_fields)


def _below(annotation: Any, part: int | str) -> Any:
    """Type of what is at `part` of a value of a type; None if it is not known."""
    section = _only_class(annotation)
    if section is not None:
        field = section.model_fields.get(str(part))
        return None if field is None else field.annotation
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _below(arguments[0], part)
    if origin in (tuple, list):
        return arguments[0]
    if origin is dict:
        return arguments[1]
    for member in arguments:  # of a union: `part` is the kind
        if isinstance(member, type) and issubclass(member, BaseModel):
            kind = member.model_fields.get("kind")
            if kind is not None and kind.default == part:
                return member
    return None


def _only_class(annotation: Any) -> type[BaseModel] | None:
    """The class of a section, or of one that may be null; None for other types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [each for each in typing.get_args(annotation) if each is not types.NoneType]
        return _only_class(members[0]) if len(members) == 1 else None
    return None


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


# -------------------------------------------------------------------- what is left


def repaired(cls: type[C], data: Mapping[str, Any], earlier: Mapping[Key, Any]) -> C | None:
    """`data` as a `cls`, with other values in place of wrong ones; None if that is not possible.

    A wrong value is replaced by that of the extended file, which `earlier` holds by key, or else by
    the default. Unknown keys are left out.
    """
    plain = copy.deepcopy(dict(data))
    for _ in range(MAX_ROUNDS):
        try:
            return cls.model_validate(plain, context=LENIENT)
        except ValidationError as error:
            replaced = [_replace(plain, each["loc"], earlier) for each in error.errors()]
        if not any(replaced):
            return None
    return None


def _replace(
    plain: dict[str, Any], location: Sequence[int | str], earlier: Mapping[Key, Any]
) -> bool:
    """Replace or remove the value at a location that pydantic reports. False if there is none.

    Of a list with a wrong item, the whole list is replaced.
    """
    node: Any = plain
    owner: dict[str, Any] = {}
    key: list[str] = []
    for part in location:
        if not isinstance(node, dict):
            break
        if isinstance(part, str) and part in node:  # else the kind of a section
            owner = node
            node = node[part]
            key.append(part)
    if not key:
        return False
    if tuple(key) in earlier and earlier[tuple(key)] != node:
        owner[key[-1]] = copy.deepcopy(earlier[tuple(key)])
    else:
        del owner[key[-1]]
    return True


def without_consequences(
    problems: Sequence[Problem], wrong_keys: Sequence[str] | None = None
) -> list[Problem]:
    """The problems without those that compare a wrong value, in whose place another one is used.

    wrong_keys: dotted keys of the wrong values, by default those of the `WrongValue` in `problems`.
    """
    if wrong_keys is None:
        wrong_keys = [each.key for each in problems if isinstance(each, WrongValue)]
    if not wrong_keys:
        return list(problems)
    kept = []
    for problem in problems:
        if isinstance(problem, WrongValue) or not _names_any(problem.text, wrong_keys):
            kept.append(problem)
    return kept


def _names_any(text: str, keys: Sequence[str]) -> bool:
    """Whether a message names one of the keys, a section that holds it, or a key below it."""
    for name in NAMED_KEY.findall(text):
        for key in keys:
            if name == key or key.startswith(f"{name}.") or name.startswith(f"{key}."):
                return True
    return False
