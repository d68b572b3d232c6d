"""Semantic tokenizer: vision features in, a few discrete codes per frame out, and back.

Letters: B batch, T frames, C feature channels, h w feature rows and columns, n = h * w visual tokens of a
frame, N latent tokens of a clip = iframe_tokens + (T - 1) * pframe_tokens, S = T * n + N sequence, D hidden
width, H heads, K head width (of an attention) or codes (of a whole clip), Z width of a latent token.

    encode(features_BTChw) -> indices_BK
    decode(indices_BK, num_frames) -> features_BTChw
    forward(features_BTChw) -> TokenizerOutput, for training on one segment

The sequence inside, and who sees whom in it: frame_spans.py.
Source: LanDiff (arXiv 2503.04606), semantic tokenizer; sizes as in the released code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import cdist

from model_zoo.config import TokenizerConfig
from model_zoo.frame_spans import AttentionSpan, Sequence, decoder_spans, encoder_spans, span_attention

log = logging.getLogger(__name__)

NORM_EPS = 1e-5
FEATURE_EPS = 1e-8  # added to the standard deviation of a feature channel


@dataclass(frozen=True)
class TokenizerOutput:
    loss: Tensor  # commitment_weight * commitment + reconstruction
    commitment: Tensor
    reconstruction: Tensor  # mean squared error of the (possibly normalised) features
    indices: Tensor  # int64 [B, N]
    decoded: Tensor  # [B, T, C, h, w], on the scale of the input features
    perplexity: Tensor  # exp(entropy) of the codes of this batch: between 1 and codebook_size
    codes_used: Tensor  # share of the codebook that this batch uses, 0..1


# ---------------------------------------------------------------- positions


def rotary_angles(sequence: Sequence, grid_width: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles of the 3-D rotary embedding, float32 [S, head_dim / 2], in the order time, row, column.

    A visual token stands at (frame, row, column), the m-th latent of a clip at (m, m, m): the latents'
    positions start again at 0 and overlap with the visual ones on purpose.
    """
    place = torch.arange(sequence.num_visual, device=device)
    cell = place % sequence.frame_tokens
    visual_S3 = torch.stack([place // sequence.frame_tokens, cell // grid_width, cell % grid_width], dim=1)
    latent_S3 = torch.arange(sequence.num_latent, device=device)[:, None].expand(-1, 3)
    position_S3 = torch.cat([visual_S3, latent_S3]).double()
    angles = []
    for axis, dim in enumerate((head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)):
        exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
        angles.append(position_S3[:, axis, None] * theta**-exponent)
    return torch.cat(angles, dim=1).float()


def rotate(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    """Rotate the pairs of adjacent elements (2j, 2j + 1) in float32; the result has x's dtype."""
    even, odd = x_BSHK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_SK[:, None], sin_SK[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BSHK.dtype)


# ---------------------------------------------------------------- transformer


@dataclass(frozen=True)
class Context:
    """What all blocks of one pass share."""

    spans: list[AttentionSpan]
    cos_SK: Tensor
    sin_SK: Tensor


class Block(nn.Module):
    """Pre-norm block: attention without biases, MLP with exact GELU and biases."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        qkv = self.qkv(self.norm1(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        q_BSHK, k_BSHK, v_BSHK = qkv.unbind(2)
        q_BSHK = rotate(q_BSHK, context.cos_SK, context.sin_SK)
        k_BSHK = rotate(k_BSHK, context.cos_SK, context.sin_SK)
        x_BSD = x_BSD + self.out(span_attention(q_BSHK, k_BSHK, v_BSHK, context.spans).flatten(2))
        return x_BSD + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x_BSD))))


class Stack(nn.Module):
    """LayerNorm, blocks, a selection of positions, LayerNorm: the part that encoder and decoder share."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.recompute = False  # recompute the blocks' activations in backward instead of keeping them
        self.norm_in = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)

    def run(self, x_BSD: Tensor, context: Context, keep: slice) -> Tensor:
        x_BSD = self.norm_in(x_BSD)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BSD = checkpoint(block, x_BSD, context, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, context)
        return self.norm_out(x_BSD[:, keep])


class Encoder(Stack):
    """Visual tokens and learned queries -> latents before quantisation."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed = nn.Linear(config.feature_channels, dim)
        self.iframe_queries = nn.Parameter(torch.randn(config.iframe_tokens, dim) * dim**-0.5)
        self.pframe_queries = nn.Parameter(torch.randn(config.pframe_tokens, dim) * dim**-0.5)
        self.head = nn.Linear(dim, config.token_size)

    def forward(self, features_BTChw: Tensor, sequence: Sequence, context: Context) -> Tensor:
        """-> latents_BNZ. The P queries are the same for every frame; place and mask tell them apart."""
        visual_BSD = self.embed(features_BTChw.flatten(3).transpose(2, 3).flatten(1, 2))
        queries_ND = torch.cat([self.iframe_queries, self.pframe_queries.repeat(sequence.num_frames - 1, 1)])
        queries_BND = queries_ND.to(visual_BSD.dtype).expand(len(visual_BSD), -1, -1)
        x_BSD = torch.cat([visual_BSD, queries_BND], dim=1)
        return self.head(self.run(x_BSD, context, slice(sequence.num_visual, None)))


class Decoder(Stack):
    """Quantised latents -> features, from copies of one mask token."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed = nn.Linear(config.token_size, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * dim**-0.5)
        self.head_in = nn.Linear(dim, 2 * dim)
        self.head_out = nn.Linear(2 * dim, config.feature_channels)

    def forward(self, latents_BNZ: Tensor, sequence: Sequence, context: Context) -> Tensor:
        """-> features_BSC of the visual positions."""
        latents_BND = self.embed(latents_BNZ)
        visual_BSD = self.mask_token.to(latents_BND.dtype).expand(len(latents_BND), sequence.num_visual, -1)
        x_BSD = torch.cat([visual_BSD, latents_BND], dim=1)
        return self.head_out(torch.tanh(self.head_in(self.run(x_BSD, context, slice(0, sequence.num_visual)))))


# ---------------------------------------------------------------- quantiser


class Quantizer(VectorQuantize):
    """vector-quantize-pytorch as the released tokenizer uses it: EMA codebook, rotation-trick gradient.

    Everything in it is float32, whatever the model is cast to and under autocast, but for the
    projection in `nearest`, which follows autocast (docs/specification.md §3.10). Code vectors are
    all-reduced over ranks if the process group exists when this is built. k-means initialisation and the
    replacement of dead codes draw from torch's global generator, in training only.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        group = torch.distributed
        synced = group.is_available() and group.is_initialized() and group.get_world_size() > 1
        super().__init__(
            dim=config.token_size,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            decay=config.codebook_decay,
            eps=1e-5,
            kmeans_init=True,
            kmeans_iters=config.kmeans_iterations,
            threshold_ema_dead_code=config.dead_code_threshold,
            commitment_weight=1.0,
            rotation_trick=True,
            sync_codebook=synced,  # the library's own default is remembered from the first time it is asked
        )
        # A buffer outside the state dict would stay without data when weights are loaded into a meta model.
        del self.zero
        self.zero = torch.zeros((), device="cpu")
        self.register_load_state_dict_pre_hook(_load_as_float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Follow moves between devices, not casts to another float type."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)

    def quantize(self, latents_BNZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training step: (values_BNZ float32 with gradient, indices_BN, commitment); updates the codebook."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            values_BNZ, indices_BN, _, losses = self(latents_BNZ.float(), return_loss_breakdown=True)
        return values_BNZ, indices_BN, losses.commitment

    @torch.no_grad()
    def nearest(self, latents_BNZ: Tensor) -> Tensor:
        """indices_BN of the nearest codes; the lowest index wins a tie. Changes nothing.

        Under autocast the projected vectors carry its rounding; distances are float32.
        """
        self.require_codebook()
        codes_BNE = self.project_in(latents_BNZ.float()).float()
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            return cdist(codes_BNE.flatten(0, 1)[None], self._codebook.embed)[0].argmin(-1).view(codes_BNE.shape[:2])

    def lookup(self, indices_BN: Tensor) -> Tensor:
        """values_BNZ float32 of codes."""
        self.require_codebook()
        with torch.autocast(indices_BN.device.type, enabled=False):
            return self.get_output_from_indices(indices_BN)

    def require_codebook(self) -> None:
        if not self._codebook.initted:
            raise ValueError(
                "the tokenizer's codebook is untrained (initted = 0): it is filled by k-means in the first "
                "training step; train the tokenizer or load trained weights before it encodes or decodes"
            )


def _load_as_float32(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Weights stored in half precision are loaded as float32, also where tensors are assigned, not copied."""
    for name in list(state):
        if name.startswith(prefix) and state[name].is_floating_point():
            state[name] = state[name].float()


# ---------------------------------------------------------------- the tokenizer


class SemanticTokenizer(nn.Module):
    """Encoder, quantiser and decoder. Build it after the process group so that ranks share one codebook."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.feature_channels))
        self.register_buffer("std", torch.ones(config.feature_channels))
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)
        self.register_load_state_dict_post_hook(_tell_of_statistics)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embed.weight.dtype

    def set_recompute(self, recompute: bool) -> None:
        """Trade compute for memory in training: recompute the blocks' activations in backward."""
        self.encoder.recompute = self.decoder.recompute = recompute

    def set_feature_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Per-channel statistics of the features, used where `normalize_features` is on."""
        self.mean.copy_(mean_C)
        self.std.copy_(std_C)

    def normalize(self, features_BTChw: Tensor) -> Tensor:
        return (features_BTChw - self.mean[:, None, None]) / (self.std[:, None, None] + FEATURE_EPS)

    def denormalize(self, features_BTChw: Tensor) -> Tensor:
        return features_BTChw * (self.std[:, None, None] + FEATURE_EPS) + self.mean[:, None, None]

    def sequence(self, num_frames: int) -> Sequence:
        config = self.config
        return Sequence(num_frames, config.grid_height * config.grid_width, config.iframe_tokens, config.pframe_tokens)

    def encode_latents(self, features_BTChw: Tensor) -> Tensor:
        """latents_BNZ before quantisation, of features as they enter the encoder (normalised if so configured)."""
        self._check_features(features_BTChw)
        sequence = self.sequence(features_BTChw.shape[1])
        context = self._context(sequence, encoder_spans(sequence), features_BTChw.device)
        return self.encoder(features_BTChw.to(self.dtype), sequence, context)

    def decode_latents(self, latents_BNZ: Tensor, num_frames: int) -> Tensor:
        """features_BTChw as they leave the decoder, of quantised latents_BNZ."""
        sequence = self.sequence(num_frames)
        context = self._context(sequence, decoder_spans(sequence), latents_BNZ.device)
        features_BSC = self.decoder(latents_BNZ.to(self.dtype), sequence, context)
        grid = (num_frames, self.config.grid_height, self.config.grid_width)
        return features_BSC.unflatten(1, grid).permute(0, 1, 4, 2, 3)

    def encode(self, features_BTChw: Tensor) -> Tensor:
        """int64 [B, K] codes. A clip longer than `segment_frames` is cut into segments, each with an I-frame and
        encoded by itself (the last may be shorter), whose codes follow each other.

        Raises ValueError for a wrong shape or an untrained codebook.
        """
        self._check_features(features_BTChw)
        if self.config.normalize_features:
            features_BTChw = self.normalize(features_BTChw)
        segments = features_BTChw.split(self.config.segment_frames, dim=1)
        return torch.cat([self.quantizer.nearest(self.encode_latents(segment)) for segment in segments], dim=1)

    def decode(self, indices_BK: Tensor, num_frames: int) -> Tensor:
        """features_BTChw of the codes of clips of `num_frames`; the inverse layout of `encode`.

        Raises ValueError for codes that do not fit and for an untrained codebook.
        """
        lengths = self._segment_lengths(num_frames)
        codes = [self.sequence(length).num_latent for length in lengths]
        if indices_BK.ndim != 2 or indices_BK.shape[1] != sum(codes):
            raise ValueError(f"{num_frames} frames have codes of shape [B, {sum(codes)}], not {list(indices_BK.shape)}")
        low, high = int(indices_BK.min()), int(indices_BK.max())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(f"codes {low}..{high} do not fit a codebook of {self.config.codebook_size}")
        segments = zip(self.quantizer.lookup(indices_BK).split(codes, dim=1), lengths, strict=True)
        features_BTChw = torch.cat([self.decode_latents(*segment) for segment in segments], dim=1)
        return self.denormalize(features_BTChw) if self.config.normalize_features else features_BTChw

    def _segment_lengths(self, num_frames: int) -> list[int]:
        if num_frames < 1:
            raise ValueError(f"num_frames = {num_frames} must be at least 1")
        whole, rest = divmod(num_frames, self.config.segment_frames)
        return [self.config.segment_frames] * whole + [rest] * (rest > 0)

    def forward(self, features_BTChw: Tensor) -> TokenizerOutput:
        """One training pass; in training mode it also updates the codebook."""
        if self.config.normalize_features:
            features_BTChw = self.normalize(features_BTChw)
        latents_BNZ = self.encode_latents(features_BTChw)
        if self.training:
            values_BNZ, indices_BN, commitment = self.quantizer.quantize(latents_BNZ)
        else:
            indices_BN = self.quantizer.nearest(latents_BNZ)
            values_BNZ = self.quantizer.lookup(indices_BN)
            commitment = self._commitment(latents_BNZ, indices_BN)
        decoded_BTChw = self.decode_latents(values_BNZ, features_BTChw.shape[1])
        target_BTChw = features_BTChw.to(self.dtype).float()
        reconstruction = F.mse_loss(decoded_BTChw.float(), target_BTChw)
        perplexity, codes_used = codebook_usage(indices_BN, self.config.codebook_size)
        if self.config.normalize_features:
            decoded_BTChw = self.denormalize(decoded_BTChw)
        return TokenizerOutput(
            loss=self.config.commitment_weight * commitment + reconstruction,
            commitment=commitment,
            reconstruction=reconstruction,
            indices=indices_BN,
            decoded=decoded_BTChw,
            perplexity=perplexity,
            codes_used=codes_used,
        )

    def _commitment(self, latents_BNZ: Tensor, indices_BN: Tensor) -> Tensor:
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            codes_BNE = self.quantizer.project_in(latents_BNZ.float())
        return F.mse_loss(codes_BNE, self.quantizer.get_codes_from_indices(indices_BN))

    def _context(self, sequence: Sequence, spans: list[AttentionSpan], device: torch.device) -> Context:
        config = self.config
        head_dim = config.hidden_size // config.num_heads
        angles_SK = rotary_angles(sequence, config.grid_width, head_dim, config.rope_theta, device)
        return Context(spans=spans, cos_SK=angles_SK.cos(), sin_SK=angles_SK.sin())

    def _check_features(self, features_BTChw: Tensor) -> None:
        config = self.config
        expected = (config.feature_channels, config.grid_height, config.grid_width)
        if features_BTChw.ndim != 5 or tuple(features_BTChw.shape[2:]) != expected or not features_BTChw.shape[1]:
            raise ValueError(
                f"the tokenizer takes features [B, T >= 1, {', '.join(map(str, expected))}] (channels, rows, "
                f"columns), not {list(features_BTChw.shape)}"
            )


def _tell_of_statistics(model: SemanticTokenizer, _keys: object) -> None:
    """Released inference never normalises; whether training did, only the stored statistics can tell (§8.3)."""
    if model.config.normalize_features or model.mean.is_meta:
        return
    if bool(model.mean.any()) or bool((model.std != 1).any()):
        low, high = float(model.std.min()), float(model.std.max())
        log.warning(
            f"the tokenizer's weights hold feature statistics (means up to {float(model.mean.abs().max()):.3g}, deviations {low:.3g} "
            f"to {high:.3g}), and normalize_features is off, as in the released inference. Where new videos come back badly, set it"
        )


def codebook_usage(indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """(perplexity, share of the codebook in use) of the codes of one batch, as float32 scalars."""
    share = torch.bincount(indices.flatten(), minlength=codebook_size).float() / indices.numel()
    perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
    return perplexity, (share > 0).float().mean()
