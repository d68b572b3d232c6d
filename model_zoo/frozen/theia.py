"""Theia backbone as vision features: a plain ViT-B/16 on square frames (docs/specification.md §2).

Preprocessing differs from that of the model card: frames are padded at the bottom or right with 127
to a square, mapped to (u - 127.5) / 127.5, and not resized. The position table is resized to the
grid of the frame by bicubic interpolation. The CLS token and the cells of the padding are dropped
from the output of the final LayerNorm.

Weights are a folder or hub repository like `theiainstitute/theia-base-patch16-224-cddsv`:
*.safetensors with keys `backbone.model.<ViT key>` (the translator heads, `translator.*`, are not
used). A plain ViT with keys `<ViT key>`, `vit.<ViT key>` or `model.<ViT key>` is read too. All
sizes but the number of heads are those of the tensors, because config.json of the repository
describes the whole Theia model.

Shape letters (docs/glossary.md): B batch, T frames, N = B · T frames of the whole batch,
C channels, H, W height and width in pixels, h, w height and width in feature cells of 16 pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTLayer

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.frozen.config import TheiaConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable
from landiff.model_zoo.layers import compile_blocks

PAD_VALUE = 127
PREFIXES = ("backbone.model.", "vit.", "model.", "")
# Other tensors are the pooler, which is not used, and other parts of Theia.
USED_PARTS = ("embeddings.", "encoder.", "layernorm.")
LAYER_NORM_EPS = 1e-12


def quantize(video: Tensor) -> Tensor:
    """Truncates a float video in [-1, 1] to uint8: v · 255.999, v = clamp((x + 1) / 2, 0, 1)."""
    return (((video + 1) / 2).clamp(0, 1) * 255.999).to(torch.uint8)


def pad_to_square(frames_NCHW: Tensor) -> Tensor:
    """Pads uint8 frames with 127 at the bottom or right, to the larger of H and W on each side."""
    height, width = frames_NCHW.shape[-2:]
    side = max(height, width)
    return functional.pad(frames_NCHW, (0, side - width, 0, side - height), value=PAD_VALUE)


class TheiaFeatures(nn.Module):
    """`VisionFeatures` around a ViT."""

    name = "theia"

    def __init__(self, network: ViTModel, config: TheiaConfig, fingerprint: str) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.channels: int = network.config.hidden_size
        self.cell: int = network.config.patch_size
        self.network = network
        self.autocast = config.dtype == "bfloat16"
        self.frames_per_pass = config.frames_per_pass
        self.eval().requires_grad_(False)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        # versions of transformers differ in the name of their list
        blocks = [module for module in self.network.modules() if isinstance(module, ViTLayer)]
        compile_blocks(blocks, **options)

    @torch.no_grad()
    def forward(self, frames_BTHWC: Tensor) -> Tensor:
        """Frames [B, T, H, W, 3] -> float32 [B, T, C, H / cell, W / cell].

        frames_BTHWC: uint8, or float in [-1, 1], which is truncated to uint8 first (`quantize`).

        Raises ValueError unless H and W are multiples of the cell.
        """
        batch, num_frames, height, width, _ = frames_BTHWC.shape
        if height % self.cell or width % self.cell:
            raise ValueError(
                f"frames of {height} x {width} pixels: height and width must be multiples of "
                f"{self.cell}"
            )
        if frames_BTHWC.is_floating_point():
            frames_BTHWC = quantize(frames_BTHWC)
        frames_NHWC = frames_BTHWC.to(self.network.device).flatten(0, 1)
        passes = frames_NHWC.permute(0, 3, 1, 2).split(self.frames_per_pass)
        features_NChw = torch.cat([self._features(frames_NCHW) for frames_NCHW in passes])
        return features_NChw.unflatten(0, (batch, num_frames))

    def _features(self, frames_NCHW: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, C, h, w]."""
        height, width = frames_NCHW.shape[-2:]
        square_NCHW = (pad_to_square(frames_NCHW).float() - 127.5) / 127.5
        with torch.autocast(frames_NCHW.device.type, torch.bfloat16, enabled=self.autocast):
            states = self.network(square_NCHW, interpolate_pos_encoding=True).last_hidden_state
        side = max(height, width) // self.cell
        # Position 0 is the CLS token.
        grid_NChw = states[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))
        return grid_NChw[:, :, : height // self.cell, : width // self.cell]


def from_tensors(tensors: dict[str, Tensor], config: TheiaConfig) -> TheiaFeatures:
    """Builds the encoder from the tensors of a checkpoint.

    Raises ConfigError if they are not those of a ViT.
    """
    state = _vit_state(tensors, config)
    # from_pretrained and not load_state_dict, because it renames the keys of older checkpoints.
    network, report = ViTModel.from_pretrained(
        None,
        config=_vit_config(state, config),
        state_dict={name: tensor.float() for name, tensor in state.items()},
        add_pooling_layer=False,
        output_loading_info=True,
    )
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
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


_PATCH_WEIGHT = "embeddings.patch_embeddings.projection.weight"


def _vit_state(tensors: dict[str, Tensor], config: TheiaConfig) -> dict[str, Tensor]:
    """The used tensors by their ViT keys. Raises ConfigError if there is no ViT."""
    for prefix in PREFIXES:
        if prefix + _PATCH_WEIGHT in tensors:
            break
    else:
        raise ConfigError(
            f"theia: path = {config.path!r} holds no ViT: no key is {_PATCH_WEIGHT!r} after one of "
            f"the prefixes {PREFIXES}"
        )
    state = {}
    for name, tensor in tensors.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key.startswith(USED_PARTS):
            state[key] = tensor
    return state


def _vit_config(state: dict[str, Tensor], config: TheiaConfig) -> ViTConfig:
    """Sizes of the ViT. Raises ConfigError if the number of heads does not fit."""
    hidden, _, patch, _ = state[_PATCH_WEIGHT].shape
    if hidden % config.num_heads:
        raise ConfigError(
            f"theia: num_heads = {config.num_heads} does not divide the width {hidden} of the "
            "weights"
        )
    table_side = int((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = {int(key.split(".")[2]) for key in state if key.startswith("encoder.layer.")}
    return ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=1 + max(layers),
        num_attention_heads=config.num_heads,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=LAYER_NORM_EPS,
        qkv_bias=True,
        image_size=table_side * patch,
        patch_size=patch,
    )


def build(config: TheiaConfig, device: str | torch.device) -> TheiaFeatures:
    """Loads the encoder. Raises ConfigError if `config.path` cannot be read or holds no ViT."""
    place = local_or_hub(config.kind, config.path)
    if isinstance(place, str):
        try:
            place = Path(snapshot_download(place, allow_patterns=["*.safetensors"]))
        except (OSError, HfHubHTTPError) as error:
            raise unreadable(config.kind, config.path, error) from error
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{config.kind}: path = {config.path!r} holds no *.safetensors; set path to a folder "
            "that does"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_safetensors(file))
    return from_tensors(tensors, config).to(device)
