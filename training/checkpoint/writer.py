"""The process that writes checkpoints while training continues. Torch-free, so it starts quickly.

    python -m landiff.training.checkpoint.writer SOCKET BUFFER SIZE

It reads requests from a socket, one JSON object a line, and answers each with one. The bytes of the
files are in a buffer that it shares with the trainer (training/checkpoint/staging.py).

    write     write this rank's files of a checkpoint into a hidden folder, durably
    commit    add the documents, rename the folder, delete old checkpoints; one rank only

It ends with the trainer: a save that was not committed by then does not exist. Its errors are
returned to the trainer, which raises them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import signal
import socket
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from landiff.configs.disk_errors import naming
from landiff.configs.files import PUBLIC, remove_dir, replace_dir

BLOCK = 16 << 20  # bytes that are hashed and written at once
NICENESS = 5  # above the trainer's, so that its steps come first; also lowers the I/O priority
PARENT_DIED = 1  # PR_SET_PDEATHSIG


class _Writer:
    """Answers requests."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer

    def write(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Write files. Answers with their sizes and hashes."""
        folder = Path(request["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for file in request["files"]:
            if file.get("same_as"):
                link_file(Path(file["same_as"]), folder / file["path"])
                entries.append({key: file[key] for key in ("path", "bytes", "sha256")})
                continue
            self._insert_crcs(file["crcs"])
            content = self.buffer[file["start"] : file["start"] + file["bytes"]]
            digest = _write_file(folder / file["path"], content)
            entries.append({"path": file["path"], "bytes": file["bytes"], "sha256": digest})
        return {"entries": entries}

    def _insert_crcs(self, crcs: list[tuple[int, int, list[int]]]) -> None:
        """Compute the CRC-32 of tensors and put them where they belong."""
        for start, length, positions in crcs:
            crc = zlib.crc32(self.buffer[start : start + length]).to_bytes(4, "little")
            for position in positions:
                self.buffer[position : position + 4] = crc

    def commit(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Add documents, rename the folder and delete old checkpoints. Answers with warnings."""
        return {"warnings": commit(request)}


def link_file(existing: Path, path: Path) -> None:
    """Make a hard link to a file, or a durable copy where the file system has no links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        try:
            os.link(existing, path)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(existing, path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def commit(request: Mapping[str, Any]) -> list[str]:
    """Make a checkpoint of a folder with the files of all ranks.

    folder, final: names before and after.
    documents: [name, text, permissions], the list of files last.
    delete: old checkpoints. A failure to delete one is a warning, which is returned.
    """
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)  # if no rank had a file to write
    for name, text, permissions in request["documents"]:
        _write_file(folder / name, memoryview(text.encode()), permissions)
    replace_dir(folder, Path(request["final"]))
    warnings = []
    for old in request["delete"]:
        try:
            remove_dir(Path(old))
        except OSError as error:
            warnings.append(f"could not delete old checkpoint {old}: {error}")
    return warnings


def _write_file(path: Path, content: memoryview, permissions: int = PUBLIC) -> str:
    """Write a file, which is durable on return. Returns its SHA-256 in hex."""

    def create(name: str, flags: int) -> int:
        return os.open(name, flags, permissions)

    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with naming(path), open(path, "wb", buffering=0, opener=create) as file:
        for start in range(0, len(content), BLOCK):
            block = content[start : start + BLOCK]
            digest.update(block)
            while block:
                block = block[file.write(block) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def serve(connection: socket.socket, buffer: memoryview) -> None:
    """Answer requests until the trainer closes its end of the socket."""
    writer = _Writer(buffer)
    handlers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "write": writer.write,
        "commit": writer.commit,
    }
    with connection.makefile("rwb") as file:
        for line in file:
            request = json.loads(line)
            try:
                answer = handlers[request["kind"]](request)
            except OSError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            file.write(json.dumps(answer).encode() + b"\n")
            file.flush()


def main(arguments: list[str]) -> None:
    """Serve the trainer that started this process."""
    socket_fd, buffer_fd, size = map(int, arguments)
    # A stop signal of the launcher is meant for the trainer, which waits for this process.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    os.nice(NICENESS)
    buffer = memoryview(mmap.mmap(buffer_fd, size))
    with suppress(ConnectionError):  # the trainer has died
        serve(socket.socket(fileno=socket_fd), buffer)


if __name__ == "__main__":
    main(sys.argv[1:])
