"""Counts the operators of a training step, and finds where it reads scalars."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.host_reads import callers

READ = "aten::_local_scalar_dense"  # what `.item()`, `bool()` and `float()` of a tensor call


class CountedOperators(TorchDispatchMode):
    """Context in which all operators are counted, those of the backward pass too.

    by_name: calls by operator.
    readers: scalars read, by the innermost function outside torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.readers: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        self.by_name[name] += 1
        if name == READ:
            self.readers[next(callers(sys._getframe(1)))] += 1
        return func(*args, **(kwargs or {}))
