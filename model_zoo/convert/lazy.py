"""Tensors that stay on disk until somebody asks for one, and files written one tensor at a time.

A conversion is a chain of mappings from names to tensors, each of which knows all names, shapes and dtypes (as
tensors on the meta device) before anything is read. So every problem is reported before the first byte is
written, and memory holds no more than one group of a rule: the parts of one tensor and the tensor.
"""

from __future__ import annotations

import ctypes
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
    Group,
    Rule,
    format_mismatch,
    rule_groups,
)
from landiff.model_zoo.health import require_finite

# (megabytes done, megabytes in all[, what is being done]); 0 done is the start of a count
ProgressCallback = Callable[..., None]

# safetensors' names of dtypes; its files hold little-endian numbers, as all machines do that torch runs on
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
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of sharded weights, with the variant that it lists
MEGABYTE = 1 << 20
TRIM_EVERY = 64 * MEGABYTE


@dataclass(frozen=True)
class LazyTensors(Mapping[str, Tensor]):
    """Names -> tensors, made when asked for and not kept."""

    meta: Mapping[str, Tensor]  # shape and dtype of each, on the meta device
    read: Callable[[str], Tensor]
    pieces: Callable[[str], Iterator[Tensor]] | None = (
        None  # the same in flat stretches, where a whole one is too large
    )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.meta:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.meta

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def stretches(self, name: str) -> Iterator[Tensor]:
        """All elements of a tensor, in order: at once, or stretch by stretch where it has `pieces`."""
        if self.pieces is None:
            yield self[name]
        else:
            yield from self.pieces(name)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in self.meta.values())

    @property
    def num_elements(self) -> int:
        return sum(tensor.numel() for tensor in self.meta.values())

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> LazyTensors:
        """Tensors that are in memory already."""
        return LazyTensors(
            {name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.__getitem__
        )

    def only(self, keep: Callable[[str], bool]) -> LazyTensors:
        return LazyTensors(
            {name: meta for name, meta in self.meta.items() if keep(name)}, self.read, self.pieces
        )

    def renamed(self, rename: Callable[[str], str]) -> LazyTensors:
        names = {rename(name): name for name in self.meta}
        return LazyTensors(
            {new: self.meta[old] for new, old in names.items()},
            lambda new: self.read(names[new]),
            self.pieces and (lambda new: self.stretches(names[new])),
        )

    def with_prefix(self, prefix: str) -> LazyTensors:
        return self.renamed(lambda name: prefix + name)

    def without_prefix(self, prefix: str) -> LazyTensors:
        return self.only(lambda name: name.startswith(prefix)).renamed(
            lambda name: name.removeprefix(prefix)
        )

    def joined(self, other: LazyTensors) -> LazyTensors:
        """Both; where they share a name, the `other`'s."""

        def of(name: str) -> LazyTensors:
            return other if name in other.meta else self

        return LazyTensors(
            {**self.meta, **other.meta},
            lambda name: of(name).read(name),
            (self.pieces or other.pieces) and (lambda name: of(name).stretches(name)),
        )

    def cast(self, dtype: torch.dtype | None) -> LazyTensors:
        """Floating-point tensors in `dtype`; None keeps them as they are."""
        if dtype is None:
            return self
        meta = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.meta.items()
        }
        return LazyTensors(
            meta,
            lambda name: self.read(name).to(meta[name].dtype),
            self.pieces
            and (lambda name: (stretch.to(meta[name].dtype) for stretch in self.stretches(name))),
        )

    def checked(self, what: str) -> LazyTensors:
        """The same, but reading NaN or infinity raises UnhealthyError with the name in `what`."""

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            require_finite([(name, tensor)], what)
            return tensor

        def pieces(name: str) -> Iterator[Tensor]:
            for stretch in self.stretches(name):
                require_finite([(name, stretch)], what)
                yield stretch
                del stretch  # before the next one is read

        return LazyTensors(self.meta, read, self.pieces and pieces)

    def dtype(self) -> torch.dtype:
        """The one that most elements have."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.meta.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=counts.__getitem__, default=torch.float32)


def converted(state: LazyTensors, rules: Sequence[Rule], direction: str) -> LazyTensors:
    """`rules.convert`, but nothing is read before it is asked for. Raises ConversionError at once.

    Tensors of one group come out of one reading when they are asked for one after the other.
    """
    meta: dict[str, Tensor] = {}
    makers: dict[str, Group] = {}
    for group in rule_groups(state, rules, direction):
        changed = group.apply([state.meta[name] for name in group.sources])
        for target, tensor in zip(group.targets, changed, strict=True):
            meta[target], makers[target] = tensor, group
    last = _LastGroup(state, makers)

    def read(name: str) -> Tensor:
        tensor = last(
            name
        )  # may be a part of its source, which nobody who keeps it would want to keep
        return (
            tensor.clone()
            if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize
            else tensor
        )

    def pieces(name: str) -> Iterator[Tensor]:
        if makers[name].end_to_end:
            for source in makers[name].sources:
                yield from state.stretches(source)
        else:
            yield last(name)

    return LazyTensors(meta, read, pieces)


class _LastGroup:
    """Makes a group's tensors and hands each out once, so that neighbours don't read the same source again."""

    def __init__(self, state: LazyTensors, makers: Mapping[str, Group]) -> None:
        self.state, self.makers = state, makers
        self.waiting: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self.waiting:
            group = self.makers[name]
            self.waiting = {}
            changed = group.apply([self.state.read(source) for source in group.sources])
            self.waiting = dict(zip(group.targets, changed, strict=True))
        return self.waiting.pop(name)


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie."""

    path: Path
    start: int  # of the whole storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None  # None: contiguous from the start of the storage
    offset: int = 0  # of the first element, in elements

    def read(self) -> Tensor:
        """A fresh tensor; nothing else of the file enters memory. Raises ConversionError for a file that is too short."""
        extent = (
            1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            if self.stride is not None
            else 0
        )
        numel = torch.Size(self.shape).numel()
        flat = torch.empty(extent if self.stride is not None and numel else numel, dtype=self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + self.offset * flat.itemsize)
            _read_fully(file, byte_view(flat), self.path)
        if self.stride is None or not numel:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.stride).contiguous()

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor; where it is contiguous, nothing else is read."""
        if self.stride is not None and self.stride != self.meta.stride():
            return self.read().reshape(-1)[start : start + numel].clone()
        return replace(self, shape=(numel,), stride=None, offset=self.offset + start).read()

    @property
    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _read_fully(file, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise ConversionError(f"{path} ends {len(target) - done} bytes early; it is damaged")
        done += count


def quantised(what: str, sign: str) -> ConversionError:
    """The error for quantised weights; `sign` shows what they are known by."""
    return ConversionError(
        f"{what} holds quantised weights, such as {sign}, which have lost precision and are not read; convert the "
        "original in float32, bfloat16 or float16"
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ConversionError for a file that git-lfs has not downloaded."""
    if is_lfs_pointer(path):
        raise ConversionError(
            f"{path} is a git-lfs pointer, not weights: run `git lfs pull` in its repository, or download the file"
        )


def stored_tensors(stored: Mapping[str, Stored]) -> LazyTensors:
    return LazyTensors(
        {name: place.meta for name, place in stored.items()}, lambda name: stored[name].read()
    )


def read_safetensors(path: Path) -> LazyTensors:
    """The tensors of a .safetensors file, or of all files of a .safetensors.index.json. Raises ConversionError."""
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
            raise quantised(str(path), f"{name} ({entry.dtype})")
        start = header.data_start + entry.begin
        stored[name] = Stored(path, start, DTYPES[entry.dtype], entry.shape)
    return stored_tensors(stored)


def load_safetensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a .safetensors file in memory. Raises ConversionError, OSError."""
    read_safetensors(path)
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ConversionError(f"{path} is a damaged safetensors file: {error}") from None


def _read_index(path: Path) -> LazyTensors:
    """The tensors of every file that the index names, each in the file where the index says it is."""
    try:
        index = read_json(path)
    except DocumentError as error:
        raise ConversionError(
            f"{path} is not an index of .safetensors files, or a damaged one: {error}"
        ) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(f"{path} is not an index of .safetensors files: it has no weight_map")
    files = {name: str(file) for name, file in weight_map.items()}
    beside = {other.name for other in path.parent.iterdir() if other.is_file()}
    parts = {}
    for file in sorted(set(files.values())):
        if file not in beside:
            raise ConversionError(f"{path} names the file {file!r}, which does not lie beside it")
        parts[file] = read_safetensors(path.with_name(file))
    held = {name: file for file, part in parts.items() for name in part}
    problems = {
        "missing": [f"{name} in {file}" for name, file in files.items() if name not in parts[file]],
        "unexpected": [f"{name} in {file}" for name, file in held.items() if name not in files],
    }
    if any(problems.values()):
        raise ConversionError(f"{path} and its files do not agree:\n{format_mismatch(problems)}")
    return LazyTensors(
        {name: parts[file].meta[name] for name, file in files.items()},
        lambda name: parts[files[name]].read(name),
    )


def write_safetensors(
    path: Path,
    tensors: LazyTensors,
    metadata: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """One tensor at a time, in the order of `tensors`; the layout in the file is that of `safetensors.save_file`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(
        tensors, key=lambda name: (-tensors.meta[name].itemsize, name)
    ):  # keeps all of them aligned
        meta = tensors.meta[name]
        starts[name], end = end, end + meta.numel() * meta.itemsize
        header[name] = {
            "dtype": names[meta.dtype],
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
                del stretch  # before the next one is read
        file.truncate(8 + len(text) + end)


def with_progress(
    tensors: LazyTensors, progress: ProgressCallback | None = None
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """(name, contiguous stretches of the tensor) one after the other, checked against what was announced."""
    total, done = tensors.num_bytes, 0

    def checked(name: str, meta: Tensor) -> Iterator[Tensor]:
        left = meta.numel()
        for stretch in tensors.stretches(name):
            assert stretch.dtype == meta.dtype, (name, stretch.dtype, meta)
            left -= stretch.numel()
            yield stretch.detach().cpu().contiguous()
            del stretch
        assert not left, (name, meta.shape, left)

    if progress is not None:
        progress(*megabytes(done, total))
    for name, meta in tensors.meta.items():
        yield name, checked(name, meta)
        before, done = done, done + meta.numel() * meta.itemsize
        give_back(before, done)
        if progress is not None:
            progress(*megabytes(done, total))


def give_back(before: int, done: int) -> None:
    """Every 64 MB: let the allocator return what nobody uses. Thousands of tensors of a few MB, with small objects in between,
    otherwise leave it with gigabytes of holes (measured: 2.1 GB after 4 GB)."""
    if before // TRIM_EVERY != done // TRIM_EVERY:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def megabytes(done: int, total: int) -> tuple[int, int]:
    """Bytes as a ProgressCallback hears them: the last report says that all is done, even of less than a megabyte."""
    whole = -(-total // MEGABYTE)
    return (whole if done >= total else done // MEGABYTE), whole
