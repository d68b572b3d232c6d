"""Softmax attention: flash-attn on CUDA in half precision where it is installed, torch's SDPA everywhere else.

The choice is made in `_flash_attn_for` and nowhere else in the project.

Letters: B batch, S positions, N positions of all sequences of a packed row, H heads, D width of a head.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256


def attention(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over whole rows -> [B, S, H, D].

    Queries may be fewer than keys (decoding with a cache); `causal` then lets the last query see everything.
    `mask` is boolean, broadcastable to [B, H, queries, keys], true = may attend; a row of it may not be empty.
    `mask` and `causal` exclude each other. `scale` defaults to 1/sqrt(D).
    """
    assert not (causal and mask is not None), "a mask says everything; causal=True beside it is ambiguous"
    queries, keys = q_BSHD.shape[1], k_BSHD.shape[1]
    assert not causal or queries <= keys, (queries, keys)
    flash = _flash_attn_for(q_BSHD) if mask is None else None
    if flash is not None:
        return flash.flash_attn_func(q_BSHD, k_BSHD, v_BSHD, softmax_scale=scale, causal=causal)
    if causal and queries == 1:
        causal = False  # the one query is the last position
    elif causal and queries != keys:
        # SDPA's own flag would align the first query with the first key
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BSHD.device).tril(keys - queries)
        causal = False
    out_BHSD = functional.scaled_dot_product_attention(
        q_BSHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2),
        attn_mask=mask, is_causal=causal, scale=scale,
    )
    return out_BHSD.transpose(1, 2)


def attention_varlen(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each sequence of a packed row -> [N, H, D].

    `cu_seqlens` is int32 [sequences + 1]: 0, then the end of each sequence; the last entry is N.
    `max_seqlen` is the longest sequence's length (an upper bound will do).
    """
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1, (cu_seqlens.dtype, cu_seqlens.shape)
    flash = _flash_attn_for(q_NHD)
    if flash is not None:
        return flash.flash_attn_varlen_func(
            q_NHD, k_NHD, v_NHD, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, softmax_scale=scale, causal=causal,
        )
    ends = cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == len(q_NHD), (ends[0], ends[-1], len(q_NHD))
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    # split, not slices: the gradient of a slice is as long as the row, which makes it quadratic in the sequences
    parts = zip(*(x_NHD[None].split(lengths, dim=1) for x_NHD in (q_NHD, k_NHD, v_NHD)), strict=True)
    outputs = [attention(q, k, v, causal=causal, scale=scale)[0] for q, k, v in parts if q.shape[1]]
    return torch.cat(outputs) if outputs else torch.zeros_like(q_NHD)


def _flash_attn_for(q: Tensor) -> ModuleType | None:
    """flash-attn where it can run these queries, else None: torch's SDPA does it."""
    if not q.is_cuda or q.dtype not in _FLASH_DTYPES or q.shape[-1] > _FLASH_MAX_HEAD_DIM:
        return None
    return _flash_attn()


@functools.cache
def _flash_attn() -> ModuleType | None:
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None
