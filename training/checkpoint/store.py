"""Checkpoints that are complete or do not exist.

    <run>/checkpoints/step_00001000/
        ...            the engine's own files
        config.yaml    resolved config of the run
        state.json     `CheckpointState`: step, loader position, versions, data fingerprints
        files.json     size and sha256 of all other files; written last

A save writes into a hidden folder beside the final name. After every rank has written, the folder
gets its documents and is renamed (training/checkpoint/saver.py). With `loop.async_save` another
process writes while training continues; the last save of a process is always synchronous.

The newest checkpoint whose files match files.json is used to resume. A damaged one is renamed to
`step_<n>.damaged`, and the previous one is used.

No random state is saved: random numbers are keyed by (seed, purpose, place), see
`landiff.model_zoo.keyed_random`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.documents import read_yaml
from landiff.configs.files import remove_abandoned, remove_dir, restore_replaced
from landiff.configs.loader import read_json_as
from landiff.model_zoo.health import NAMES_SHOWN, non_finite
from landiff.training.checkpoint.background import BackgroundWriter, InlineWriter
from landiff.training.checkpoint.errors import CheckpointError, NonFiniteError
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileEntry,
    FileList,
    difference,
    error_line,
    is_healthy,
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
from landiff.training.checkpoint.save_times import SaveTimes
from landiff.training.checkpoint.saver import Save, Saver
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import BatchSource, Engine, TrainState

log = logging.getLogger(__name__)

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
        self.saver = Saver(folder, config, world, retry_waits_s)
        self.background = BackgroundWriter(world.device)
        self.times = SaveTimes()
        self._prepared = False
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
        """Begin a checkpoint of `state.step`, and end it too if it is written at once.

        Written at once are the process's `last` save and, without `loop.async_save`, all of them.
        Returns the folder of a checkpoint that is committed on return. A save that is still being
        written is waited for, so that the same checkpoints are made as without `async_save`.

        A failure leaves the older checkpoints untouched. `loop.on_save_failure` decides what
        follows: continue without this checkpoint, retry after 1, 10 and 60 s, or raise. If this is
        the process's `last` save, "warn" raises too.

        Raises CheckpointError on all ranks, of this save or the one before. Raises NonFiniteError
        and writes nothing if weights hold NaN or infinity.
        """
        self.times.begin()
        self.finish()
        self.times.waited()
        if state.healthy and state.step % self.loop.save_every == 0:
            # A checkpoint of a stop request is no anchor, so that an interrupted run rolls back
            # to the same checkpoint as an undisturbed one.
            state.guard.anchor = state.step
            state.guard.anchor_rollbacks = 0
        what = f"the weights after step {state.step} hold"
        self._require_finite(engine, what, "no checkpoint of them is written")
        at_once = last or not self.loop.async_save
        document = self._document(state, loader)
        save = Save(
            document,
            delete=self._surplus(state, document),
            writer=InlineWriter() if at_once else self.background,
            last=last,
        )
        self.saver.begin(save, engine.state_files())
        if at_once:
            folder = self.finish()
            self.times.resumed()
            return folder
        self.times.resumed()
        return None

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
        self.finish()

    def advance(self, state: TrainState, engine: Engine) -> dict[str, float]:
        """Continue a save that is being written. Call after every step. Returns metrics.

        Raises CheckpointError on all ranks if it failed and `on_save_failure` does not allow that.
        """
        writing = self.saver.current is not None
        self.times.step(writing=writing)
        if writing and self.saver.advance():
            self.times.committed()
        if not self._prepared:
            self._prepared = True
            if self._writes_in_background(state.step):
                with suppress(OSError):  # reported by the save
                    self.background.prepare(self.saver.linked(engine.state_files()))
        return self.times.metrics

    def _writes_in_background(self, step: int) -> bool:
        """Whether a save after `step` steps or later, but not the last one, will be due."""
        every = self.loop.save_every
        return self.loop.async_save and -(-step // every) * every < self.loop.steps

    def finish(self) -> Path | None:
        """Wait until a save is committed. Returns its folder; raises like `save`."""
        writing = self.saver.current is not None
        folder = self.saver.finish()
        if writing:
            self.times.committed()
        return folder

    def __enter__(self) -> CheckpointStore:
        """Context around the training loop, at whose end no save is left unfinished."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish a save after training and after errors that all ranks raise together.

        After the error of a single rank the others do not respond, so that a save which is not
        committed yet is lost, as in a kill.
        """
        if kind is None:
            self.finish()
            self.background.close()
        elif issubclass(kind, NonFiniteError) or self.world.size == 1:
            try:
                self.finish()
            except CheckpointError as failure:
                log.error("%s", failure)

    def _document(self, state: TrainState, loader: BatchSource) -> CheckpointState:
        """Content of state.json."""
        return CheckpointState(
            step=state.step,
            kind=type(self.config).__name__,
            loader=loader.state_dict(),
            manifest=loader.manifest.fingerprint,
            world_size=self.world.size,
            versions=versions(),
            healthy=state.healthy,
            guard=replace(state.guard),
            bucket_losses=dict(state.bucket_losses),
            columns={name: column.fingerprint for name, column in loader.manifest.columns.items()},
        )

    def _surplus(self, state: TrainState, new: CheckpointState | None = None) -> list[Path]:
        """Checkpoints to delete, once `new` is committed if it is given. On rank 0.

        The newest ones (`loop.keep_last`), those of every `loop.keep_every` steps, the newest
        healthy one and the one that a rollback returns to are kept.
        """
        if self.world.rank != 0:
            return []
        steps = {step for step in committed_steps(self.folder) if step <= state.step}
        healthy = {step for step in steps if is_healthy(step_folder(self.folder, step))}
        if new is not None:
            steps.add(new.step)
            healthy.discard(new.step)
            if new.healthy:
                healthy.add(new.step)
        kept = {max(healthy, default=None), state.guard.anchor}
        found = []
        for step in sorted(steps)[: -self.loop.keep_last]:
            regular = self.loop.keep_every and step % self.loop.keep_every == 0
            if not regular and step not in kept:
                found.append(step_folder(self.folder, step))
        return found

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
        self.saver.began_with = found
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
        for folder in self._surplus(state):  # the last save was killed before it deleted them
            try:
                remove_dir(folder)
            except OSError as error:
                log.warning("could not delete old checkpoint %s: %s", folder, error)
        log.info("resumed from %s", found)
        return state

    def roll_back(self, state: TrainState, engine: Engine) -> int | None:
        """Load weights and optimizer of the last healthy checkpoint, and count that in `state`.

        Returns the step of the checkpoint. Returns None, with a warning, if there is none, since
        none could be written: the weights stay as they are.

        Raises NonFiniteError if the run returns to the same checkpoint too often.
        """
        self.finish()
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


def _own_part(world: World, paths: Sequence[str]) -> list[str]:
    """The paths that this rank processes."""
    return list(paths[world.rank :: world.size])
