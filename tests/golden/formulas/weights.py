"""Weights under the reference's own key names, and the layers that all formulas use.

The formulas of this folder are a second implementation of the specification: plain, slow, one
function per sentence, and without code of model_zoo. They are checked against the golden cases, and
generate cases of other sizes (cases.py), for which there are no recorded ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """Tensors by key. With a seed, missing tensors are drawn in the shape that a formula needs."""

    def __init__(
        self, tensors: Mapping[str, Tensor] | None = None, seed: int | None = None
    ) -> None:
        super().__init__(tensors or {})
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def take(self, key: str, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        if key not in self:
            assert self.generator is not None, f"no weight {key}"
            self[key] = around + scale * torch.randn(shape, generator=self.generator)
        assert tuple(self[key].shape) == shape, (key, tuple(self[key].shape), shape)
        return self[key]

    def linear(self, key: str, x: Tensor, width: int, bias: bool = True) -> Tensor:
        inner = x.shape[-1]
        weight = self.take(f"{key}.weight", width, inner, scale=inner**-0.5)
        return F.linear(x, weight, self.take(f"{key}.bias", width, scale=0.3) if bias else None)

    def convolution(
        self, key: str, x: Tensor, width: int, *kernel: int, padding: int = 0, stride: int = 1
    ) -> Tensor:
        """In as many dimensions as `kernel` has."""
        inner = x.shape[1]
        weight = self.take(
            f"{key}.weight", width, inner, *kernel, scale=(inner * math.prod(kernel)) ** -0.5
        )
        operation = F.conv2d if len(kernel) == 2 else F.conv3d
        return operation(
            x, weight, self.take(f"{key}.bias", width, scale=0.3), padding=padding, stride=stride
        )

    def layer_norm(self, key: str, x: Tensor, eps: float) -> Tensor:
        scale, shift = self.affine(key, x.shape[-1])
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / (
            (x - mean).square().mean(-1, keepdim=True) + eps
        ).sqrt() * scale + shift

    def group_norm(self, key: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.group_norm(x, 32, *self.affine(key, x.shape[1]), eps)

    def affine(self, key: str, width: int) -> tuple[Tensor, Tensor]:
        return self.take(f"{key}.weight", width, scale=0.2, around=1.0), self.take(
            f"{key}.bias", width, scale=0.3
        )


def softmax_attention(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, visible: Tensor | None = None
) -> Tensor:
    """[B, S, H * d]. `visible` [S, S]: true where the row may attend to the column."""
    scores = q_BHSd @ k_BHSd.mT / math.sqrt(q_BHSd.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v_BHSd).transpose(1, 2).flatten(2)


def heads(x_BSD: Tensor, count: int) -> Tensor:
    """[B, H, S, d], the heads one after another in D."""
    return x_BSD.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x_BHSd: Tensor, turns_Sp: Tensor) -> Tensor:
    """Pairs of neighbours as complex numbers, turned by `turns`, complex [S, d / 2]."""
    pairs = torch.view_as_complex(x_BHSd.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns_Sp).flatten(-2)


def turns(positions: Tensor, width: int, theta: float) -> Tensor:
    """exp(i p theta^(-2j/width)), complex [S, width / 2]."""
    angles = positions.double()[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def waves(values_B: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the values times exp(-ln(10000) j / (width / 2))."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2).float() / (width // 2))
    angles = values_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
