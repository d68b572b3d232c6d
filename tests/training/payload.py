"""Checkpoints that try to run code when they are unpickled, with a list of files that fits them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from landiff.configs.files import write_text
from landiff.training.checkpoint.files import FileList, describe_file, list_files
from landiff.training.checkpoint.run_folder import FILES

MARK = "hacked"  # the file in the working directory that exists once a payload ran


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARK}",)


def as_global(module: str, name: str) -> bytes:
    """Opcodes that push `module.name`; a dotted name reaches into what a module imports."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return words + b"\x93"


def called(function: bytes, argument: bytes) -> bytes:
    """Opcodes that push function(argument)."""
    return function + argument + b"\x85R"


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


COMMAND = text(f"touch {MARK}")
CORE = "megatron.core.dist_checkpointing.strategies.common"
PAYLOADS: dict[str, bytes] = {
    "a function": pickle.dumps(Payload()),
    # by way of modules whose classes occur in real files
    "through a module": b"\x80\x04" + called(as_global(CORE, "torch.os.system"), COMMAND) + b".",
    "through an attribute": b"\x80\x04"
    + called(
        called(
            called(as_global("pathlib", "attrgetter"), text("system")), as_global("pathlib", "os")
        ),
        COMMAND,
    )
    + b".",
}


def with_payload(path: Path) -> None:
    """Add a payload to what `torch.save` wrote into `path`."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    torch.save({**content, "extra": Payload()}, path)


def list_again(checkpoint: Path) -> None:
    """Recompute files.json, as anybody can who gives a run folder away."""
    entries = [describe_file(checkpoint, name) for name in list_files(checkpoint) if name != FILES]
    write_text(checkpoint / FILES, FileList(files=entries).model_dump_json())
