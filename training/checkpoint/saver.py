"""Saves that ranks make together: write, agree, commit; again after a failure.

Each rank's files are written by a `Writer`, in this process or in another. A save has two phases,
which begin and end on all ranks in the same step:

    write     every rank writes its files into one hidden folder. When all have answered, rank 0
              has sizes and hashes of all files
    commit    rank 0 adds the documents, renames the folder and deletes old checkpoints

docs/checkpoints.md lists what a crash leaves behind at each point.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from landiff.configs.disk_errors import way_out
from landiff.configs.files import temporary_name
from landiff.configs.loader import read_json_as
from landiff.training.checkpoint.background import Writer
from landiff.training.checkpoint.errors import CheckpointError
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileEntry,
    FileList,
    documents,
    error_line,
)
from landiff.training.checkpoint.parts import SameFile, StateFile, content_sha256
from landiff.training.checkpoint.run_folder import FILES, step_folder
from landiff.training.config import TrainConfig
from landiff.training.distributed import World

log = logging.getLogger(__name__)


@dataclass
class Save:
    """One save, until it is committed or given up.

    state: content of state.json.
    delete: checkpoints that are too many after the commit, on rank 0.
    writer: of this rank's files.
    last: of the process, so that a failure ends the run with `on_save_failure` = warn too.
    constant: hashes of this rank's files that later checkpoints hold too, by path.
    """

    state: CheckpointState
    delete: Sequence[Path]
    writer: Writer
    last: bool
    phase: Literal["write", "commit", "pause"] = "write"
    folder: Path = Path()
    attempt: int = 0
    retry_at_s: float = 0.0
    committed: bool = False
    constant: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.state.step


class Saver:
    """At most one save at a time. All methods are collective."""

    def __init__(
        self, folder: Path, config: TrainConfig, world: World, retry_waits_s: Sequence[float]
    ) -> None:
        """`folder`: of the checkpoints."""
        self.folder = folder
        self.config = config
        self.loop = config.loop
        self.world = world
        self.waits_s = tuple(retry_waits_s) if self.loop.on_save_failure == "retry" else ()
        self.current: Save | None = None
        self.began_with: Path | None = None  # the run's own checkpoint that this process loaded
        self._constant: dict[str, SameFile] = {}  # of this rank, in the last checkpoint, by path

    def begin(self, save: Save, files: Sequence[StateFile]) -> None:
        """Begin a save. Afterwards the tensors of `files` may change."""
        assert self.current is None, self.current
        self.current = save
        save.folder = self._hidden_folder(save)
        save.constant = {file.path: "" for file in files if file.constant}
        save.writer.begin_write(save.folder, self.linked(files))

    def linked(self, files: Sequence[StateFile]) -> list[StateFile]:
        """The files, those that are constant as links to the last checkpoint. Not collective."""
        return [self._linked(file) for file in files]

    def _linked(self, file: StateFile) -> StateFile:
        """The file, as a link to that of the last checkpoint if it is constant."""
        if not file.constant:
            return file
        if self.began_with is not None and file.path not in self._constant:
            same = same_in(self.began_with, file)
            if same is not None:
                self._constant[file.path] = same
        same = self._constant.get(file.path)
        if same is None or not same.path.exists():
            return file
        return replace(file, same_as=same)

    def _hidden_folder(self, save: Save) -> Path:
        """The folder of an attempt, which the next start removes if this process dies."""
        name = step_folder(self.folder, save.step)
        if save.attempt:
            name = name.with_name(f"{name.name}.{save.attempt}")
        return Path(self.world.broadcast(str(temporary_name(name))))

    def advance(self) -> bool:
        """Continue a save without waiting for it. Whether it has ended, committed or given up.

        Raises CheckpointError on all ranks if it failed and `on_save_failure` does not allow that.
        """
        save = self.current
        if save is None:
            return True
        if save.phase == "pause":
            over = self.world.rank == 0 and time.monotonic() >= save.retry_at_s
            if self.world.any_true(over):
                self._again(save)
        elif not self.world.any_true(save.writer.busy()):
            self._next(save)
        return self.current is None

    def finish(self) -> Path | None:
        """Wait for the end of a save. Returns the checkpoint if one was committed.

        Raises CheckpointError like `advance`.
        """
        save = self.current
        while save is not None and self.current is save:
            if save.phase == "pause":
                time.sleep(max(0.0, save.retry_at_s - time.monotonic()))
                self._again(save)
            save.writer.answer()
            self._next(save)
        if save is None or not save.committed:
            return None
        return step_folder(self.folder, save.step)

    def _again(self, save: Save) -> None:
        """Write once more what failed."""
        save.phase = "write"
        save.folder = self._hidden_folder(save)
        save.writer.begin_again(save.folder)

    def _next(self, save: Save) -> None:
        """Agree on the answers of all ranks, and begin the next phase or end the save."""
        answer = save.writer.answer()
        failures = self._failures(answer.get("error", ""))
        if failures:
            self._failed(save, failures)
        elif save.phase == "write":
            for entry in answer["entries"]:
                if entry["path"] in save.constant:
                    save.constant[entry["path"]] = entry["sha256"]
            entries: list[FileEntry] = []
            for part in self.world.gather(answer["entries"]):
                entries.extend(FileEntry(**entry) for entry in part)
            save.phase = "commit"
            if self.world.rank == 0:
                self._commit(save, entries)
        else:
            if self.world.rank == 0:
                for warning in answer["warnings"]:
                    log.warning("%s", warning)
            save.committed = True
            final = step_folder(self.folder, save.step)
            for path, digest in save.constant.items():
                self._constant[path] = SameFile(final / path, digest)
            self.current = None

    def _commit(self, save: Save, entries: Sequence[FileEntry]) -> None:
        """Begin the commit, on rank 0."""
        texts = []
        for name, document in documents(save.state, self.config, entries).items():
            texts.append([name, document.text, document.permissions])
        save.writer.begin_commit(
            {
                "folder": str(save.folder),
                "final": str(step_folder(self.folder, save.step)),
                "documents": texts,
                "delete": [str(path) for path in save.delete],
            }
        )

    def _failures(self, failure: str) -> list[str]:
        """The failures of all ranks on all ranks. Equal ones are listed once."""
        if not self.world.any_true(bool(failure)):
            return []
        ranks_by_text: dict[str, list[int]] = {}
        for rank, text in enumerate(self.world.gather(failure)):
            if text:
                ranks_by_text.setdefault(text, []).append(rank)
        failures = []
        for text, ranks in ranks_by_text.items():
            others = f" and {len(ranks) - 1} others" if len(ranks) > 1 else ""
            failures.append(f"rank {ranks[0]}{others}: {text}")
        return failures

    def _failed(self, save: Save, failures: list[str]) -> None:
        """Remove what was written, and pause, continue without the checkpoint or raise."""
        # Libraries do not always report that the disk was full.
        free = _free_space(self.folder) if self.world.rank == 0 else None
        failures.insert(0, self.world.broadcast(free))
        if self.world.rank == 0:
            shutil.rmtree(save.folder, ignore_errors=True)
        self.world.barrier()
        text = f"checkpoint of step {save.step} in {self.folder} failed: {'; '.join(failures)}"
        left = len(self.waits_s) - save.attempt
        if left:
            wait_s = self.waits_s[save.attempt]
            log.warning("%s; trying again in %g s (%d tries left)", text, wait_s, left)
            save.attempt += 1
            save.phase = "pause"
            save.retry_at_s = time.monotonic() + wait_s
            return
        self.current = None
        if self.loop.on_save_failure == "warn" and not save.last:
            log.warning("%s; training continues, since loop.on_save_failure = warn", text)
            return
        advice = way_out(RuntimeError(text), self.folder) or "fix the cause"
        raise CheckpointError(
            f"{text}; older checkpoints are untouched. To continue, {advice}, and run the same "
            "command again"
        )


def same_in(folder: Path, file: StateFile) -> SameFile | None:
    """The file of a checkpoint with the path and the content of `file`, or None.

    Whoever loaded the checkpoint has found it intact, so that its list of files is compared, and
    `file` is hashed.
    """
    if not (folder / FILES).exists():
        return None  # deleted since
    for entry in read_json_as(FileList, folder / FILES).files:
        if entry.path != file.path or entry.bytes != file.num_bytes:
            continue
        if entry.sha256 is not None and entry.sha256 == content_sha256(file.parts):
            return SameFile(folder / file.path, entry.sha256)
    return None


def _free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free >> 20} MiB were free on the disk"
    except OSError as error:
        return f"no disk: {error_line(error)}"
