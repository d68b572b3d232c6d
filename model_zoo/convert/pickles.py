"""Safe reading and lazy writing of the .pt files of torch.

Unpickling can run arbitrary code. Only what torch's weights-only unpickler accepts and the classes
in `HARMLESS` are allowed here; instances of the latter are replaced by placeholders, because a
conversion needs only the weights. Tensors stay in the file until they are read.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from landiff.configs.files import atomic_file
from landiff.model_zoo.convert.lazy import (
    LazyTensors,
    ProgressCallback,
    Stored,
    byte_view,
    refuse_lfs_pointer,
    with_progress,
)
from landiff.model_zoo.convert.rules import ConversionError


class IgnoredObject:
    """Placeholder for an unpickled object that conversions do not need."""

    def __init__(self, *_values: Any, **_named: Any) -> None:
        """Ignore all arguments."""

    def __setstate__(self, _state: Any) -> None:
        """Ignore the state."""


# SAT and DeepSpeed store command lines and states of random generators beside the weights.
HARMLESS = (
    "argparse.Namespace",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)

# Errors that the unpickler raises for damaged bytes.
DAMAGE_ERRORS = (EOFError, ValueError, LookupError, AttributeError, TypeError)


def read_pickle(path: Path, allowed: Mapping[str, Any] | None = None) -> Any:
    """The content of a file written by `torch.save`, with `Stored` in place of tensors.

    Files in the format before torch 1.6 are read into memory instead, because the locations of
    their tensors are not known in advance.

    `allowed` (dotted name of a class -> its placeholder) extends the allow-list. Raises
    ConversionError for damaged files and for files with other types, which it names.
    """
    _check_exists(path)
    with _allow_list(path, str(path), _with_harmless(allowed or {})):
        if not zipfile.is_zipfile(path):  # written before torch 1.6
            return torch.load(path, map_location="cpu", weights_only=True)
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)

    def stored(leaf: Any) -> Any:
        return stored_at(leaf, path) if isinstance(leaf, FakeTensor) else leaf

    return replace_leaves(content, stored)


def load_pickle(path: Path, allowed: Mapping[str, Any], map_location: Any = "cpu") -> Any:
    """The content of a file written by `torch.save`, with tensors in memory.

    For engines that read their own checkpoints. `allowed` and the errors are those of
    `read_pickle`; `map_location` is that of `torch.load`.
    """
    _check_exists(path)
    with _allow_list(path, str(path), _with_harmless(allowed)):
        return torch.load(path, map_location=map_location, weights_only=True)


def check_pickle(content: io.BytesIO, what: str) -> None:
    """Check that `content`, written by `torch.save`, holds only tensors and plain containers.

    Rewinds `content`. Raises ConversionError, whose message names it `what`.
    """
    with _allow_list(content, what, {"_io.BytesIO": io.BytesIO}):
        torch.load(content, map_location="cpu", weights_only=True)
    content.seek(0)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that accepts no classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise UnpicklingError with the dotted name."""
        raise pickle.UnpicklingError(f"{module}.{name}")


def check_plain_pickle(content: bytes, what: str) -> None:
    """Check that `content`, written by `pickle.dump`, holds only plain containers.

    Raises ConversionError, whose message names it `what`.
    """
    try:
        _PlainUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{what} is refused: beside plain containers it holds {_first_line(error)}, and "
            "unpickling an unknown type can run arbitrary code"
        ) from None
    except DAMAGE_ERRORS as error:
        raise ConversionError(f"{what} is damaged: {_first_line(error)}") from None


def _with_harmless(allowed: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(HARMLESS, IgnoredObject), **allowed}


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ConversionError(f"{path} does not exist")
    refuse_lfs_pointer(path)


@contextlib.contextmanager
def _allow_list(source: Path | io.BytesIO, what: str, known: Mapping[str, Any]) -> Iterator[None]:
    """Limit `torch.load(source, weights_only=True)` to tensors, plain containers and `known`.

    Raises ConversionError for other types and for damaged files.
    """
    try:
        with _safe_globals(known):
            yield
    except pickle.UnpicklingError as error:
        unknown = ", ".join(_unknown_types(source, set(known), str(error)))
        raise ConversionError(
            f"{what} is refused: beside tensors and plain containers it holds "
            f"{unknown or _first_line(error)}, and unpickling an unknown type can run arbitrary "
            "code. If you trust the file, save its weights alone as .safetensors"
        ) from None
    except (RuntimeError, *DAMAGE_ERRORS) as error:
        raise ConversionError(f"{what} is damaged: {_first_line(error)}") from None


@contextlib.contextmanager
def _safe_globals(placeholders: Mapping[str, Any]) -> Iterator[None]:
    """Make `placeholders` the only classes that torch's weights-only unpickler accepts.

    Classes that other libraries allowed in this process would take precedence over them.
    """
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        allowed: list[Any] = [(placeholder, name) for name, placeholder in placeholders.items()]
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def tensors_of(content: Mapping[str, Any]) -> LazyTensors:
    """The tensors in a mapping returned by `read_pickle`. All other values are ignored."""
    meta: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    in_memory: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Stored):
            stored[name] = value
            meta[name] = value.meta
        elif isinstance(value, Tensor):
            in_memory[name] = value
            meta[name] = value.to("meta")

    def read(name: str) -> Tensor:
        return stored[name].read() if name in stored else in_memory[name]

    return LazyTensors(meta, read)


def write_pickle(
    path: Path,
    tensors: LazyTensors,
    content: Callable[[Mapping[str, Tensor]], Any],
    progress: ProgressCallback | None = None,
    foreign: Mapping[str, type] | None = None,
) -> None:
    """Write what `torch.save(content(tensors), path)` would, with one tensor in memory at a time.

    `content` places tensors into the containers of the file. It is called with fake tensors; their
    bytes are filled in afterwards, part by part for tensors with `pieces`.

    `foreign` maps dotted names of classes to their placeholders: instances of a placeholder are
    written as instances of that class.
    """
    foreign = foreign or {}
    with FakeTensorMode():
        fakes = {}
        for name, meta in tensors.meta.items():
            fakes[name] = torch.empty(meta.shape, dtype=meta.dtype)
        empty = content(fakes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, file, pickle_module=_pickle_module(foreign))
        file.flush()
        # Reading the file back tells where the bytes of each tensor belong.
        with FakeTensorMode(), _safe_globals(foreign):
            reread = torch.load(file.name, map_location="cpu", weights_only=True)
        written = zip(_fake_tensors(empty), _fake_tensors(reread), strict=True)
        location_of = {id(fake): _file_offset(location) for fake, location in written}
        for name, stretches in with_progress(tensors, progress):
            file.seek(location_of[id(fakes[name])])
            for stretch in stretches:
                file.write(byte_view(stretch))
                del stretch  # frees it before the next one is read
        file.seek(0, 2)


def _pickle_module(foreign: Mapping[str, type]) -> types.ModuleType:
    """A pickle module for `torch.save` that writes placeholders under the names of their classes.

    It uses the pickler in Python, because the one in C imports a class before writing its name.
    """
    name_of = {placeholder: name for name, placeholder in foreign.items()}
    python_pickler: Any = pickle._Pickler

    class Pickler(python_pickler):
        """Pickler that replaces the names of placeholders."""

        def save_global(self, obj: Any, name: str | None = None) -> None:
            """Write a reference to a class or function."""
            if obj not in name_of:
                super().save_global(obj, name)
                return
            module, _, attribute = name_of[obj].rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            self.memoize(obj)

    module: Any = types.ModuleType("pickle_with_foreign_names")
    module.Pickler = Pickler
    return module


def stored_at(fake: FakeTensor, path: Path) -> Stored:
    """The location of a fake tensor that was loaded from `path`."""
    offset = int(fake.storage_offset())
    contiguous = fake.is_contiguous() and offset == 0
    return Stored(
        path,
        start=_file_offset(fake),
        dtype=fake.dtype,
        shape=tuple(fake.shape),
        stride=None if contiguous else tuple(fake.stride()),
        offset=offset,
    )


def _file_offset(fake: FakeTensor) -> int:
    """The byte offset of a loaded fake tensor's storage in its file."""
    offset = fake.untyped_storage()._checkpoint_offset
    assert offset is not None, fake
    return offset


def replace_leaves(node: Any, change: Callable[[Any], Any]) -> Any:
    """Copy nested containers with every leaf replaced by `change(leaf)`. A torch.Size is a leaf.

    Other subclasses of list and tuple are kept as they are.
    """
    if isinstance(node, Mapping):
        return {key: replace_leaves(value, change) for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(replace_leaves(value, change) for value in node)
    if isinstance(node, list | tuple) and not isinstance(node, torch.Size):
        return node
    return change(node)


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        for value in node.values():
            yield from _leaves(value)
    elif type(node) in (list, tuple):
        for value in node:
            yield from _leaves(value)
    else:
        yield node


def _fake_tensors(node: Any) -> list[FakeTensor]:
    return [leaf for leaf in _leaves(node) if isinstance(leaf, FakeTensor)]


def _unknown_types(source: Path | io.BytesIO, known: set[str], error: str) -> list[str]:
    """Names of the types in a file that are not `known`.

    Of a file written before torch 1.6, only the first one is known, from torch's message.
    """
    if not zipfile.is_zipfile(source):
        return re.findall(r"GLOBAL ([\w.]+)", error)[:1]
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - known)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
