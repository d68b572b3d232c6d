"""Are these numbers usable? The one check for non-finite weights and for collapsed semantic tokens.

Training asks before a checkpoint is written, the zoo and `landiff convert` before weights are used or
exported, `landiff precompute` before tokens are committed, and sampling before codes become a video.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.model_zoo.evaluate.codebook import codebook_use

NAMES_SHOWN = 5
# A trained codebook has hundreds; one of NaN or equal vectors gives one code for everything.
MIN_EFFECTIVE_CODES = 1.5


class UnhealthyError(ConfigError):
    """Weights with NaN or infinity, or tokens of a collapsed codebook; names the tensor or column."""


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity.

    A finite sum proves that all summands are finite, so each tensor is read once and nothing of its
    size is allocated. A sum that is not finite may have overflowed; only such a tensor is examined
    element by element. The sums of device tensors come to the host in one copy; of tensors in host
    memory one at a time is held, so `tensors` may read them from disk.
    """
    names: list[str] = []
    on_device: list[tuple[str, Tensor, Tensor]] = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        total = _sum(tensor.detach())
        if tensor.device.type != "cpu":
            on_device.append((name, tensor, total))
        elif not math.isfinite(total) and not bool(tensor.isfinite().all()):
            names.append(name)
    if on_device:
        totals = torch.stack([total for _, _, total in on_device]).tolist()
        for (name, tensor, _), total in zip(on_device, totals, strict=True):
            if not math.isfinite(total) and not bool(tensor.isfinite().all()):
                names.append(name)
    return names


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise UnhealthyError where a tensor of `what` holds NaN or infinity."""
    names = non_finite(tensors)
    if names:
        raise non_finite_error(names, what)


def non_finite_error(names: Sequence[str], what: str) -> UnhealthyError:
    """The error for the tensors `names` of `what`."""
    return UnhealthyError(
        f"{what} holds NaN or infinity in {listed(names)}: the training that wrote it has diverged, or it "
        "does not fit the dtype; use an earlier checkpoint or another dtype"
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more tensors" if more > 0 else shown


def effective_codes(counts: np.ndarray) -> float:
    """Perplexity of a histogram: the number of codes in use, where rare codes count less."""
    perplexity, _used = codebook_use(torch.tensor(counts, dtype=torch.float64))
    return float(perplexity)


def collapse(counts: np.ndarray) -> str:
    """What is wrong with a histogram of semantic tokens, "" where nothing is.

    `counts`: occurrences of each code over several clips.
    """
    total = int(counts.sum())
    if total < 2 or effective_codes(counts) >= MIN_EFFECTIVE_CODES:
        return ""
    code = int(counts.argmax())
    share = counts[code] / total
    text = "all" if share == 1 else f"{share:.1%}"
    return f"{text} of {total} tokens are code {code}: the codebook has collapsed"


def _sum(tensor: Tensor) -> Tensor:
    """float32 sum of a tensor; float8 types have no sum of their own."""
    if tensor.itemsize == 1:
        tensor = tensor.float()
    return tensor.sum(dtype=torch.float32)
