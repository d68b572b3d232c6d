"""Semantic tokenizer: vision features to a few discrete codes per frame, and back.

`encode` and `decode` are for inference, `forward` is for training on one segment. The layout of the
internal sequence and its attention masks are in positions/frame_spans.py.

Shape letters (docs/glossary.md): B batch, T frames, C feature channels, h, w height and width in
feature cells, N latent tokens of a segment, K codes of a whole clip, S sequence positions, D width
of the blocks, Z width of a latent token outside the blocks, E width of a code vector, A heads,
d width of a head.

Source: semantic tokenizer of LanDiff (arXiv 2503.04606), with the sizes of the released code
(docs/specification.md §3).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.device import to_device
from landiff.model_zoo.layers import compile_blocks, rotate, run_block
from landiff.model_zoo.positions.frame_spans import (
    AttentionSpan,
    Sequence,
    covering,
    decoder_spans,
    encoder_spans,
    grid_angles,
    sequence_angles,
    span_attention,
)
from landiff.model_zoo.quantizer import Quantizer

log = logging.getLogger(__name__)

Grid = tuple[int, int]
"""Rows and columns of a feature map."""
NORM_EPS = 1e-5
FEATURE_EPS = 1e-8  # added to the standard deviation of a feature channel


@dataclass(frozen=True)
class TokenizerOutput:
    """Losses, codes and reconstruction of one segment.

    loss: commitment_weight · commitment + reconstruction, scalar.
    commitment: commitment loss of the quantizer, scalar.
    reconstruction: mean squared error of the features, normalized if so configured, scalar.
    indices: codes, int64 [B, N].
    decoded: features [B, T, C, h, w] on the scale of the input features.
    """

    loss: Tensor
    commitment: Tensor
    reconstruction: Tensor
    indices: Tensor
    decoded: Tensor


@dataclass(frozen=True)
class Context:
    """Attention spans and rotations, which are the same for all blocks of a stack.

    cos_Sd, sin_Sd: float32 [S, d/2].
    covered_NV: `covering` of the V visual positions, where the config has local paths.
    """

    spans: list[AttentionSpan]
    cos_Sd: Tensor
    sin_Sd: Tensor
    covered_NV: Tensor | None = None


class Block(nn.Module):
    """Pre-norm block: attention without biases, MLP with exact GELU and biases (§3.5)."""

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
        """[B, S, D] -> [B, S, D]."""
        qkv_BS3Ad = self.qkv(self.norm1(x_BSD)).unflatten(-1, (3, self.num_heads, -1))
        q_BSAd, k_BSAd, v_BSAd = qkv_BS3Ad.unbind(2)
        q_BSAd = rotate(q_BSAd, context.cos_Sd, context.sin_Sd)
        k_BSAd = rotate(k_BSAd, context.cos_Sd, context.sin_Sd)
        attended_BSAd = span_attention(q_BSAd, k_BSAd, v_BSAd, context.spans)
        x_BSD = x_BSD + self.out(attended_BSAd.flatten(2))
        return x_BSD + self.mlp_out(functional.gelu(self.mlp_in(self.norm2(x_BSD))))


class Stack(nn.Module):
    """LayerNorm, blocks, a selection of positions, LayerNorm: common base of encoder and decoder.

    Set `recompute` in training to save memory: the backward pass then computes the activations of
    each block again.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.recompute = False
        self.norm_in = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)

    def run(self, x_BSD: Tensor, context: Context, keep: slice) -> Tensor:
        """[B, S, D] -> [B, kept positions, D]."""
        x_BSD = self.norm_in(x_BSD)
        for block in self.blocks:
            x_BSD = run_block(block, x_BSD, context, recompute=self.recompute)
        return self.norm_out(x_BSD[:, keep])


class Encoder(Stack):
    """Visual tokens and learned queries to latents before quantization (§3.2)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed = nn.Linear(config.feature_channels, dim)
        self.iframe_queries = nn.Parameter(torch.randn(config.iframe_tokens, dim) * dim**-0.5)
        self.pframe_queries = nn.Parameter(torch.randn(config.pframe_tokens, dim) * dim**-0.5)
        self.head = nn.Linear(dim, config.token_size)

    def forward(self, features_BTChw: Tensor, sequence: Sequence, context: Context) -> Tensor:
        """[B, T, C, h, w] -> latents [B, N, Z].

        All P frames have the same queries; position and mask tell them apart.
        """
        visual_BSD = self.embed(features_BTChw.flatten(3).transpose(2, 3).flatten(1, 2))
        pframe_queries = self.pframe_queries.repeat(sequence.num_frames - 1, 1)
        queries_ND = torch.cat([self.iframe_queries, pframe_queries])
        queries_BND = queries_ND.to(visual_BSD.dtype).expand(len(visual_BSD), -1, -1)
        if context.covered_NV is not None:
            shares_NV = context.covered_NV / context.covered_NV.sum(dim=1, keepdim=True)
            queries_BND = queries_BND + shares_NV.to(visual_BSD.dtype) @ visual_BSD
        x_BSD = torch.cat([visual_BSD, queries_BND], dim=1)
        latents_BND = self.run(x_BSD, context, slice(sequence.num_visual, None))
        return self.head(latents_BND)


class Decoder(Stack):
    """Quantized latents to features, which start as copies of one mask token (§3.7)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed = nn.Linear(config.token_size, dim)
        masks = config.grid_height * config.grid_width if config.cell_mask_tokens else 1
        self.mask_token = nn.Parameter(torch.randn(1, masks, dim) * dim**-0.5)
        self.head_in = nn.Linear(dim, 2 * dim)
        self.head_out = nn.Linear(2 * dim, config.feature_channels)

    def forward(self, latents_BNZ: Tensor, sequence: Sequence, context: Context) -> Tensor:
        """[B, N, Z] -> features of the visual positions, [B, T · h · w, C]."""
        latents_BND = self.embed(latents_BNZ)
        mask_token = self.mask_token.to(latents_BND.dtype)
        if mask_token.shape[1] > 1:
            mask_token = mask_token.repeat(1, sequence.num_frames, 1)
        visual_BSD = mask_token.expand(len(latents_BND), sequence.num_visual, -1)
        if context.covered_NV is not None:
            shares_VN = (context.covered_NV / context.covered_NV.sum(dim=0, keepdim=True)).T
            visual_BSD = visual_BSD + shares_VN.to(latents_BND.dtype) @ latents_BND
        x_BSD = torch.cat([visual_BSD, latents_BND], dim=1)
        visual_BSD = self.run(x_BSD, context, slice(0, sequence.num_visual))
        return self.head_out(torch.tanh(self.head_in(visual_BSD)))


class SemanticTokenizer(nn.Module):
    """Encoder, quantizer and decoder (§3).

    Build it after the process group, so that all ranks share one codebook.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.feature_channels))
        self.register_buffer("std", torch.ones(config.feature_channels))
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)
        self.register_load_state_dict_post_hook(_warn_of_statistics)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights of encoder and decoder."""
        return self.encoder.embed.weight.dtype

    def set_recompute(self, recompute: bool) -> None:
        """Sets whether the backward pass computes the blocks' activations again to save memory."""
        self.encoder.recompute = recompute
        self.decoder.recompute = recompute

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        compile_blocks([*self.encoder.blocks, *self.decoder.blocks], **options)

    def set_feature_statistics(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Sets mean and deviation of the feature channels, used if `normalize_features` is on."""
        self.mean.copy_(mean_C)
        self.std.copy_(std_C)

    def normalize(self, features_BTChw: Tensor) -> Tensor:
        """(features - mean) / (std + 1e-8) per channel, [B, T, C, h, w]."""
        std = self.std[:, None, None] + FEATURE_EPS
        return (features_BTChw - self.mean[:, None, None]) / std

    def denormalize(self, features_BTChw: Tensor) -> Tensor:
        """The inverse of `normalize`, [B, T, C, h, w]."""
        std = self.std[:, None, None] + FEATURE_EPS
        return features_BTChw * std + self.mean[:, None, None]

    def sequence(self, num_frames: int, grid: Grid | None = None) -> Sequence:
        """The sequence of a segment of `num_frames` frames. `grid` is that of `decode`."""
        config = self.config
        rows, columns = grid or (config.grid_height, config.grid_width)
        return Sequence(num_frames, rows * columns, config.iframe_tokens, config.pframe_tokens)

    def encode_latents(self, features_BTChw: Tensor) -> Tensor:
        """Latents of one segment before quantization, [B, T, C, h, w] -> [B, N, Z].

        The features are those that enter the encoder, normalized if so configured. Raises
        ValueError for a wrong shape.
        """
        self._check_features(features_BTChw)
        grid = (features_BTChw.shape[3], features_BTChw.shape[4])
        sequence = self.sequence(features_BTChw.shape[1], grid)
        context = self._context(sequence, grid, encoder_spans(sequence), features_BTChw.device)
        return self.encoder(features_BTChw.to(self.dtype), sequence, context)

    def decode_latents(
        self, latents_BNZ: Tensor, num_frames: int, grid: Grid | None = None
    ) -> Tensor:
        """Features of one segment as the decoder returns them, [B, N, Z] -> [B, T, C, h, w].

        `grid` is that of `decode`.
        """
        grid = self._checked_grid(grid)
        sequence = self.sequence(num_frames, grid)
        context = self._context(sequence, grid, decoder_spans(sequence), latents_BNZ.device)
        features_BSC = self.decoder(latents_BNZ.to(self.dtype), sequence, context)
        return features_BSC.unflatten(1, (num_frames, *grid)).permute(0, 1, 4, 2, 3)

    def encode(self, features_BTChw: Tensor) -> Tensor:
        """Codes of clips of any length, [B, T, C, h, w] -> int64 [B, K].

        A clip longer than `segment_frames` is divided into segments, the last of which may be
        shorter. Each segment has its own I frame and is encoded on its own; the codes of all
        segments are concatenated.

        Raises ValueError for a wrong shape or an untrained codebook.
        """
        self._check_features(features_BTChw)
        if self.config.normalize_features:
            features_BTChw = self.normalize(features_BTChw)
        indices = []
        for segment_BTChw in features_BTChw.split(self.config.segment_frames, dim=1):
            latents_BNZ = self.encode_latents(segment_BTChw)
            indices.append(self.quantizer.nearest(latents_BNZ))
        return torch.cat(indices, dim=1)

    def decode(self, indices_BK: Tensor, num_frames: int, grid: Grid | None = None) -> Tensor:
        """Features of clips of `num_frames` frames from codes that `encode` returned.

        [B, K] -> [B, T, C, h, w]. `grid`: rows and columns (h, w), which the codes do not tell.
        None: those of the config. Codes may be on the host: they are then checked without waiting
        for the device, and copied to it.

        Raises ValueError for codes that do not fit the codebook or the number of frames, for an
        untrained codebook, and for another grid than that of `cell_mask_tokens`.
        """
        lengths = self._segment_lengths(num_frames)
        counts = [self.sequence(length).num_latent for length in lengths]
        if indices_BK.ndim != 2 or indices_BK.shape[1] != sum(counts):
            raise ValueError(
                f"{num_frames} frames have codes of shape [B, {sum(counts)}], not "
                f"{list(indices_BK.shape)}"
            )
        low = int(indices_BK.min())
        high = int(indices_BK.max())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"codes {low}..{high} do not fit a codebook of {self.config.codebook_size}"
            )
        if not indices_BK.is_cuda:
            indices_BK = to_device(indices_BK, self.mean.device)
        segments = []
        for indices_BN, length in zip(indices_BK.split(counts, dim=1), lengths, strict=True):
            # Looked up one by one, so that a segment does not depend on the others by rounding.
            segments.append(self.decode_latents(self.quantizer.lookup(indices_BN), length, grid))
        features_BTChw = torch.cat(segments, dim=1)
        if self.config.normalize_features:
            features_BTChw = self.denormalize(features_BTChw)
        return features_BTChw

    def _segment_lengths(self, num_frames: int) -> list[int]:
        """Frames of each segment of a clip."""
        if num_frames < 1:
            raise ValueError(f"num_frames = {num_frames} must be at least 1")
        full, rest = divmod(num_frames, self.config.segment_frames)
        lengths = [self.config.segment_frames] * full
        if rest:
            lengths.append(rest)
        return lengths

    def forward(self, features_BTChw: Tensor, quantized: bool = True) -> TokenizerOutput:
        """Losses, codes and reconstruction of one segment, [B, T, C, h, w].

        In training mode it also updates the codebook. Without `quantized` the decoder receives the
        latents as they are, projected to the width of code vectors and back: the codes are then 0
        and the commitment loss is 0. Raises ValueError for a wrong shape and, in eval mode, for an
        untrained codebook.
        """
        if self.config.normalize_features:
            features_BTChw = self.normalize(features_BTChw)
        latents_BNZ = self.encode_latents(features_BTChw)
        if not quantized:
            values_BNZ = self.quantizer.bypass(latents_BNZ)
            indices_BN = torch.zeros(latents_BNZ.shape[:2], dtype=torch.int64)
            indices_BN = indices_BN.to(latents_BNZ.device)
            commitment = values_BNZ.new_zeros(())
        elif self.training:
            values_BNZ, indices_BN, commitment = self.quantizer.quantize(latents_BNZ)
        else:
            indices_BN = self.quantizer.nearest(latents_BNZ)
            values_BNZ = self.quantizer.lookup(indices_BN)
            commitment = self._commitment(latents_BNZ, indices_BN)
        grid = (features_BTChw.shape[3], features_BTChw.shape[4])
        decoded_BTChw = self.decode_latents(values_BNZ, features_BTChw.shape[1], grid)
        target_BTChw = features_BTChw.to(self.dtype).float()
        reconstruction = functional.mse_loss(decoded_BTChw.float(), target_BTChw)
        if self.config.normalize_features:
            decoded_BTChw = self.denormalize(decoded_BTChw)
        return TokenizerOutput(
            loss=self.config.commitment_weight * commitment + reconstruction,
            commitment=commitment,
            reconstruction=reconstruction,
            indices=indices_BN,
            decoded=decoded_BTChw,
        )

    def _commitment(self, latents_BNZ: Tensor, indices_BN: Tensor) -> Tensor:
        """Commitment loss without an update of the codebook, scalar."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            codes_BNE = self.quantizer.project_in(latents_BNZ.float())
        return functional.mse_loss(codes_BNE, self.quantizer.get_codes_from_indices(indices_BN))

    def _context(
        self, sequence: Sequence, grid: Grid, spans: list[AttentionSpan], device: torch.device
    ) -> Context:
        config = self.config.sized(*grid)
        head_dim = config.hidden_size // config.num_heads
        if config.latent_positions == "grid":
            angles_Sd = grid_angles(sequence, config, device)
        else:
            angles_Sd = sequence_angles(
                sequence, config.grid_width, head_dim, config.rope_theta, device
            )
        covered_NV = covering(config, sequence, device) if config.local_paths else None
        return Context(spans, angles_Sd.cos(), angles_Sd.sin(), covered_NV)

    def _check_features(self, features_BTChw: Tensor) -> None:
        """Raises ValueError for features that are not [B, T, C, h, w] with C of the config."""
        channels = self.config.feature_channels
        shape = features_BTChw.shape
        if features_BTChw.ndim != 5 or shape[2] != channels or not all(shape[1:]):
            raise ValueError(
                f"the tokenizer takes features [B, T >= 1, {channels}, rows, columns], not "
                f"{list(shape)}"
            )
        self._checked_grid((shape[3], shape[4]))

    def _checked_grid(self, grid: Grid | None) -> Grid:
        """`grid`, or that of the config. Raises ValueError for one that the model cannot take."""
        own = (self.config.grid_height, self.config.grid_width)
        if grid is not None and grid != own and self.config.cell_mask_tokens:
            raise ValueError(
                f"the tokenizer has mask tokens for each cell of {own[0]} x {own[1]} "
                f"(cell_mask_tokens) and cannot take features of {grid[0]} x {grid[1]}"
            )
        return grid or own


def _warn_of_statistics(model: SemanticTokenizer, _keys: object) -> None:
    """Warns about loaded feature statistics that the config does not use.

    The released inference never normalizes. Whether the training did shows only in the stored
    statistics (§8.3).
    """
    if model.config.normalize_features or model.mean.is_meta:
        return
    if bool(model.mean.any()) or not bool(torch.all(model.std == 1)):
        log.warning(
            "the tokenizer's weights hold feature statistics (means up to "
            f"{float(model.mean.abs().max()):.3g}, deviations {float(model.std.min()):.3g} to "
            f"{float(model.std.max()):.3g}), and normalize_features is off, as in the released "
            "inference. If new videos are reconstructed badly, set normalize_features"
        )
