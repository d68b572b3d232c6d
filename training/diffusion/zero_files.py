"""The files of DeepSpeed's checkpoints, collected for `loop.async_save` and read safely."""

from __future__ import annotations

import importlib
import os
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from landiff.model_zoo.convert.formats.deepspeed import (
    CLASSES,
    SHARDS,
    add_frozen,
    divide_frozen,
    frozen_file,
)
from landiff.model_zoo.convert.pickles import load_pickle
from landiff.training.checkpoint.parts import StateFile, torch_archive


class CheckpointFiles:
    """Collects and reads DeepSpeed's checkpoint files, in place of its `checkpoint_engine`.

    DeepSpeed divides its state among files and ranks; when they are written, `loop.async_save`
    decides. Files are unpickled with an allow-list, whereas DeepSpeed would run any code in them.
    Frozen parameters get files of their own, which never change.
    """

    def __init__(self, inner: Any, frozen: Set[str]) -> None:
        """`inner`: DeepSpeed's own checkpoint engine. `frozen`: names of frozen parameters."""
        self.inner = inner
        self.frozen = frozen
        self._files: list[StateFile] = []

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of the inner engine."""
        return getattr(self.inner, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: whoever writes the files makes their folder."""

    def save(self, state_dict: Any, path: str) -> None:
        """Collect a file."""
        if self.frozen and "module" in state_dict:
            state_dict, frozen = divide_frozen(state_dict, self.frozen)
            place = str(frozen_file(Path(path)))
            self._files.append(StateFile(place, torch_archive(frozen), constant=True))
        self._files.append(StateFile(path, torch_archive(state_dict)))

    def take(self) -> list[StateFile]:
        """The files of this rank since the last call."""
        files = self._files
        self._files = []
        return files

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file. Raises ConversionError if it holds more than what DeepSpeed writes."""
        classes = {name: _imported(name) for name in CLASSES}
        content = load_pickle(Path(path), classes, map_location)
        frozen = frozen_file(Path(path))
        if "module" in content and frozen.exists():
            add_frozen(content, load_pickle(frozen, classes, map_location))
        return content


def state_files(engine: Any) -> list[StateFile]:
    """This rank's files of DeepSpeed's checkpoint, below the folder SHARDS. Collective."""
    engine.save_checkpoint(".", tag=SHARDS, save_latest=False)
    files = engine.checkpoint_engine.take()
    return [replace(file, path=os.path.normpath(file.path)) for file in files]


def _imported(name: str) -> Any:
    """The object with a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
