"""Temporary replacement of an attribute of a library.

Megatron-core and DeepSpeed offer no option for a few things that the trainers need: devices on a
machine without CUDA (lm/device.py), reading checkpoints without running code in them
(lm/checkpoint.py), and one optimizer for all ZeRO stages (diffusion/zero.py). Each replaces a
function of the library within a `with` block and gives the reason there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` to `value` inside the block and restore the original on exit.

    Raises AttributeError if `owner` has no such attribute, which means that the library has
    changed.
    """
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
