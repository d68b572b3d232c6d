"""Frozen encoders as components of a `LanDiffPipeline`.

T5 and the CogVideoX VAE are stock classes of transformers and diffusers. Other encoders are wrapped
by `LanDiffTextEncoder` and `LanDiffCodec`, whose folders hold their weights and text tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from diffusers import AutoencoderKLCogVideoX, ConfigMixin, ModelMixin
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase, T5EncoderModel

from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.model_zoo.convert.formats.diffusers_folder import FILE
from landiff.model_zoo.convert.lazy import LazyTensors, read_safetensors, write_safetensors
from landiff.model_zoo.device import keeping_dtype
from landiff.model_zoo.frozen.base import LatentCodec, TextEncoder
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec
from landiff.model_zoo.frozen.config import (
    FlanT5Config,
    MiniLMConfig,
    T5V11Config,
    TextConfig,
)
from landiff.model_zoo.frozen.dct import DctCodec
from landiff.model_zoo.frozen.minilm import MiniLMText
from landiff.model_zoo.frozen.pca import PcaCodec
from landiff.model_zoo.frozen.t5 import T5Text

PUBLIC_MODULE = "landiff"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"


def refuse_quantization(component: type, quantization_config: Any) -> None:
    """Raises ValueError for a quantization, which our classes would ignore."""
    if quantization_config is not None:
        raise ValueError(
            f"{component.__name__} cannot be quantized while it loads; leave it out of "
            "quantization_config"
        )


class FrozenComponent(ModelMixin, ConfigMixin):
    """Base class: a frozen encoder as a diffusers model.

    It stays in float32 whatever the pipeline is cast to, as in `landiff sample`.
    """

    config_name = CONFIG_FILE
    model: Any

    def __init__(self, model: nn.Module, **config: Any) -> None:
        """config: what `from_pretrained` needs besides the weights, as JSON values."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_to_config(**config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenComponent:
        """Moves tensors between devices but does not cast them to another dtype."""
        return super()._apply(keeping_dtype(fn), recurse)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the component's file."""
        return self.model.state_dict()

    def save_pretrained(self, save_directory: str | Path, **_options: Any) -> None:
        """Writes config.json and the weights. Options of diffusers are ignored."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / FILE, LazyTensors.of(self._tensors()), {"format": "pt"})
        config: dict[str, Any] = {"_class_name": type(self).__name__}
        for key, value in self.config.items():
            if not key.startswith("_"):
                config[key] = value
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


class LanDiffTextEncoder(FrozenComponent):
    """all-MiniLM-L6-v2 with its text tokenizer."""

    __module__ = PUBLIC_MODULE

    @classmethod
    def of(cls, encoder: MiniLMText) -> LanDiffTextEncoder:
        """Wraps an encoder without copies."""
        config = MiniLMConfig(max_length=encoder.max_length, padded=encoder.padded)
        return cls(encoder, landiff=config.model_dump(), bert=encoder.network.config.to_dict())

    def _tensors(self) -> dict[str, Tensor]:
        return self.model.network.state_dict()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes config, weights and tokenizer.json."""
        super().save_pretrained(save_directory, **options)
        self.model.tokenizer.save(str(Path(save_directory, TOKENIZER_FILE)))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        quantization_config: Any = None,
        **_options: Any,
    ) -> LanDiffTextEncoder:
        """Loads the encoder of a local folder. Other options of diffusers are ignored.

        Raises UnhealthyError for weights with NaN or infinity, ValueError for a quantization.
        """
        refuse_quantization(cls, quantization_config)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        stored = read_json(folder / CONFIG_FILE)
        network = BertModel(BertConfig.from_dict(stored["bert"]), add_pooling_layer=False)
        network.load_state_dict(_checked(folder))
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        config = MiniLMConfig.model_validate(stored["landiff"])
        return cls.of(MiniLMText(network, tokenizer, config, ""))


class LanDiffCodec(FrozenComponent):
    """Codec `dct` or `pca`."""

    __module__ = PUBLIC_MODULE

    @classmethod
    def of(cls, codec: DctCodec | PcaCodec) -> LanDiffCodec:
        """Wraps a codec without copies."""
        return cls(codec, landiff={"kind": codec.name})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        quantization_config: Any = None,
        **_options: Any,
    ) -> LanDiffCodec:
        """Loads the codec of a local folder. Other options of diffusers are ignored.

        Raises UnhealthyError for weights with NaN or infinity, ValueError for a quantization.
        """
        refuse_quantization(cls, quantization_config)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        kind = read_json(folder / CONFIG_FILE)["landiff"]["kind"]
        tensors = _checked(folder)
        if kind == DctCodec.name:
            codec = DctCodec()
            codec.load_state_dict(tensors)
            return cls.of(codec)
        return cls.of(PcaCodec(tensors))

    def enable_tiling(self) -> None:
        """Does nothing: cells are decoded one by one, which needs no tiles."""

    def disable_tiling(self) -> None:
        """Does nothing, as `enable_tiling`."""


def _checked(folder: Path) -> dict[str, Tensor]:
    """The tensors of a component's file. Raises UnhealthyError for NaN or infinity."""
    return dict(read_safetensors(folder / FILE).checked(str(folder)))


# ---------------------------------------------------------------- encoders and components

TextComponent: TypeAlias = T5EncoderModel | LanDiffTextEncoder
TextParts: TypeAlias = tuple[TextComponent, PreTrainedTokenizerBase | None, dict[str, Any] | None]


def text_parts(encoder: TextEncoder) -> TextParts:
    """Component, tokenizer and options (`kind` and `max_length`) of a text encoder.

    Tokenizer and options are None for a `LanDiffTextEncoder`, which holds them itself.
    """
    if isinstance(encoder, T5Text):
        options = {"kind": encoder.name, "max_length": encoder.max_length}
        return encoder.network, encoder.tokenizer, options
    assert isinstance(encoder, MiniLMText), encoder
    return LanDiffTextEncoder.of(encoder), None, None


def text_encoder_of(
    component: TextComponent,
    tokenizer: PreTrainedTokenizerBase | None,
    options: Mapping[str, Any],
) -> TextEncoder:
    """The text encoder of a component, without copies. Raises ValueError without a tokenizer."""
    if isinstance(component, LanDiffTextEncoder):
        return cast(TextEncoder, component.model)
    if tokenizer is None:
        raise ValueError(
            f"a text encoder of class {type(component).__name__} needs its tokenizer: give the "
            "pipeline lm_tokenizer and tokenizer"
        )
    config = TypeAdapter(TextConfig).validate_python(dict(options))
    assert isinstance(config, FlanT5Config | T5V11Config), config
    return T5Text(component, tokenizer, config, "")


def codec_component(codec: LatentCodec) -> AutoencoderKLCogVideoX | LanDiffCodec:
    """The component of a codec."""
    if isinstance(codec, CogVideoXCodec):
        return codec.network
    assert isinstance(codec, DctCodec | PcaCodec), codec
    return LanDiffCodec.of(codec)


def codec_of(component: AutoencoderKLCogVideoX | LanDiffCodec) -> LatentCodec:
    """The codec of a component, without copies."""
    if isinstance(component, LanDiffCodec):
        return cast(LatentCodec, component.model)
    return CogVideoXCodec(component, "")
