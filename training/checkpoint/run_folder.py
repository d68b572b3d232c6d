"""What anybody may read in a run folder without loading torch: how far it came."""

from __future__ import annotations

import re
from pathlib import Path

from landiff.configs.documents import DocumentError, parse_json, read_text, shown

MAX_DONE_BYTES = 100

# documents of a checkpoint: state of the loop, list of the other files, config of the run
STATE, FILES, CONFIG = "state.json", "files.json", "config.yaml"


def finished_step(folder: Path) -> int | None:
    """The step at which the run in `folder` finished, or None while it has not."""
    path = folder / "done"
    if not path.exists():
        return None
    text = read_text(path, MAX_DONE_BYTES).strip()
    if not (text.isascii() and text.isdigit()):
        raise DocumentError(
            f"{path} holds {shown(text)} instead of a step; delete it and run again"
        )
    return int(text)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of a metrics.jsonl; lines torn by a kill or damaged are left out."""
    if not path.exists():
        return []
    whole = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        values = parse_metrics(line)
        if values is not None:
            whole.append(values)
    return whole


def parse_metrics(line: str) -> dict[str, float] | None:
    """One line of a metrics.jsonl; None where it is torn or damaged."""
    if not line.endswith("\n"):
        return None
    try:
        values = parse_json(line, "metrics.jsonl", allow_nonfinite=True)
    except DocumentError:
        return None
    if not isinstance(values, dict) or not all(
        _is_number(values.get(key)) for key in ("step", "time")
    ):
        return None
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, e.g. step_00001000."""
    return folder / f"step_{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints were committed, rising."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(
        int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name))
    )
