"""What anybody may read in a run folder without loading torch: how far it came."""

from __future__ import annotations

import re
from pathlib import Path

# documents of a checkpoint: state of the loop, list of the other files, config of the run
STATE, FILES, CONFIG = "state.json", "files.json", "config.yaml"


def finished_step(folder: Path) -> int | None:
    """The step at which the run in `folder` finished, or None while it has not."""
    path = folder / "done"
    return int(path.read_text(encoding="utf-8")) if path.exists() else None


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, e.g. step_00001000."""
    return folder / f"step_{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints were committed, rising."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))
