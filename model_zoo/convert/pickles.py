"""torch's .pt files, read safely and written lazily: plain containers and tensors that stay on disk.

A pickle can run any code. Only what torch's own weights-only unpickler knows and `HARMLESS` below is let in; those
classes are stood in for and forgotten, since a converter needs weights alone.
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
    """Takes the place of an object that is of no use here."""

    def __init__(self, *_values: Any, **_named: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


# What SAT and DeepSpeed put beside the weights: command lines and states of random generators.
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


def read_pickle(path: Path, allowed: Mapping[str, Any] | None = None) -> Any:
    """What `torch.save` wrote into `path`, with `Stored` in the place of tensors, so nothing large is read.

    `allowed` (dotted class -> what stands in for it) widens the allow-list. Raises ConversionError that names
    the foreign types of a file that holds others.
    """
    _check_exists(path)
    lazy = zipfile.is_zipfile(path)
    with _allow_list(path, str(path), _with_harmless(allowed or {})):
        if (
            not lazy
        ):  # the format of before torch 1.6: in memory, since its tensors cannot be found by offset
            return torch.load(path, map_location="cpu", weights_only=True)
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    return replace_leaves(
        content, lambda leaf: _stored(leaf, path) if isinstance(leaf, FakeTensor) else leaf
    )


def load_pickle(path: Path, allowed: Mapping[str, Any], map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote into `path`, tensors in memory: for engines that read their own files.

    `allowed` and errors are those of `read_pickle`; `map_location` is that of `torch.load`.
    """
    _check_exists(path)
    with _allow_list(path, str(path), _with_harmless(allowed)):
        return torch.load(path, map_location=map_location, weights_only=True)


def check_pickle(content: io.BytesIO, what: str) -> None:
    """Raises ConversionError if `content`, written by `torch.save`, holds more than tensors and plain containers.

    Leaves `content` at its start. `what` names it in the message.
    """
    with _allow_list(content, what, {"_io.BytesIO": io.BytesIO}):
        torch.load(content, map_location="cpu", weights_only=True)
    content.seek(0)


class _PlainUnpickler(pickle.Unpickler):
    """Knows no classes and functions at all."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def check_plain_pickle(content: bytes, what: str) -> None:
    """Raises ConversionError if `content`, written by `pickle.dump`, holds more than plain containers.

    `what` names it in the message.
    """
    try:
        _PlainUnpickler(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{what} is refused: beside plain containers it holds {_first_line(error)}, and unpickling a foreign "
            "type can run any code"
        ) from None
    except (EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConversionError(f"{what} is damaged: {_first_line(error)}") from None


def _with_harmless(allowed: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(HARMLESS, IgnoredObject), **allowed}


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ConversionError(f"{path} does not exist")
    refuse_lfs_pointer(path)


@contextlib.contextmanager
def _allow_list(source: Path | io.BytesIO, what: str, known: Mapping[str, Any]) -> Iterator[None]:
    """Limits `torch.load(source, weights_only=True)` to tensors, plain containers and `known`. Raises ConversionError."""
    try:
        with _only_these([(stand_in, name) for name, stand_in in known.items()]):
            yield
    except pickle.UnpicklingError as error:
        foreign = _foreign(source, set(known), str(error))
        raise ConversionError(
            f"{what} is refused: beside tensors and plain containers it holds {', '.join(foreign) or _first_line(error)}, and "
            f"unpickling a foreign type can run any code. If you trust the file, save its weights alone as .safetensors"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # whatever the bytes led to
        raise ConversionError(f"{what} is damaged: {_first_line(error)}") from None


@contextlib.contextmanager
def _only_these(stand_ins: list[tuple[Any, str]]) -> Iterator[None]:
    """Unpickling knows these stand-ins alone: what other libraries allowed in this process would win over them."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(stand_ins):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def tensors_of(content: Mapping[str, Any]) -> LazyTensors:
    """The tensors of a mapping that `read_pickle` gave; entries of None and anything else are passed over."""
    stored = {name: value for name, value in content.items() if isinstance(value, Stored)}
    memory = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    meta = {
        name: value.meta if isinstance(value, Stored) else value.to("meta")
        for name, value in content.items()
        if isinstance(value, Stored | Tensor)
    }
    return LazyTensors(meta, lambda name: stored[name].read() if name in stored else memory[name])


def write_pickle(
    path: Path,
    tensors: LazyTensors,
    content: Callable[[Mapping[str, Tensor]], Any],
    progress: ProgressCallback | None = None,
    foreign: Mapping[str, type] | None = None,
) -> None:
    """`torch.save(content(tensors), path)`, one tensor in memory at a time, or one stretch of it.

    `content` puts the tensors into the containers of the file; it gets stand-ins, whose bytes are filled in after.
    Instances of the classes in `foreign` (dotted class -> what stands in for it) are written as that class's.
    """
    with FakeTensorMode():
        stand_ins = {
            name: torch.empty(meta.shape, dtype=meta.dtype) for name, meta in tensors.meta.items()
        }
        empty = content(stand_ins)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, file, pickle_module=_writer(foreign or {}))
        file.flush()
        with (
            FakeTensorMode(),
            _only_these([(stand_in, name) for name, stand_in in (foreign or {}).items()]),
        ):
            reread = torch.load(file.name, map_location="cpu", weights_only=True)
        places = [leaf for leaf in _leaves(reread) if isinstance(leaf, FakeTensor)]
        order = {id(leaf): place for leaf, place in zip(_fakes(empty), places, strict=True)}
        for name, stretches in with_progress(tensors, progress):
            file.seek(order[id(stand_ins[name])].untyped_storage()._checkpoint_offset)
            for stretch in stretches:
                file.write(byte_view(stretch))
                del stretch  # before the next one is read
        file.seek(0, 2)


def _writer(foreign: Mapping[str, type]) -> types.ModuleType:
    """A pickle module for torch.save. Python's own pickler, since C's imports a class before it writes its name."""
    names = {stand_in: name for name, stand_in in foreign.items()}

    class Pickler(pickle._Pickler):
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if obj not in names:
                super().save_global(obj, name)
                return
            module, _, attribute = names[obj].rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            self.memoize(obj)

    module = types.ModuleType("pickle_with_foreign_names")
    module.Pickler = Pickler
    return module


def _stored(fake: FakeTensor, path: Path) -> Stored:
    stride = None if fake.is_contiguous() and fake.storage_offset() == 0 else tuple(fake.stride())
    return Stored(
        path,
        fake.untyped_storage()._checkpoint_offset,
        fake.dtype,
        tuple(fake.shape),
        stride,
        fake.storage_offset(),
    )


def replace_leaves(node: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers with other leaves; a torch.Size is a leaf."""
    if isinstance(node, Mapping):
        return {key: replace_leaves(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple) and not isinstance(node, torch.Size):
        return (
            type(node)(replace_leaves(value, change) for value in node)
            if type(node) in (list, tuple)
            else node
        )
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


def _fakes(node: Any) -> list[FakeTensor]:
    return [leaf for leaf in _leaves(node) if isinstance(leaf, FakeTensor)]


def _foreign(source: Path | io.BytesIO, known: set[str], error: str) -> list[str]:
    """Names of the types that are not `known`; of a file of before torch 1.6 the first one, from torch's message."""
    if not zipfile.is_zipfile(source):
        return re.findall(r"GLOBAL ([\w.]+)", error)[:1]
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(source)) - known)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
