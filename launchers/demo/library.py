"""The finished videos of `landiff demo`, those of earlier starts included. Torch-free."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from landiff.launchers.results.gallery import Record
from landiff.launchers.results.prompts import TOKENS_SUFFIX
from landiff.launchers.results.sample_folder import TOKENS, read_record


@dataclass(frozen=True)
class Result:
    """A finished video.

    name: `FOLDER/FILE.mp4` below the folder of the demo.
    record: what made the video, as `landiff sample` writes it.
    time: when the video was finished, in seconds since 1970.
    """

    name: str
    record: Record
    time: float


class Library:
    """The results in the folders below `root`. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._results: dict[str, Result] = {}
        self._others: set[str] = set()  # files without a record
        self._lock = threading.Lock()

    def results(self) -> list[Result]:
        """All results, the newest first."""
        with self._lock:
            self._refresh()
            return sorted(self._results.values(), key=lambda result: result.time, reverse=True)

    def find(self, name: object) -> Result | None:
        """The result of this name; None for any other text, paths to other files among them."""
        with self._lock:
            if name not in self._results:
                self._refresh()
            return self._results.get(name) if isinstance(name, str) else None

    def tokens_of(self, result: Result) -> Path | None:
        """The file with the tokens of a result; None if there is none in this library."""
        path = self.root / result.name
        tokens = path.parent / TOKENS / f"{path.stem}{TOKENS_SUFFIX}"
        given = result.record.get("given")
        if given is not None and given["kind"] == "tokens_from":
            tokens = Path(given["path"])
        is_here = tokens.resolve().is_relative_to(self.root.resolve())
        return tokens if is_here and tokens.is_file() else None

    def _refresh(self) -> None:
        """Reads the records of new videos, and forgets deleted ones."""
        found = {}
        for path in self.root.glob("*/*.mp4"):
            name = f"{path.parent.name}/{path.name}"
            if path.name.startswith(".") or name in self._others:
                continue
            result = self._results.get(name)
            if result is None:
                record = read_record(path)
                if record is None:
                    self._others.add(name)
                    continue
                result = Result(name, record, path.stat().st_mtime)
            found[name] = result
        self._results = found
