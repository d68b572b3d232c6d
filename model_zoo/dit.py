"""Control diffusion transformer: noisy latents, text and semantic features in, velocity out.

Letters: B batch, T latent frames, C latent channels, H W latent height and width, p patch size,
N = T * H/p * W/p video tokens, L text tokens, S = L + N sequence, D model width, A heads, K head width,
E width of the time embedding.

    DiffusionTransformer: forward(latents_BTCHW, timestep_B, text_BLD) -> velocity_BTCHW
    ControlledDiffusion:  forward(latents_BTCHW, timestep_B, text_BLD, features_BTChw) -> velocity_BTCHW

The text has no mask: its pad rows are attended, so a model expects the number of rows (`text_length`) that it
was trained with, though any number is computed. The number of frames may differ from the configured one.
Source: CogVideoX-2B (arXiv 2408.06072) as LanDiff (arXiv 2503.04606) uses it; LanDiff's serial control branch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_zoo.attention import attention
from model_zoo.config import DiffusionConfig, TransformerConfig
from model_zoo.semantic_condition import SemanticCondition

BLOCK_NORM_EPS = 1e-5  # input, MLP and final norms, as the released model really computes them
FINE_NORM_EPS = 1e-6  # query, key and output norms

# ---------------------------------------------------------------- embeddings that are functions of the sizes


def timestep_sinusoid(timestep_B: Tensor, dim: int) -> Tensor:
    """float32 [B, dim]: cosines, then sines."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angles = timestep_B.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(num_frames: int, rows: int, columns: int, dim: int, spatial_interpolation: float,
                   device: torch.device | str = "cpu") -> Tensor:
    """float32 [T, rows, columns, dim] of sines and cosines: a quarter for time, 3/8 for columns, 3/8 for rows."""
    time, column, row = (torch.arange(n, dtype=torch.float64, device=device) for n in (num_frames, columns, rows))
    parts = [
        _sinusoid(time, dim // 4)[:, None, None],
        _sinusoid(column / spatial_interpolation, dim * 3 // 8)[None, None],
        _sinusoid(row / spatial_interpolation, dim * 3 // 8)[None, :, None],
    ]
    return torch.cat([p.expand(num_frames, rows, columns, -1) for p in parts], dim=-1)


def _sinusoid(position: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of float64 positions; computed in float64, returned as float32."""
    half = dim // 2
    omega = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angles = position[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def position_table_numel(config: TransformerConfig) -> int:
    """Elements of the table that the release stores as a parameter: text rows (zeros) and video tokens."""
    cells = (config.latent_height // config.patch_size) * (config.latent_width // config.patch_size)
    return (config.text_length + config.latent_frames * cells) * config.hidden_size


# ---------------------------------------------------------------- transformer


class TransformerInput(nn.Module):
    """Patches, text and timestep -> the sequence and the time embedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        self.patch = nn.Conv2d(config.latent_channels, dim, kernel_size=patch, stride=patch)
        self.text = nn.Linear(config.text_dim, dim)
        self.time_in = nn.Linear(dim, config.time_embed_dim)
        self.time_out = nn.Linear(config.time_embed_dim, config.time_embed_dim)
        nn.init.xavier_uniform_(self.patch.weight.view(dim, -1))
        nn.init.zeros_(self.patch.bias)

    def forward(self, latents_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """-> (sequence_BSD, time_BE), in the dtype of the weights."""
        batch, num_frames = latents_BTCHW.shape[:2]
        dtype = self.patch.weight.dtype
        patches = self.patch(latents_BTCHW.flatten(0, 1).to(dtype))
        rows, columns = patches.shape[-2:]
        video_BND = patches.unflatten(0, (batch, num_frames)).permute(0, 1, 3, 4, 2)
        table = position_table(
            num_frames, rows, columns, self.config.hidden_size, self.config.spatial_interpolation, patches.device
        )
        video_BND = (video_BND + table.to(patches.dtype)).flatten(1, 3)
        sinusoid = timestep_sinusoid(timestep_B, self.config.hidden_size).to(dtype)
        time_BE = self.time_out(F.silu(self.time_in(sinusoid)))
        return torch.cat([self.text(text_BLD.to(dtype)), video_BND], dim=1), time_BE


def _by_part(x_BSD: Tensor, video_BD: Tensor, text_BD: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
    """x times a vector of its own for text and for video, as two tensors."""
    return x_BSD[:, :text_length] * text_BD[:, None], x_BSD[:, text_length:] * video_BD[:, None]


class Block(nn.Module):
    """Joint attention over text and video; each has its own shift, scale and gate from the time embedding."""

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

    def forward(self, x_BSD: Tensor, time_BE: Tensor, text_length: int) -> Tensor:
        video_and_text = self.modulation(F.silu(time_BE)).chunk(12, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(video_and_text[:6], video_and_text[6:], strict=True)
        y = self._attend(_modulate(self.norm1(x_BSD), shift1, scale1, text_length))
        x_BSD = x_BSD + torch.cat(_by_part(y, *gate1, text_length), dim=1)
        y = _modulate(self.norm2(x_BSD), shift2, scale2, text_length)
        y = self.mlp_out(F.gelu(self.mlp_in(y), approximate="tanh"))
        return x_BSD + torch.cat(_by_part(y, *gate2, text_length), dim=1)

    def _attend(self, x_BSD: Tensor) -> Tensor:
        q_BSAK, k_BSAK, v_BSAK = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # Under autocast the norms return float32; the kernels want one dtype.
        q_BSAK, k_BSAK = (t.to(v_BSAK.dtype) for t in (self.query_norm(q_BSAK), self.key_norm(k_BSAK)))
        return self.out(attention(q_BSAK, k_BSAK, v_BSAK).flatten(2))

    def init_weights(self, num_layers: int, zero_modulation: bool) -> None:
        """Normal weights, residual outputs scaled down by depth; with zero modulation a block starts as identity.

        The deviation is 1/sqrt(width): 0.023 at the released width, and large enough for a narrow model to leave
        its first plateau.
        """
        inner_std = self.qkv.in_features**-0.5
        output_std = inner_std / math.sqrt(2 * num_layers)
        for linear, std in ((self.qkv, inner_std), (self.mlp_in, inner_std), (self.out, output_std), (self.mlp_out, output_std)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)
        if zero_modulation:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)


def _modulate(x_BSD: Tensor, shifts: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor], text_length: int) -> Tensor:
    """x * (1 + scale) + shift; the pairs are (video, text), each BD."""
    text, video = _by_part(x_BSD, 1 + scales[0], 1 + scales[1], text_length)
    return torch.cat([text + shifts[1][:, None], video + shifts[0][:, None]], dim=1)


class TransformerOutput(nn.Module):
    """Video tokens -> velocity."""

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

    def forward(self, video_BND: Tensor, time_BE: Tensor, shape: torch.Size) -> Tensor:
        """`shape` is that of the latents, BTCHW. Output channels run (channel, row, column in the patch)."""
        batch, num_frames, channels, height, width = shape
        shift_BD, scale_BD = self.modulation(F.silu(time_BE)).chunk(2, dim=1)
        patches = self.linear(self.norm(video_BND) * (1 + scale_BD[:, None]) + shift_BD[:, None])
        p = self.patch_size
        patches = patches.view(batch, num_frames, height // p, width // p, channels, p, p)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)


def _run(block: nn.Module, recompute: bool, *inputs: Tensor | int) -> Tensor:
    """`block(*inputs)`; with `recompute` its activations are computed again in backward instead of being kept.

    Only the non-reentrant kind gives gradients where no input requires one (a frozen stem).
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class DiffusionTransformer(nn.Module):
    """Main transformer. `recompute` saves activation memory in training: backward computes the blocks again."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.input = TransformerInput(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=BLOCK_NORM_EPS)
        self.output = TransformerOutput(config)
        for block in self.blocks:
            block.init_weights(config.num_layers, zero_modulation=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.input.patch.weight.dtype

    def forward(self, latents_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        check_latents(self.config, latents_BTCHW)
        x_BSD, time_BE = self.input(latents_BTCHW, timestep_B, text_BLD)
        for block in self.blocks:
            x_BSD = _run(block, self.recompute, x_BSD, time_BE, text_BLD.shape[1])
        return self.finish(x_BSD, time_BE, text_BLD.shape[1], latents_BTCHW.shape)

    def finish(self, x_BSD: Tensor, time_BE: Tensor, text_length: int, shape: torch.Size) -> Tensor:
        """velocity_BTCHW from the last block's output."""
        return self.output(self.final_norm(x_BSD)[:, text_length:], time_BE, shape)


class ControlBranch(nn.Module):
    """A second, shorter transformer with input layers of its own.

    Its layers stand in series: layer l gives h_l = Z_l(block_l(h_{l-1})), which is added to the main
    transformer's block l and is also the input of the next layer. Z starts at zero.
    """

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        self.input = TransformerInput(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.projections = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(num_layers)
        )
        # Part of the released checkpoint; it influences nothing and never gets a gradient.
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=BLOCK_NORM_EPS)
        for block, projection in zip(self.blocks, self.projections, strict=True):
            block.init_weights(num_layers, zero_modulation=False)
            nn.init.zeros_(projection.weight)


class ControlledDiffusion(nn.Module):
    """Main transformer, control branch and semantic condition. Guidance acts on the text alone: the semantic
    condition is never dropped."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = DiffusionTransformer(config.transformer)
        self.control = ControlBranch(config.transformer, config.control_layers)
        self.semantic = SemanticCondition(config.semantic, config.transformer.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def recompute(self) -> bool:
        """Save activation memory in training: compute the blocks of both transformers again in backward."""
        return self.transformer.recompute

    @recompute.setter
    def recompute(self, recompute: bool) -> None:
        self.transformer.recompute = recompute

    def forward(
        self,
        latents_BTCHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        features_BTChw: Tensor | None = None,
        *,
        semantic_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """velocity_BTCHW in the dtype of the weights.

        Without features this is the main transformer alone. A sampler that calls it many times computes
        `semantic_BTCHW = model.semantic(features)` once and gives that instead.
        """
        main, control = self.transformer, self.control
        if features_BTChw is not None:
            assert semantic_BTCHW is None, "give the features or what they become, not both"
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
        length = text_BLD.shape[1]
        x_BSD, time_BE = main.input(latents_BTCHW, timestep_B, text_BLD)
        h_BSD, control_time_BE = control.input(latents_BTCHW + semantic_BTCHW, timestep_B, text_BLD)
        for layer, block in enumerate(main.blocks):
            x_BSD = _run(block, self.recompute, x_BSD, time_BE, length)
            if layer < len(control.blocks):
                h_BSD = _run(control.blocks[layer], self.recompute, h_BSD, control_time_BE, length)
                h_BSD = control.projections[layer](h_BSD)
                x_BSD = x_BSD + h_BSD
        return main.finish(x_BSD, time_BE, length, latents_BTCHW.shape)

    @torch.no_grad()
    def copy_main_to_control(self) -> None:
        """Start the control branch from the main transformer's input layers and first blocks; Z stays as it is."""
        self.control.input.load_state_dict(self.transformer.input.state_dict())
        self.control.final_norm.load_state_dict(self.transformer.final_norm.state_dict())
        for mine, source in zip(self.control.blocks, self.transformer.blocks, strict=False):
            mine.load_state_dict(source.state_dict())


def check_latents(config: TransformerConfig, latents_BTCHW: Tensor) -> None:
    """Raise ValueError for latents of a wrong number of channels or a size that patches do not tile."""
    channels, patch = config.latent_channels, config.patch_size
    shape = list(latents_BTCHW.shape)
    if len(shape) != 5 or shape[2] != channels or shape[3] % patch or shape[4] % patch:
        raise ValueError(f"the transformer takes latents [B, T, {channels}, H, W], H and W multiples of {patch}, not {shape}")
