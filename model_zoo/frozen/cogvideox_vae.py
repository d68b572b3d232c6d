"""3-D causal VAE of CogVideoX as a latent codec (docs/specification.md §5.9), run by diffusers.

Encoding runs the whole clip in one pass. diffusers' default, which splits a clip into 9 + 8 + 8 ...
frames, gives other latents, because group norms then see other frames. Decoding runs latent frames
0 to 2, then pairs, and carries the convolution cache over, which is diffusers' default. Latents are
scaled by 1.15258426.

Weights are a folder written by `save_pretrained` (or the folder or hub repository of a pipeline
with `subfolder`), or the released `3d-vae.pt`, which model_zoo/convert/formats/release_vae.py
converts.

Shape letters (docs/glossary.md): B batch, T RGB frames (1 + 8 k), t latent frames (1 + 2 k),
C channels, H, W height and width in pixels, h, w height and width in latent cells of 8 x 8 pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
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
    """`LatentCodec` around a diffusers network."""

    name = "cogvideox-vae"

    def __init__(self, network: AutoencoderKLCogVideoX, fingerprint: str) -> None:
        super().__init__()
        sizes = network.config
        self.fingerprint = fingerprint
        self.channels: int = sizes.latent_channels
        self.space: int = 2 ** (len(sizes.block_out_channels) - 1)
        self.time: int = int(sizes.temporal_compression_ratio)
        self.scale: float = sizes.scaling_factor
        self.network = network
        network.enable_slicing()  # one clip at a time: the same values with the memory of one clip
        network.num_latent_frames_batch_size = 2  # an odd first frame joins the first pair
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] -> scaled latents, float32 [B, t, C, h, w].

        The mean of the posterior, or with noise the sample mean + std · noise. Raises ValueError
        for frames that the VAE does not give back, or sides that cells do not divide.
        """
        return self.encode_pixels(self._pixels(video_BTHWC), noise_BtChw)

    @torch.no_grad()
    def encode_moments(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> mean and log-variance of scaled latents [B, t, 2 C, h, w].

        float32. Errors are those of `encode`.
        """
        moments_BCthw = self.moments(self._pixels(video_BTHWC))
        mean, log_variance = moments_BCthw.transpose(1, 2).float().chunk(2, dim=2)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE) + 2 * math.log(self.scale)
        return torch.cat([mean * self.scale, log_variance], dim=2)

    def _pixels(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 pixels in [-1, 1], [B, 3, T, H, W]."""
        frames, height, width = video_BTHWC.shape[1:4]
        if (frames - 1) % (2 * self.time) or height % self.space or width % self.space:
            raise ValueError(
                f"video of {frames} frames, {height} x {width}: this VAE decodes to "
                f"1 + {2 * self.time} * k frames only, and sides must be multiples of {self.space}"
            )
        return video_BTHWC.to(self.network.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def encode_pixels(self, pixels_BCTHW: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """`encode` for float pixels in [-1, 1], channels first."""
        moments_BCthw = self.moments(pixels_BCTHW)
        mean, log_variance = moments_BCthw.transpose(1, 2).float().chunk(2, dim=2)
        if noise_BtChw is not None:
            std = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
            mean = mean + std * noise_BtChw.to(mean)
        return mean * self.scale

    @torch.no_grad()
    def moments(self, pixels_BCTHW: Tensor) -> Tensor:
        """Posterior mean and log-variance, not scaled, [B, 2 C, t, h, w]."""
        self.network.num_sample_frames_batch_size = pixels_BCTHW.shape[2]
        return self.network.encode(pixels_BCTHW.to(self.network.dtype)).latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents [B, t, C, h, w] -> uint8 [B, T, H, W, 3].

        Raises ValueError for an even number of latent frames.
        """
        return to_frames(self.decode_pixels(latents_BtChw))

    @torch.no_grad()
    def decode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive parts of latents [B, t, C, h, w] -> their frames, uint8 [B, T, H, W, 3].

        Latent frames 0 to 2 and then pairs pass through the decoder, as in `decode`, and the
        convolution cache is kept in between. Raises ValueError at the end of an even number of
        latent frames.
        """
        waiting_BtChw = torch.empty(0)
        caches: list[Any] = []
        total = 0
        for part_BtChw in parts:
            if not total:
                waiting_BtChw = part_BtChw[:, :0]
                caches = [None] * len(part_BtChw)
            total += part_BtChw.shape[1]
            waiting_BtChw = torch.cat([waiting_BtChw, part_BtChw], dim=1)
            frames: list[Tensor] = []
            while True:
                count = 3 if caches[0] is None else 2
                if waiting_BtChw.shape[1] < count:
                    break
                frames.append(self._decode_group(waiting_BtChw[:, :count], caches))
                waiting_BtChw = waiting_BtChw[:, count:]
            if frames:
                yield torch.cat(frames, dim=1)
            else:
                yield self._no_frames(part_BtChw)
        if total == 1:
            yield self._decode_group(waiting_BtChw, caches)
        elif total % 2 == 0:
            raise ValueError(self._even(total))

    def _decode_group(self, latents_BtChw: Tensor, caches: list[Any]) -> Tensor:
        """Frames of the next latent frames, one clip after the other. Replaces the caches."""
        clips = []
        for number, latents_1tChw in enumerate(latents_BtChw.split(1)):
            latents_1Cthw = latents_1tChw.transpose(1, 2) / self.scale
            latents_1Cthw = latents_1Cthw.to(self.network.device, self.network.dtype)
            if self.network.post_quant_conv is not None:
                latents_1Cthw = self.network.post_quant_conv(latents_1Cthw)
            pixels_1CTHW, caches[number] = self.network.decoder(
                latents_1Cthw, conv_cache=caches[number]
            )
            clips.append(to_frames(pixels_1CTHW.float()))
        return torch.cat(clips)

    def _no_frames(self, latents_BtChw: Tensor) -> Tensor:
        """Frames of no latent frame, uint8 [B, 0, H, W, 3]."""
        batch, _, _, rows, columns = latents_BtChw.shape
        shape = (batch, 0, rows * self.space, columns * self.space, 3)
        return torch.empty(shape, dtype=torch.uint8, device=self.network.device)

    def _even(self, num_latent_frames: int) -> str:
        """Message about an even number of latent frames."""
        return (
            f"{num_latent_frames} latent frames: this VAE decodes the first of an even number "
            f"to {self.time} frames; use 1 + 2 k"
        )

    @torch.no_grad()
    def decode_pixels(self, latents_BtChw: Tensor) -> Tensor:
        """Scaled latents -> float32 pixels in about [-1, 1], [B, 3, T, H, W].

        Raises ValueError for an even number of latent frames.
        """
        num_latent_frames = latents_BtChw.shape[1]
        if num_latent_frames % 2 == 0:
            raise ValueError(self._even(num_latent_frames))
        latents_BCthw = latents_BtChw.transpose(1, 2) / self.scale
        latents_BCthw = latents_BCthw.to(self.network.device, self.network.dtype)
        return self.network.decode(latents_BCthw).sample.float()


def to_frames(pixels_BCTHW: Tensor) -> Tensor:
    """Pixels in about [-1, 1], [B, 3, T, H, W] -> uint8 [B, T, H, W, 3]."""
    bytes_BCTHW = ((pixels_BCTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bytes_BCTHW.permute(0, 2, 3, 4, 1)


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `AutoencoderKLCogVideoX`, from keys and shapes of its state dict."""
    levels = num_levels(state)
    first_block = re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.norm1\.weight")
    widths = []
    for level in range(levels):
        widths.append(state[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"].shape[0])
    return {
        "block_out_channels": tuple(widths),
        "down_block_types": ("CogVideoXDownBlock3D",) * levels,
        "up_block_types": ("CogVideoXUpBlock3D",) * levels,
        "layers_per_block": sum(1 for key in state if first_block.fullmatch(key)),
        "latent_channels": state["decoder.conv_in.conv.weight"].shape[1],
    }


def network_of(state: Mapping[str, Tensor], **options: Any) -> AutoencoderKLCogVideoX:
    """Builds an untrained network of the sizes of a state dict.

    options: further arguments of the class, whose defaults are those of the release.
    """
    return AutoencoderKLCogVideoX(**sizes_of(state), **options)


def wrap(network: AutoencoderKLCogVideoX, dtype: str) -> CogVideoXCodec:
    """The codec of a loaded network, cast to `dtype`."""
    tensors = dict(network.named_parameters())
    options = {
        "dtype": dtype,
        "scale": network.config.scaling_factor,
        "encode": "one pass",
        "decode": "3 then pairs",
        "time": network.config.temporal_compression_ratio,
        "eps": network.config.norm_eps,
    }
    fingerprint = encoder_fingerprint(CogVideoXCodec.name, options, tensors)
    return CogVideoXCodec(network.to(getattr(torch, dtype)), fingerprint)


def build(config: CogVideoXVaeConfig, device: str | torch.device) -> CogVideoXCodec:
    """Loads the codec. Raises ConfigError if `config.path` cannot be read or is incomplete."""
    place = local_or_hub(config.kind, config.path)
    if isinstance(place, Path) and place.is_file():
        state = to_diffusers(read_release(place))
        network = network_of(state)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        check_against(state, shapes, f"path = {config.path}")
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
    missing = report["missing_keys"] or report["mismatched_keys"]
    if missing:
        raise ConfigError(f"{config.kind}: path = {config.path!r} lacks weights: {missing}")
    return wrap(network, config.dtype).to(device)
