"""Checkpoints that are complete or do not exist.

    <run>/checkpoints/step_00001000/
        ...            the engine's own files
        config.yaml    resolved config of the run
        state.json     `CheckpointState`: step, loader position, versions, data fingerprints
        files.json     size and sha256 of all other files; written last

A save writes into a hidden folder beside the final name. After every rank has written, the files
are listed, hashed and fsynced, and the folder is renamed. The ranks divide the hashing among them.
Files above HASH_LIMIT are listed with their size only.

The newest checkpoint whose files match files.json is used to resume. A damaged one is renamed to
`step_<n>.damaged`, and the one before it is used.

No random state is saved: draws are keyed by (seed, purpose, place), see
`landiff.model_zoo.keyed_random`.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from landiff.configs.base import ConfigError
from landiff.configs.disk_errors import way_out
from landiff.configs.documents import read_yaml
from landiff.configs.files import (
    remove_abandoned,
    remove_dir,
    replace_dir,
    restore_replaced,
    temporary_name,
)
from landiff.configs.loader import read_json_as
from landiff.model_zoo.health import NAMES_SHOWN, non_finite
from landiff.training.checkpoint.errors import CheckpointError, NonFiniteError
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileEntry,
    FileList,
    describe_file,
    difference,
    error_line,
    is_healthy,
    list_files,
    seal,
    versions,
)
from landiff.training.checkpoint.guard_state import GuardState
from landiff.training.checkpoint.parent import find_parent, write_parent
from landiff.training.checkpoint.resume import changed_keys, check_past_phases
from landiff.training.checkpoint.run_folder import (
    CONFIG,
    DAMAGED,
    FILES,
    STATE,
    committed_steps,
    step_folder,
)
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import BatchSource, Engine, TrainState

log = logging.getLogger(__name__)

# Errors that a full disk causes.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)
RETRY_WAITS_S = (1.0, 10.0, 60.0)
PROBLEMS_SHOWN = 3  # of a damaged checkpoint


class CheckpointStore:
    """The checkpoints of one run. All methods are collective unless they say otherwise."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        world: World,
        *,
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        """Open the folder of checkpoints and remove what interrupted saves left there."""
        self.folder = folder
        self.config = config
        self.loop = config.loop
        self.world = world
        self.retry_waits_s = tuple(retry_waits_s)
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            restore_replaced(folder)
            # A run folder has one owner, this run. No process on another machine writes to it.
            remove_abandoned(folder, foreign_after_s=0)
        world.barrier()

    # ---------------------------------------------------------------- save

    def save(
        self, state: TrainState, engine: Engine, loader: BatchSource, *, last: bool = False
    ) -> Path | None:
        """Commit a checkpoint of `state.step`. Returns its folder.

        A failure leaves the older checkpoints untouched. `loop.on_save_failure` decides what
        follows: continue without this checkpoint and return None, retry after 1, 10 and 60 s, or
        raise. If this is the process's `last` save, "warn" raises too.

        Raises CheckpointError on all ranks. Raises NonFiniteError and writes nothing if weights
        hold NaN or infinity.
        """
        if state.healthy and state.step % self.loop.save_every == 0:
            # A checkpoint of a stop request is no anchor, so that an interrupted run rolls back
            # to the same checkpoint as an undisturbed one.
            state.guard.anchor = state.step
            state.guard.anchor_rollbacks = 0
        what = f"the weights after step {state.step} hold"
        self._require_finite(engine, what, "no checkpoint of them is written")
        waits = self.retry_waits_s if self.loop.on_save_failure == "retry" else ()
        for attempt in range(len(waits) + 1):
            failures = self._try_save(state, engine, loader)
            if not failures:
                self._prune(state)
                return step_folder(self.folder, state.step)
            text = f"checkpoint of step {state.step} in {self.folder} failed: {'; '.join(failures)}"
            if attempt < len(waits):
                wait_s = waits[attempt]
                left = len(waits) - attempt
                log.warning("%s; trying again in %g s (%d tries left)", text, wait_s, left)
                time.sleep(wait_s)
        if self.loop.on_save_failure == "warn" and not last:
            log.warning("%s; training continues, since loop.on_save_failure = warn", text)
            return None
        advice = way_out(RuntimeError(text), self.folder) or "fix the cause"
        raise CheckpointError(
            f"{text}; older checkpoints are untouched. To continue, {advice}, and run the same "
            "command again"
        )

    def save_start(self, state: TrainState, engine: Engine, loader: BatchSource) -> None:
        """Commit a checkpoint before the first step of a run in which steps may be rolled back.

        Its weights are the initial ones, those of `init_from` or those of the run's parent.
        """
        if not self.loop.may_roll_back or self._committed():
            return
        # All ranks open the data together; rank 0, which asks for the position, cannot do it alone.
        loader.state_dict()
        state.guard.anchor = state.step
        state.guard.anchor_rollbacks = 0
        self.save(state, engine, loader)

    def _try_save(self, state: TrainState, engine: Engine, loader: BatchSource) -> list[str]:
        """Failures by rank, empty if the checkpoint was committed. Equal on all ranks."""
        world = self.world
        final = step_folder(self.folder, state.step)
        temporary = Path(world.broadcast(str(temporary_name(final))))
        failures = self._on_rank_0(lambda: temporary.mkdir(parents=True))
        if not failures:
            failures = _failures(world, _attempt(lambda: engine.save(temporary)))
        if not failures:
            entries, failures = self._describe_files(temporary)
        if not failures:
            failures = self._on_rank_0(
                lambda: self._commit(temporary, final, state, loader, entries)
            )
        if failures:
            # Libraries do not always report that the disk was full.
            free = _free_space(self.folder) if world.rank == 0 else None
            failures.insert(0, world.broadcast(free))
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        world.barrier()
        return failures

    def _on_rank_0(self, action: Callable[[], object]) -> list[str]:
        """Run `action` on rank 0. Returns its failure, if any, on all ranks."""
        failure = ""
        if self.world.rank == 0:
            failure = _attempt(action)
        return _failures(self.world, failure)

    def _describe_files(self, folder: Path) -> tuple[list[FileEntry], list[str]]:
        """Size and hash of all files, and the failures. The ranks divide the hashing among them."""
        paths = self.world.broadcast(list_files(folder) if self.world.rank == 0 else None)
        own: list[dict[str, Any]] = []
        failure = ""
        try:
            for path in _own_part(self.world, paths):
                own.append(describe_file(folder, path).model_dump())
        except OSError as error:
            failure = error_line(error)
        failures = _failures(self.world, failure)
        entries: list[FileEntry] = []
        for part in self.world.gather(own):
            entries.extend(FileEntry(**entry) for entry in part)
        return entries, failures

    def _commit(
        self,
        temporary: Path,
        final: Path,
        state: TrainState,
        loader: BatchSource,
        entries: list[FileEntry],
    ) -> None:
        """Add the documents and rename the folder. Rank 0 only."""
        document = CheckpointState(
            step=state.step,
            kind=type(self.config).__name__,
            loader=loader.state_dict(),
            manifest=loader.manifest.fingerprint,
            world_size=self.world.size,
            versions=versions(),
            healthy=state.healthy,
            guard=state.guard,
            bucket_losses=state.bucket_losses,
            columns={name: column.fingerprint for name, column in loader.manifest.columns.items()},
        )
        seal(temporary, document, self.config, entries)
        replace_dir(temporary, final)

    def _prune(self, state: TrainState) -> None:
        """Delete old checkpoints.

        The newest ones (`loop.keep_last`), those of every `loop.keep_every` steps, the newest
        healthy one and the one that a rollback returns to are kept. A checkpoint that cannot be
        deleted does not stop the run.
        """
        if self.world.rank != 0:
            return
        steps = [step for step in committed_steps(self.folder) if step <= state.step]
        healthy = [step for step in steps if is_healthy(step_folder(self.folder, step))]
        for step in steps[: -self.loop.keep_last]:
            if self.loop.keep_every and step % self.loop.keep_every == 0:
                continue
            if step in healthy[-1:] or step == state.guard.anchor:
                continue
            folder = step_folder(self.folder, step)
            try:
                remove_dir(folder)
            except OSError as error:
                log.warning("could not delete old checkpoint %s: %s", folder, error)

    # ---------------------------------------------------------------- load

    def load_latest(self, engine: Engine, loader: BatchSource) -> TrainState | None:
        """Restore the newest intact and healthy checkpoint, or that of the run's parent.

        Returns None if the run has neither. If no intact checkpoint is healthy, the newest one is
        used: the guard continues to count where it stood.

        Raises ConfigError for a checkpoint of another model, CheckpointError if no checkpoint is
        intact, and NonFiniteError if weights hold NaN or infinity.
        """
        steps = self._committed()
        found = self._newest_intact(steps)
        if found is None and steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self.folder} is intact; they are kept "
                "as step_*.damaged. Restore one of them, or run the command again to start at "
                "step 0"
            )
        own = found is not None
        if found is None:
            found = self._parent_checkpoint()
        if found is None:
            return None
        document = self._check(found)
        loader.load_state_dict(document.loader)  # raises for other data
        self._load(engine, found)
        # Checkpoints that are older than the guard had an update in every step.
        guard = document.guard or GuardState(updates=document.step)
        if not own:
            guard = replace(guard, anchor=None, anchor_rollbacks=0)
            if self.world.rank == 0:
                write_parent(self.config.run, found, document.step)
        losses = dict(document.bucket_losses)
        state = TrainState(document.step, document.healthy is not False, guard, losses)
        self._prune(state)  # the last save may have been killed between commit and deletion
        log.info("resumed from %s", found)
        return state

    def roll_back(self, state: TrainState, engine: Engine) -> int | None:
        """Load weights and optimizer of the last healthy checkpoint, and count that in `state`.

        Returns the step of the checkpoint. Returns None, with a warning, if there is none, since
        none could be written: the weights stay as they are.

        Raises NonFiniteError if the run returns to the same checkpoint too often.
        """
        guard = state.guard
        steps = [step for step in self._committed() if step <= state.step]
        if guard.anchor in steps:
            steps = [step for step in steps if step < guard.anchor] + [guard.anchor]
        found = self._newest_intact(steps, healthy_only=True)
        if found is None:
            log.warning("no healthy checkpoint to roll back to; the step is only skipped")
            return None
        document = self._check(found)
        self._load(engine, found)
        if document.step != guard.anchor:
            guard.anchor = document.step
            guard.anchor_rollbacks = 0
        guard.anchor_rollbacks += 1
        guard.rollbacks += 1
        updates = document.guard.updates if document.guard else document.step
        guard.undone += guard.updates - updates
        guard.updates = updates
        if guard.anchor_rollbacks > max(1, self.loop.max_skips_in_a_row):
            raise NonFiniteError(
                f"the run has returned to the checkpoint of step {document.step} "
                f"{guard.anchor_rollbacks} times without reaching the next one, the last time in "
                f"step {state.step}: training has diverged. Resume from an earlier checkpoint "
                "(move the later ones away), with a lower optim.lr or other data"
            )
        return document.step

    def _load(self, engine: Engine, folder: Path) -> None:
        """Load a checkpoint into the engine and check its weights."""
        engine.load(folder)
        advice = "delete it to resume from an earlier one"
        self._require_finite(engine, f"checkpoint {folder} holds", advice)

    def _committed(self) -> list[int]:
        """Steps of the committed checkpoints, as rank 0 sees them."""
        return self.world.broadcast(committed_steps(self.folder) if self.world.rank == 0 else None)

    def _newest_intact(self, steps: Sequence[int], *, healthy_only: bool = False) -> Path | None:
        """The newest healthy checkpoint of `steps` that is intact.

        If there is none, the newest intact one, unless `healthy_only`.
        """
        unhealthy = None
        for step in reversed(steps):
            folder = step_folder(self.folder, step)
            # A state.json that cannot be read counts as healthy here: `_check` reports it.
            healthy = self.world.rank == 0 and is_healthy(folder, unreadable=True)
            healthy = self.world.broadcast(healthy)
            if not healthy and (healthy_only or unhealthy is not None):
                continue
            problems = self.damage(folder)
            if problems:
                self._rename_damaged(folder, problems)
            elif healthy:
                return folder
            else:
                unhealthy = folder
        if unhealthy is None:
            return None
        log.warning("no checkpoint in %s is healthy; using %s", self.folder, unhealthy)
        return unhealthy

    def _parent_checkpoint(self) -> Path | None:
        """The checkpoint of another run that this run begins with, or None if it names none."""
        if self.config.parent is None:
            return None
        path = ""
        error = ""
        if self.world.rank == 0:
            try:
                path = str(find_parent(self.config))
            except ConfigError as raised:
                error = str(raised)
        path, error = self.world.broadcast([path, error])
        if error:
            raise ConfigError(error)
        folder = Path(path)
        problems = self.damage(folder)
        if problems:
            listed = "; ".join(problems[:PROBLEMS_SHOWN])
            raise CheckpointError(
                f"parent = {self.config.parent}: checkpoint {folder} is damaged ({listed}); "
                "restore it, or name another one"
            )
        return folder

    def _rename_damaged(self, folder: Path, problems: Sequence[str]) -> None:
        """Rename a damaged checkpoint so that it is not used again."""
        listed = "; ".join(problems[:PROBLEMS_SHOWN])
        log.warning("checkpoint %s is damaged (%s); using the one before it", folder, listed)
        if self.world.rank == 0:
            damaged = folder.with_name(f"{folder.name}{DAMAGED}")
            shutil.rmtree(damaged, ignore_errors=True)
            os.rename(folder, damaged)
        self.world.barrier()

    def damage(self, folder: Path) -> list[str]:
        """Differences from files.json, empty for an intact checkpoint. Equal on all ranks.

        The ranks divide the reading among them.
        """
        listed: list[dict[str, Any]] = []
        problem = ""
        if self.world.rank == 0:
            try:
                files = read_json_as(FileList, folder / FILES).files
                listed = [entry.model_dump() for entry in files]
            except (OSError, ConfigError) as error:
                problem = f"{FILES}: {error_line(error)}"
        problem, listed = self.world.broadcast([problem, listed])
        if problem:
            return [problem]
        entries = {entry["path"]: FileEntry(**entry) for entry in listed}
        found = [difference(folder, entries[path]) for path in _own_part(self.world, list(entries))]
        problems: list[str] = []
        for part in self.world.gather([text for text in found if text]):
            problems.extend(part)
        return problems

    def _require_finite(self, engine: Engine, what: str, consequence: str) -> None:
        """Raise NonFiniteError on all ranks if the weights of one rank are not finite."""
        names = non_finite(engine.local_weights())
        if not self.world.any_true(bool(names)):
            return
        found: list[str] = []
        for part in self.world.gather(names[: NAMES_SHOWN + 1]):
            for name in part:
                if name not in found:
                    found.append(name)
        shown = ", ".join(found[:NAMES_SHOWN])
        others = " and others" if len(found) > NAMES_SHOWN else ""
        raise NonFiniteError(f"{what} NaN or infinity in {shown}{others}; {consequence}")

    def _check(self, folder: Path) -> CheckpointState:
        """state.json of an intact checkpoint.

        Raises ConfigError with the keys in which the checkpoint does not fit this run.
        """
        advice = (
            f"restore the file, or remove {folder} so that training resumes from the checkpoint "
            "before it"
        )
        document = read_json_as(CheckpointState, folder / STATE, advice=advice)
        stored = read_yaml(folder / CONFIG, advice=advice)
        must_match = self.config.must_match
        changed = changed_keys(folder, document.kind, stored, self.config, must_match)
        check_past_phases(folder, stored, self.config, document.step)
        if changed:
            log.info("resuming with a changed config: %s", ", ".join(changed))
        return document


def _attempt(action: Callable[[], object]) -> str:
    """Run `action`. Returns its error, or an empty string."""
    try:
        action()
    except DISK_ERRORS as error:
        log.warning("saving failed", exc_info=error)
        return error_line(error)
    return ""


def _failures(world: World, failure: str) -> list[str]:
    """The failures of all ranks on all ranks. Equal ones are listed once."""
    if not world.any_true(bool(failure)):
        return []
    ranks_by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(world.gather(failure)):
        if text:
            ranks_by_text.setdefault(text, []).append(rank)
    failures = []
    for text, ranks in ranks_by_text.items():
        others = f" and {len(ranks) - 1} others" if len(ranks) > 1 else ""
        failures.append(f"rank {ranks[0]}{others}: {text}")
    return failures


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free >> 20} MiB were free on the disk"
    except OSError as error:
        return f"no disk: {error_line(error)}"


def _own_part(world: World, paths: Sequence[str]) -> list[str]:
    """The paths that this rank processes."""
    return list(paths[world.rank :: world.size])
