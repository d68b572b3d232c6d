"""Layers and functions that several models share: rotary embedding, sinusoids, RMSNorm, recompute.

Shape letters: docs/glossary.md. `...` stands for any leading dimensions.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._triton import has_triton
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from landiff.configs.base import ConfigError


def rotary_angles(
    positions: Tensor, dim: int, theta: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Angles of the rotary embedding: position · theta^(-2j / dim) for j = 0 … dim/2 - 1.

    positions: [...]. Returns float32 [..., dim / 2]. The angles are computed in `dtype`.
    """
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim
    frequencies = 1.0 / theta**exponents
    return (positions.to(dtype)[..., None] * frequencies).float()


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of one-dimensional positions [S], float32 [S, d/2] each."""
    angles_Sd = rotary_angles(positions, head_dim, theta)
    return angles_Sd.cos(), angles_Sd.sin()


def rotate(x: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotates the pairs of adjacent elements (2j, 2j + 1) of every head.

    x: [..., S, A, d] and cos_Sd, sin_Sd: float32 [S, d/2]. Returns the shape and dtype of `x`; the
    rotation itself is computed in float32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos = cos_Sd.unsqueeze(-2)
    sin = sin_Sd.unsqueeze(-2)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_pairs(x: Tensor, rotations: Tensor) -> Tensor:
    """`rotate` by complex products, in a third of the time.

    x: [..., S, A, d]. rotations: complex64 [S, 1, d/2]. Equal to `rotate` up to the last bit, and
    in it for head widths that vector units divide.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def sinusoid(
    values: Tensor, dim: int, *, dtype: torch.dtype = torch.float32, sines_first: bool = False
) -> Tensor:
    """Sinusoidal embedding of scalars (docs/specification.md §4.4).

    values: [N]. Returns float32 [N, dim]: the cosines of value · f_j, then the sines, or the other
    way round with `sines_first`. f_j = 10000^(-2j / dim). The embedding is computed in `dtype`.
    """
    half = dim // 2
    steps = torch.arange(half, device=values.device, dtype=dtype)
    frequencies = torch.exp(-math.log(10000) * steps / half)
    angles = values.to(dtype)[:, None] * frequencies
    parts = [angles.cos(), angles.sin()]
    if sines_first:
        parts.reverse()
    return torch.cat(parts, dim=1).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension.

    x: [..., D] and weight: [D]. Norm and product with the weight are computed in float32; the
    result has the dtype of `x`.
    """
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, see `rms_norm`."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`."""
        return rms_norm(x, self.weight, self.eps)


def gated_gelu(x: Tensor) -> Tensor:
    """gelu_tanh(first half of the last dimension) * second half: [..., 2 D] -> [..., D]."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        gate, up = x.chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up
    return _GatedGelu.apply(x)


class _GatedGelu(torch.autograd.Function):
    """`gated_gelu` with the same operations as autograd's, without a copy of both gradients.

    autograd joins the gradients of the two halves with `cat`. Here they are written into place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        activated = functional.gelu(gate, approximate="tanh")
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.gelu_backward.grad_input(
            gradient * up, gate, approximate="tanh", grad_input=of_gate
        )
        return result


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile lacks a compiler for `device`.

    Its code for GPUs is generated by Triton, which builds launchers in C; its code for CPUs is C++.
    """
    names = ("gcc", "clang", "cc")
    if device.type == "cpu":
        names = ("g++", "clang++", "c++")
    elif not has_triton():
        raise ConfigError(
            "compile_blocks = true needs Triton, which is not installed or does not know this GPU; "
            "set compile_blocks=false"
        )
    if not any(map(shutil.which, names)):
        raise ConfigError(
            f"compile_blocks = true needs a compiler, one of {', '.join(names)}; install one, or "
            "set compile_blocks=false"
        )


def compile_blocks(blocks: Iterable[nn.Module], **options: Any) -> None:
    """Compiles modules in place, each at its first call. Names of weights stay the same.

    options: those of torch.compile.
    """
    for block in blocks:
        block.compile(**options)


def run_block(
    block: nn.Module, *inputs: Any, recompute: bool, keep_inputs_on_host: bool = False
) -> Tensor:
    """Returns `block(*inputs)`.

    With `recompute`, activations inside the block are not kept for the backward pass but computed
    again there, which saves memory and costs one more forward pass. The inputs are kept, with
    `keep_inputs_on_host` in host memory. Without gradients neither has an effect.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    # The reentrant variant gives no gradients where no input requires one, as behind frozen input
    # layers.
    if not keep_inputs_on_host:
        return checkpoint(block, *inputs, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(block, *inputs, use_reentrant=False)


def run_selectively(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Returns `function(*inputs)`, of which only expensive results are kept for the backward pass.

    Those of matrix multiplications and attention; the others are computed again there.
    """
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_expensive)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_expensive(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Whether `run_selectively` keeps the result of an operator: `aten::mm`, `aten::_scaled_mm`,
    `aten::_scaled_dot_product_flash_attention`, `flash_attn::_flash_attn_varlen_forward` and so on.
    """
    name = operator.name().partition(".")[0]
    if name.endswith("mm") or "attention" in name or "attn" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


LARGE = 1 << 20  # bytes of a tensor that is worth a copy to the host

HostCopy = tuple[torch.device, Tensor]
"""Device of a tensor, and its copy in host memory."""


def _to_host(tensor: Tensor) -> Tensor | HostCopy:
    """What autograd keeps of a tensor: a copy in host memory of a large one.

    The copies run in the stream of the computation, after which the memory on the device is free.
    The host does not wait, and reads nothing. torch's `save_on_cpu` waits for each copy.
    """
    if tensor.nbytes < LARGE:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _from_host(kept: Tensor | HostCopy) -> Tensor:
    """The tensor that `_to_host` has copied."""
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
