"""Every option of every command is used by a test."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.arguments import build_parser

TESTS = IMPORT_ROOT / "tests"


def options(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, str]]:
    """Command and option, for each option that --help shows, in its longest spelling."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, command or name)
        elif action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
            yield command, max(action.option_strings, key=len)


def named(word: str, text: str) -> bool:
    """Whether a string of a test file is, or begins or ends with, this word."""
    return re.search(rf"""["'\s]{re.escape(word)}["'\s=]""", text) is not None


def test_every_option_is_used_by_a_test_of_its_command():
    texts = []
    for path in sorted(TESTS.rglob("*.py")):
        if path != Path(__file__):
            texts.append(path.read_text(encoding="utf-8"))
    missing = set()
    for command, option in options(build_parser()):
        together = (named(option, text) and named(command or "landiff", text) for text in texts)
        if not any(together):
            missing.add(f"{command} {option}")
    assert not missing
