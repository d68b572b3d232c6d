"""Mappings of tensors that are read on access, and safetensors files read and written with them.

A conversion is a chain of mappings from names to tensors. Each of them knows all names, shapes and
dtypes (as tensors on the meta device) before anything is read. All problems are therefore reported
before the first byte is written, and memory holds at most one group of a rule: the source tensors
and the target tensors of one application.
"""

from __future__ import annotations

import ctypes
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from landiff.configs.documents import DocumentError, read_json
from landiff.configs.files import atomic_file, is_lfs_pointer
from landiff.configs.safetensors_header import read_header
from landiff.model_zoo.convert.rules import (
    ConversionError,
    Direction,
    Group,
    Rule,
    format_mismatch,
    rule_groups,
)
from landiff.model_zoo.health import require_finite
from landiff.model_zoo.sample.placement.quantized import refuse_quantized

# Called with (megabytes done, total megabytes[, what is being done]); 0 done starts a new count.
ProgressCallback = Callable[..., None]

# Names of dtypes in safetensors files. The numbers in these files are little-endian, as on every
# machine that torch supports.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
}
# The index of sharded weights: NAME.index.json, or NAME.index.VARIANT.json.
INDEX = re.compile(r"\.index(\.\w+)?\.json$")
MEGABYTE = 1 << 20
TRIM_EVERY = 64 * MEGABYTE


@dataclass(frozen=True)
class LazyTensors(Mapping[str, Tensor]):
    """Mapping from names to tensors that are read on access and not cached."""

    meta: Mapping[str, Tensor]  # shape and dtype of each tensor, on the meta device
    read: Callable[[str], Tensor]
    # Returns all elements of a tensor in order, in several parts. None: tensors are read whole.
    pieces: Callable[[str], Iterator[Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """Read the tensor `name`."""
        if name not in self.meta:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor `name`. Mapping's own method would read it."""
        return name in self.meta

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.meta)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.meta)

    def stretches(self, name: str) -> Iterator[Tensor]:
        """All elements of a tensor in order: in parts if `pieces` is set, else as one tensor."""
        if self.pieces is None:
            yield self[name]
        else:
            yield from self.pieces(name)

    @property
    def num_bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.meta.values())

    @property
    def num_elements(self) -> int:
        """Total number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self.meta.values())

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> LazyTensors:
        """Wrap tensors that are already in memory. Raises ConfigError for quantized ones."""
        refuse_quantized(tensors, "saved or exported")
        meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return LazyTensors(meta, tensors.__getitem__)

    def only(self, keep: Callable[[str], bool]) -> LazyTensors:
        """The tensors whose names satisfy `keep`."""
        meta = {name: meta for name, meta in self.meta.items() if keep(name)}
        return LazyTensors(meta, self.read, self.pieces)

    def renamed(self, rename: Callable[[str], str]) -> LazyTensors:
        """The same tensors under new names."""
        old_names = {rename(name): name for name in self.meta}
        return LazyTensors(
            {new: self.meta[old] for new, old in old_names.items()},
            lambda new: self.read(old_names[new]),
            self.pieces and (lambda new: self.stretches(old_names[new])),
        )

    def with_prefix(self, prefix: str) -> LazyTensors:
        """The same tensors with `prefix` before each name."""
        return self.renamed(lambda name: prefix + name)

    def without_prefix(self, prefix: str) -> LazyTensors:
        """The tensors whose names start with `prefix`, without it."""
        matching = self.only(lambda name: name.startswith(prefix))
        return matching.renamed(lambda name: name.removeprefix(prefix))

    def joined(self, other: LazyTensors) -> LazyTensors:
        """The tensors of both mappings. `other` takes precedence for names that are in both."""

        def holder(name: str) -> LazyTensors:
            return other if name in other.meta else self

        return LazyTensors(
            {**self.meta, **other.meta},
            lambda name: holder(name).read(name),
            (self.pieces or other.pieces) and (lambda name: holder(name).stretches(name)),
        )

    def cast(self, dtype: torch.dtype | None) -> LazyTensors:
        """The same tensors, floating-point ones in `dtype`. None keeps all dtypes."""
        if dtype is None:
            return self
        meta = dict(self.meta)
        for name, tensor in self.meta.items():
            if tensor.is_floating_point():
                meta[name] = tensor.to(dtype)

        def read(name: str) -> Tensor:
            return self.read(name).to(meta[name].dtype)

        def pieces(name: str) -> Iterator[Tensor]:
            return (stretch.to(meta[name].dtype) for stretch in self.stretches(name))

        return LazyTensors(meta, read, self.pieces and pieces)

    def checked(self, what: str) -> LazyTensors:
        """The same tensors. Reading NaN or infinity raises UnhealthyError with the name."""

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            require_finite([(name, tensor)], what)
            return tensor

        def pieces(name: str) -> Iterator[Tensor]:
            for stretch in self.stretches(name):
                require_finite([(name, stretch)], what)
                yield stretch
                del stretch  # frees it before the next one is read

        return LazyTensors(self.meta, read, self.pieces and pieces)

    def dtype(self) -> torch.dtype:
        """The dtype of most elements; float32 without any."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.meta.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=counts.__getitem__, default=torch.float32)


def converted(state: LazyTensors, rules: Sequence[Rule], direction: Direction) -> LazyTensors:
    """Lazy version of `rules.apply_rules`: nothing is read until a tensor is accessed.

    Tensors of one group share one read if they are accessed one after the other. Raises
    ConversionError at once for keys that the rules do not match.
    """
    meta: dict[str, Tensor] = {}
    group_of: dict[str, Group] = {}
    for group in rule_groups(state, rules, direction):
        changed = group.apply([state.meta[name] for name in group.sources])
        for target, tensor in zip(group.targets, changed, strict=True):
            meta[target] = tensor
            group_of[target] = group
    reader = _GroupReader(state, group_of)

    def read(name: str) -> Tensor:
        tensor = reader.take(name)
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize:
            return tensor.clone()  # a view would keep the whole source tensor in memory
        return tensor

    def pieces(name: str) -> Iterator[Tensor]:
        if group_of[name].end_to_end:
            for source in group_of[name].sources:
                yield from state.stretches(source)
        else:
            yield reader.take(name)

    return LazyTensors(meta, read, pieces)


class _GroupReader:
    """Computes the tensors of the group that was accessed last, and returns each of them once.

    Accessing the tensors of a group in sequence therefore reads its sources only once.
    """

    def __init__(self, state: LazyTensors, group_of: Mapping[str, Group]) -> None:
        self.state = state
        self.group_of = group_of
        self.waiting: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor `name`, which is not kept here afterwards."""
        if name not in self.waiting:
            group = self.group_of[name]
            self.waiting = {}  # frees the previous group before this one is read
            changed = group.apply([self.state.read(source) for source in group.sources])
            self.waiting = dict(zip(group.targets, changed, strict=True))
        return self.waiting.pop(name)


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Stored:
    """Location of a tensor's bytes in a file."""

    path: Path
    start: int  # byte offset of the storage in the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # None: contiguous
    offset: int = 0  # of the first element in the storage, in elements

    def read(self) -> Tensor:
        """Read the tensor, and nothing else of the file.

        Raises ConversionError for a file that is too short.
        """
        numel = torch.Size(self.shape).numel()
        extent = numel  # number of elements between the first and the last, inclusive
        if self.stride is not None and numel:
            dims = zip(self.shape, self.stride, strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in dims)
        flat = torch.empty(extent, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + self.offset * flat.itemsize)
            _read_fully(file, byte_view(flat), self.path)
        if self.stride is None or not numel:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor.

        Only these are read if the tensor is contiguous.
        """
        if self.stride is not None and self.stride != self.meta.stride():
            return self.read().reshape(-1)[start : start + numel].clone()
        return replace(self, shape=(numel,), stride=None, offset=self.offset + start).read()

    @property
    def meta(self) -> Tensor:
        """Shape and dtype, as a tensor on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_fully(file: io.FileIO, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise ConversionError(f"{path} ends {len(target) - done} bytes early; it is damaged")
        done += count


def quantised_error(what: str, example: str) -> ConversionError:
    """The error for quantised weights; `example` shows how they were recognised."""
    return ConversionError(
        f"{what} holds quantised weights, such as {example}. They have lost precision and are not "
        "converted; convert the original in float32, bfloat16 or float16"
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ConversionError for a git-lfs pointer file."""
    if is_lfs_pointer(path):
        raise ConversionError(
            f"{path} is a git-lfs pointer, not weights: run `git lfs pull` in its repository, or "
            "download the file"
        )


def stored_tensors(stored: Mapping[str, Stored]) -> LazyTensors:
    """Tensors at known locations in files."""
    meta = {name: location.meta for name, location in stored.items()}
    return LazyTensors(meta, lambda name: stored[name].read())


def read_safetensors(path: Path) -> LazyTensors:
    """The tensors of a .safetensors file, or of all files in a .safetensors.index.json.

    Only headers are read here. Raises ConversionError.
    """
    refuse_lfs_pointer(path)
    if INDEX.search(path.name):
        return _read_index(path)
    try:
        header = read_header(path)
    except DocumentError as error:
        raise ConversionError(str(error)) from None
    stored = {}
    for name, entry in header.entries.items():
        if entry.dtype not in DTYPES:
            raise quantised_error(str(path), f"{name} ({entry.dtype})")
        start = header.data_start + entry.begin
        stored[name] = Stored(path, start, DTYPES[entry.dtype], entry.shape)
    return stored_tensors(stored)


def load_safetensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Load all tensors of a .safetensors file into memory. Raises ConversionError, OSError."""
    read_safetensors(path)  # reports damaged and quantised files with a better message
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ConversionError(f"{path} is a damaged safetensors file: {error}") from None


def _read_index(path: Path) -> LazyTensors:
    """The tensors that an index lists. Raises ConversionError if it contradicts its files."""
    try:
        index = read_json(path)
    except DocumentError as error:
        raise ConversionError(
            f"{path} is not an index of .safetensors files, or a damaged one: {error}"
        ) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{path} is not an index of .safetensors files: it has no weight_map")
    file_of = {name: str(file) for name, file in weight_map.items()}
    existing = {other.name for other in path.parent.iterdir() if other.is_file()}
    shards = {}
    for file in sorted(set(file_of.values())):
        if file not in existing:
            raise ConversionError(f"{path} names the file {file!r}, which is not in its folder")
        shards[file] = read_safetensors(path.with_name(file))
    problems: dict[str, list[str]] = {"missing": [], "unexpected": []}
    for name, file in file_of.items():
        if name not in shards[file]:
            problems["missing"].append(f"{name} in {file}")
    found = {}
    for file, shard in shards.items():
        found.update(dict.fromkeys(shard, file))
    for name, file in found.items():
        if name not in file_of:
            problems["unexpected"].append(f"{name} in {file}")
    if any(problems.values()):
        raise ConversionError(f"{path} and its files do not agree:\n{format_mismatch(problems)}")
    return LazyTensors(
        {name: shards[file].meta[name] for name, file in file_of.items()},
        lambda name: shards[file_of[name]].read(name),
    )


def write_safetensors(
    path: Path,
    tensors: LazyTensors,
    metadata: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a .safetensors file, one tensor in memory at a time.

    The tensors are read in the order of `tensors`. The file is byte for byte what
    `safetensors.torch.save_file` writes.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0

    def by_size_and_name(name: str) -> tuple[int, str]:
        return -tensors.meta[name].itemsize, name

    for name in sorted(tensors, key=by_size_and_name):  # large elements first: all are aligned
        meta = tensors.meta[name]
        starts[name] = end
        end += meta.numel() * meta.itemsize
        header[name] = {
            "dtype": dtype_names[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, stretches in with_progress(tensors, progress):
            file.seek(8 + len(text) + starts[name])
            for stretch in stretches:
                file.write(byte_view(stretch))
                del stretch  # frees it before the next one is read
        file.truncate(8 + len(text) + end)


def with_progress(
    tensors: LazyTensors, progress: ProgressCallback | None = None
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Iterate over (name, contiguous CPU parts of the tensor) and report progress.

    Asserts that the parts have the announced dtype and number of elements.
    """
    total = tensors.num_bytes
    done = 0

    def checked(name: str, meta: Tensor) -> Iterator[Tensor]:
        remaining = meta.numel()
        for stretch in tensors.stretches(name):
            assert stretch.dtype == meta.dtype, (name, stretch.dtype, meta)
            remaining -= stretch.numel()
            yield stretch.detach().cpu().contiguous()
            del stretch
        assert not remaining, (name, meta.shape, remaining)

    if progress is not None:
        progress(*megabytes(done, total))
    for name, meta in tensors.meta.items():
        yield name, checked(name, meta)
        before = done
        done += meta.numel() * meta.itemsize
        trim_memory(before, done)
        if progress is not None:
            progress(*megabytes(done, total))


def trim_memory(before: int, done: int) -> None:
    """Return free memory to the system once for every 64 MB between two byte counts.

    Thousands of tensors of a few MB with small objects in between fragment the heap otherwise: the
    process kept 2.1 GB after a conversion of 4 GB.
    """
    if before // TRIM_EVERY != done // TRIM_EVERY:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)


def megabytes(done: int, total: int) -> tuple[int, int]:
    """Byte counts in megabytes for a ProgressCallback.

    The total is rounded up and `done` down. They are equal only when everything is done.
    """
    whole = -(-total // MEGABYTE)
    if done >= total:
        return whole, whole
    return done // MEGABYTE, whole
