"""Diffusion transformer with control branch: noisy latents, text and semantic features to velocity,
or to clean latents where the noise schedule says so (`ScheduleConfig.prediction`).

The text has no mask: its rows of padding are attended. A model therefore expects the number of text
rows (`text_length`) that it was trained with, though it computes any number. The number of frames
may differ from the configured one.

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width in
latent cells, h, w height and width in feature cells, N video tokens, which are one per patch, L
text rows, S sequence positions (L + N), D width of a vector (of text states or of the model),
E width of the time embedding, A heads, d width of a head. With a `sequence_group`, S and N are
those of this rank inside the blocks.

Source: CogVideoX-2B (arXiv 2408.06072) as LanDiff (arXiv 2503.04606) uses it, and LanDiff's serial
control branch (docs/specification.md §5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo.attention import attention
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.layers import compile_blocks, rotate, run_block, sinusoid
from landiff.model_zoo.positions.division import Positions
from landiff.model_zoo.positions.tables import Rotation, position_table, video_rotation
from landiff.model_zoo.semantic_condition import SemanticCondition

BLOCK_NORM_EPS = 1e-5  # of input, MLP and final norms, as the released model computes them (§8.16)
FINE_NORM_EPS = 1e-6  # of query, key and output norms


class TransformerInput(nn.Module):
    """Embeds patches, text and timestep: the sequence of tokens and the time embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        patch = config.patch_size
        self.patch = nn.Conv2d(config.latent_channels, dim, kernel_size=patch, stride=patch)
        self.text = nn.Linear(config.text_dim, dim)
        self.time_in = nn.Linear(dim, config.time_embed_dim)
        self.time_out = nn.Linear(config.time_embed_dim, config.time_embed_dim)
        nn.init.xavier_uniform_(self.patch.weight.view(dim, -1))
        assert self.patch.bias is not None
        nn.init.zeros_(self.patch.bias)

    def forward(
        self, latents_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sequence [B, L + N, D] and time embedding [B, E], both in the dtype of the weights."""
        size = self.config.hidden_size
        dtype = self.patch.weight.dtype
        batch, num_frames = latents_BTCHW.shape[:2]
        patches = self.patch(latents_BTCHW.flatten(0, 1).to(dtype))
        rows, columns = patches.shape[-2:]
        # [B · T, D, rows, columns] -> [B, T, rows, columns, D]
        patches = patches.unflatten(0, (batch, num_frames)).permute(0, 1, 3, 4, 2)
        scale = self.config.spatial_interpolation
        table = position_table(num_frames, rows, columns, size, scale, device=patches.device)
        video_BND = (patches + table.to(patches.dtype)).flatten(1, 3)
        time_BD = sinusoid(timestep_B, size).to(dtype)
        time_BE = self.time_out(functional.silu(self.time_in(time_BD)))
        return torch.cat([self.text(text_BLD.to(dtype)), video_BND], dim=1), time_BE


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of one half of a block, [B, D] each, for text and for video."""

    text_shift: Tensor
    text_scale: Tensor
    text_gate: Tensor
    video_shift: Tensor
    video_scale: Tensor
    video_gate: Tensor

    def shift_and_scale(self, x_BSD: Tensor, text_length: int) -> Tensor:
        """x · (1 + scale) + shift, [B, S, D]."""
        text_BLD = x_BSD[:, :text_length] * (1 + self.text_scale)[:, None]
        video_BND = x_BSD[:, text_length:] * (1 + self.video_scale)[:, None]
        text_BLD = text_BLD + self.text_shift[:, None]
        video_BND = video_BND + self.video_shift[:, None]
        return torch.cat([text_BLD, video_BND], dim=1)

    def gate(self, x_BSD: Tensor, text_length: int) -> Tensor:
        """x · gate, [B, S, D]."""
        text_BLD = x_BSD[:, :text_length] * self.text_gate[:, None]
        video_BND = x_BSD[:, text_length:] * self.video_gate[:, None]
        return torch.cat([text_BLD, video_BND], dim=1)


class Block(nn.Module):
    """Joint attention over text and video, and an MLP (§5.1).

    Text and video share all weights, except that each has its own shift, scale and gate, computed
    from the time embedding.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        head_dim = dim // config.num_heads
        self.num_heads = config.num_heads
        self.modulation = nn.Linear(config.time_embed_dim, 12 * dim)
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.LayerNorm(head_dim, eps=FINE_NORM_EPS)
        self.key_norm = nn.LayerNorm(head_dim, eps=FINE_NORM_EPS)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)

    def forward(self, x_BSD: Tensor, time_BE: Tensor, positions: Positions) -> Tensor:
        """[B, S, D], [B, E] -> [B, S, D]."""
        text_length = positions.text_length
        first, second = self._modulations(time_BE)
        y_BSD = first.shift_and_scale(self.norm1(x_BSD), text_length)
        x_BSD = x_BSD + first.gate(self._attend(y_BSD, positions), text_length)
        y_BSD = second.shift_and_scale(self.norm2(x_BSD), text_length)
        y_BSD = self.mlp_out(functional.gelu(self.mlp_in(y_BSD), approximate="tanh"))
        return x_BSD + second.gate(y_BSD, text_length)

    def _modulations(self, time_BE: Tensor) -> tuple[Modulation, Modulation]:
        """Modulation of the attention and of the MLP."""
        # Rows of the layer: shift, scale, gate of attention and MLP for video, then for text.
        chunks = self.modulation(functional.silu(time_BE)).chunk(12, dim=1)
        video = chunks[:6]
        text = chunks[6:]
        return Modulation(*text[:3], *video[:3]), Modulation(*text[3:], *video[3:])

    def _attend(self, x_BSD: Tensor, positions: Positions) -> Tensor:
        qkv_BS3Ad = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1))
        q_BSAd, k_BSAd, v_BSAd = qkv_BS3Ad.unbind(2)
        # Under autocast the norms return float32. The attention kernels need one dtype.
        q_BSAd = self.query_norm(q_BSAd).to(v_BSAd.dtype)
        k_BSAd = self.key_norm(k_BSAd).to(v_BSAd.dtype)
        if positions.rotation is not None:
            q_BSAd = _rotate_video(q_BSAd, positions.text_length, positions.rotation)
            k_BSAd = _rotate_video(k_BSAd, positions.text_length, positions.rotation)
        part = positions.part
        if part is None:
            return self.out(attention(q_BSAd, k_BSAd, v_BSAd).flatten(2))
        joined = part.positions_of_heads(torch.cat([q_BSAd, k_BSAd, v_BSAd], dim=-1))
        attended = attention(*joined.chunk(3, dim=-1))
        return self.out(part.heads_of_positions(attended, self.num_heads).flatten(2))

    def init_weights(self, num_layers: int, zero_modulation: bool) -> None:
        """Draws normal weights with deviation 1/sqrt(D), and 1/sqrt(2 · layers · D) for outputs.

        1/sqrt(D) is 0.023 at the released width, and large enough for a narrow model to leave the
        first plateau of the loss. With `zero_modulation` the block is the identity at first.
        """
        inner_std = self.qkv.in_features**-0.5
        output_std = inner_std / math.sqrt(2 * num_layers)
        stds = {
            self.qkv: inner_std,
            self.mlp_in: inner_std,
            self.out: output_std,
            self.mlp_out: output_std,
        }
        for linear, std in stds.items():
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        if zero_modulation:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)


def _rotate_video(x_BSAd: Tensor, text_length: int, rotation: Rotation) -> Tensor:
    """Rotates the heads of the video tokens and leaves those of the text as they are."""
    video_BNAd = rotate(x_BSAd[:, text_length:], rotation.cos_Nd, rotation.sin_Nd)
    return torch.cat([x_BSAd[:, :text_length], video_BNAd], dim=1)


class TransformerOutput(nn.Module):
    """Output layers: video tokens to velocity."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        dim = config.hidden_size
        self.norm = nn.LayerNorm(dim, eps=FINE_NORM_EPS)
        self.modulation = nn.Linear(config.time_embed_dim, 2 * dim)
        self.linear = nn.Linear(dim, config.latent_channels * config.patch_size**2)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, video_BND: Tensor, time_BE: Tensor, shape: torch.Size, positions: Positions
    ) -> Tensor:
        """[B, N, D], [B, E] -> velocity [B, T, C, H, W], where `shape` is that of the latents."""
        batch, num_frames, channels, height, width = shape
        shift_BD, scale_BD = self.modulation(functional.silu(time_BE)).chunk(2, dim=1)
        video_BND = self.norm(video_BND) * (1 + scale_BD[:, None]) + shift_BD[:, None]
        patches = positions.whole_video(self.linear(video_BND))
        # Channels of a patch are ordered (channel, row in the patch, column in the patch).
        patch = self.patch_size
        patches = patches.view(
            batch, num_frames, height // patch, width // patch, channels, patch, patch
        )
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)


class DiffusionTransformer(nn.Module):
    """Main transformer.

    Set `recompute` in training to save memory: the backward pass then computes the activations of
    each block again. With `keep_inputs_on_host` it reads the inputs of the blocks from the host.

    Set `sequence_group` to let its ranks compute each sequence together. They call the model with
    the same inputs, and all get the whole output.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.keep_inputs_on_host = False
        self.sequence_group: dist.ProcessGroup | None = None
        self.input = TransformerInput(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=BLOCK_NORM_EPS)
        self.output = TransformerOutput(config)
        for block in cast(Iterable[Block], self.blocks):
            block.init_weights(config.num_layers, zero_modulation=True)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.input.patch.weight.dtype

    def forward(self, latents_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Velocity [B, T, C, H, W] in the dtype of the weights.

        latents_BTCHW: noisy latents. timestep_B: integer timesteps. text_BLD: states of the text
        encoder. Raises ValueError for latents of a wrong shape.
        """
        check_latents(self.config, latents_BTCHW)
        positions = self.positions(latents_BTCHW, text_BLD.shape[1])
        x_BSD, time_BE = self.input(latents_BTCHW, timestep_B, text_BLD)
        x_BSD = positions.own(x_BSD)
        for block in self.blocks:
            x_BSD = self.run_block(block, x_BSD, time_BE, positions)
        return self.finish(x_BSD, time_BE, positions, latents_BTCHW.shape)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        compile_blocks(self.blocks, **options)

    def run_block(
        self, block: nn.Module, x_BSD: Tensor, time_BE: Tensor, positions: Positions
    ) -> Tensor:
        """Output of a block, which keeps for the backward pass what this model is set to."""
        return run_block(
            block,
            x_BSD,
            time_BE,
            positions,
            recompute=self.recompute,
            keep_inputs_on_host=self.keep_inputs_on_host,
        )

    def positions(self, latents_BTCHW: Tensor, text_length: int) -> Positions:
        """The positions that this rank computes of the sequence of `latents_BTCHW` and the text."""
        patch = self.config.patch_size
        num_frames, _, height, width = latents_BTCHW.shape[1:]
        grid = (num_frames, height // patch, width // patch)
        positions = Positions(text_length, video_rotation(self.config, *grid, latents_BTCHW.device))
        if self.sequence_group is None:
            return positions
        return positions.shared_by(self.sequence_group, math.prod(grid))

    def finish(
        self, x_BSD: Tensor, time_BE: Tensor, positions: Positions, shape: torch.Size
    ) -> Tensor:
        """Final norm and output layers: [B, S, D], the last block's output, to [B, T, C, H, W]."""
        video_BND = self.final_norm(x_BSD)[:, positions.text_length :]
        return self.output(video_BND, time_BE, shape, positions)


class ControlBranch(nn.Module):
    """A second, shallower transformer with its own input layers (§5.2).

    Its layers are in series: layer l computes h_l = Z_l(block_l(h_{l-1})), which is added to the
    output of block l of the main transformer and is the input of layer l + 1. Z starts at zero.
    With `control_projections: beside`, layer l + 1 receives block_l(h_{l-1}) instead.
    """

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        self.input = TransformerInput(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        size = config.hidden_size
        self.projections = nn.ModuleList(
            nn.Linear(size, size, bias=False) for _ in range(num_layers)
        )
        # Part of the released checkpoint, without influence and never with a gradient (§8.17).
        self.final_norm = nn.LayerNorm(size, eps=BLOCK_NORM_EPS)
        for block in cast(Iterable[Block], self.blocks):
            block.init_weights(num_layers, zero_modulation=False)
        for projection in cast(Iterable[nn.Linear], self.projections):
            nn.init.zeros_(projection.weight)


class ControlledDiffusion(nn.Module):
    """Main transformer, control branch and semantic condition.

    Guidance acts on the text only: the semantic condition is never dropped (§8.13).
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = DiffusionTransformer(config.transformer)
        self.control = ControlBranch(config.transformer, config.control_layers)
        self.semantic = SemanticCondition(config.semantic, config.transformer.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.transformer.dtype

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes the activations of both transformers' blocks again."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        self.transformer.recompute = recompute

    @property
    def keep_inputs_on_host(self) -> bool:
        """Whether the inputs of these blocks are then read from the host."""
        return self.transformer.keep_inputs_on_host

    @keep_inputs_on_host.setter
    def keep_inputs_on_host(self, on_host: bool) -> None:
        self.transformer.keep_inputs_on_host = on_host

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """The ranks that compute each sequence together, see `DiffusionTransformer`."""
        return self.transformer.sequence_group

    @sequence_group.setter
    def sequence_group(self, group: dist.ProcessGroup | None) -> None:
        self.transformer.sequence_group = group

    def forward(
        self,
        latents_BTCHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        features_BTChw: Tensor | None = None,
        *,
        semantic_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, T, C, H, W] in the dtype of the weights.

        latents_BTCHW: noisy latents. timestep_B: integer timesteps. text_BLD: states of the text
        encoder.
        features_BTChw: decoded vision features, one frame per latent frame. None runs the main
        transformer without control branch.
        semantic_BTCHW: `model.semantic(features_BTChw)`, to be given instead of the features. A
        sampler computes it once for all its steps.

        Raises ValueError for latents or features of a wrong shape.
        """
        main = self.transformer
        control = self.control
        if features_BTChw is not None:
            assert semantic_BTCHW is None, "give either the features or the semantic latent"
            semantic_BTCHW = self.semantic(features_BTChw)
        if semantic_BTCHW is None:
            return main(latents_BTCHW, timestep_B, text_BLD)
        check_latents(self.config.transformer, latents_BTCHW)
        if semantic_BTCHW.shape != latents_BTCHW.shape:
            raise ValueError(
                f"the semantic condition is {list(semantic_BTCHW.shape)} where the latents are "
                f"{list(latents_BTCHW.shape)}: features need one frame per latent frame, on a grid "
                f"{self.semantic.scale} times coarser than the latents'"
            )
        positions = main.positions(latents_BTCHW, text_BLD.shape[1])
        x_BSD, time_BE = main.input(latents_BTCHW, timestep_B, text_BLD)
        given_BTCHW = semantic_BTCHW
        if self.config.control_input == "sum":
            given_BTCHW = latents_BTCHW + semantic_BTCHW
        h_BSD, control_time_BE = control.input(given_BTCHW, timestep_B, text_BLD)
        x_BSD = positions.own(x_BSD)
        h_BSD = positions.own(h_BSD)
        for layer, block in enumerate(main.blocks):
            x_BSD = main.run_block(block, x_BSD, time_BE, positions)
            if layer < len(control.blocks):
                control_block = control.blocks[layer]
                h_BSD = main.run_block(control_block, h_BSD, control_time_BE, positions)
                projected_BSD = control.projections[layer](h_BSD)
                x_BSD = x_BSD + projected_BSD
                if self.config.control_projections == "series":
                    h_BSD = projected_BSD
        return main.finish(x_BSD, time_BE, positions, latents_BTCHW.shape)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block of both transformers at its first call."""
        compile_blocks([*self.transformer.blocks, *self.control.blocks], **options)

    @torch.no_grad()
    def copy_main_to_control(self) -> None:
        """Copies the main transformer's input layers, first blocks and final norm, but not Z."""
        self.control.input.load_state_dict(self.transformer.input.state_dict())
        self.control.final_norm.load_state_dict(self.transformer.final_norm.state_dict())
        for block, source in zip(self.control.blocks, self.transformer.blocks, strict=False):
            block.load_state_dict(source.state_dict())


def check_latents(config: TransformerConfig, latents_BTCHW: Tensor) -> None:
    """Raises ValueError for latents of other channels or a size that patches do not divide."""
    channels = config.latent_channels
    patch = config.patch_size
    shape = list(latents_BTCHW.shape)
    if len(shape) != 5 or shape[2] != channels or shape[3] % patch or shape[4] % patch:
        raise ValueError(
            f"the transformer takes latents [B, T, {channels}, H, W], H and W multiples of "
            f"{patch}, not {shape}"
        )
