"""Conditions on clips: `motion > 0.2 and aesthetic >= 4`. Torch-free.

A condition reads metadata of a clip and scores, the values of columns `score-NAME`. It is Python
syntax without calls and attributes: numbers, text, names, + - * /, comparisons, in, and, or, not.
A clip that lacks a score of the condition does not meet it.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.column_checks import check_column_fingerprints
from landiff.data_pipeline.format.schema import Manifest, RawSample

SCORE = "score-"
MAX_CHARACTERS = 2000
MAX_DEPTH = 50

METADATA: dict[str, Callable[[RawSample], float | str]] = {
    "motion": lambda meta: meta.motion_score,
    "motion_p95": lambda meta: meta.motion_p95,
    "motion_residual": lambda meta: meta.motion_residual,
    "cuts": lambda meta: meta.cuts,
    "frames": lambda meta: meta.num_frames,
    "fps": lambda meta: meta.fps,
    "seconds": lambda meta: meta.num_frames / meta.fps,
    "start_s": lambda meta: meta.start_s,
    "height": lambda meta: meta.height,
    "width": lambda meta: meta.width,
    "caption": lambda meta: meta.caption,
    "caption_words": lambda meta: len(meta.caption.split()),
    "captions": lambda meta: 1 + len(meta.more_captions),
    "source": lambda meta: meta.source,
}
"""Names of a clip's metadata in conditions."""

ALLOWED = (
    ast.Expression,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.Compare,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.Eq,
    ast.NotEq,
    ast.In,
    ast.NotIn,
    ast.Name,
    ast.Load,
    ast.Constant,
)


class Where:
    """A parsed condition. Calling it with the values of its names says whether a clip meets it."""

    def __init__(self, text: str) -> None:
        """Parse `text`. Raises ConfigError that names what is wrong and where."""
        self.text = text
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(f"a condition has at most {MAX_CHARACTERS} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            place = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
            raise ConfigError(
                f"{text!r} is not a condition{place}: {getattr(error, 'msg', error)}; write e.g. "
                "motion > 0.2 and aesthetic >= 4"
            ) from None
        self.names = self._checked_names(tree)
        self._code: CodeType = compile(tree, "where", "eval")

    def _checked_names(self, tree: ast.Expression) -> tuple[str, ...]:
        """The names of the condition, sorted. Raises ConfigError for what is not allowed."""
        names = set()
        for node in ast.walk(tree):
            if not isinstance(node, ALLOWED):
                part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
                raise ConfigError(
                    f"{part!r} is not allowed in a condition: write numbers, text and names with "
                    "+ - * /, comparisons, in, and, or, not"
                )
            if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | str):
                raise ConfigError(f"{node.value!r} is not allowed in a condition")
            if isinstance(node, ast.Name):
                names.add(node.id)
        if not names:
            raise ConfigError(f"{self.text!r} is the same for all clips: it names no value")
        return tuple(sorted(names))

    def check_names(self, columns: Sequence[str]) -> None:
        """Raise ConfigError if a name is neither metadata nor the score of a column."""
        scores = score_columns(columns)
        for name in self.names:
            if name in METADATA or name in scores:
                continue
            known = [*METADATA, *scores]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            found = ", ".join(scores.values()) or "none"
            raise ConfigError(
                f"unknown value {name!r} in {self.text!r}{hint} Metadata: {', '.join(METADATA)}. "
                f"Columns with scores: {found}. `landiff precompute` makes more of them"
            )

    def __call__(self, values: Mapping[str, float | str | None]) -> bool:
        """Whether a clip with these values by name meets the condition.

        None stands for a score that the clip lacks. Raises ConfigError if the values have no such
        comparison, as 1 < "text".
        """
        own = {name: values[name] for name in self.names}
        if None in own.values():
            return False
        try:
            return bool(eval(self._code, {"__builtins__": {}}, own))
        except (TypeError, ArithmeticError) as error:
            shown = ", ".join(f"{name} = {value!r}" for name, value in own.items())
            raise ConfigError(f"{self.text!r} fails for {shown}: {error}") from None


def score_columns(columns: Sequence[str]) -> dict[str, str]:
    """Columns with scores by the names that conditions use: "text_area" -> "score-text-area"."""
    found = {}
    for column in columns:
        if column.startswith(SCORE):
            found[column.removeprefix(SCORE).replace("-", "_").replace(".", "_")] = column
    return found


def require_names(name: str, text: str, columns: Sequence[str]) -> Where:
    """The condition of config key `name` on clips with `columns`.

    Raises ConfigError if it names values that such clips do not have.
    """
    try:
        where = Where(text)
        where.check_names(columns)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return where


def checked_where(name: str, text: str, manifest: Manifest, *, adopt: bool = False) -> Where:
    """The condition of config key `name`. Raises ConfigError if its values do not exist."""
    where = require_names(name, text, list(manifest.columns))
    known = score_columns(list(manifest.columns))
    used = [known[score] for score in where.names if score not in METADATA]
    check_column_fingerprints(manifest, used, adopt=adopt)
    return where


def conditions(wheres: Sequence[str | None]) -> Iterator[tuple[str, str | None]]:
    """(config key, condition) of each data set of a blend."""
    for number, where in enumerate(wheres):
        yield ("data.where" if number == 0 else f"data.blend.{number - 1}.where"), where or None
