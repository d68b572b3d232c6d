"""Folders of torch.distributed.checkpoint, read and written without a process group.

The pickle `.metadata` says which byte range of which `*.distcp` file holds which part of which
tensor. torch itself would unpickle anything in it; here, only the classes of the format are
allowed. Tensors are read part by part.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
from landiff.model_zoo.convert.lazy import (
    LazyTensors,
    ProgressCallback,
    Stored,
    megabytes,
    trim_memory,
)
from landiff.model_zoo.convert.pickles import IgnoredObject, stored_at, write_pickle
from landiff.model_zoo.convert.rules import ConversionError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

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
# The path that the checkpoint was written to, and additional data of Megatron.
IGNORED = re.compile(r"pathlib(\._local)?\.\w+|megatron\.core\.dist_checkpointing\.[\w.]+")


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes of the format."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """The class, a placeholder for an ignored one, or ConversionError."""
        if name in KNOWN.get(module, ()):
            return super().find_class(module, name)
        if IGNORED.fullmatch(f"{module}.{name}"):
            return IgnoredObject
        raise ConversionError(
            f"{self.path} is refused: it holds {module}.{name}, which does not belong to this "
            "format, and unpickling an unknown type can run arbitrary code"
        )


def read_metadata(folder: Path) -> Metadata:
    """Unpickle `.metadata` of a checkpoint folder with the allow-list.

    Objects that are not needed (paths, data of Megatron) become `IgnoredObject`. Raises
    ConversionError.
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
    """Reads tensors of a checkpoint folder: whole, a box, or one layer of a stacked tensor."""

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        """Read the metadata, if they are not given.

        Raises ConversionError if `folder` is no such checkpoint.
        """
        metadata = metadata or read_metadata(folder)
        self.folder = folder
        self.places = metadata.storage_data
        self.entries: dict[str, TensorStorageMetadata] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.entries[key] = entry

    def meta(self, key: str) -> Tensor:
        """Shape and dtype of a tensor, as a tensor on the meta device."""
        entry = self.entries[key]
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Read a tensor, or only `layer` of a tensor that stacks all layers in dim 0."""
        entry = self.entries[key]
        shape = entry.size if layer is None else entry.size[1:]
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        done = 0
        for chunk in entry.chunks:
            offsets = chunk.offsets
            sizes = chunk.sizes
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            part = self._read_chunk(MetadataIndex(key, chunk.offsets))
            self._check_shape(key, part.shape, sizes)
            if layer is not None:
                part = part[layer - offsets[0]]
                offsets = offsets[1:]
                sizes = sizes[1:]
            if sizes == shape:
                return part.clone() if layer is not None else part
            ranges = zip(offsets, sizes, strict=True)
            whole[tuple(slice(start, start + size) for start, size in ranges)] = part
            done += part.numel()
        self._check_complete(key, done, whole)
        return whole

    def read_box(self, key: str, offsets: Sequence[int], target: Tensor) -> None:
        """Read into `target` the box of its shape that begins at `offsets` of a tensor.

        Of a stored part that is partly in the box, the rows that it shares with the box are read.
        Raises ConversionError if the box is not stored completely.
        """
        done = 0
        for chunk in self.entries[key].chunks:
            shared = _overlap(chunk, offsets, target.shape)
            if shared is None:
                continue
            begin, sizes = shared
            if sizes == tuple(chunk.sizes):
                part = self._read_chunk(MetadataIndex(key, chunk.offsets))
                self._check_shape(key, part.shape, chunk.sizes)
            else:
                first = [low - start for low, start in zip(begin, chunk.offsets, strict=True)]
                part = self._read_rows(key, chunk, first, sizes)
            where = []
            for low, start, size in zip(begin, offsets, sizes, strict=True):
                where.append(slice(low - start, low - start + size))
            target[tuple(where)] = part
            done += part.numel()
        self._check_complete(key, done, target)

    def _read_rows(
        self, key: str, chunk: ChunkStorageMetadata, first: Sequence[int], sizes: Sequence[int]
    ) -> Tensor:
        """Read the box of `sizes` that begins at `first` of a stored part.

        Rows are those of the first dimension in which the box has more than one element.
        """
        stored = self._stored_chunk(MetadataIndex(key, chunk.offsets))
        self._check_shape(key, stored.shape, chunk.sizes)
        axis = 0
        while axis < len(sizes) - 1 and sizes[axis] == 1:
            axis += 1
        strides = stored.meta.stride()
        start = 0
        for index, stride in zip(first[: axis + 1], strides, strict=False):
            start += index * stride
        rows = stored.part(start, sizes[axis] * strides[axis])
        part = rows.view(*sizes[: axis + 1], *stored.shape[axis + 1 :])
        for dim in range(axis + 1, len(sizes)):
            part = part.narrow(dim, first[dim], sizes[dim])
        return part

    def _check_shape(self, key: str, found: Sequence[int], expected: Sequence[int]) -> None:
        """Raise ConversionError if a stored part has another shape than the metadata say."""
        if tuple(found) != tuple(expected):
            raise ConversionError(
                f"{self.folder}: a part of {key} has the shape {tuple(found)} instead of "
                f"{tuple(expected)}; it is damaged"
            )

    def _check_complete(self, key: str, done: int, whole: Tensor) -> None:
        """Raise ConversionError if `done` elements do not fill a tensor."""
        if done != whole.numel():
            raise ConversionError(
                f"{self.folder} holds {done} of the {whole.numel()} elements of {key}; it is "
                "damaged"
            )

    def _read_chunk(self, index: MetadataIndex) -> Tensor:
        """Read one stored part of a tensor."""
        return self._open_chunk(index)[0]

    def _stored_chunk(self, index: MetadataIndex) -> Stored:
        """Where one stored part of a tensor is."""
        with FakeTensorMode():
            fake, place = self._open_chunk(index)
        assert isinstance(fake, FakeTensor), index
        inner = stored_at(fake, self.folder / place.relative_path)
        return replace(inner, start=place.offset + inner.start)

    def _open_chunk(self, index: MetadataIndex) -> tuple[Tensor, _StorageInfo]:
        """One stored part of a tensor as torch loads it, and its place."""
        place = self.places.get(index)
        if place is None:
            raise ConversionError(
                f"{self.folder / METADATA} has no location for {index.fqn}; it is damaged"
            )
        path = self.folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            transforms = ", ".join(place.transform_descriptors)
            raise ConversionError(
                f"{path} is compressed ({transforms}), which is not supported; save it uncompressed"
            )
        try:
            with open(path, "rb", buffering=0) as file:
                window: Any = _Window(file, place.offset, place.length)
                return torch.load(window, map_location="cpu", weights_only=True), place
        except FileNotFoundError:
            raise ConversionError(f"{path} is missing: the checkpoint is incomplete") from None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConversionError(
                f"{path} is damaged at {index.fqn}: {str(error).splitlines()[0]}"
            ) from None


def _overlap(
    chunk: ChunkStorageMetadata, offsets: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and sizes of what a stored part shares with a box. None if it is nothing."""
    begin = []
    sizes = []
    for start, size, other, other_size in zip(
        chunk.offsets, chunk.sizes, offsets, shape, strict=True
    ):
        low = max(start, other)
        high = min(start + size, other + other_size)
        if low >= high:
            return None
        begin.append(low)
        sizes.append(high - low)
    return tuple(begin), tuple(sizes)


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self.file = file
        self.start = start
        self.length = length
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

    def readinto(self, buffer: WriteableBuffer) -> int:
        remaining = max(0, self.length - self.tell())
        return self.file.readinto(memoryview(buffer)[:remaining])


def write_dist(
    folder: Path,
    tensors: LazyTensors,
    objects: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> None:
    """Write whole tensors, which load into any parallel layout, and small objects.

    Each tensor gets a file of its own, which is filled while it is computed. torch's own writer
    would hold several tensors in memory and wraps every exception that interrupts it.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    objects_file = "__0_0.distcp"
    with atomic_file(folder / objects_file) as file:
        for key, value in objects.items():
            start = file.tell()
            buffer = io.BytesIO()
            torch.save(value, buffer)
            file.write(buffer.getbuffer())
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(objects_file, start, file.tell() - start)
    done = 0
    if progress is not None:
        progress(*megabytes(done, tensors.num_bytes))
    for number, (key, meta) in enumerate(tensors.meta.items(), 1):
        path = folder / f"__0_{number}.distcp"
        only_this = LazyTensors({key: meta}, tensors.read, tensors.pieces)
        write_pickle(path, only_this, _content_of(key))
        offsets = torch.Size([0] * meta.ndim)
        chunk = ChunkStorageMetadata(offsets, meta.shape)
        properties = TensorProperties(dtype=meta.dtype)
        entries[key] = TensorStorageMetadata(properties, meta.shape, [chunk])
        places[MetadataIndex(key, offsets)] = _StorageInfo(path.name, 0, path.stat().st_size)
        before = done
        done += meta.numel() * meta.itemsize
        trim_memory(before, done)
        if progress is not None:
            progress(*megabytes(done, tensors.num_bytes))
    with atomic_file(folder / METADATA) as file:
        pickle.dump(Metadata(entries, storage_data=places, version="1.0.0"), file)


def _content_of(key: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The content of a file that holds the single tensor `key`."""
    return lambda tensors: tensors[key]
