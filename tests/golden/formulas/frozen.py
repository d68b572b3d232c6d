"""The video auto-encoder and the feature extractor in formulas (specification §2, §5.9)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.formulas.weights import Weights, gelu_exact, heads, softmax_attention, swish

Sizes = dict[str, Any]
Caches = dict[str, Tensor]


def causal(
    w: Weights, key: str, x_BCTHW: Tensor, width: int, caches: Caches, kernel: int = 3
) -> Tensor:
    """Pads time with the past only: the first frame repeated, or the end of the chunk before."""
    before = caches[key] if key in caches else x_BCTHW[:, :, :1].repeat(1, 1, kernel - 1, 1, 1)
    x = torch.cat([before, x_BCTHW], dim=2)
    caches[key] = x[:, :, x.shape[2] - (kernel - 1) :]
    x = F.pad(x, [kernel // 2] * 4)
    return w.convolution(f"{key}.conv", x, width, kernel, kernel, kernel)


def first_apart(x: Tensor) -> list[Tensor]:
    """The first frame and the rest where the number of frames is odd and more than one."""
    return [x[:, :, :1], x[:, :, 1:]] if x.shape[2] > 1 and x.shape[2] % 2 else [x]


def norm(w: Weights, key: str, x: Tensor, latent: Tensor | None, caches: Caches) -> Tensor:
    if latent is None:
        return w.group_norm(key, x)
    parts = zip(
        first_apart(latent) if x.shape[2] > 1 and x.shape[2] % 2 else [latent],
        first_apart(x),
        strict=True,
    )
    z = torch.cat([F.interpolate(a, size=b.shape[-3:], mode="nearest") for a, b in parts], dim=2)
    scale, shift = (
        causal(w, f"{key}.{name}", z, x.shape[1], caches, kernel=1) for name in ("conv_y", "conv_b")
    )
    return w.group_norm(f"{key}.norm_layer", x) * scale + shift


def res_block(
    w: Weights, key: str, x: Tensor, width: int, latent: Tensor | None, caches: Caches
) -> Tensor:
    y = causal(w, f"{key}.conv1", swish(norm(w, f"{key}.norm1", x, latent, caches)), width, caches)
    y = causal(w, f"{key}.conv2", swish(norm(w, f"{key}.norm2", y, latent, caches)), width, caches)
    return (
        w.convolution(f"{key}.nin_shortcut", x, width, 1, 1, 1) if x.shape[1] != width else x
    ) + y


def each_frame(w: Weights, key: str, x: Tensor, **options: int) -> Tensor:
    frames = x.transpose(1, 2)
    y = w.convolution(key, frames.flatten(0, 1), x.shape[1], 3, 3, **options)
    return y.unflatten(0, frames.shape[:2]).transpose(1, 2)


def encode(w: Weights, sizes: Sizes, video_BCTHW: Tensor) -> Tensor:
    caches: Caches = {}
    levels = len(sizes["ch_mult"])
    x = causal(w, "encoder.conv_in", video_BCTHW, sizes["ch"], caches)
    for level, multiplier in enumerate(sizes["ch_mult"]):
        for number in range(sizes["res"]):
            x = res_block(
                w, f"encoder.down.{level}.block.{number}", x, sizes["ch"] * multiplier, None, caches
            )
        if level < levels - 1:
            if level < 2:  # time too: the first frame stays, the others are averaged in pairs
                parts = first_apart(x) if x.shape[2] > 1 else []
                x = (
                    torch.cat(
                        [*parts[:-1], *[p.unflatten(2, (-1, 2)).mean(3) for p in parts[-1:]]], dim=2
                    )
                    if parts
                    else x
                )
            x = each_frame(
                w, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2
            )
    for name in ("block_1", "block_2"):
        x = res_block(w, f"encoder.mid.{name}", x, x.shape[1], None, caches)
    return causal(
        w,
        "encoder.conv_out",
        swish(w.group_norm("encoder.norm_out", x)),
        2 * sizes["z_channels"],
        caches,
    )


def decode(w: Weights, sizes: Sizes, latent: Tensor, caches: Caches) -> Tensor:
    top = sizes["ch"] * sizes["ch_mult"][-1]
    x = causal(w, "decoder.conv_in", latent, top, caches)
    for name in ("block_1", "block_2"):
        x = res_block(w, f"decoder.mid.{name}", x, top, latent, caches)
    levels = len(sizes["ch_mult"])
    for level in reversed(range(levels)):
        for number in range(sizes["res"] + 1):
            x = res_block(
                w,
                f"decoder.up.{level}.block.{number}",
                x,
                sizes["ch"] * sizes["ch_mult"][level],
                latent,
                caches,
            )
        if level:
            if (
                levels - 1 - level < 2 and x.shape[2] > 1
            ):  # time too: the first of an odd number stays one frame
                parts = first_apart(x)
                x = torch.cat([*parts[:-1], parts[-1].repeat_interleave(2, dim=2)], dim=2)
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = each_frame(w, f"decoder.up.{level}.upsample.conv", x, padding=1)
    return causal(
        w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", x, latent, caches)), 3, caches
    )


def vae(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    moments = encode(w, sizes, inputs["video"])
    mean, log_variance = moments.chunk(2, dim=1)
    sample = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * inputs["posterior_noise"]
    latents, caches = inputs["latent_scaled"] / sizes["scale_factor"], {}
    ends = [min(3, latents.shape[2]), *range(5, latents.shape[2] + 1, 2)]
    chunks = [
        decode(w, sizes, latents[:, :, start:end], caches)
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return {
        "encoder_moments": moments,
        "encoded_scaled_latent": sizes["scale_factor"] * sample,
        "decoded_chunked": torch.cat(chunks, dim=2),
        "decoded_whole": decode(w, sizes, latents, {}),
    }


def feature_extractor(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix, width, patch = "backbone.model.", sizes["hidden"], sizes["patch_size"]
    video = inputs["video"]
    frames = (((video + 1) / 2).clamp(0, 1) * 255.999).to(torch.uint8)
    height, columns = frames.shape[-2:]
    side = max(height, columns)
    padded = torch.full((*frames.shape[:-2], side, side), sizes["pad_value"], dtype=torch.uint8)
    padded[..., :height, :columns] = frames
    pixels = (padded.flatten(0, 1).float() - 127.5) / 127.5
    grid = side // patch
    patches = w.convolution(
        f"{prefix}embeddings.patch_embeddings.projection", pixels, width, patch, patch, stride=patch
    )
    table = w.take(f"{prefix}embeddings.position_embeddings", 1, 1 + 14 * 14, width)
    places = table[:, 1:].reshape(1, 14, 14, width).permute(0, 3, 1, 2)
    places = (
        F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False).flatten(2).mT
    )
    places = torch.cat([table[:, :1], places], dim=1)
    cls = w.take(f"{prefix}embeddings.cls_token", 1, 1, width).expand(len(pixels), -1, -1)
    x = torch.cat([cls, patches.flatten(2).mT], dim=1) + places
    eps = sizes["layer_norm_eps"]
    for layer in range(sizes["layers"]):
        key = f"{prefix}encoder.layer.{layer}"
        y = w.layer_norm(f"{key}.layernorm_before", x, eps)
        q, k, v = (
            heads(w.linear(f"{key}.attention.attention.{name}", y, width), sizes["heads"])
            for name in ("query", "key", "value")
        )
        x = x + w.linear(f"{key}.attention.output.dense", softmax_attention(q, k, v), width)
        y = gelu_exact(
            w.linear(
                f"{key}.intermediate.dense",
                w.layer_norm(f"{key}.layernorm_after", x, eps),
                4 * width,
            )
        )
        x = x + w.linear(f"{key}.output.dense", y, width)
    x = w.layer_norm(f"{prefix}layernorm", x, eps)[:, 1:]
    features = x.reshape(*video.shape[:2], grid, grid, width).permute(0, 1, 4, 2, 3)
    rows, cells = sizes["output_shape"]
    return {
        "frames_uint8": frames,
        "frames_padded_uint8": padded,
        "interpolated_position_embeddings": places,
        "features": features[..., :rows, :cells],
    }
