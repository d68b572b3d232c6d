"""CogVideoX 3-D causal VAE as a latent codec (specification §5.9), run by diffusers.

Letters: B batch, T frames = 1 + 8k, t latent frames = 1 + 2k, H W pixels, h w cells of 8 x 8 pixels, C = 16
latent channels.

encode: the whole clip in ONE pass (diffusers' default of 9 + 8 + 8 ... frames gives other latents, since group
norms see other frames), times the scale 1.15258426. decode: latent frames 0..2, then pairs, with the
convolution cache carried over, which is diffusers' default.

Files: a folder written by `save_pretrained` (or a pipeline's folder or hub repository with `subfolder`), or
the released `3d-vae.pt`, converted by model_zoo/convert/formats/release_vae.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.formats.release_vae import num_levels, read_release, to_diffusers
from landiff.model_zoo.convert.rules import check_against
from landiff.model_zoo.frozen.config import CogVideoXVaeConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class CogVideoXCodec(nn.Module):
    name = "cogvideox-vae"

    def __init__(self, network: AutoencoderKLCogVideoX, mark: str) -> None:
        super().__init__()
        sizes = network.config
        self.fingerprint = mark
        self.channels: int = sizes.latent_channels
        self.space: int = 2 ** (len(sizes.block_out_channels) - 1)
        self.time: int = int(sizes.temporal_compression_ratio)
        self.scale: float = sizes.scaling_factor
        self.network = network
        network.enable_slicing()  # clip by clip: same values, memory of one clip
        network.num_latent_frames_batch_size = 2  # an odd first frame goes with the first pair
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, t, C, H / 8, W / 8]: scaled posterior mean, or mean + std * noise."""
        return self.encode_pixels(self._pixels(video_BTHWC), noise_BtChw)

    @torch.no_grad()
    def encode_moments(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, t, 2C, H / 8, W / 8]: mean and log-variance of the scaled latents."""
        mean, log_variance = (
            self.moments(self._pixels(video_BTHWC)).transpose(1, 2).float().chunk(2, dim=2)
        )
        return torch.cat(
            [mean * self.scale, log_variance.clamp(*LOG_VARIANCE_RANGE) + 2 * math.log(self.scale)],
            dim=2,
        )

    def _pixels(self, video_BTHWC: Tensor) -> Tensor:
        T, H, W = video_BTHWC.shape[1:4]
        if (T - 1) % (2 * self.time) or H % self.space or W % self.space:
            raise ValueError(
                f"video of {T} frames, {H} x {W}: this VAE gives back 1 + {2 * self.time} * k frames only, and "
                f"sides must be multiples of {self.space}"
            )
        return video_BTHWC.to(self.network.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def encode_pixels(self, pixels_BCTHW: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """`encode` for float pixels in [-1, 1], channels first."""
        moments = self.moments(pixels_BCTHW)
        mean, log_variance = moments.transpose(1, 2).float().chunk(2, dim=2)
        if noise_BtChw is not None:
            std = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
            mean = mean + std * noise_BtChw.to(mean)
        return mean * self.scale

    @torch.no_grad()
    def moments(self, pixels_BCTHW: Tensor) -> Tensor:
        """Posterior mean and log-variance, [B, 2C, t, h, w], unscaled."""
        self.network.num_sample_frames_batch_size = pixels_BCTHW.shape[2]
        return self.network.encode(pixels_BCTHW.to(self.network.dtype)).latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents [B, 1 + 2k, C, h, w] -> uint8 [B, 1 + 8k, 8h, 8w, 3]."""
        pixels_BCTHW = self.decode_pixels(latents_BtChw)
        return (
            ((pixels_BCTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        )

    @torch.no_grad()
    def decode_pixels(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents -> float32 pixels about [-1, 1], [B, 3, T, H, W]."""
        t = latents_BtChw.shape[1]
        if t % 2 == 0:
            raise ValueError(
                f"{t} latent frames: this VAE stretches the first of an even number over {self.time} frames; use 1 + 2k"
            )
        latents_BCthw = latents_BtChw.transpose(1, 2) / self.scale
        return self.network.decode(
            latents_BCthw.to(self.network.device, self.network.dtype)
        ).sample.float()


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `AutoencoderKLCogVideoX` that diffusers' keys and shapes in `state` tell."""
    levels = num_levels(state)
    first_block = [
        k for k in state if re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.norm1\.weight", k)
    ]
    widths = [
        state[f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight"].shape[0]
        for i in range(levels)
    ]
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("CogVideoXDownBlock3D",) * levels,
        "up_block_types": ("CogVideoXUpBlock3D",) * levels,
        "layers_per_block": len(first_block),
        "latent_channels": state["decoder.conv_in.conv.weight"].shape[1],
    }


def network_of(state: Mapping[str, Tensor], **options: Any) -> AutoencoderKLCogVideoX:
    """An untrained network of the sizes that diffusers' keys and shapes in `state` tell.

    `options` are further arguments of the class; its defaults for them are those of the release.
    """
    return AutoencoderKLCogVideoX(**sizes_of(state), **options)


def wrap(network: AutoencoderKLCogVideoX, dtype: str) -> CogVideoXCodec:
    """The codec around a loaded network, cast to `dtype`."""
    tensors = dict(network.named_parameters())
    options = {
        "dtype": dtype,
        "scale": network.config.scaling_factor,
        "encode": "one pass",
        "decode": "3 then pairs",
        "time": network.config.temporal_compression_ratio,
        "eps": network.config.norm_eps,
    }
    mark = encoder_fingerprint(CogVideoXCodec.name, options, tensors)
    return CogVideoXCodec(network.to(getattr(torch, dtype)), mark)


def build(config: CogVideoXVaeConfig, device: str | torch.device) -> CogVideoXCodec:
    """Raises ConfigError where `config.path` can't be read."""
    place = local_or_hub(config.kind, config.path)
    if isinstance(place, Path) and place.is_file():
        state = to_diffusers(read_release(place))
        network = network_of(state)
        check_against(
            state, {k: v.shape for k, v in network.state_dict().items()}, f"path = {config.path}"
        )
        network.load_state_dict(state)
        return wrap(network, config.dtype).to(device)
    subfolder = config.subfolder
    if isinstance(place, Path) and not (place / subfolder).is_dir():
        subfolder = ""
    try:
        network, report = AutoencoderKLCogVideoX.from_pretrained(
            place, subfolder=subfolder or None, output_loading_info=True
        )
    except OSError as error:
        raise unreadable(config.kind, config.path, error) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ConfigError(
            f"{config.kind}: path = {config.path!r} lacks weights: {report['missing_keys'] or report['mismatched_keys']}"
        )
    return wrap(network, config.dtype).to(device)
