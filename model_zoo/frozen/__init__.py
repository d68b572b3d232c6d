"""Frozen encoders behind three interfaces, see base.py.

`build` imports only the packages that the chosen encoder needs.
"""

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
    config: configs.DctConfig | configs.PcaConfig | configs.CogVideoXVaeConfig,
    device: str | torch.device = "cpu",
) -> LatentCodec: ...
@overload
def build(
    config: configs.MiniLMConfig | configs.FlanT5Config | configs.T5V11Config,
    device: str | torch.device = "cpu",
) -> TextEncoder: ...


def build(
    config: configs.FrozenConfig, device: str | torch.device = "cpu"
) -> VisionFeatures | LatentCodec | TextEncoder:
    """Builds the encoder of a config on `device`, in eval mode and without gradients.

    Raises ConfigError if a package or the weights are missing; the message says what to do.
    """
    match config:
        case configs.EfficientNetConfig():
            from landiff.model_zoo.frozen import efficientnet

            return efficientnet.build(config, device)
        case configs.TheiaConfig():
            from landiff.model_zoo.frozen import theia

            return theia.build(config, device)
        case configs.DctConfig():
            from landiff.model_zoo.frozen import dct

            return dct.build(config, device)
        case configs.PcaConfig():
            from landiff.model_zoo.frozen import pca

            return pca.build(config, device)
        case configs.CogVideoXVaeConfig():
            from landiff.model_zoo.frozen import cogvideox_vae

            return cogvideox_vae.build(config, device)
        case configs.MiniLMConfig():
            from landiff.model_zoo.frozen import minilm

            return minilm.build(config, device)
        case configs.FlanT5Config() | configs.T5V11Config():
            from landiff.model_zoo.frozen import t5

            return t5.build(config, device)
        case _:
            raise ConfigError(
                f"{type(config).__name__} is not the config of a frozen encoder; the configs are "
                "in model_zoo/frozen/config.py"
            )
