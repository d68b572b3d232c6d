"""Names of the files in a run folder, and readers of the small ones. Torch-free.

    config.yaml             resolved config, written by the ranks
    resolved.yaml           the same, written by `landiff train` for the ranks
    checkpoints/            checkpoints (training/checkpoint/store.py)
        step_00001000/
            config.yaml     config of the run at this step
            state.json      state of the loop
            files.json      size and sha256 of the other files
    parent.json             checkpoint of another run that this run started from
    metrics.jsonl           one line per logged step
    events.jsonl            skipped steps, spikes, rollbacks and alarms (training/observe/events.py)
    preview_prompts.safetensors
                            text states of `preview_prompts` (training/observe/prompts.py)
    tensorboard/            scalars, videos, traces of the profiler
    trackers.json           ids of the run in other trackers, and the last step sent
    errors/rank_0003.txt    why a rank failed
    heartbeat/rank_0003     progress of a rank
    hangs/rank_0003.txt     stacks of a rank that hung
    stop                    request to save and stop
    done                    final step; exists only if the run has finished
    job/                    records of what started the run (launchers/run)

Other modules take the names from here. Those below job/ are defined by the launchers, which are the
only ones to use them.
"""

from __future__ import annotations

import re
from pathlib import Path

from landiff.configs.documents import DocumentError, parse_json, read_text, shown

CONFIG = "config.yaml"  # in the run folder and in each checkpoint
RESOLVED = "resolved.yaml"
CHECKPOINTS = "checkpoints"
DAMAGED = ".damaged"  # end of the name of a rejected checkpoint
STATE = "state.json"
FILES = "files.json"
PARENT = "parent.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
PROMPTS = "preview_prompts.safetensors"
TENSORBOARD = "tensorboard"
TRACKERS = "trackers.json"
ERRORS = "errors"
HEARTBEAT = "heartbeat"
HANGS = "hangs"
STOP = "stop"
DONE = "done"

MAX_DONE_BYTES = 100


def rank_name(rank: int) -> str:
    """Stem of the files of a rank, e.g. rank_0003."""
    return f"rank_{rank:04d}"


def heartbeat_path(run: Path, rank: int) -> Path:
    """Path of the heartbeat of a rank."""
    return run / HEARTBEAT / rank_name(rank)


def stacks_path(run: Path, rank: int) -> Path:
    """Path of the stacks of a rank that hung."""
    return run / HANGS / f"{rank_name(rank)}.txt"


def step_folder(folder: Path, step: int) -> Path:
    """Path of the checkpoint of `step`, e.g. step_00001000, in the folder of checkpoints."""
    return folder / f"step_{step:08d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder of checkpoints, ascending."""
    if not folder.is_dir():
        return []
    steps = []
    for path in folder.iterdir():
        match = re.fullmatch(r"step_(\d{8,})", path.name)
        if match:
            steps.append(int(match[1]))
    return sorted(steps)


def finished_step(folder: Path) -> int | None:
    """The step at which the run in `folder` finished, or None if it has not."""
    path = folder / DONE
    if not path.exists():
        return None
    text = read_text(path, MAX_DONE_BYTES).strip()
    if not (text.isascii() and text.isdigit()):
        raise DocumentError(
            f"{path} holds {shown(text)} instead of a step; delete it and run again"
        )
    return int(text)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a metrics.jsonl. Lines that a kill or damage truncated are skipped."""
    if not path.exists():
        return []
    complete = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        values = parse_metrics(line)
        if values is not None:
            complete.append(values)
    return complete


def parse_metrics(line: str) -> dict[str, float] | None:
    """The values of one line of a metrics.jsonl, or None if it is truncated or damaged."""
    if not line.endswith("\n"):
        return None
    try:
        values = parse_json(line, METRICS, allow_nonfinite=True)
    except DocumentError:
        return None
    if not isinstance(values, dict):
        return None
    if not (_is_number(values.get("step")) and _is_number(values.get("time"))):
        return None
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
