"""Theia backbone as vision features: a plain ViT-B/16 on frames padded to a square (specification §2).

Letters: B batch, T frames, H W pixels, S side of the square, h w cells of 16 pixels, C channels, N = B * T.

forward(frames uint8 [B, T, H, W, 3]) -> float32 [B, T, C, H / 16, W / 16]

Preprocessing, which replaces the one of the model's own card: pad bottom or right with 127 to a square,
(u - 127.5) / 127.5, no resize. The position table is resized to the target grid by bicubic interpolation;
CLS and the cells of the padding are dropped from the output of the final LayerNorm.

Files: a folder or hub repository laid out as `theiainstitute/theia-base-patch16-224-cddsv`: *.safetensors
whose keys are `backbone.model.<ViT key>` (the translator heads, `translator.*`, are ignored). A plain ViT
with keys `<ViT key>`, `vit.<ViT key>` or `model.<ViT key>` is read too. All sizes but the number of heads are
taken from the tensors, since the repository's config.json describes the whole Theia model.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.frozen.config import TheiaConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable

PAD_VALUE = 127
PREFIXES = ("backbone.model.", "vit.", "model.", "")
LAYER_NORM_EPS = 1e-12


def quantise(video: Tensor) -> Tensor:
    """Float video in [-1, 1] -> uint8 by truncation of v * 255.999, v = clamp((x + 1) / 2, 0, 1): 0.5 -> 127."""
    return (((video + 1) / 2).clamp(0, 1) * 255.999).to(torch.uint8)


def pad_to_square(frames_NCHW: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> [N, 3, S, S], S = max(H, W), filled with 127 at the bottom or right."""
    H, W = frames_NCHW.shape[-2:]
    side = max(H, W)
    return F.pad(frames_NCHW, (0, side - W, 0, side - H), value=PAD_VALUE)


class TheiaFeatures(nn.Module):
    name = "theia"

    def __init__(self, network: ViTModel, config: TheiaConfig, mark: str) -> None:
        super().__init__()
        self.fingerprint = mark
        self.channels: int = network.config.hidden_size
        self.cell: int = network.config.patch_size
        self.network = network
        self.autocast = config.dtype == "bfloat16"
        self.frames_per_pass = config.frames_per_pass
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3], or float in [-1, 1] -> float32 [B, T, C, H / cell, W / cell].

        Float frames are truncated to uint8 first (see `quantise`). H and W must be multiples of the cell.
        """
        B, T, H, W, _ = frames_BTHWC.shape
        if H % self.cell or W % self.cell:
            raise ValueError(
                f"frames of {H} x {W} pixels: height and width must be multiples of {self.cell}"
            )
        if frames_BTHWC.is_floating_point():
            frames_BTHWC = quantise(frames_BTHWC)
        frames_NCHW = (
            frames_BTHWC.to(self.network.device).reshape(B * T, H, W, 3).permute(0, 3, 1, 2)
        )
        features_NChw = torch.cat(
            [self._features(f) for f in frames_NCHW.split(self.frames_per_pass)]
        )
        return features_NChw.reshape(B, T, self.channels, H // self.cell, W // self.cell)

    def _features(self, frames_NCHW: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, C, h, w]."""
        N, _, H, W = frames_NCHW.shape
        pixels_NCSS = (pad_to_square(frames_NCHW).float() - 127.5) / 127.5
        with torch.autocast(frames_NCHW.device.type, torch.bfloat16, enabled=self.autocast):
            states = self.network(pixels_NCSS, interpolate_pos_encoding=True).last_hidden_state
        side = max(H, W) // self.cell
        grid_NCss = states[:, 1:].float().transpose(1, 2).reshape(N, self.channels, side, side)
        return grid_NCss[:, :, : H // self.cell, : W // self.cell]


def from_tensors(tensors: dict[str, Tensor], config: TheiaConfig) -> TheiaFeatures:
    """The encoder from the tensors of the checkpoint file. Raises ConfigError where they are no ViT."""
    marker = "embeddings.patch_embeddings.projection.weight"
    prefix = next((p for p in PREFIXES if p + marker in tensors), None)
    if prefix is None:
        raise ConfigError(
            f"theia: path = {config.path!r} holds no ViT: no key ends {marker!r} after one of {PREFIXES}"
        )
    # the unused pooler and the other parts of Theia stay out of the network and of the fingerprint
    state = {
        k.removeprefix(prefix): v
        for k, v in tensors.items()
        if k.removeprefix(prefix).startswith(("embeddings.", "encoder.", "layernorm."))
        and k.startswith(prefix)
    }
    hidden, _, patch, _ = state[marker].shape
    if hidden % config.num_heads:
        raise ConfigError(
            f"theia: num_heads = {config.num_heads} does not divide the width {hidden} of the weights"
        )
    table_side = int((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    vit = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=1
        + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer.")),
        num_attention_heads=config.num_heads,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=LAYER_NORM_EPS,
        qkv_bias=True,
        image_size=table_side * patch,
        patch_size=patch,
    )
    # from_pretrained, not load_state_dict: it knows today's names for the keys that ViT checkpoints hold
    network, report = ViTModel.from_pretrained(
        None,
        config=vit,
        state_dict={k: v.float() for k, v in state.items()},
        add_pooling_layer=False,
        output_loading_info=True,
    )
    problems = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if problems:
        raise ConfigError(
            f"theia: the weights of path = {config.path!r} do not fill a ViT: {problems}"
        )
    options = {
        "pad": PAD_VALUE,
        "scale": 127.5,
        "eps": LAYER_NORM_EPS,
        "positions": "bicubic to the grid size",
        "num_heads": config.num_heads,
        "dtype": config.dtype,
    }
    return TheiaFeatures(network, config, encoder_fingerprint(config.kind, options, state))


def build(config: TheiaConfig, device: str | torch.device) -> TheiaFeatures:
    """Raises ConfigError where `config.path` can't be read or is no ViT."""
    place = local_or_hub(config.kind, config.path)
    if isinstance(place, str):
        try:
            place = Path(snapshot_download(place, allow_patterns=["*.safetensors"]))
        except (OSError, HfHubHTTPError) as error:
            raise unreadable(config.kind, config.path, error) from error
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{config.kind}: path = {config.path!r} holds no *.safetensors; set path to a folder that does"
        )
    tensors = {name: tensor for file in files for name, tensor in load_safetensors(file).items()}
    return from_tensors(tensors, config).to(device)
