"""Language model of semantic tokens: text and two scalars in, logits of the next token out.

This is the plain torch model: the reference for the parallel one in training/lm, and the one that
sampling and export use.

Shape letters (docs/glossary.md): B batch, S positions (3 + L conditions, then the body, see
token_layout.py), L text rows, P prompt positions (BOS and conditions), D width of a vector (of text
states or of the model), A heads, d width of a head, V vocabulary.

Precision (docs/specification.md §4.5): the residual stream and the matrix multiplications have the
dtype of the weights, or that of a surrounding autocast. Norms and rotary embedding use float32.
The last hidden state is cast to float32, and final norm and head run in float32.

Source: released language model of LanDiff (arXiv 2503.04606).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from landiff.configs.base import ConfigError
from landiff.model_zoo.attention import attention
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.layers import RMSNorm, rotary_table, rotate, sinusoid
from landiff.model_zoo.token_layout import IGNORE, NUM_MICRO_CONDITIONS, TokenLayout

INIT_STD = 0.02


class TextProjection(nn.Module):
    """MLP from text states to the model's width, with a learned null vector for dropped text."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(text_dim, hidden_size)
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.null = nn.Parameter(torch.empty(hidden_size))
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all parameters (§4.3)."""
        for linear in (self.fc0, self.fc1):
            # torch truncates at ±2, so far out that it does not change the standard deviation.
            std = math.sqrt(2 / linear.in_features)
            nn.init.trunc_normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.null, std=1 / math.sqrt(self.null.numel()), generator=generator)

    def forward(self, text: Tensor, drop: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], from the width of text states to that of the model.

        drop: bool, broadcastable to [...]; true = the null vector instead of the text.
        """
        hidden = functional.gelu(self.fc0(text.to(self.fc0.weight.dtype)), approximate="tanh")
        projected = self.fc1(hidden)
        if drop is None:
            return projected
        return torch.where(drop[..., None], self.null.to(projected.dtype), projected)


class ScalarCondition(nn.Module):
    """MLP from the sinusoid of a scalar to the width of the model. Its output is zero at first."""

    def __init__(self, hidden_size: int, micro_hidden_size: int, frequency_dim: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(frequency_dim, micro_hidden_size)
        self.fc1 = nn.Linear(micro_hidden_size, hidden_size)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws the first layer and sets the second to zero (§4.4)."""
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
    """Vectors of the number of semantic frames and of the motion score, each from its own MLP.

    With a grid, MLPs of its rows and columns are added to the vector of the frames. They are zero
    at first, so a model that was trained without them can continue with them.
    """

    def __init__(
        self,
        hidden_size: int,
        micro_hidden_size: int,
        frequency_dim: int,
        *,
        grid: bool = False,
    ) -> None:
        super().__init__()
        self.frames = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)
        self.motion_score = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)
        self.rows: ScalarCondition | None = None
        self.columns: ScalarCondition | None = None
        if grid:
            self.rows = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)
            self.columns = ScalarCondition(hidden_size, micro_hidden_size, frequency_dim)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all parameters."""
        self.frames.init_weights(generator)
        self.motion_score.init_weights(generator)
        if self.rows is not None and self.columns is not None:
            self.rows.init_weights(generator)
            self.columns.init_weights(generator)

    def forward(
        self, frames_B: Tensor, motion_score_B: Tensor, grid_B2: Tensor | None = None
    ) -> Tensor:
        """[B], [B], [B, 2] -> [B, 2, D], the vector of the frames first.

        frames_B counts semantic frames, 13 for a video of 49 frames. grid_B2: rows and columns of
        feature cells; a model without a grid ignores them. Raises ValueError if they are missing.
        """
        frames_BD = self.frames(frames_B)
        if self.rows is not None and self.columns is not None:
            if grid_B2 is None:
                raise ValueError(
                    "grid_condition = true: the model needs rows and columns of feature cells"
                )
            frames_BD = frames_BD + self.rows(grid_B2[:, 0]) + self.columns(grid_B2[:, 1])
        return torch.stack([frames_BD, self.motion_score(motion_score_B)], dim=1)


def micro_conditions(config: LMConfig) -> MicroConditions:
    """The micro-conditions of a model."""
    return MicroConditions(
        config.hidden_size,
        config.micro_hidden_size,
        config.micro_frequency_dim,
        grid=config.grid_condition,
    )


class KVCache:
    """Keys and values of all layers for up to `capacity` positions.

    The memory is allocated once and filled from the left. `length` is the number of filled
    positions; the model advances it after the last layer.
    """

    def __init__(
        self,
        config: LMConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        head_dim = config.hidden_size // config.num_heads
        # Keys and values, layers, then [B, capacity, A, d].
        shape = (2, config.num_layers, batch, capacity, config.num_heads, head_dim)
        self.keys_and_values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Number of positions that fit."""
        return self.keys_and_values.shape[3]

    def append(self, layer: int, k_BSAd: Tensor, v_BSAd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values of a layer.

        Returns all keys and values of that layer so far, [B, length + S, A, d] each.
        """
        end = self.length + k_BSAd.shape[1]
        assert end <= self.capacity, (end, self.capacity)
        keys, values = self.keys_and_values[:, layer].unbind(0)
        keys[:, self.length : end] = k_BSAd
        values[:, self.length : end] = v_BSAd
        return keys[:, :end], values[:, :end]


class Block(nn.Module):
    """Attention and gated MLP, each after an RMSNorm and without biases (§4.5)."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        ffn = config.ffn_size
        self.layer = layer
        self.num_heads = config.num_heads
        self.norm0 = RMSNorm(size, config.norm_eps)
        self.norm1 = RMSNorm(size, config.norm_eps)
        # Rows: q of all heads, k of all heads, v of all heads.
        self.wqkv = nn.Linear(size, 3 * size, bias=False)
        self.wo = nn.Linear(size, size, bias=False)
        self.w1 = nn.Linear(size, ffn, bias=False)  # the gate
        self.w2 = nn.Linear(ffn, size, bias=False)
        self.w3 = nn.Linear(size, ffn, bias=False)

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """All linear layers of the block."""
        return self.wqkv, self.wo, self.w1, self.w2, self.w3

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KVCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D].

        rotary: cosines and sines [S, d/2] of the positions, see `layers.rotary_table`.
        cache: keys and values of the positions before these, to which new ones are appended.
        mask: bool, broadcastable to [B, A, S, keys]; causal if None.
        """
        qkv_BS3Ad = self.wqkv(self.norm0(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        q_BSAd, k_BSAd, v_BSAd = qkv_BS3Ad.unbind(2)
        q_BSAd = rotate(q_BSAd, *rotary)
        k_BSAd = rotate(k_BSAd, *rotary)
        if cache is not None:
            k_BSAd, v_BSAd = cache.append(self.layer, k_BSAd, v_BSAd)
        attended_BSAd = attention(q_BSAd, k_BSAd, v_BSAd, causal=mask is None, mask=mask)
        x_BSD = x_BSD + self.wo(attended_BSAd.flatten(2))
        y_BSD = self.norm1(x_BSD)
        gate = functional.gelu(self.w1(y_BSD), approximate="tanh")
        return x_BSD + self.w2(gate * self.w3(y_BSD))


class LanguageModel(nn.Module):
    """Transformer over conditions and semantic tokens (§4).

    `forward` returns the logits of whole sequences. Sampling calls `embed_prompt` and
    `embed_tokens`, then `sample.decode.Decoder`, or under autocast `transform` with a cache and
    `logits`.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.layout = TokenLayout.of(config)
        self.token_embedding = nn.Embedding(self.layout.vocab_size, size)
        self.text = TextProjection(config.text_dim, size)
        self.micro = micro_conditions(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.head = nn.Linear(size, self.layout.vocab_size, bias=False)
        self.init_weights()

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all parameters (§4.3 to §4.5), also after `to_empty` of a model built on meta."""
        self.text.init_weights(generator)
        self.micro.init_weights(generator)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD, generator=generator)
        for block in self._blocks():
            nn.init.ones_(block.norm0.weight)
            nn.init.ones_(block.norm1.weight)
            for linear in block.linears:
                nn.init.normal_(linear.weight, std=INIT_STD, generator=generator)
        nn.init.ones_(self.final_norm.weight)
        nn.init.zeros_(self.final_norm.bias)
        nn.init.normal_(self.head.weight, std=INIT_STD, generator=generator)

    def to_inference(self, dtype: torch.dtype) -> LanguageModel:
        """Casts weights of linear layers to `dtype` and keeps norms and head in float32.

        The results are those of a float32 model under autocast to `dtype`, without casting all
        weights for each token. Changes the model in place, to eval mode and without gradients, and
        returns it.
        """
        self.requires_grad_(False).eval().float()
        for module in (self.token_embedding, self.text, self.micro):
            module.to(dtype)
        for block in self._blocks():
            for linear in block.linears:
                linear.to(dtype)
        return self

    def forward(
        self,
        ids_BS: Tensor,
        text_BLD: Tensor,
        frames_B: Tensor,
        motion_score_B: Tensor,
        drop_text_B: Tensor | None = None,
        grid_B2: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each position, float32 [B, S, V].

        ids_BS: `TokenLayout.build` of each clip, with IGNORE at condition positions.
        text_BLD: states of the text encoder.
        frames_B, motion_score_B: number of semantic frames and motion score of each clip.
        drop_text_B: bool, true = the null text.
        grid_B2: rows and columns of feature cells of each clip, for a model with `grid_condition`.

        Raises ValueError where the length of the text is not the one that the ids were built for.
        """
        x_BSD = self.embed(ids_BS, text_BLD, frames_B, motion_score_B, drop_text_B, grid_B2)
        return self.logits(self.transform(x_BSD))

    def embed(
        self,
        ids_BS: Tensor,
        text_BLD: Tensor,
        frames_B: Tensor,
        motion_score_B: Tensor,
        drop_text_B: Tensor | None = None,
        grid_B2: Tensor | None = None,
    ) -> Tensor:
        """Input of the first block, [B, S, D]. Arguments and errors are those of `forward`."""
        prompt_BPD = self.embed_prompt(text_BLD, frames_B, motion_score_B, drop_text_B, grid_B2)
        start = prompt_BPD.shape[1]
        is_condition_BS = ids_BS == IGNORE
        fits = is_condition_BS[:, 1:start].all() & ~is_condition_BS[:, start:].any()
        if not bool(fits):
            raise ValueError(
                f"ids of shape {tuple(ids_BS.shape)} do not fit a text of {text_BLD.shape[1]} "
                f"tokens: positions 1 … {start - 1} and no others must hold {IGNORE}"
            )
        return torch.cat([prompt_BPD, self.embed_tokens(ids_BS[:, start:])], dim=1)

    def embed_tokens(self, ids_BS: Tensor) -> Tensor:
        """[B, S] -> [B, S, D] in the dtype of the residual stream."""
        embedded_BSD = self.token_embedding(ids_BS)
        device = embedded_BSD.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            embedded_BSD = embedded_BSD.to(torch.get_autocast_dtype(device))
        return embedded_BSD

    def embed_prompt(
        self,
        text_BLD: Tensor,
        frames_B: Tensor,
        motion_score_B: Tensor,
        drop_text_B: Tensor | None = None,
        grid_B2: Tensor | None = None,
    ) -> Tensor:
        """Vectors of BOS, micro-conditions and text, [B, 3 + L, D].

        Raises ValueError for text states of another width or of too many tokens, and without the
        grid where the model has `grid_condition`.
        """
        batch, length, width = text_BLD.shape
        config = self.config
        if width != config.text_dim or not 1 <= length <= config.max_text_tokens:
            raise ValueError(
                f"text states of shape {tuple(text_BLD.shape)} do not fit the model: text_dim = "
                f"{config.text_dim}, 1 to max_text_tokens = {config.max_text_tokens} tokens"
            )
        bos_ids_B1 = torch.full((batch, 1), self.layout.bos, device=text_BLD.device)
        bos_B1D = self.embed_tokens(bos_ids_B1)
        micro_B2D = self.micro(frames_B, motion_score_B, grid_B2)
        assert micro_B2D.shape[1] == NUM_MICRO_CONDITIONS, micro_B2D.shape
        drop_B1 = None
        if drop_text_B is not None:
            drop_B1 = drop_text_B[:, None]
        projected_BLD = self.text(text_BLD, drop_B1)
        dtype = bos_B1D.dtype
        return torch.cat([bos_B1D, micro_B2D.to(dtype), projected_BLD.to(dtype)], dim=1)

    def check_capacity(self, capacity: int) -> None:
        """Raises ConfigError if a cache has more positions than the model."""
        if capacity > self.config.max_positions:
            raise ConfigError(
                f"text and tokens of the video take {capacity} positions, more than the language "
                f"model's max_positions = {self.config.max_positions}; ask for fewer frames or a "
                "shorter text"
            )

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` positions.

        If the steps run under autocast, create the cache under the same autocast. Raises
        ConfigError for more positions than the model has.
        """
        self.check_capacity(capacity)
        weight = next(iter(self._blocks())).wqkv.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(self.config, batch, capacity, weight.device, dtype)

    def transform(
        self, x_BSD: Tensor, *, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """All blocks, [B, S, D] -> [B, S, D] before the final norm.

        cache: the positions follow those that it holds, and are appended to it.
        mask: bool, true = may attend, broadcastable to [B, A, S, cached + S]; causal if None.

        Raises ValueError for more positions than the model has.
        """
        start = 0
        if cache is not None:
            start = cache.length
        end = start + x_BSD.shape[1]
        if end > self.config.max_positions:
            raise ValueError(f"{end} positions exceed max_positions = {self.config.max_positions}")
        positions_S = torch.arange(start, end, device=x_BSD.device)
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary = rotary_table(positions_S, head_dim, self.config.rope_theta)
        for block in self.blocks:
            x_BSD = block(x_BSD, rotary, cache, mask)
        if cache is not None:
            cache.length = end
        return x_BSD

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Final norm and head, [B, S, D] -> [B, S, V], in float32 under any autocast."""
        device = x_BSD.device.type
        if device == "meta":
            device = "cpu"  # autocast does not know the meta device
        norm = self.final_norm
        with torch.autocast(device, enabled=False):
            y_BSD = functional.layer_norm(
                x_BSD.float(),
                norm.normalized_shape,
                norm.weight.float(),
                norm.bias.float(),
                norm.eps,
            )
            return functional.linear(y_BSD, self.head.weight.float())
