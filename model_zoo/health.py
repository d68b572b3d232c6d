"""Checks for weights that are not finite and for semantic tokens of a collapsed codebook.

Trainers use them before a checkpoint is written, the zoo and `landiff convert` before weights are
used or exported, `landiff precompute` before tokens are committed, and sampling before codes are
decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.evaluate.codebook import codebook_use

NAMES_SHOWN = 5
# A trained codebook has hundreds. One with NaN or equal vectors gives a single code.
MIN_EFFECTIVE_CODES = 1.5
CODE_VECTORS = "quantizer._codebook.embed"
CODES_STARTED = "quantizer._codebook.initted"  # False before k-means, when all vectors are 0


class UnhealthyError(ConfigError):
    """Raised for weights with NaN or infinity and for tokens of a collapsed codebook."""


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity.

    If a sum is finite, all summands are, so each tensor is read once and nothing of its size is
    allocated. A sum that is not finite may have overflowed, and only such a tensor is checked
    element by element. The sums of device tensors are copied to the host at once. Of tensors in
    host memory only one is held at a time, so `tensors` may read them from disk.
    """
    names: list[str] = []
    on_device: list[tuple[str, Tensor, Tensor]] = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        total = _sum(tensor.detach())
        if tensor.device.type != "cpu":
            on_device.append((name, tensor, total))
        elif not math.isfinite(total) and not _all_finite(tensor):
            names.append(name)
    if on_device:
        totals = torch.stack([total for _, _, total in on_device]).tolist()
        for (name, tensor, _), total in zip(on_device, totals, strict=True):
            if not math.isfinite(total) and not _all_finite(tensor):
                names.append(name)
    return names


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raises UnhealthyError if one of the tensors of `what` contains NaN or infinity."""
    names = non_finite(tensors)
    if names:
        raise non_finite_error(names, what)


def non_finite_error(names: Sequence[str], what: str) -> UnhealthyError:
    """The error for the tensors `names` of `what`."""
    return UnhealthyError(
        f"{what} holds NaN or infinity in {listed(names)}: the training that wrote it has "
        "diverged, or it does not fit the dtype; use an earlier checkpoint or another dtype"
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and the number of further ones."""
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    if more > 0:
        return f"{shown} and {more} more tensors"
    return shown


def effective_codes(counts: np.ndarray) -> float:
    """Perplexity of a histogram: the number of codes in use, in which rare codes count less."""
    perplexity, _used = codebook_use(torch.tensor(counts, dtype=torch.float64))
    return float(perplexity)


def collapse(counts: np.ndarray) -> str:
    """Description of a collapsed codebook, "" for a healthy one.

    counts: occurrences of each code over several clips.
    """
    total = int(counts.sum())
    if total < 2 or effective_codes(counts) >= MIN_EFFECTIVE_CODES:
        return ""
    code = int(counts.argmax())
    fraction = counts[code] / total
    text = f"{fraction:.1%}"
    if fraction == 1:
        text = "all"
    return f"{text} of {total} tokens are code {code}: the codebook has collapsed"


def require_distinct_codes(read: Callable[[str], Tensor], what: str) -> None:
    """Raises UnhealthyError if all code vectors of a trained tokenizer are equal.

    read: returns a tensor of the tokenizer by its name.
    """
    if not bool(read(CODES_STARTED).all()):
        return
    vectors_NE = read(CODE_VECTORS).float().flatten(0, -2)
    if len(vectors_NE) > 1 and bool((vectors_NE == vectors_NE[0]).all()):
        raise UnhealthyError(
            f"{what} has {len(vectors_NE)} equal code vectors in {CODE_VECTORS}: the codebook has "
            "collapsed; use an earlier checkpoint, and see the tokenizer's alarms in events.jsonl"
        )


def _sum(tensor: Tensor) -> Tensor:
    """float32 sum of a tensor. torch has no sum for float8 dtypes."""
    if tensor.itemsize == 1:
        tensor = tensor.float()
    return tensor.sum(dtype=torch.float32)
