"""Folder of codes and latents from which an interrupted long video resumes.

    key                        identifies the request; the folder is ignored if it differs
    codes-00000.safetensors    codes [B, K], in the order in which they were sampled
    chunk-00000.safetensors    new latents [B, T, C, H, W] of each chunk, and the state of the noise

Every file is committed by rename, so at most the current chunk is lost. A damaged file is deleted
with all later ones of its kind, and their content is computed again.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from landiff.configs.files import atomic_file, remove_abandoned, remove_dir, write_text

log = logging.getLogger(__name__)

KEY = "key"
KINDS = ("codes", "chunk")


class StreamStore:
    """Saved codes and latents of one batch of videos. One process at a time uses a folder."""

    def __init__(self, folder: Path, key: str) -> None:
        """Open `folder`, or clear it if it was written for another key.

        key: of everything that the videos depend on.
        """
        self.folder = folder
        path = folder / KEY
        if folder.exists() and (not path.exists() or path.read_text(encoding="utf-8") != key):
            shutil.rmtree(folder)
        if not path.exists():
            write_text(path, key)
        remove_abandoned(folder, foreign_after_s=0)
        self._counts = {kind: self._count_intact(kind) for kind in KINDS}

    def codes(self) -> list[Tensor]:
        """Saved codes, int64 [B, K] each."""
        return [load_file(path)["codes"] for path in self._files("codes")]

    def add_codes(self, codes_BK: Tensor) -> None:
        """Saves the next codes."""
        self._add("codes", {"codes": codes_BK})

    @property
    def num_chunks(self) -> int:
        """Saved chunks."""
        return self._counts["chunk"]

    def latents(self) -> Iterator[Tensor]:
        """New latents of each saved chunk, float32 [B, T, C, H, W]."""
        for path in self._files("chunk"):
            yield load_file(path)["latents"]

    def noise_state(self) -> Tensor:
        """State of the noise after the last saved chunk, uint8 [B, bytes]."""
        return load_file(self._path("chunk", self.num_chunks - 1))["noise"]

    def add_chunk(self, latents_BTCHW: Tensor, noise_state: Tensor) -> None:
        """Saves the next chunk."""
        self._add("chunk", {"latents": latents_BTCHW, "noise": noise_state})

    def remove(self) -> None:
        """Delete the folder, when its videos are finished."""
        with contextlib.suppress(FileNotFoundError):
            remove_dir(self.folder)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.safetensors"

    def _files(self, kind: str) -> list[Path]:
        """Saved files of a kind, in order."""
        return [self._path(kind, number) for number in range(self._counts[kind])]

    def _count_intact(self, kind: str) -> int:
        """The number of consecutive whole files of a kind. Deletes all others of the kind."""
        count = 0
        while self._path(kind, count).exists() and _is_whole(self._path(kind, count)):
            count += 1
        for path in self.folder.glob(f"{kind}-*.safetensors"):
            if path.name >= self._path(kind, count).name:
                log.warning("%s is not used: it, or a file before it, is damaged", path)
                path.unlink()
        return count

    def _add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with atomic_file(self._path(kind, self._counts[kind])) as file:
            file.write(data)
        self._counts[kind] += 1


def _is_whole(path: Path) -> bool:
    """Whether a file has the length that its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
