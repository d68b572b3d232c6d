"""Language model over semantic tokens: text and two scalars in, logits of the next token out.

The plain torch model: the reference for the parallel one, and what sampling and export use.

Letters: B batch, S positions (L + 3 conditions, then the body, see token_layout.py), L text tokens, T text
width, D model width, H heads, d width of a head, V vocabulary, N layers.

forward(ids_BS, text_BLT, frames_B, motion_score_B) -> logits_BSV

Precision (specification §4.5): the residual stream and the matmuls run in the dtype of the matmul weights,
or under autocast in autocast's; norms and rotary embedding are float32 inside; the last hidden state is
cast to float32 before the final norm, and final norm and head run in float32.
Source: LanDiff (arXiv 2503.04606), its released language model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.base import ConfigError
from model_zoo.attention import attention
from model_zoo.config import LMConfig
from model_zoo.token_layout import IGNORE, NUM_MICRO_CONDITIONS, TokenLayout

INIT_STD = 0.02


class TextProjection(nn.Module):
    """States of the frozen text encoder -> model width, or one learned null vector where the text is dropped."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(text_dim, hidden_size)
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.null = nn.Parameter(torch.empty(hidden_size))
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        for linear in (self.fc0, self.fc1):
            # torch's own cut at ±2, far outside: the standard deviation stays what it says
            nn.init.trunc_normal_(linear.weight, std=math.sqrt(2 / linear.in_features), generator=generator)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.null, std=1 / math.sqrt(self.null.numel()), generator=generator)

    def forward(self, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """[..., T] -> [..., D]. `drop` is boolean, broadcastable to text.shape[:-1]: true = the null vector."""
        hidden = functional.gelu(self.fc0(text.to(self.fc0.weight.dtype)), approximate="tanh")
        projected = self.fc1(hidden)
        if drop is None:
            return projected
        return torch.where(drop[..., None], self.null.to(projected.dtype), projected)


def sinusoid(values_B: Tensor, dim: int) -> Tensor:
    """[cos(v f_0) … cos(v f_j) …, sin(v f_0) …], f_j = 10000^(-2j / dim) -> float32 [B, dim]."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=values_B.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = values_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarCondition(nn.Module):
    """One scalar -> one vector of model width. Starts as zero."""

    def __init__(self, hidden_size: int, micro_hidden_size: int, frequency_dim: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(frequency_dim, micro_hidden_size)
        self.fc1 = nn.Linear(micro_hidden_size, hidden_size)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        bound = 1 / math.sqrt(self.fc0.in_features)  # torch's default for a linear layer
        nn.init.uniform_(self.fc0.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.fc0.bias, -bound, bound, generator=generator)
        nn.init.zeros_(self.fc1.weight)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, values_B: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        waves = sinusoid(values_B, self.fc0.in_features).to(self.fc0.weight.dtype)
        return self.fc1(functional.silu(self.fc0(waves)))


class MicroConditions(nn.Module):
    """Number of semantic frames and motion score, each through a network of its own, in that order."""

    def __init__(self, hidden_size: int, micro_hidden_size: int, frequency_dim: int) -> None:
        super().__init__()
        self.frames = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)
        self.motion_score = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.frames.init_weights(generator)
        self.motion_score.init_weights(generator)

    def forward(self, frames_B: Tensor, motion_score_B: Tensor) -> Tensor:
        """-> [B, 2, D]: frames, then motion score. Frames are counted after the tokenizer (13 for 49 video frames)."""
        return torch.stack([self.frames(frames_B), self.motion_score(motion_score_B)], dim=1)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j / d) for positions [S] -> float32 [S, d/2] each."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on adjacent pairs (2j, 2j + 1), in float32, cast back. cos, sin: [S, d/2]."""
    even, odd = x_BSHd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BSHd.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm, float32 inside, the weight multiplied in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class KVCache:
    """Keys and values of all layers for up to `capacity` positions, allocated once, filled from the left."""

    def __init__(self, config: LMConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        head_dim = config.hidden_size // config.num_heads
        shape = (2, config.num_layers, batch, capacity, config.num_heads, head_dim)
        self.kv_2NBSHd = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # positions filled; the model moves it on after the last layer

    @property
    def capacity(self) -> int:
        return self.kv_2NBSHd.shape[3]

    def append(self, layer: int, k_BSHd: Tensor, v_BSHd: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return all of that layer so far."""
        end = self.length + k_BSHd.shape[1]
        assert end <= self.capacity, (end, self.capacity)
        keys, values = self.kv_2NBSHd[:, layer].unbind(0)
        keys[:, self.length : end] = k_BSHd
        values[:, self.length : end] = v_BSHd
        return keys[:, :end], values[:, :end]


class Block(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm, without biases."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        size, ffn = config.hidden_size, config.ffn_size
        self.layer, self.num_heads = layer, config.num_heads
        self.norm0 = RMSNorm(size, config.norm_eps)
        self.norm1 = RMSNorm(size, config.norm_eps)
        self.wqkv = nn.Linear(size, 3 * size, bias=False)  # rows: all q heads, all k heads, all v heads
        self.wo = nn.Linear(size, size, bias=False)
        self.w1 = nn.Linear(size, ffn, bias=False)  # the gate
        self.w2 = nn.Linear(ffn, size, bias=False)
        self.w3 = nn.Linear(size, ffn, bias=False)

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.wqkv, self.wo, self.w1, self.w2, self.w3

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None) -> Tensor:
        qkv_BS3Hd = self.wqkv(self.norm0(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv_BS3Hd.unbind(2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        attended_BSHd = attention(q, k, v, causal=mask is None, mask=mask)
        x_BSD = x_BSD + self.wo(attended_BSHd.flatten(2))
        y_BSD = self.norm1(x_BSD)
        return x_BSD + self.w2(functional.gelu(self.w1(y_BSD), approximate="tanh") * self.w3(y_BSD))


class LanguageModel(nn.Module):
    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = TokenLayout.of(config)
        self.token_embedding = nn.Embedding(self.layout.vocab_size, config.hidden_size)
        self.text = TextProjection(config.text_dim, config.hidden_size)
        self.micro = MicroConditions(config.hidden_size, config.micro_hidden_size, config.micro_frequency_dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, self.layout.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew (specification §4.3-§4.5); also after `to_empty` on a model built on meta."""
        self.text.init_weights(generator)
        self.micro.init_weights(generator)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD, generator=generator)
        for block in self.blocks:
            nn.init.ones_(block.norm0.weight)
            nn.init.ones_(block.norm1.weight)
            for linear in block.linears:
                nn.init.normal_(linear.weight, std=INIT_STD, generator=generator)
        nn.init.ones_(self.final_norm.weight)
        nn.init.zeros_(self.final_norm.bias)
        nn.init.normal_(self.head.weight, std=INIT_STD, generator=generator)

    def to_inference(self, dtype: torch.dtype) -> LanguageModel:
        """Keep the matmul weights in `dtype`, norms and head in float32.

        Gives the numbers of a float32 model under autocast to `dtype`, without casting 2 B weights for every
        token. In place; returns self, in eval mode and without gradients.
        """
        self.requires_grad_(False).eval().float()
        for module in (self.token_embedding, self.text, self.micro):
            module.to(dtype)
        for block in self.blocks:
            for linear in block.linears:
                linear.to(dtype)
        return self

    def forward(self, ids_BS: Tensor, text_BLT: Tensor, frames_B: Tensor, motion_score_B: Tensor,
                drop_text_B: Tensor | None = None) -> Tensor:
        """-> float32 logits [B, S, V] of the token after each position.

        ids_BS: `TokenLayout.build` of each clip, IGNORE at condition positions. drop_text_B: bool, true = null text.
        Raises ValueError where the text's length is not that of the ids.
        """
        x_BSD = self.embed(ids_BS, text_BLT, frames_B, motion_score_B, drop_text_B)
        return self.logits(self.transform(x_BSD))

    def embed(self, ids_BS: Tensor, text_BLT: Tensor, frames_B: Tensor, motion_score_B: Tensor,
              drop_text_B: Tensor | None = None) -> Tensor:
        """The rows [B, S, D] that enter the first block."""
        prompt_BPD = self.embed_prompt(text_BLT, frames_B, motion_score_B, drop_text_B)
        start = prompt_BPD.shape[1]
        is_condition = ids_BS == IGNORE
        if not bool(is_condition[:, 1:start].all() & ~is_condition[:, start:].any()):
            raise ValueError(
                f"ids of shape {tuple(ids_BS.shape)} do not fit a text of {text_BLT.shape[1]} tokens: positions "
                f"1 … {start - 1} and no others must hold {IGNORE}"
            )
        return torch.cat([prompt_BPD, self.embed_tokens(ids_BS[:, start:])], dim=1)

    def embed_tokens(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, D] in the dtype of the residual stream."""
        embedded = self.token_embedding(ids_BS)
        device = embedded.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            embedded = embedded.to(torch.get_autocast_dtype(device))
        return embedded

    def embed_prompt(self, text_BLT: Tensor, frames_B: Tensor, motion_score_B: Tensor,
                     drop_text_B: Tensor | None = None) -> Tensor:
        """BOS, micro-conditions and text -> [B, 3 + L, D]."""
        batch, length, width = text_BLT.shape
        if width != self.config.text_dim or not 1 <= length <= self.config.max_text_tokens:
            raise ValueError(
                f"text states of shape {tuple(text_BLT.shape)} do not fit the model: text_dim = {self.config.text_dim}, "
                f"1 to max_text_tokens = {self.config.max_text_tokens} tokens"
            )
        bos_B1D = self.embed_tokens(torch.full((batch, 1), self.layout.bos, device=text_BLT.device))
        micro_B2D = self.micro(frames_B, motion_score_B)
        text_BLD = self.text(text_BLT, None if drop_text_B is None else drop_text_B[:, None])
        assert micro_B2D.shape[1] == NUM_MICRO_CONDITIONS, micro_B2D.shape
        return torch.cat([bos_B1D, micro_B2D.to(bos_B1D.dtype), text_BLD.to(bos_B1D.dtype)], dim=1)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache for `batch` rows; make it under the autocast that the steps will run under, if any."""
        if capacity > self.config.max_positions:
            raise ConfigError(
                f"text and tokens of the video take {capacity} positions, more than the language model's "
                f"max_positions = {self.config.max_positions}; ask for fewer frames or a shorter text"
            )
        weight = self.blocks[0].wqkv.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(self.config, batch, capacity, weight.device, dtype)

    def transform(self, x_BSD: Tensor, *, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Blocks -> [B, S, D], before the final norm. With a cache the rows continue what it holds.

        mask: bool, true = may attend, broadcastable to [B, H, S, cached + S]; causal by default.
        """
        before = cache.length if cache is not None else 0
        end = before + x_BSD.shape[1]
        if end > self.config.max_positions:
            raise ValueError(f"{end} positions exceed max_positions = {self.config.max_positions}")
        positions = torch.arange(before, end, device=x_BSD.device)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = rotary_table(positions, head_dim, self.config.rope_theta)
        for block in self.blocks:
            x_BSD = block(x_BSD, rotary, cache, mask)
        if cache is not None:
            cache.length = end
        return x_BSD

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Final norm and head, in float32 whatever surrounds them -> [B, S, V]."""
        device = x_BSD.device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            norm = self.final_norm
            y_BSD = functional.layer_norm(x_BSD.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            return functional.linear(y_BSD, self.head.weight.float())
