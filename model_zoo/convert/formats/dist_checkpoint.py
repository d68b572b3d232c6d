"""Folders of torch.distributed.checkpoint (`.metadata`, `*.distcp`), read and written without a process group.

`.metadata` is a pickle that says which stretch of which file holds which part of which tensor; torch itself would unpickle
whatever it holds. Here only the classes of the format are let in, and tensors are read part by part.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from landiff.configs.files import atomic_file
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, give_back, megabytes
from landiff.model_zoo.convert.pickles import IgnoredObject, write_pickle
from landiff.model_zoo.convert.rules import ConversionError

METADATA = ".metadata"
DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": DTYPES | {"Size", "device"},
    "collections": {"OrderedDict"},
}
PASSED_OVER = re.compile(
    r"pathlib(\._local)?\.\w+|megatron\.core\.dist_checkpointing\.[\w.]+"
)  # where it was written; Megatron's notes


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        if PASSED_OVER.fullmatch(f"{module}.{name}"):
            return IgnoredObject
        raise ConversionError(
            f"{self.path} is refused: it holds {module}.{name}, which no checkpoint of this format does, and "
            "unpickling a foreign type can run any code"
        )


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a checkpoint folder, unpickled with the allow-list. Raises ConversionError.

    Objects that are of no use here (paths, Megatron's own notes) come back as `IgnoredObject`.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ConversionError(f"{folder} is not a Megatron checkpoint: it has no {METADATA}")
    try:
        with open(path, "rb") as file:
            found = _MetadataUnpickler(file, path).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        raise ConversionError(f"{path} is damaged: {error!r}") from None
    if not isinstance(found, Metadata):
        raise ConversionError(f"{path} is damaged: it holds a {type(found).__name__}")
    return found


class DistReader:
    """Tensors of a folder, whole or one of a stack."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError where `folder` is no such checkpoint."""
        self.folder, found = folder, read_metadata(folder)
        self.places = found.storage_data
        self.entries = {
            key: entry
            for key, entry in found.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def meta(self, key: str) -> Tensor:
        entry = self.entries[key]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The tensor; with `layer` that one of the stack that it is, and no other layer is read."""
        entry = self.entries[key]
        shape = entry.size if layer is None else entry.size[1:]
        whole, done = torch.empty(shape, dtype=entry.properties.dtype), 0
        for chunk in entry.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            part = self._part(MetadataIndex(key, chunk.offsets))
            if part.shape != sizes:
                raise ConversionError(
                    f"{self.folder}: a part of {key} has the shape {tuple(part.shape)} instead of {tuple(sizes)}; it is damaged"
                )
            if layer is not None:
                part, offsets, sizes = part[layer - offsets[0]], offsets[1:], sizes[1:]
            if sizes == shape:
                return part.clone() if layer is not None else part
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = part
            done += part.numel()
        if done != whole.numel():
            raise ConversionError(
                f"{self.folder} holds {done} of the {whole.numel()} elements of {key}; it is damaged"
            )
        return whole

    def _part(self, index: MetadataIndex) -> Tensor:
        place = self.places.get(index)
        if place is None:
            raise ConversionError(
                f"{self.folder / METADATA} does not say where {index.fqn} lies; it is damaged"
            )
        path = self.folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            raise ConversionError(
                f"{path} is compressed ({', '.join(place.transform_descriptors)}), which is not read here; save it without"
            )
        try:
            with open(path, "rb", buffering=0) as file:
                return torch.load(
                    _Window(file, place.offset, place.length), map_location="cpu", weights_only=True
                )
        except FileNotFoundError:
            raise ConversionError(f"{path} is missing: the checkpoint is not whole") from None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConversionError(
                f"{path} is damaged where {index.fqn} lies: {str(error).splitlines()[0]}"
            ) from None


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self.file, self.start, self.length = file, start, length
        file.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell() - self.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.length}[whence]
        return self.file.seek(self.start + base + offset) - self.start

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(memoryview(buffer)[: max(0, self.length - self.tell())])


def write_dist(
    folder: Path,
    tensors: LazyTensors,
    objects: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> None:
    """Whole tensors, for any layout to load, and small objects beside them.

    A file for each tensor, filled as it is made. torch's own writer would hold several at a time, and wraps whatever interrupts it.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    first = "__0_0.distcp"
    with atomic_file(folder / first) as file:
        for key, value in objects.items():
            start = file.tell()
            torch.save(value, buffer := io.BytesIO())
            file.write(buffer.getbuffer())
            entries[key], places[MetadataIndex(key)] = (
                BytesStorageMetadata(),
                _StorageInfo(first, start, file.tell() - start),
            )
    done = 0
    if progress is not None:
        progress(*megabytes(done, tensors.num_bytes))
    for number, (key, meta) in enumerate(tensors.meta.items(), 1):
        path = folder / f"__0_{number}.distcp"
        write_pickle(
            path,
            LazyTensors({key: meta}, tensors.read, tensors.pieces),
            lambda fakes, key=key: fakes[key],
        )
        start = torch.Size([0] * meta.ndim)
        entries[key] = TensorStorageMetadata(
            TensorProperties(dtype=meta.dtype),
            meta.shape,
            [ChunkStorageMetadata(start, meta.shape)],
        )
        places[MetadataIndex(key, start)] = _StorageInfo(path.name, 0, path.stat().st_size)
        before, done = done, done + meta.numel() * meta.itemsize
        give_back(before, done)
        if progress is not None:
            progress(*megabytes(done, tensors.num_bytes))
    with atomic_file(folder / METADATA) as file:
        pickle.dump(Metadata(entries, storage_data=places, version="1.0.0"), file)
