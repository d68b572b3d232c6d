"""Files of a checkpoint on disk: its documents, their writer and the check of all files.

Nothing here is collective, and the import is torch-free. training/checkpoint/store.py saves and
loads checkpoints on all ranks.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator

from landiff.configs.base import Config, ConfigError
from landiff.configs.files import PRIVATE, PUBLIC, sha256_file, write_text
from landiff.configs.loader import dump, read_json_as
from landiff.configs.secrets import redact
from landiff.training.checkpoint.guard_state import GuardState
from landiff.training.checkpoint.run_folder import (
    CONFIG,
    FILES,
    STATE,
    committed_steps,
    step_folder,
)

OLD_GUARD_KEYS = frozenset({"losses", "grad_norms"})
DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "deepspeed",
    "vector-quantize-pytorch",
    "safetensors",
    "numpy",
)


class CheckpointState(Config):
    """state.json: the state of the loop, and what wrote the checkpoint.

    kind: class name of the config, which tells the trainers apart.
    loader: position in the stream of samples.
    manifest: fingerprint of the raw shards.
    columns: fingerprints of the data's columns by name.
    healthy: False if steps were skipped or had a spike when it was written. Runs roll back to
        healthy checkpoints only, and resume from them if there are any. None in checkpoints older
        than this field.
    guard: state of the guard. None in checkpoints older than this field.
    bucket_losses: sum of losses since the last logged step, and number of steps, by clip shape.
    """

    format: Literal[1] = 1
    step: NonNegativeInt
    kind: str
    loader: dict[str, Any]
    manifest: str
    columns: dict[str, str]
    world_size: int
    versions: dict[str, str]
    healthy: bool | None = None
    guard: GuardState | None = None
    bucket_losses: dict[str, tuple[float, int]] = Field(default_factory=dict)

    @field_validator("guard", mode="before")
    @classmethod
    def _without_old_window(cls, guard: Any) -> Any:
        """Old checkpoints hold one window for all clip shapes; it fills anew."""
        if isinstance(guard, dict):
            return {key: value for key, value in guard.items() if key not in OLD_GUARD_KEYS}
        return guard


class FileEntry(Config):
    """One file of a checkpoint.

    path: relative to the checkpoint.
    sha256: None in old checkpoints, for files above 4 GiB.
    """

    path: str
    bytes: NonNegativeInt
    sha256: str | None


class FileList(Config):
    """files.json."""

    format: Literal[1] = 1
    files: list[FileEntry]


def list_files(folder: Path) -> list[str]:
    """All files below `folder` as sorted relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe_file(folder: Path, path: str) -> FileEntry:
    """Size and hash of one file."""
    size = (folder / path).stat().st_size
    return FileEntry(path=path, bytes=size, sha256=sha256_file(folder / path))


@dataclass(frozen=True)
class TextFile:
    """A document of a checkpoint before it is written."""

    text: str
    permissions: int = PUBLIC

    def entry(self, path: str) -> FileEntry:
        """Its entry in files.json."""
        content = self.text.encode()
        return FileEntry(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def documents(
    state: CheckpointState, config: Config, entries: Sequence[FileEntry]
) -> dict[str, TextFile]:
    """state.json, config.yaml and files.json by name. `entries`: of the engine's files.

    files.json is the last one.
    """
    text = dump(config)
    permissions = PRIVATE if redact(text) != text else PUBLIC  # a secret, e.g. in a URL
    found = {
        STATE: TextFile(state.model_dump_json(indent=1)),
        CONFIG: TextFile(text, permissions),
    }
    own = [document.entry(name) for name, document in found.items()]
    files = FileList(files=sorted([*entries, *own], key=lambda entry: entry.path))
    return {**found, FILES: TextFile(files.model_dump_json(indent=1))}


def seal(
    folder: Path, state: CheckpointState, config: Config, entries: Sequence[FileEntry]
) -> None:
    """Write `documents` beside an engine's files."""
    for name, document in documents(state, config, entries).items():
        write_text(folder / name, document.text, document.permissions)


def difference(folder: Path, entry: FileEntry) -> str:
    """How a file differs from its entry, or an empty string."""
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes instead of {entry.bytes}"
        if entry.sha256 is not None and sha256_file(path) != entry.sha256:
            return f"{entry.path} differs from what was written"
    except OSError as error:
        return f"{entry.path}: {error_line(error)}"
    return ""


def latest_whole(folder: Path) -> Path | None:
    """The newest intact and healthy checkpoint in `folder`, for readers outside a run."""
    for step in reversed(committed_steps(folder)):
        path = step_folder(folder, step)
        if not differences(path) and is_healthy(path):
            return path
    return None


def differences(folder: Path) -> list[str]:
    """Differences from files.json, empty for an intact checkpoint.

    `CheckpointStore.damage` does the same on several ranks.
    """
    try:
        listed = read_json_as(FileList, folder / FILES)
    except (OSError, ConfigError) as error:
        return [f"{FILES}: {error_line(error)}"]
    found = [difference(folder, entry) for entry in listed.files]
    return [text for text in found if text]


def is_healthy(folder: Path, *, unreadable: bool = False) -> bool:
    """Whether a checkpoint is healthy: False if its state.json has healthy = false.

    `unreadable`: the result if state.json cannot be read.
    """
    try:
        state = read_json_as(CheckpointState, folder / STATE)
    except (OSError, ConfigError):
        return unreadable
    return state.healthy is not False


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that write a checkpoint's files."""
    import torch  # here, since checks before the start read this module's documents without torch

    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def error_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
