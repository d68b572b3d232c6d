"""Softmax attention with flash-attn where it is installed and applies, with torch's SDPA otherwise.

flash-attn applies to half precision on CUDA. `_flash_attn_for` is the only place in the project
that chooses between the two.

Shape letters (docs/glossary.md): B batch, S positions, N positions of all sequences of a packed
row, A heads, d width of a head.
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
    q_BSAd: Tensor,
    k_BSAd: Tensor,
    v_BSAd: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over whole rows.

    Returns [B, S, A, d] with S of the queries. There may be fewer queries than keys, as in decoding
    with a cache; `causal` then aligns them at the end, so that the last query attends to all keys.

    mask: bool, broadcastable to [B, A, queries, keys], true = may attend. Every query must attend
    to at least one key. `mask` and `causal` exclude each other. `scale` defaults to 1/sqrt(d).
    """
    assert not (causal and mask is not None), "causal=True is ambiguous beside a mask"
    queries = q_BSAd.shape[1]
    keys = k_BSAd.shape[1]
    assert not causal or queries <= keys, (queries, keys)
    flash = None
    if mask is None:
        flash = _flash_attn_for(q_BSAd)
    if flash is not None:
        return flash.flash_attn_func(q_BSAd, k_BSAd, v_BSAd, softmax_scale=scale, causal=causal)
    if causal and queries == 1:
        causal = False  # the only query is the last position, which attends to all keys
    elif causal and queries != keys:
        # SDPA's own flag would align the first query with the first key.
        every = torch.ones(queries, keys, dtype=torch.bool, device=q_BSAd.device)
        mask = every.tril(keys - queries)
        causal = False
    out_BASd = functional.scaled_dot_product_attention(
        q_BSAd.transpose(1, 2),
        k_BSAd.transpose(1, 2),
        v_BSAd.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return out_BASd.transpose(1, 2)


def attention_varlen(
    q_NAd: Tensor,
    k_NAd: Tensor,
    v_NAd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each sequence of a packed row. Returns [N, A, d].

    cu_seqlens: int32 [sequences + 1], 0 followed by the end of each sequence; the last entry is N.
    max_seqlen: length of the longest sequence, or an upper bound of it.
    """
    assert cu_seqlens.dtype == torch.int32, cu_seqlens.dtype
    assert cu_seqlens.ndim == 1, cu_seqlens.shape
    flash = _flash_attn_for(q_NAd)
    if flash is not None:
        return flash.flash_attn_varlen_func(
            q_NAd,
            k_NAd,
            v_NAd,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=causal,
        )
    ends = cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == len(q_NAd), (ends[0], ends[-1], len(q_NAd))
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    # Split, not sliced: the gradient of a slice is as long as the whole row, which makes the
    # backward pass quadratic in the number of sequences.
    queries = q_NAd[None].split(lengths, dim=1)
    keys = k_NAd[None].split(lengths, dim=1)
    values = v_NAd[None].split(lengths, dim=1)
    outputs = []
    for q_1SAd, k_1SAd, v_1SAd in zip(queries, keys, values, strict=True):
        if q_1SAd.shape[1]:
            outputs.append(attention(q_1SAd, k_1SAd, v_1SAd, causal=causal, scale=scale)[0])
    if not outputs:
        return torch.zeros_like(q_NAd)
    return torch.cat(outputs)


def _flash_attn_for(q: Tensor) -> ModuleType | None:
    """flash-attn if it can run these queries, else None."""
    if not q.is_cuda or q.dtype not in _FLASH_DTYPES or q.shape[-1] > _FLASH_MAX_HEAD_DIM:
        return None
    return _flash_attn()


@functools.cache
def _flash_attn() -> ModuleType | None:
    """The flash-attn package, or None if it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn")
