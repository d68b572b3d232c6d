"""Incremental decoding of the language model with few operators per token.

`Decoder` computes what `LanguageModel.transform` computes with a cache, in inference mode and
without work that does not depend on the token: the rotations of all positions are computed once,
query, key and value are rotated by one complex product (the value by 1), keys and values are stored
by one copy, and the mask is made once a step, not once a layer.

On CUDA the step is captured as a graph for each number of new tokens, with the position as a
tensor, and replayed (`graphs`). The operators of such a step have static shapes: they attend to the
whole cache under a mask.

Shape letters (docs/glossary.md): R rows of the model, S new positions, C capacity of the cache, A
heads, d width of a head, D width of the model, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.attention import attention
from landiff.model_zoo.layers import rotary_table
from landiff.model_zoo.lm import Block, LanguageModel
from landiff.model_zoo.sample.placement.quantized import is_quantized

log = logging.getLogger(__name__)

WARM_UP_STEPS = 2  # before a capture, so that libraries have allocated their workspaces


@dataclass(frozen=True)
class _Layer:
    """Weights of a block. Norms are float32.

    Matrices are transposed for products from the left, except for quantized ones, which torchao
    multiplies in `functional.linear` only.
    """

    norm0: Tensor
    wqkv: Tensor
    wo: Tensor
    norm1: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor

    @classmethod
    def of(cls, block: Block) -> _Layer:
        """The weights of `block`, not copied unless a norm has another dtype."""

        def factor_of(linear: nn.Linear) -> Tensor:
            return linear.weight if is_quantized(linear.weight) else linear.weight.t()

        return cls(
            norm0=block.norm0.weight.float(),
            wqkv=factor_of(block.wqkv),
            wo=factor_of(block.wo),
            norm1=block.norm1.weight.float(),
            w1=factor_of(block.w1),
            w2=factor_of(block.w2),
            w3=factor_of(block.w3),
        )


class Decoder:
    """The blocks and the head of a model with a cache for up to `capacity` positions.

    Rows may begin with padding, to which no later position attends.

    length: number of filled positions.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        capacity: int,
        *,
        padding_R: Tensor | None = None,
        graphs: bool | None = None,
    ) -> None:
        """`padding_R`: positions of padding at the begin of each row; None if there are none.

        graphs: replay steps of few tokens; None where the model is on CUDA.

        Raises ConfigError for more positions than the model has. The weights must not change.
        """
        model.check_capacity(capacity)
        config = model.config
        weight = model.head.weight
        self.device = weight.device
        self.heads = config.num_heads
        self.eps = config.norm_eps
        self.layers = [_Layer.of(block) for block in cast(Iterable[Block], model.blocks)]
        self.dtype = self.layers[0].wqkv.dtype
        self.single = self.dtype == torch.float32
        self.quantized = is_quantized(self.layers[0].wqkv)
        self.eps_of_sum = config.norm_eps * config.hidden_size
        if self.single:
            root = config.hidden_size**0.5
            for number, layer in enumerate(self.layers):
                scaled = {"norm0": layer.norm0 * root, "norm1": layer.norm1 * root}
                self.layers[number] = replace(layer, **scaled)
        head_dim = config.hidden_size // config.num_heads
        positions_C = torch.arange(capacity, device=self.device)
        cos_Cd, sin_Cd = rotary_table(positions_C, head_dim, config.rope_theta)
        turn_C1d = torch.complex(cos_Cd, sin_Cd)[:, None]
        # Of query, key and value, [C, 3, 1, d / 2].
        self.rotations = torch.stack([turn_C1d, turn_C1d, torch.ones_like(turn_C1d)], dim=1)
        # Layers, [R, C], key and value, [A, d].
        shape = (config.num_layers, rows, capacity, 2, self.heads, head_dim)
        self.cache = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.norm = (model.final_norm.weight.float(), model.final_norm.bias.float())
        self.head = weight.float()
        self.length = 0
        self.padding_R = padding_R
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self._captured: dict[int, _Graph | None] = {}

    @property
    def capacity(self) -> int:
        """Number of positions that fit."""
        return self.cache.shape[2]

    @torch.inference_mode()
    def step(self, x_RSD: Tensor) -> Tensor:
        """Appends new positions and returns the logits after the last one, float32 [R, V]."""
        count = x_RSD.shape[1]
        start = self.length
        end = start + count
        assert end <= self.capacity, (end, self.capacity)
        self.length = end
        if self.graphs and start:
            return self._replay(x_RSD, torch.arange(start, end, device=self.device))
        mask = None
        if self.padding_R is not None:
            positions_S = torch.arange(start, end, device=self.device)
            mask = padding_mask(self.padding_R, positions_S, end)
        elif start and count > 1:
            every = torch.ones(count, end, dtype=torch.bool, device=self.device)
            mask = every.tril(start)
        new = self.cache[:, :, start:end].unbind(0)
        keys, values = self.cache[:, :, :end].permute(3, 0, 1, 4, 2, 5).unbind(0)
        places = list(zip(new, keys.unbind(0), values.unbind(0), strict=True))

        def store(layer: int, kv_RS2Ad: Tensor) -> tuple[Tensor, Tensor]:
            place, keys_RACd, values_RACd = places[layer]
            place.copy_(kv_RS2Ad)
            return keys_RACd, values_RACd

        return self._forward(x_RSD, self.rotations[start:end], store, mask)

    def static_step(self, x_RSD: Tensor, positions_S: Tensor) -> Tensor:
        """As `step` at `positions_S`, with shapes that depend on the number of positions only."""
        if self.padding_R is None:
            mask = torch.arange(self.capacity, device=self.device) <= positions_S[:, None]
        else:
            mask = padding_mask(self.padding_R, positions_S, self.capacity)

        def store(layer: int, kv_RS2Ad: Tensor) -> tuple[Tensor, Tensor]:
            cache = self.cache[layer]
            cache.index_copy_(1, positions_S, kv_RS2Ad)
            keys_RACd, values_RACd = cache.permute(2, 0, 3, 1, 4).unbind(0)
            return keys_RACd, values_RACd

        return self._forward(x_RSD, self.rotations[positions_S], store, mask)

    def _forward(
        self,
        x_RSD: Tensor,
        rotations_S31d: Tensor,
        store: Callable[[int, Tensor], tuple[Tensor, Tensor]],
        mask: Tensor | None,
    ) -> Tensor:
        """All blocks and the head. `store` keeps keys and values and returns all of a layer."""
        rows, count, width = x_RSD.shape
        x = x_RSD.reshape(rows * count, width)
        by_pairs = (rows, count, 3, self.heads, -1, 2)
        by_heads = (rows, count, 3, self.heads, width // self.heads)
        for number, layer in enumerate(self.layers):
            y = self._rms_norm(x, layer.norm0)
            pairs = torch.view_as_complex(self._float(self._product(y, layer.wqkv)).view(by_pairs))
            turned = torch.view_as_real(pairs * rotations_S31d).view(by_heads)
            if not self.single:
                turned = turned.to(self.dtype)
            keys, values = store(number, turned[:, :, 1:])
            attended = _attend(turned[:, :, 0], keys, values, mask)
            x = self._add_product(x, attended.reshape(rows * count, width), layer.wo)
            y = self._rms_norm(x, layer.norm1)
            gate = functional.gelu(self._product(y, layer.w1), approximate="tanh")
            x = self._add_product(x, gate * self._product(y, layer.w3), layer.w2)
        last_RD = self._float(x.view(rows, count, width)[:, -1])
        weight, bias = self.norm
        return functional.linear(
            functional.layer_norm(last_RD, (width,), weight, bias, self.eps), self.head
        )

    def _float(self, x: Tensor) -> Tensor:
        return x if self.single else x.float()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of `layers.rms_norm`; in float32 with half of its operators.

        weight: times the root of the width in float32, see `__init__`.
        """
        if not self.single:
            return torch.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * length.mul_(length).add_(self.eps_of_sum).rsqrt_() * weight

    def _product(self, factor: Tensor, weight: Tensor) -> Tensor:
        """The product with a matrix of `_Layer`."""
        if self.quantized:
            return functional.linear(factor, weight)
        return torch.mm(factor, weight)

    def _add_product(self, x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        """x + factor · weight. In half precision the product is rounded first, as in the model."""
        if self.single and not self.quantized:
            return torch.addmm(x, factor, weight)
        return x + self._product(factor, weight)

    def _replay(self, x_RSD: Tensor, positions_S: Tensor) -> Tensor:
        """`static_step`, as a graph where the device can capture it."""
        count = x_RSD.shape[1]
        if count not in self._captured:
            self._captured[count] = _capture(self.static_step, x_RSD, positions_S)
        graph = self._captured[count]
        if graph is None:
            return self.static_step(x_RSD, positions_S)
        return graph(x_RSD, positions_S)


def padding_mask(padding_R: Tensor, positions_S: Tensor, keys: int) -> Tensor:
    """Mask that hides later positions and padding, bool [R, 1, S, keys], true = may attend.

    padding_R: positions of padding at the begin of each row.
    """
    queries_S1 = positions_S[:, None]
    keys_K = torch.arange(keys, device=positions_S.device)
    mask_RSK = (keys_K <= queries_S1) & (keys_K >= padding_R[:, None, None])
    mask_RSK |= keys_K == queries_S1  # padding attends to itself: no row of the mask may be empty
    return mask_RSK[:, None]


def _attend(q_RSAd: Tensor, keys_RACd: Tensor, values_RACd: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, causal without a mask, [R, S, A, d]."""
    if q_RSAd.is_cuda:
        keys_RCAd = keys_RACd.transpose(1, 2)
        values_RCAd = values_RACd.transpose(1, 2)
        return attention(q_RSAd, keys_RCAd, values_RCAd, causal=mask is None, mask=mask)
    # One call: for few queries, `attention` with its views takes longer than the kernel.
    attended_RASd = functional.scaled_dot_product_attention(
        q_RSAd.transpose(1, 2),
        keys_RACd,
        values_RACd,
        attn_mask=mask,
        is_causal=mask is None and q_RSAd.shape[1] > 1,
    )
    return attended_RASd.transpose(1, 2)


class _Graph:
    """A captured function of tensors of fixed shapes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...], out: Tensor
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.out = out

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The result for `inputs`. It is overwritten by the next call with the same shapes."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.out


def _capture(function: Callable[..., Tensor], *inputs: Tensor) -> _Graph | None:
    """Captures a call; None on the CPU, and with a warning where the capture fails.

    The function runs on `inputs` before it is captured.
    """
    if not inputs[0].is_cuda:
        return None
    own = tuple(tensor.clone() for tensor in inputs)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                function(*own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*own)
    except RuntimeError as error:
        log.warning("tokens are sampled without CUDA graphs, whose capture failed: %s", error)
        return None
    return _Graph(graph, own, out)
