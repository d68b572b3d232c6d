"""Statistics of how often the codes of a codebook are used."""

from __future__ import annotations

import torch
from torch import Tensor


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Occurrences of each code, int64 [codebook_size]. codes: integers of any shape."""
    return torch.bincount(codes.flatten(), minlength=codebook_size)


def code_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the distribution of codes, a scalar.

    counts: floating-point [codebook_size], in whose dtype the entropy is computed.
    """
    return torch.special.entr(counts / counts.sum()).sum()


def codebook_use(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Perplexity of the codes and fraction of the codebook in use, scalars.

    counts: floating-point [codebook_size]. The perplexity is the exponential of the entropy: 1 if
    one code stands for everything, codebook_size if all codes are equally frequent.
    """
    return torch.exp(code_entropy(counts)), (counts > 0).float().mean()
