"""Start of a run from a checkpoint of another run, its parent (config key `parent`). Torch-free.

The run continues with weights, optimizer state, step number and position in the data of the
parent's checkpoint, and with its own config. `parent.json` in its folder records the checkpoint,
so that a restart before the run's own first checkpoint starts from the same one, even if `parent`
is a run folder that now has newer checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from landiff.configs.base import Config, ConfigError
from landiff.configs.files import sha256_file, write_text
from landiff.configs.loader import read_json_as
from landiff.configs.problems import nearest_path
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileList,
    error_line,
    is_healthy,
)
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    FILES,
    PARENT,
    STATE,
    committed_steps,
    step_folder,
)
from landiff.training.config import TrainConfig

OTHER = "name another checkpoint with parent=..."


class ParentRecord(Config):
    """parent.json.

    checkpoint: absolute path.
    files_sha256: hash of its files.json, which identifies its content.
    """

    format: Literal[1] = 1
    checkpoint: Path
    step: NonNegativeInt
    files_sha256: str


def find_parent(config: TrainConfig) -> Path:
    """The checkpoint that the run begins with.

    Raises ConfigError if it is missing, incomplete, unhealthy, not before `loop.steps`, or another
    one than parent.json says.
    """
    assert config.parent is not None
    recorded = read_parent(config.run)
    if recorded is None:
        folder = _named_checkpoint(config.parent)
        _require_usable(config, folder)
        return folder
    folder = recorded.checkpoint
    if config.parent.absolute() not in (folder, folder.parent.parent):
        raise ConfigError(
            f"parent = {config.parent}, but {config.run} began with {folder}; restore it, or "
            "choose another run folder (run=...)"
        )
    _require_usable(config, folder)
    if sha256_file(folder / FILES) != recorded.files_sha256:
        raise ConfigError(
            f"parent = {config.parent}: {folder} has changed since {config.run} began with it; "
            "restore it, or choose another run folder (run=...)"
        )
    return folder


def _named_checkpoint(parent: Path) -> Path:
    """The checkpoint `parent`, or the newest healthy one of the run folder `parent`."""
    if (parent / STATE).is_file() or parent.parent.name == CHECKPOINTS:
        return parent.absolute()
    steps = committed_steps(parent / CHECKPOINTS)
    for step in reversed(steps):
        folder = step_folder(parent / CHECKPOINTS, step)
        if is_healthy(folder, unreadable=True):
            return folder.absolute()
    if not parent.exists():
        raise ConfigError(
            f"parent = {parent} does not exist{nearest_path(parent)}; name a run folder (runs/lm) "
            "or a checkpoint in it (runs/lm/checkpoints/step_00001000)"
        )
    raise ConfigError(
        f"parent = {parent} holds no healthy checkpoint; it must be a run folder (runs/lm) or a "
        "checkpoint in it (runs/lm/checkpoints/step_00001000)"
    )


def _require_usable(config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError unless a checkpoint is complete, healthy and before `loop.steps`.

    Sizes of files are compared here. The ranks compare their hashes too, and divide the reading
    among them.
    """
    parent = config.parent
    if not folder.is_dir():
        others = [str(step) for step in committed_steps(folder.parent)]
        there = f"; {folder.parent} holds the steps {', '.join(others)}" if others else ""
        raise ConfigError(f"parent = {parent}: {folder} does not exist{there}; {OTHER}")
    damage = _damage(folder)
    if damage:
        raise ConfigError(f"parent = {parent}: checkpoint {folder} is damaged ({damage}); {OTHER}")
    state = read_json_as(CheckpointState, folder / STATE)
    if state.step >= config.loop.steps:
        raise ConfigError(
            f"loop.steps = {config.loop.steps} counts from step 0, and parent = {parent} is at "
            f"step {state.step} already; raise it above that"
        )
    if state.healthy is False:
        raise ConfigError(
            f"parent = {parent}: checkpoint {folder} is of a diverged run (healthy = false in "
            f"state.json); {OTHER}"
        )


def _damage(folder: Path) -> str:
    """The first file that is missing or has another size than files.json says, or an empty text."""
    try:
        for entry in read_json_as(FileList, folder / FILES).files:
            size = (folder / entry.path).stat().st_size
            if size != entry.bytes:
                return f"{entry.path} has {size} bytes instead of {entry.bytes}"
    except (OSError, ConfigError) as error:
        return error_line(error)
    return ""


def read_parent(run: Path) -> ParentRecord | None:
    """The record of the checkpoint that a run began with, or None."""
    path = run / PARENT
    if not path.exists():
        return None
    return read_json_as(ParentRecord, path, advice=f"delete it to begin again with parent ({run})")


def write_parent(run: Path, folder: Path, step: int) -> None:
    """Record the checkpoint `folder` as the start of `run`."""
    record = ParentRecord(checkpoint=folder, step=step, files_sha256=sha256_file(folder / FILES))
    write_text(run / PARENT, record.model_dump_json(indent=1))
