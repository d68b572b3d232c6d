"""Tables of two-way rules that turn one checkpoint's keys and tensors into another's.

A rule maps a group of our keys to a group of their keys. `{name}` in a pattern stands for one path part
(`[^.]+`), `{name*}` for any rest; the same names must appear on both sides. Tensors change by a pair of
functions that are each other's inverse; where they are left out the group is a pure rename.

    Rule("blocks.{i}.wo.weight", "transformer.blocks.{i}.wo.weight")
    Rule(("q", "k", "v"), ("qkv",), to_theirs=lambda q, k, v: (torch.cat([q, k, v]),), to_ours=lambda x: x.chunk(3), stacked="theirs")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from landiff.configs.base import ConfigError


class ConversionError(ConfigError):
    """Keys or shapes that do not fit; the message lists all of them, grouped by pattern."""


T = TypeVar("T")
Change = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    to_theirs: Change | None = None  # (our tensors in order) -> their tensors in order
    to_ours: Change | None = None
    stacked: str | None = (
        None  # "theirs" | "ours": the side with one tensor, which is the other's end to end
    )

    def sides(self, direction: str) -> tuple[tuple[str, ...], tuple[str, ...], Change | None]:
        """Source patterns, target patterns and the change, for direction "to_ours" or "to_theirs"."""
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        if direction == "to_ours":
            return theirs, ours, self.to_ours
        assert direction == "to_theirs", direction
        return ours, theirs, self.to_theirs


@dataclass(frozen=True)
class Group:
    """One application of a rule: these tensors become those."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    change: Change | None
    end_to_end: bool = (
        False  # is the one target made of all elements of the sources, one source after the other?
    )

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        changed = list(tensors if self.change is None else self.change(*tensors))
        assert len(changed) == len(self.targets), (self.targets, len(changed))
        return changed


def rule_groups(names: Iterable[str], rules: Sequence[Rule], direction: str) -> list[Group]:
    """What `rules` make of these names. Raises ConversionError for names no rule takes and for incomplete groups."""
    left = dict.fromkeys(names)
    found: list[Group] = []
    missing: list[str] = []
    for rule in rules:
        sources, targets, change = rule.sides(direction)
        patterns = [_compile(source) for source in sources]
        for key in list(left):
            match = next((m for pattern in patterns if (m := pattern.fullmatch(key))), None)
            if match is None or key not in left:
                continue
            group = tuple(_fill(source, match.groupdict()) for source in sources)
            absent = [name for name in group if name not in left]
            missing += absent
            if not absent:
                filled = tuple(_fill(target, match.groupdict()) for target in targets)
                found.append(
                    Group(group, filled, change, end_to_end=direction == f"to_{rule.stacked}")
                )
            for name in group:
                left.pop(name, None)
    if left or missing:
        raise ConversionError(format_mismatch({"unexpected": list(left), "missing": missing}))
    return found


def apply_rules(
    state: Mapping[str, Tensor], rules: Sequence[Rule], direction: str
) -> dict[str, Tensor]:
    """Apply `rules` to a flat state dict. Raises ConversionError for keys no rule takes and for incomplete groups.

    Tensors are looked up one group at a time, so a lazy mapping stays lazy until a group is needed.
    """
    result: dict[str, Tensor] = {}
    for group in rule_groups(state, rules, direction):
        result.update(
            zip(group.targets, group.apply([state[name] for name in group.sources]), strict=True)
        )
    return result


def check_against(
    state: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], what: str
) -> None:
    """Raise one ConversionError with all missing, extra and misshapen keys of `state`."""
    problems = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "wrong shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k])}"
            for k in expected
            if k in state and tuple(state[k].shape) != tuple(expected[k])
        ],
    }
    if any(problems.values()):
        raise ConversionError(f"{what} does not fit the model:\n{format_mismatch(problems)}")


def all_of(actions: Iterable[Callable[[], T]]) -> list[T]:
    """Results of all actions; where some raise ConversionError, one error that says all they say."""
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
    """Problems grouped by pattern (numbers folded to *), with counts."""
    lines = []
    for kind, keys in problems.items():
        groups: dict[str, int] = {}
        for key in keys:
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
            groups[pattern] = groups.get(pattern, 0) + 1
        lines += [
            f"  {kind}: {pattern}" + (f"  (x{n})" if n > 1 else "")
            for pattern, n in sorted(groups.items())
        ]
    return "\n".join(lines)


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\*?\})", pattern)
    text = "".join(
        (f"(?P<{p[1:-2]}>.+)" if p.endswith("*}") else f"(?P<{p[1:-1]}>[^.]+)")
        if p.startswith("{")
        else re.escape(p)
        for p in parts
    )
    return re.compile(text)


def _fill(pattern: str, names: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: names[m.group(1)], pattern)
