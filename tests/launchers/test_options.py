"""Every option of every command is used by a test."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.arguments import build_parser

TESTS = IMPORT_ROOT / "tests"
BETWEEN_WORDS = re.compile(r"""["'\s=]+""")


def options(parser: argparse.ArgumentParser, command: str = "") -> Iterator[tuple[str, str]]:
    """Command and option, for each option that --help shows, in its longest spelling."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, command or name)
        elif action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
            yield command, max(action.option_strings, key=len)


def test_every_option_is_used_by_a_test_of_its_command():
    files = []
    for path in sorted(TESTS.rglob("*.py")):
        if path != Path(__file__):
            files.append(set(BETWEEN_WORDS.split(path.read_text(encoding="utf-8"))))
    missing = set()
    for command, option in options(build_parser()):
        if not any({command or "landiff", option} <= words for words in files):
            missing.add(f"{command} {option}")
    assert not missing
