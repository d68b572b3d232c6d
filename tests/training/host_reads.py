"""Finds where a training step reads tensors on the host. On CUDA each read waits for the device.

Tensors of the tests are on the CPU, so a read is counted where Python turns a tensor into numbers.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
OUTSIDE = (f"{Path(torch.__file__).parent}/", f"{Path(__file__)}", "<")


@contextmanager
def counted_host_reads(*host_side: str) -> Iterator[Counter[str]]:
    """Context in which reads are counted by the function that asks for them.

    host_side: functions whose reads do not count, with what they call: they work on tensors that
        are on the host with a GPU too, such as random draws of samples.
    """
    found: Counter[str] = Counter()
    originals = {name: getattr(Tensor, name) for name in READS}

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*arguments: Any, **options: Any) -> Any:
            names = list(callers(sys._getframe(1)))
            if not set(names) & set(host_side):
                found[names[0]] += 1
            return original(*arguments, **options)

        return read

    for name, original in originals.items():
        setattr(Tensor, name, counting(original))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(Tensor, name, original)


def callers(frame: FrameType | None) -> Iterator[str]:
    """Names of the functions on the stack, innermost first, without those of torch."""
    while frame is not None:
        if not frame.f_code.co_filename.startswith(OUTSIDE):
            yield frame.f_code.co_name
        frame = frame.f_back
