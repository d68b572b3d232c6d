"""Tables of two-way rules between the keys and tensors of two checkpoint formats.

A rule maps a group of our keys to a group of keys of another format ("theirs"). In a pattern,
`{name}` matches one part of a dotted key (`[^.]+`) and `{name*}` matches any non-empty rest. Both
sides of a rule use the same names.

A rule with functions also changes the tensors; the two functions
are inverses of each other. A rule without functions only renames.

    Rule("blocks.{i}.wo.weight", "transformer.blocks.{i}.wo.weight")
    Rule(
        ("q", "k", "v"),
        ("qkv",),
        to_theirs=lambda q, k, v: (torch.cat([q, k, v]),),
        to_ours=lambda qkv: qkv.chunk(3),
        stacked="theirs",
    )
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from landiff.configs.base import ConfigError

T = TypeVar("T")
Change = Callable[..., Sequence[Tensor]]
Direction = Literal["to_ours", "to_theirs"]


class ConversionError(ConfigError):
    """Keys, shapes or files that cannot be converted. The message lists all problems, grouped."""


@dataclass(frozen=True)
class Rule:
    """A two-way mapping between groups of keys; see the module docstring."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    # Called with the tensors of one side in order; returns those of the other side in order.
    to_theirs: Change | None = None
    to_ours: Change | None = None
    # The side that has a single tensor: the tensors of the other side, concatenated along dim 0.
    stacked: Literal["ours", "theirs"] | None = None

    def sides(self, direction: Direction) -> tuple[tuple[str, ...], tuple[str, ...], Change | None]:
        """Source patterns, target patterns and the change for one direction."""
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        if direction == "to_ours":
            return theirs, ours, self.to_ours
        assert direction == "to_theirs", direction
        return ours, theirs, self.to_theirs


@dataclass(frozen=True)
class Group:
    """One application of a rule: the keys it reads and the keys it produces."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change | None
    # True if the single target consists of all elements of the sources, in the order of `sources`.
    end_to_end: bool = False

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The target tensors for the source tensors, both in the order of their keys."""
        changed = list(tensors if self.change is None else self.change(*tensors))
        assert len(changed) == len(self.targets), (self.targets, len(changed))
        return changed


def rule_groups(names: Iterable[str], rules: Sequence[Rule], direction: Direction) -> list[Group]:
    """Match keys against rules, in the order of the rules.

    Raises ConversionError for keys that match no rule and for groups with missing keys.
    """
    remaining = dict.fromkeys(names)
    found: list[Group] = []
    missing: list[str] = []
    for rule in rules:
        sources, targets, change = rule.sides(direction)
        patterns = [_compile(source) for source in sources]
        for key in list(remaining):
            if key not in remaining:  # matched above as another key of the same group
                continue
            values = _first_match(patterns, key)
            if values is None:
                continue
            group = tuple(_fill(source, values) for source in sources)
            absent = [name for name in group if name not in remaining]
            missing += absent
            if not absent:
                filled = tuple(_fill(target, values) for target in targets)
                end_to_end = direction == f"to_{rule.stacked}"
                found.append(Group(group, filled, change, end_to_end))
            for name in group:
                remaining.pop(name, None)
    if remaining or missing:
        raise ConversionError(format_mismatch({"unexpected": list(remaining), "missing": missing}))
    return found


def apply_rules(
    state: Mapping[str, Tensor], rules: Sequence[Rule], direction: Direction
) -> dict[str, Tensor]:
    """Apply rules to a flat state dict.

    Tensors are looked up one group at a time, so a lazy mapping is read group by group. Raises
    ConversionError for keys that match no rule and for groups with missing keys.
    """
    result: dict[str, Tensor] = {}
    for group in rule_groups(state, rules, direction):
        changed = group.apply([state[name] for name in group.sources])
        result.update(zip(group.targets, changed, strict=True))
    return result


def check_against(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], what: str
) -> None:
    """Raise one ConversionError with all missing, unexpected and misshapen keys of `state`."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "wrong shape": [],
    }
    for name, shape in expected.items():
        if name in state and tuple(state[name].shape) != tuple(shape):
            found = tuple(state[name].shape)
            problems["wrong shape"].append(f"{name} {found} instead of {tuple(shape)}")
    if any(problems.values()):
        raise ConversionError(f"{what} does not fit the model:\n{format_mismatch(problems)}")


def all_of(actions: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all actions. All ConversionErrors that they raise are joined into one."""
    results: list[T] = []
    problems: list[str] = []
    for action in actions:
        try:
            results.append(action())
        except ConversionError as error:
            problems.append(str(error))
    if problems:
        raise ConversionError("\n".join(problems))
    return results


def format_mismatch(problems: Mapping[str, Sequence[str]]) -> str:
    """Problems as text. Keys that differ only in numbers are shown once, with `*` and a count."""
    lines = []
    for kind, keys in problems.items():
        counts: dict[str, int] = {}
        for key in keys:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
            counts[pattern] = counts.get(pattern, 0) + 1
        for pattern, count in sorted(counts.items()):
            times = f"  (x{count})" if count > 1 else ""
            lines.append(f"  {kind}: {pattern}{times}")
    return "\n".join(lines)


def _compile(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, with a named group for each `{name}`."""
    text = ""
    for part in re.split(r"(\{\w+\*?\})", pattern):
        if part.endswith("*}"):
            text += f"(?P<{part[1:-2]}>.+)"
        elif part.startswith("{"):
            text += f"(?P<{part[1:-1]}>[^.]+)"
        else:
            text += re.escape(part)
    return re.compile(text)


def _first_match(patterns: Sequence[re.Pattern[str]], key: str) -> dict[str, str] | None:
    """The values of the names in the first pattern that matches the whole key."""
    for pattern in patterns:
        match = pattern.fullmatch(key)
        if match:
            return match.groupdict()
    return None


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    """The key of a pattern whose names have these values."""
    return re.sub(r"\{(\w+)\*?\}", lambda match: values[match.group(1)], pattern)
