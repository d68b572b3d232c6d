"""Are these numbers usable? The one check for non-finite weights and for collapsed semantic tokens.

Training asks before a checkpoint is written, the zoo and `landiff convert` before weights are used or exported,
`landiff precompute` before tokens are committed, and sampling before codes become a video.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from configs.base import ConfigError

NAMES_SHOWN = 5
MIN_EFFECTIVE_CODES = 1.5  # a trained codebook has hundreds; a NaN or dead one gives one code for everything


class UnhealthyError(ConfigError):
    """Weights with NaN or infinity, or tokens of a collapsed codebook; the message names the tensor or column."""


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinity.

    A finite sum proves that all summands are finite, so each tensor is read once and nothing of its size is
    allocated; all sums come to the host in one copy. A sum that is not finite may have overflowed, so only such a
    tensor is examined element by element.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return []
    device = named[0][1].device
    sums = torch.stack([_sum(tensor).to(device) for _, tensor in named])
    suspects = [pair for pair, finite in zip(named, sums.isfinite().tolist(), strict=True) if not finite]
    return [name for name, tensor in suspects if not bool(tensor.isfinite().all())]


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise UnhealthyError where a tensor of `what` holds NaN or infinity."""
    names = non_finite(tensors)
    if names:
        raise UnhealthyError(
            f"{what} holds NaN or infinity in {listed(names)}: the training that wrote it has diverged; "
            "use an earlier checkpoint"
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more tensors" if more > 0 else shown


def effective_codes(counts: np.ndarray) -> float:
    """Exponential of the entropy of a histogram of codes: how many codes are in use, rare ones counting less."""
    share = counts[counts > 0] / counts.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


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
