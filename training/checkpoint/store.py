"""Checkpoints that are whole or not there at all.

    <run>/checkpoints/step_00001000/
        ...            the engine's own files
        config.yaml    resolved config of the run
        state.json     `CheckpointState`: step, loader position, versions, data fingerprint
        files.json     every other file with size and sha256; written last

A save goes into a hidden folder beside the final name; after every rank has written, files are listed,
hashed (the work is shared over the ranks; files above HASH_LIMIT are listed with their size alone),
fsynced, and the folder is renamed. "Latest" is the highest step whose files still are as listed. A newest
checkpoint that is damaged is set aside as `step_<n>.damaged` and the one before it is used.

Random numbers need no place here: they are keyed by (seed, purpose, place), so nothing remembers them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from landiff.configs.base import Config, ConfigError
from landiff.configs.disk_errors import way_out
from landiff.configs.documents import read_yaml
from landiff.configs.files import (
    remove_abandoned,
    remove_dir,
    replace_dir,
    restore_replaced,
    sha256_file,
    temporary_name,
    write_text,
)
from landiff.configs.loader import read_json_as, write_config
from landiff.model_zoo.health import NAMES_SHOWN, non_finite
from landiff.training.checkpoint.errors import CheckpointError, NonFiniteError
from landiff.training.checkpoint.resume import changed_keys
from landiff.training.checkpoint.run_folder import (
    CONFIG,
    FILES,
    STATE,
    committed_steps,
    step_folder,
)
from landiff.training.config import LoopConfig
from landiff.training.distributed import World
from landiff.training.engine import BatchSource, Engine, TrainState

log = logging.getLogger(__name__)

HASH_LIMIT = 4 << 30  # bytes; above, reading a file back would hold a save up for seconds
DISK_ERRORS = (
    OSError,
    RuntimeError,
    SafetensorError,
    CheckpointException,
)  # what a full disk looks like
RETRY_WAITS_S = (1.0, 10.0, 60.0)
DISTRIBUTIONS = (
    "torch",
    "megatron-core",
    "deepspeed",
    "vector-quantize-pytorch",
    "safetensors",
    "numpy",
)


class CheckpointState(Config):
    """state.json: what the loop needs to go on, and what made it."""

    format: Literal[1] = 1
    step: NonNegativeInt
    kind: str  # name of the config class: which trainer
    loader: dict[str, Any]
    manifest: str  # fingerprint of the raw shards
    columns: dict[str, str]  # fingerprints of the data's columns by name
    world_size: int
    versions: dict[str, str]
    healthy: bool | None = None  # may be resumed from; None: written before this was recorded


class FileEntry(Config):
    """One file of a checkpoint."""

    path: str  # relative
    bytes: NonNegativeInt
    sha256: str | None  # None above HASH_LIMIT


class FileList(Config):
    """files.json."""

    format: Literal[1] = 1
    files: list[FileEntry]


class CheckpointStore:
    """The checkpoints of one run. Methods are collective unless they say otherwise."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        loop: LoopConfig,
        world: World,
        *,
        must_match: Sequence[str] = ("model",),
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        """`must_match`: sections of `config` in which a checkpoint may not differ. Removes what dead saves left."""
        self.folder = folder
        self.config = config
        self.loop = loop
        self.world = world
        self.must_match = tuple(must_match)
        self.retry_waits_s = tuple(retry_waits_s)
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            restore_replaced(folder)
            remove_abandoned(
                folder, foreign_after_s=0
            )  # a run folder has one owner, and that is this run
        world.barrier()

    # ---------------------------------------------------------------- save

    def save(
        self, state: TrainState, engine: Engine, loader: BatchSource, *, last: bool = False
    ) -> Path | None:
        """Commit a checkpoint of `state.step`; returns its folder.

        A failure leaves the older checkpoints alone and is handled as `loop.on_save_failure` says: go on
        without (returns None), try again after 1, 10 and 60 s, or raise. When this is the `last` chance of
        the process, "warn" raises too. Raises CheckpointError on all ranks, NonFiniteError (and writes
        nothing) where weights hold NaN or infinity.
        """
        what = f"the weights after step {state.step} hold"
        self._require_finite(engine, what, "no checkpoint of them is written")
        waits = self.retry_waits_s if self.loop.on_save_failure == "retry" else ()
        for attempt in range(len(waits) + 1):
            failures = self._try_save(state, engine, loader)
            if not failures:
                self._prune(state.step)
                return step_folder(self.folder, state.step)
            text = f"checkpoint of step {state.step} in {self.folder} failed: {'; '.join(failures)}"
            if attempt < len(waits):
                log.warning(
                    "%s; trying again in %g s (%d tries left)",
                    text,
                    waits[attempt],
                    len(waits) - attempt,
                )
                time.sleep(waits[attempt])
        if self.loop.on_save_failure == "warn" and not last:
            log.warning("%s; going on, since loop.on_save_failure = warn", text)
            return None
        advice = way_out(RuntimeError(text), self.folder) or "fix the cause"
        raise CheckpointError(
            f"{text}; older checkpoints are untouched. To continue, {advice}, and run the same command again"
        )

    def _try_save(self, state: TrainState, engine: Engine, loader: BatchSource) -> list[str]:
        """What went wrong, by rank; empty when the checkpoint is committed. Equal on all ranks."""
        world, final = self.world, step_folder(self.folder, state.step)
        temporary = Path(world.broadcast(str(temporary_name(final))))
        failure = _attempt(lambda: temporary.mkdir(parents=True)) if world.rank == 0 else ""
        failures = _failures(world, failure)
        if not failures:
            failures = _failures(world, _attempt(lambda: engine.save(temporary)))
        if not failures:
            failure, entries = "", []
            paths = world.broadcast(list_files(temporary) if world.rank == 0 else None)
            try:
                entries = [
                    describe_file(temporary, path).model_dump() for path in _share(world, paths)
                ]
            except OSError as error:
                failure = _explain(error)
            failures = _failures(world, failure)
            entries = [FileEntry(**entry) for part in world.gather(entries) for entry in part]
        if not failures:
            failure = (
                _attempt(lambda: self._commit(temporary, final, state, loader, entries))
                if world.rank == 0
                else ""
            )
            failures = _failures(world, failure)
        if failures:  # libraries do not always say that it was the disk
            failures.insert(0, world.broadcast(_room(self.folder) if world.rank == 0 else None))
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        world.barrier()
        return failures

    def _commit(
        self,
        temporary: Path,
        final: Path,
        state: TrainState,
        loader: BatchSource,
        entries: list[FileEntry],
    ) -> None:
        """Rank 0: add our own documents, then rename."""
        document = CheckpointState(
            step=state.step,
            kind=type(self.config).__name__,
            loader=loader.state_dict(),
            manifest=loader.manifest.fingerprint,
            world_size=self.world.size,
            versions=versions(),
            healthy=state.healthy,
            columns={name: column.fingerprint for name, column in loader.manifest.columns.items()},
        )
        seal(temporary, document, self.config, entries)
        replace_dir(temporary, final)

    def _prune(self, newest: int) -> None:
        """Keep the last n, every m-th and the newest healthy one. A failure to delete does not stop the run."""
        if self.world.rank != 0:
            return
        steps = [step for step in committed_steps(self.folder) if step <= newest]
        healthy = [step for step in steps if is_healthy(step_folder(self.folder, step))]
        for step in steps[: -self.loop.keep_last]:
            if self.loop.keep_every and step % self.loop.keep_every == 0:
                continue
            if step in healthy[-1:]:
                continue
            try:
                remove_dir(step_folder(self.folder, step))
            except OSError as error:
                log.warning(
                    "could not delete old checkpoint %s: %s", step_folder(self.folder, step), error
                )

    # ---------------------------------------------------------------- load

    def load_latest(self, engine: Engine, loader: BatchSource) -> TrainState | None:
        """Restore the newest whole and healthy checkpoint; None in a run without any.

        Raises ConfigError for a checkpoint of another model, CheckpointError when none is whole and healthy, and
        NonFiniteError where weights hold NaN or infinity.
        """
        found = self._newest_whole()
        if found is None:
            return None
        document = self._check(found)
        loader.load_state_dict(document.loader)  # refuses other data
        engine.load(found)
        way_out = "delete it to resume from an earlier one"
        self._require_finite(engine, f"checkpoint {found} holds", way_out)
        self._prune(document.step)  # a kill may have come between commit and deletion
        log.info("resumed from %s", found)
        return TrainState(step=document.step)

    def _newest_whole(self) -> Path | None:
        steps = self.world.broadcast(committed_steps(self.folder) if self.world.rank == 0 else None)
        unhealthy = 0
        for step in reversed(steps):
            folder = step_folder(self.folder, step)
            problems = self.damage(folder)
            healthy = self.world.rank == 0 and is_healthy(folder, unreadable=True)
            if not problems and self.world.broadcast(healthy):
                return folder  # `_check` reports a state.json that cannot be read
            if not problems:
                unhealthy += 1
                log.warning("checkpoint %s has healthy = false; using the one before it", folder)
                continue
            log.warning(
                "checkpoint %s is damaged (%s); using the one before it",
                folder,
                "; ".join(problems[:3]),
            )
            if self.world.rank == 0:
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
            self.world.barrier()
        if unhealthy:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole and healthy: {unhealthy} of {len(steps)} are of a "
                "diverged run (healthy = false in state.json). Delete them to begin at step 0, or choose "
                "another run folder (run=...)"
            )
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.folder} is whole; they are kept as step_*.damaged. "
                "Bring one back, or start the command once more to begin at step 0"
            )
        return None

    def damage(self, folder: Path) -> list[str]:
        """What differs from files.json; empty for a whole checkpoint. Equal on all ranks; reading is shared."""
        paths, problem = [], ""
        if self.world.rank == 0:
            try:
                listed = read_json_as(FileList, folder / FILES)
                paths = [entry.model_dump() for entry in listed.files]
            except (OSError, ConfigError) as error:
                problem = f"{FILES}: {_explain(error)}"
        problem, paths = self.world.broadcast([problem, paths])
        if problem:
            return [problem]
        entries = {entry["path"]: FileEntry(**entry) for entry in paths}
        problems = [
            text
            for path in _share(self.world, list(entries))
            if (text := difference(folder, entries[path]))
        ]
        return [text for part in self.world.gather(problems) for text in part]

    def _require_finite(self, engine: Engine, what: str, consequence: str) -> None:
        """Raise NonFiniteError on all ranks where one rank's part of the weights is not finite."""
        names = non_finite(engine.local_weights())
        if self.world.any_says(bool(names)):
            parts = self.world.gather(names[: NAMES_SHOWN + 1])
            found = list(dict.fromkeys(name for part in parts for name in part))
            shown = ", ".join(found[:NAMES_SHOWN])
            others = " and others" if len(found) > NAMES_SHOWN else ""
            raise NonFiniteError(f"{what} NaN or infinity in {shown}{others}; {consequence}")

    def _check(self, folder: Path) -> CheckpointState:
        """state.json of a whole checkpoint that fits this run. Raises ConfigError with the keys that don't."""
        advice = f"bring the file back, or remove {folder} so that training resumes from the checkpoint before it"
        document = read_json_as(CheckpointState, folder / STATE, advice=advice)
        stored = read_yaml(folder / CONFIG, advice=advice)
        changed = changed_keys(folder, document.kind, stored, self.config, self.must_match)
        if changed:
            log.info("resuming with a changed config: %s", ", ".join(changed))
        return document


# -------------------------------------------------------------------- on disk (not collective)


def list_files(folder: Path) -> list[str]:
    """All files below `folder`, relative, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def describe_file(folder: Path, path: str) -> FileEntry:
    size = (folder / path).stat().st_size
    return FileEntry(
        path=path, bytes=size, sha256=sha256_file(folder / path) if size <= HASH_LIMIT else None
    )


def seal(
    folder: Path, document: CheckpointState, config: Config, entries: Sequence[FileEntry]
) -> None:
    """Add our own documents to an engine's files, which `entries` describe; the list of files last."""
    write_text(folder / STATE, document.model_dump_json(indent=1))
    write_config(folder / CONFIG, config)
    own = [describe_file(folder, name) for name in (STATE, CONFIG)]
    write_text(
        folder / FILES,
        FileList(files=sorted([*entries, *own], key=lambda entry: entry.path)).model_dump_json(
            indent=1
        ),
    )


def difference(folder: Path, entry: FileEntry) -> str:
    """What is wrong with one listed file, or ""."""
    path = folder / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes instead of {entry.bytes}"
        if entry.sha256 is not None and sha256_file(path) != entry.sha256:
            return f"{entry.path} has other content than was written"
    except OSError as error:
        return f"{entry.path}: {_explain(error)}"
    return ""


def latest_whole(folder: Path) -> Path | None:
    """The newest healthy checkpoint in `folder` whose files are as listed, for readers outside a run."""
    for step in reversed(committed_steps(folder)):
        path = step_folder(folder, step)
        if not differences(path) and is_healthy(path):
            return path
    return None


def differences(folder: Path) -> list[str]:
    """What differs from files.json; empty for a whole checkpoint. `CheckpointStore.damage` shares this over ranks."""
    try:
        listed_files = read_json_as(FileList, folder / FILES)
    except (OSError, ConfigError) as error:
        return [f"{FILES}: {_explain(error)}"]
    found = [difference(folder, entry) for entry in listed_files.files]
    return [text for text in found if text]


def is_healthy(folder: Path, *, unreadable: bool = False) -> bool:
    """False where state.json says healthy = false; older checkpoints do not record it.

    `unreadable` is the answer for a state.json that cannot be read.
    """
    try:
        state = read_json_as(CheckpointState, folder / STATE)
    except (OSError, ConfigError):
        return unreadable
    return state.healthy is not False


def versions() -> dict[str, str]:
    """Python and the libraries whose files a checkpoint holds."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


# -------------------------------------------------------------------- small helpers


def _attempt(action: Any) -> str:
    """Run `action`; what the disk had to say against it, or ""."""
    try:
        action()
    except DISK_ERRORS as error:
        log.warning("saving failed", exc_info=error)
        return _explain(error)
    return ""


def _failures(world: World, failure: str) -> list[str]:
    """The failures of all ranks, on all ranks; what many say is said once."""
    if not world.any_says(bool(failure)):
        return []
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(world.gather(failure)):
        ranks.setdefault(text, []).append(rank)
    return [
        f"rank {first}{f' and {len(others)} others' if others else ''}: {text}"
        for text, (first, *others) in ranks.items()
        if text
    ]


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free >> 20} MiB were free on the disk"
    except OSError as error:
        return f"no disk: {_explain(error)}"


def _explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _share(world: World, paths: Sequence[str]) -> list[str]:
    return list(paths[world.rank :: world.size])
