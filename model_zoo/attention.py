"""Softmax attention, and the choice of the kernel that computes it.

`choose` is the only place in the project that chooses a kernel, by the table `PREFERENCES`. Half
precision on CUDA has a choice; all else uses torch's SDPA. `prefer` overrides the table.

    flash-4    FlashAttention-4, package flash-attn-4, activated in torch
    flash-3    FlashAttention-3, module flash_attn_interface, activated in torch
    flash-2    FlashAttention-2, package flash-attn
    cudnn      cuDNN, which comes with torch; not for packed rows
    torch      torch's own kernels: FlashAttention-2, else the memory-efficient or the plain one

Under `torch.use_deterministic_algorithms` (config key `loop.deterministic`) all kernels compute
their backward pass in a fixed order, except for cuDNN, which is not chosen then.

Shape letters (docs/glossary.md): B batch, S positions, N positions of all sequences of a packed
row, A heads, d width of a head.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

log = logging.getLogger(__name__)

Backend = Literal["flash-4", "flash-3", "flash-2", "cudnn", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

FLASH_DTYPES = (torch.float16, torch.bfloat16)
OLDEST_ARCHITECTURE = 8  # major compute capability that all of these kernels need
TORCH_NAMES: dict[Backend, str] = {"flash-4": "FA4", "flash-3": "FA3"}
# In order of trial. torch takes the first that supports a call.
SDP_BACKENDS: dict[Backend, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "torch": [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}


@dataclass(frozen=True)
class Limits:
    """What a kernel supports.

    head_dim: largest width of a head. architectures: major compute capabilities, None for all.
    """

    head_dim: int = 256
    architectures: tuple[int, ...] | None = None
    packed: bool = True
    deterministic: bool = True


LIMITS: dict[Backend, Limits] = {
    "flash-4": Limits(head_dim=128, architectures=(9, 10)),
    "flash-3": Limits(architectures=(9,)),
    "flash-2": Limits(),
    "cudnn": Limits(head_dim=128, packed=False, deterministic=False),
    "torch": Limits(head_dim=1 << 30),
}


@dataclass(frozen=True)
class Case:
    """What decides the kernel of half-precision attention on CUDA.

    architecture: major compute capability, 9 for H100. length: queries of the longest sequence, in
    a call rounded down to a `min_length` of the table. packed: several sequences in one row.
    """

    architecture: int
    head_dim: int
    length: int
    causal: bool
    dtype: torch.dtype
    packed: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Preference:
    """Kernels for some cases, the fastest first. None applies to all values.

    min_length: smallest number of queries. max_head_dim: largest width of a head.
    """

    backends: tuple[Backend, ...]
    architecture: int | None = None
    min_length: int = 0
    max_head_dim: int | None = None
    causal: bool | None = None
    dtype: torch.dtype | None = None

    def fits(self, case: Case) -> bool:
        """Whether the row applies to a case."""
        return (
            self.architecture in (None, case.architecture)
            and case.length >= self.min_length
            and (self.max_head_dim is None or case.head_dim <= self.max_head_dim)
            and self.causal in (None, case.causal)
            and self.dtype in (None, case.dtype)
        )


# The first row that fits a case decides. `python -m benchmarks.gpu --only attention` measures the
# order on a device. Forward on H100 at head width 64, 16k positions, not causal, in TFLOP/s:
# flash-3 497, cudnn 413, flash-2 324 (FlashAttention-3, arXiv 2407.08608). Below some hundred
# queries, as in decoding, launches decide, and the kernel with the least code around it is first.
PREFERENCES: tuple[Preference, ...] = (
    Preference(("flash-3", "cudnn", "flash-4", "flash-2", "torch"), architecture=9, min_length=512),
    Preference(("flash-4", "cudnn", "flash-2", "torch"), architecture=10, min_length=512),
    Preference(("flash-2", "torch")),
)
MIN_LENGTHS = sorted({row.min_length for row in PREFERENCES})


def choose(
    case: Case,
    installed: Collection[Backend],
    preferred: Backend | None = None,
    table: Sequence[Preference] = PREFERENCES,
) -> Backend:
    """The kernel of a case: `preferred` where it applies, else the first that does in `table`.

    installed: what `find_installed` returns, or a part of it.
    """
    order: tuple[Backend, ...] = ()
    for row in table:
        if row.fits(case):
            order = row.backends
            break
    if preferred is not None:
        order = (preferred, *order)
    for backend in order:
        if backend in installed and _supports(backend, case):
            return backend
    return "torch"


def _supports(backend: Backend, case: Case) -> bool:
    limits = LIMITS[backend]
    return (
        case.head_dim <= limits.head_dim
        and case.head_dim % 8 == 0
        and case.architecture >= OLDEST_ARCHITECTURE
        and (limits.architectures is None or case.architecture in limits.architectures)
        and (limits.packed or not case.packed)
        and (limits.deterministic or not case.deterministic)
    )


@functools.cache
def find_installed() -> frozenset[Backend]:
    """The kernels that are there, by their packages. Imports none but that of flash-2.

    flash-attn-4 installs a folder `flash_attn` without the functions of flash-attn 2.
    """
    found: set[Backend] = {"cudnn", "torch"}
    if importlib.util.find_spec("flash_attn") is not None:
        if hasattr(importlib.import_module("flash_attn"), "flash_attn_varlen_func"):
            found.add("flash-2")
        if importlib.util.find_spec("flash_attn.cute") is not None:
            found.add("flash-4")
    if importlib.util.find_spec("flash_attn_interface") is not None:
        found.add("flash-3")
    return frozenset(found)


class _Choices:
    """The choices of this process: what is preferred, what failed, what was logged.

    flash_2: functions of the package flash-attn, once they are used. torch.compile cannot trace
        imports.
    """

    def __init__(self) -> None:
        self.preferred: Backend | None = None
        self.flash_2: dict[str, Callable[..., Any]] = {}
        self.failed: set[Backend] = set()
        self.made: dict[Case, Backend] = {}

    def of(self, case: Case) -> Backend:
        """The kernel of a case, which is activated and logged at its first use."""
        if case not in self.made:
            backend = choose(case, find_installed() - self.failed, self.preferred)
            while not self._activate(backend):
                self.failed.add(backend)
                backend = choose(case, find_installed() - self.failed, self.preferred)
            self.made[case] = backend
            log.info("attention kernel %s for %s", backend, case)
        return self.made[case]

    def _activate(self, backend: Backend) -> bool:
        """Import flash-attn 2, or make torch's calls use FlashAttention-3 or 4.

        Returns whether the kernel is usable.
        """
        if backend == "flash-2":
            package = importlib.import_module("flash_attn")
            for function in ("flash_attn_func", "flash_attn_varlen_func"):
                self.flash_2[function] = getattr(package, function)
            return True
        name = TORCH_NAMES.get(backend)
        if name is None or name == current_flash_attention_impl():
            return True
        try:
            activate_flash_attention_impl(name)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            log.warning("attention kernel %s cannot be used: %s", backend, error)
            return False
        return True


_CHOICES = _Choices()


def prefer(backend: Backend | None) -> None:
    """Use `backend` in this process wherever it applies, before the table. None undoes it."""
    _CHOICES.preferred = backend
    _CHOICES.made.clear()
    if current_flash_attention_impl() is not None:  # else torch's own calls would still use it
        restore_flash_attention_impl()


@torch.compiler.assume_constant_result
def _choice(
    device: torch.device, head_dim: int, length: int, causal: bool, dtype: torch.dtype, packed: bool
) -> Backend:
    """The kernel of a call on CUDA in half precision. torch.compile needs constant arguments."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    major, _ = torch.cuda.get_device_capability(device)
    return _CHOICES.of(Case(major, head_dim, length, causal, dtype, packed, deterministic))


def _kernel_for(q: Tensor, length: int, *, causal: bool, packed: bool) -> Backend | None:
    """The kernel of a call, or None if there is no choice but torch's SDPA."""
    if not _has_choice(q):
        return None
    # Only comparisons of the length, which compiled code does not know if it varies.
    rounded = 0
    for min_length in MIN_LENGTHS:
        if length >= min_length:
            rounded = min_length
    return _choice(q.device, q.shape[-1], rounded, causal, q.dtype, packed)


def _has_choice(q: Tensor) -> bool:
    """Whether there are several kernels for queries of this device and dtype."""
    return q.is_cuda and q.dtype in FLASH_DTYPES


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
    backend = None
    if mask is None:
        backend = _kernel_for(q_BSAd, queries, causal=causal, packed=False)
    if backend == "flash-2":
        return _CHOICES.flash_2["flash_attn_func"](
            q_BSAd,
            k_BSAd,
            v_BSAd,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    if causal and queries == 1:
        causal = False  # the only query is the last position, which attends to all keys
    elif causal and queries != keys:
        # SDPA's own flag would align the first query with the first key.
        every = torch.ones(queries, keys, dtype=torch.bool, device=q_BSAd.device)
        mask = every.tril(keys - queries)
        causal = False

    def run() -> Tensor:
        out_BASd = functional.scaled_dot_product_attention(
            q_BSAd.transpose(1, 2),
            k_BSAd.transpose(1, 2),
            v_BSAd.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
        )
        return out_BASd.transpose(1, 2)

    if backend is None or mask is not None:
        return run()
    with sdpa_kernel(SDP_BACKENDS.get(backend, SDP_BACKENDS["torch"]), set_priority=True):
        return run()


def attention_varlen(
    q_NAd: Tensor,
    k_NAd: Tensor,
    v_NAd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Attention inside each sequence of a packed row. Returns [N, A, d].

    cu_seqlens: int32 [sequences + 1], 0 followed by the end of each sequence; the last entry is N.
    cu_seqlens_k: the same of keys and values, if a sequence has more of them than queries. `causal`
        then aligns them at the end, as in `attention`.
    max_seqlen: length of the longest sequence, or an upper bound of it.

    In half precision on CUDA nothing is copied to the host, on GPUs of compute capability 8.0 or
    newer. Otherwise the lengths are.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    assert cu_seqlens.dtype == cu_seqlens_k.dtype == torch.int32, cu_seqlens.dtype
    assert cu_seqlens.ndim == 1 and cu_seqlens.shape == cu_seqlens_k.shape, cu_seqlens.shape
    backend = _kernel_for(q_NAd, max_seqlen, causal=causal, packed=True)
    if backend == "flash-2":
        return _CHOICES.flash_2["flash_attn_varlen_func"](
            q_NAd,
            k_NAd,
            v_NAd,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    lengths = (cu_seqlens, cu_seqlens_k)
    if backend is not None and _has_varlen(q_NAd):
        return _torch_varlen(q_NAd, k_NAd, v_NAd, lengths, max_seqlen, causal, scale)
    return _attention_by_length(q_NAd, k_NAd, v_NAd, lengths, causal, scale)


def _has_varlen(q_NAd: Tensor) -> bool:
    """Whether torch's kernel for packed rows takes these queries, which are on CUDA."""
    head_dim = q_NAd.shape[-1]
    major, _ = torch.cuda.get_device_capability(q_NAd.device)
    return (
        major >= OLDEST_ARCHITECTURE
        and head_dim % 8 == 0
        and head_dim <= LIMITS["flash-2"].head_dim
    )


def _torch_varlen(
    q_NAd: Tensor,
    k_NAd: Tensor,
    v_NAd: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen: int,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """torch's own kernel for packed rows. It has none for the CPU."""
    from torch.nn.attention.varlen import varlen_attn  # registers operators

    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(
        q_NAd,
        k_NAd,
        v_NAd,
        *cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=window,
    )
    assert isinstance(out, Tensor)
    return out


def _attention_by_length(
    q_NAd: Tensor,
    k_NAd: Tensor,
    v_NAd: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of packed sequences with one call for neighbours of equal lengths."""
    queries = _lengths(cu_seqlens[0], len(q_NAd))
    keys = _lengths(cu_seqlens[1], len(k_NAd))
    lengths = [pair for pair in zip(queries, keys, strict=True) if pair[0]]
    if not lengths:
        return torch.zeros_like(q_NAd)
    runs = [(pair, len(list(group))) for pair, group in itertools.groupby(lengths)]
    # Split, not sliced: the gradient of a slice is as long as the whole row, which makes the
    # backward pass quadratic in the number of sequences.
    query_sizes = [pair[0] * count for pair, count in runs]
    key_sizes = [pair[1] * count for pair, count in runs]
    parts = [q_NAd.split(query_sizes), k_NAd.split(key_sizes), v_NAd.split(key_sizes)]
    outputs = []
    for ((num_queries, num_keys), count), q, k, v in zip(runs, *parts, strict=True):
        out_BSAd = attention(
            q.unflatten(0, (count, num_queries)),
            k.unflatten(0, (count, num_keys)),
            v.unflatten(0, (count, num_keys)),
            causal=causal,
            scale=scale,
        )
        outputs.append(out_BSAd.flatten(0, 1))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs)


def _lengths(cu_seqlens: Tensor, total: int) -> list[int]:
    """Lengths of the sequences that end at `cu_seqlens`, which are `total` long together."""
    ends = cu_seqlens.tolist()
    assert ends[0] == 0 and ends[-1] == total, (ends[0], ends[-1], total)
    return [end - start for start, end in itertools.pairwise(ends)]
