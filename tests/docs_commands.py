"""The `landiff` commands in the code blocks of README and docs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = ("…", "...", "STAGE", "SOURCE", "FORMAT", "COMMAND")


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line in a code block that starts with `landiff`."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            text = block.replace("\\\n", " ")
            for line in text.splitlines():
                command = line.strip().removeprefix("$ ")
                if not command.startswith("landiff "):
                    continue
                if any(word in command for word in PLACEHOLDERS):
                    continue
                found.append((page.name, command))
    return found


def words_of(command: str) -> list[str]:
    """The arguments of a command line, without its comment and redirection."""
    words = shlex.split(command, comments=True)[1:]
    if ">" in words:
        return words[: words.index(">")]
    return words
