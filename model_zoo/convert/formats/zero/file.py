"""A file of a DeepSpeed checkpoint whose tensors are read in parts when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.convert.formats.zero.state import CLASSES, TensorPlace
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback
from landiff.model_zoo.convert.pickles import replace_leaves, write_pickle


@dataclass(frozen=True)
class TensorKey:
    """Stands for a tensor in the content of a file until the file is written."""

    name: str


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter, followed by `zeros` elements of padding."""

    name: str
    start: int
    numel: int
    zeros: int = 0


class ZeroFile:
    """The content of a file in memory, except for its tensors, which are read when written."""

    def __init__(self) -> None:
        """Start with an empty file."""
        self.meta: dict[str, Tensor] = {}
        self.readers: dict[str, Callable[[], Iterator[Tensor]]] = {}
        self.content: dict[Any, Any] = {}

    def add(
        self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Iterator[Tensor]]
    ) -> TensorKey:
        """Add a tensor whose elements `read` yields in order; returns its key for `content`."""
        key = TensorKey(str(len(self.meta)))
        self.meta[key.name] = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self.readers[key.name] = read
        return key

    def add_whole(self, place: TensorPlace, dtype: torch.dtype) -> TensorKey:
        """Add a tensor in another dtype."""
        return self.add(place.shape, dtype, lambda: iter([place.read().to(dtype)]))

    def add_value(self, value: Any) -> Any:
        """Add a tensor that is in memory. Any other value is returned unchanged."""
        if not isinstance(value, Tensor):
            return value
        return self.add(value.shape, value.dtype, lambda: iter([value]))

    def add_vector(
        self,
        places: Mapping[str, TensorPlace],
        fragments: Sequence[Fragment],
        dtype: torch.dtype,
    ) -> TensorKey:
        """Add a flat vector that consists of fragments of parameters."""

        def read() -> Iterator[Tensor]:
            for fragment in fragments:
                if fragment.numel:
                    part = places[fragment.name].part(fragment.start, fragment.numel)
                    yield part.to(dtype)
                    del part  # frees it before the next one is read
                if fragment.zeros:
                    yield torch.zeros(fragment.zeros, dtype=dtype)

        numel = sum(fragment.numel + fragment.zeros for fragment in fragments)
        return self.add((numel,), dtype, read)

    @property
    def tensors(self) -> LazyTensors:
        """All tensors of the file by key."""

        def read(name: str) -> Tensor:
            return torch.cat([part.flatten() for part in self.readers[name]()])

        return LazyTensors(self.meta, read, lambda name: self.readers[name]())

    def write(self, path: Path, progress: ProgressCallback | None) -> None:
        """Write the file."""

        def content(fakes: Mapping[str, Tensor]) -> Any:
            def with_tensor(leaf: Any) -> Any:
                return fakes[leaf.name] if isinstance(leaf, TensorKey) else leaf

            return replace_leaves(self.content, with_tensor)

        write_pickle(path, self.tensors, content, progress, CLASSES)
