"""Frozen encoders behind three interfaces (base.py). `build` imports only what the chosen kind needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen import config as configs

if TYPE_CHECKING:
    import torch

    from landiff.model_zoo.frozen.base import LatentCodec, TextEncoder, VisionFeatures


@overload
def build(
    config: configs.EfficientNetConfig | configs.TheiaConfig, device: str | torch.device = "cpu"
) -> VisionFeatures: ...
@overload
def build(
    config: configs.DctConfig | configs.CogVideoXVaeConfig, device: str | torch.device = "cpu"
) -> LatentCodec: ...
@overload
def build(
    config: configs.MiniLMConfig | configs.FlanT5Config | configs.T5V11Config,
    device: str | torch.device = "cpu",
) -> TextEncoder: ...


def build(
    config: configs.FrozenConfig, device: str | torch.device = "cpu"
) -> VisionFeatures | LatentCodec | TextEncoder:
    """The encoder behind `config`, on `device`, in eval mode and without gradients.

    Raises ConfigError where a package or the weights are missing; the message holds the way out.
    """
    match config:
        case configs.EfficientNetConfig():
            from landiff.model_zoo.frozen.efficientnet import build as build_kind
        case configs.TheiaConfig():
            from landiff.model_zoo.frozen.theia import build as build_kind
        case configs.DctConfig():
            from landiff.model_zoo.frozen.dct import build as build_kind
        case configs.CogVideoXVaeConfig():
            from landiff.model_zoo.frozen.cogvideox_vae import build as build_kind
        case configs.MiniLMConfig():
            from landiff.model_zoo.frozen.minilm import build as build_kind
        case configs.FlanT5Config() | configs.T5V11Config():
            from landiff.model_zoo.frozen.t5 import build as build_kind
        case _:
            raise ConfigError(
                f"no frozen encoder is configured by {type(config).__name__}; see model_zoo/frozen/config.py"
            )
    return build_kind(config, device)
