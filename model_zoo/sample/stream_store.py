"""What continues a long video after a kill: a folder of codes and latents.

    key                        what is generated; another key makes the folder worthless
    codes-00000.safetensors    codes [B, K], in the order in which they were drawn
    chunk-00000.safetensors    new latents [B, T, C, H, W] of each chunk, and the state of the noise

Every file is committed by rename, so that a kill loses at most the chunk in work.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from landiff.configs.files import atomic_file, remove_dir, write_text

KEY = "key"


class StreamStore:
    """Saved codes and latents of one batch of videos."""

    def __init__(self, folder: Path, key: str) -> None:
        """Open `folder`, or start anew if it was written for another key.

        key: of everything that the videos depend on.
        """
        self.folder = folder
        path = folder / KEY
        if folder.exists() and (not path.exists() or path.read_text(encoding="utf-8") != key):
            shutil.rmtree(folder)
        if not path.exists():
            write_text(path, key)

    def codes(self) -> list[Tensor]:
        """Saved codes, int64 [B, K] each."""
        return [load_file(path)["codes"] for path in self._files("codes")]

    def add_codes(self, codes_BK: Tensor) -> None:
        """Saves the next codes."""
        self._write("codes", len(self._files("codes")), {"codes": codes_BK})

    def latents(self) -> Iterator[Tensor]:
        """New latents of each saved chunk, float32 [B, T, C, H, W]."""
        for path in self._files("chunk"):
            yield load_file(path)["latents"]

    def noise_state(self, chunk: int) -> Tensor:
        """State of the noise after a saved chunk, uint8 [B, bytes]."""
        return load_file(self._path("chunk", chunk))["noise"]

    def add_chunk(self, chunk: int, latents_BTCHW: Tensor, noise_state: Tensor) -> None:
        """Saves a chunk."""
        self._write("chunk", chunk, {"latents": latents_BTCHW, "noise": noise_state})

    def remove(self) -> None:
        """Delete the folder, when its videos are finished."""
        if self.folder.exists():
            remove_dir(self.folder)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.safetensors"

    def _files(self, kind: str) -> list[Path]:
        """Saved files of a kind, in order."""
        found: list[Path] = []
        while self._path(kind, len(found)).exists():
            found.append(self._path(kind, len(found)))
        return found

    def _write(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        with atomic_file(self._path(kind, number)) as file:
            file.write(data)
