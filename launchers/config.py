"""Configs of the commands that combine several packages. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from landiff.configs.base import Config, refuse_values
from landiff.data_pipeline.format.buckets import BucketName
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.loading.config import ValidationConfig
from landiff.model_zoo.config import ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.frozen.config import (
    CodecConfig,
    EfficientNetConfig,
    TextConfig,
    VisionConfig,
)
from landiff.model_zoo.lora.config import AdapterUse

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ShardsJobConfig(ShardsConfig):
    """`landiff shards`: the content of the shards, and the folder they are written to."""

    data: Path = Field(
        description=(
            "Data folder. Shards are written to its subfolder `raw`, the manifest to "
            "`manifest.json`. Does not affect the content of the shards."
        )
    )

    @property
    def content(self) -> ShardsConfig:
        """The part of the config that determines the bytes of the shards."""
        return ShardsConfig.model_validate(self.model_dump(exclude={"data"}))


class WorldConfig(Config):
    """Clips of moving shapes that a pipeline generates first, in the folder `world`."""

    clips: PositiveInt = Field(description="Number of training clips.")
    true_clips: NonNegativeInt = Field(
        default=108, description="Number of clips in each set that is not used for training."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of positions, sizes and order.")


GIVEN = ("first_frame", "continue_video", "tokens_from")
"""Keys of what a video can be given beside text."""


class SampleConfig(Config):
    """`landiff sample`: from prompts to tokens, latents and mp4 files."""

    zoo: Path = Field(
        description="Zoo folder with the three models. `packaged` is the zoo that comes with "
        "landiff."
    )
    out: Path = Field(description="Folder of the mp4 files.")
    lm: str = Field(
        default="lm",
        description="Zoo reference of the language model: name, name@fingerprint or path.",
    )
    tokenizer: str = Field(default="tokenizer", description="Zoo reference of the tokenizer.")
    diffusion: str = Field(
        default="diffusion",
        description="Zoo reference of the diffusion model, including the control branch.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        default=(),
        description="LoRA adapters from the zoo, each applied to its base model.",
    )
    merge_adapters: bool = Field(
        default=True,
        description=(
            "Add the adapters to the weights before sampling, so that they take no extra time. "
            "`false` computes them in separate layers."
        ),
    )
    lm_text: TextConfig = Field(description="Text encoder of the language model.")
    diffusion_text: TextConfig = Field(
        description="Text encoder of the diffusion model. Must be padded."
    )
    codec: CodecConfig = Field(description="Codec that decodes latents to frames.")
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of the diffusion model."
    )
    prompts: tuple[str, ...] = Field(
        default=(),
        description="Prompts, one video each. Prompts on the command line replace them.",
    )
    prompts_file: Path | None = Field(
        default=None,
        description=(
            "File of prompts, instead of `prompts`: .txt with one per line, .csv with a header, or "
            ".jsonl, with `prompt` or `schedule` and optionally `seed`, `frames` (latent frames), "
            "`motion` and `negative`; or .schedule with lines `FRAME: TEXT`."
        ),
    )
    prompt_schedule: tuple[str, ...] = Field(
        default=(),
        description=(
            "One video whose prompt changes, instead of `prompts`: lines `FRAME: TEXT`, such as "
            "`97: the fox jumps`. Each text applies from the chunk that contains this RGB frame."
        ),
    )
    num_latent_frames: PositiveInt = Field(
        default=13,
        description="Length of each video in latent frames: one chunk, or one chunk and whole "
        "strides of further chunks.",
    )
    size: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*x[1-9]\d*$",
        description=(
            "Height and width of the videos in pixels, such as 480x720. The models must have been "
            "trained on this clip shape (`data.buckets`). null: the size in their configs."
        ),
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames per second of the mp4 files.")
    motion_score: NonNegativeFloat | None = Field(
        default=None,
        description=(
            "Motion score given to the language model, in frame heights per second; null means 0.1."
        ),
    )
    tokens: TokenSamplingConfig = Field(
        default=TokenSamplingConfig(),
        description="Sampling of semantic tokens by the language model.",
    )
    steps: PositiveInt = Field(
        default=50, description="Sampling steps of the diffusion model for each chunk, at least 2."
    )
    guidance: NonNegativeFloat = Field(
        default=6.0,
        description=(
            "Classifier-free guidance of the diffusion model. The scale varies between 1 and 1 + "
            "`guidance` over the sampling steps."
        ),
    )
    guidance_schedule: Literal["timestep", "step", "constant"] = Field(
        default="timestep",
        description=(
            "Schedule of the scale. `timestep` jumps between 1 and 1 + `guidance`, as in the "
            "release; `step` rises smoothly; `constant` is 1 + `guidance` in all steps."
        ),
    )
    guidance_interval: tuple[Fraction, Fraction] = Field(
        default=(0.0, 1.0),
        description=(
            "Range of the sampling steps with guidance, from 0 (noise) to 1 (the video). Steps "
            "without guidance take half the time."
        ),
    )
    guidance_rescale: Fraction = Field(
        default=0.0,
        description=(
            "Fraction of the contrast added by guidance that is removed again; 0.7 is common for "
            "high guidance."
        ),
    )
    control_guidance: NonNegativeFloat = Field(
        default=0.0,
        description=(
            "Guidance on the semantic tokens: multiplies the contribution of the control branch by "
            "1 + `control_guidance`, so that videos follow their tokens more closely. Above 0, "
            "each step takes one more forward pass of the main transformer."
        ),
    )
    solver: Literal["sde-dpm++", "ddim", "unipc", "euler"] = Field(
        default="sde-dpm++",
        description=(
            "`sde-dpm++` is the sampler of the release. The others are deterministic solvers of "
            "diffusers: `ddim` and `euler` of first order, `unipc` of second order."
        ),
    )
    clean_frames: NonNegativeInt = Field(
        default=7,
        description=(
            "Number of latent frames at the end of a chunk that the next chunk of a long video "
            "continues as its clean prefix."
        ),
    )
    seed: NonNegativeInt = Field(
        default=42, description="Random seed of the first prompt; prompt i uses seed + 1000 i."
    )
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description=(
            "Seeds of every prompt, instead of `seed`: one video for each. A seed in the file of "
            "prompts takes precedence."
        ),
    )
    num_videos: PositiveInt = Field(
        default=1, description="Videos for each prompt and seed s, with seeds s, s + 1, and so on."
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        default=1,
        description=(
            "Number of videos that one device generates at once. It changes a video by rounding "
            "only. `auto` measures which size is fastest, once per output folder."
        ),
    )
    vision: VisionConfig | None = Field(
        default=None,
        description=(
            "Vision encoder that the tokenizer was trained with. Required for `first_frame`, "
            "`continue_video`, and a video as `tokens_from`. The drift report of a long video uses "
            "it too."
        ),
    )
    first_frame: Path | None = Field(
        default=None, description="Image or video whose first frame the videos start with."
    )
    continue_video: Path | None = Field(
        default=None,
        description=(
            "Video to continue: the videos start with its last `clean_frames` latent frames."
        ),
    )
    tokens_from: Path | None = Field(
        default=None,
        description=(
            "Video, or file of `tokens_only`, whose semantic tokens are rendered. The language "
            "model is not used."
        ),
    )
    tokens_only: bool = Field(
        default=False,
        description=(
            "Only sample semantic tokens, and write them to `tokens/NAME.safetensors`. The same "
            "command without it renders them."
        ),
    )
    split_guidance: bool = Field(
        default=False,
        description=(
            "Generate each video on two devices: a second process computes half of the batch of "
            "the diffusion model; with guidance, this is one of its two branches. `--nproc` must "
            "be even. Videos differ by rounding, as with another `batch_size`."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description=(
            "`fp32` computes in float32, whatever the dtype of the stored weights. `bf16` samples "
            "as the release does (§4.5, §5.11): norms, output head and quantizer stay float32."
        ),
    )
    quantize: Literal["none", "int8"] = Field(
        default="none",
        description=(
            "Quantization of the weights of transformer blocks in the language model and the "
            "diffusion model. `int8` takes a quarter of the memory of `fp32`, half of that of "
            "`bf16`, with torchao (extra `quantize`). Videos differ by rounding."
        ),
    )
    compile_blocks: bool = Field(
        default=False,
        description=(
            "Compile the blocks of the diffusion model with torch.compile on CUDA, which needs a "
            "compiler. Faster, but the first sampling step takes a minute or more. Videos differ "
            "by rounding. No effect with offload = group or sequential, nor on the CPU."
        ),
    )
    offload: Literal["none", "model", "group", "sequential", "disk"] = Field(
        default="none",
        description=(
            "Placement of models and text encoders. `none`: all on the device. `model`: in host "
            "memory; each moves to the device while it is used. `group`: the model in use moves "
            "block by block. `sequential`: layer by layer, except for the language model. `disk`: "
            "each is loaded when it is used. `--memory` selects a mode. Videos do not depend on "
            "it."
        ),
    )
    device: str = Field(
        default="auto",
        description="torch device; `auto` uses a GPU if there is one, otherwise the CPU.",
    )

    @property
    def shape(self) -> ClipShape | None:
        """The clip shape of `size`, of one frame."""
        return None if self.size is None else ClipShape.parse(f"1x{self.size}")

    @model_validator(mode="after")
    def _one_condition(self, info: ValidationInfo) -> SampleConfig:
        """Rejects a first frame together with tokens, for instance."""
        given = [name for name in GIVEN if getattr(self, name) is not None]
        if len(given) > 1:
            refuse_values(info, [f"{' and '.join(given)} exclude each other; leave one out"])
        return self

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float]) -> tuple[float, float]:
        """Rejects an empty range, which would turn guidance off."""
        if interval[0] >= interval[1]:
            raise ValueError(
                "the range is empty; write its start before its end, or set guidance=0"
            )
        return interval

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        """Rejects empty prompts, and those with lone surrogates, which cannot be encoded."""
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {i} is empty; describe what the video shows")
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ValueError(
                    f"prompt {i}, {prompt!a}, is not valid UTF-8 text; check the encoding of the "
                    "terminal or file"
                )
        return prompts


class EvaluateConfig(Config):
    """`landiff evaluate`: losses with right and wrong conditions, on clips of a data folder."""

    zoo: Path = Field(description="Zoo folder with the three models.")
    data: Path = Field(
        description="Data folder with tokens, latents and the text columns named below."
    )
    out: Path = Field(description="JSON file of the results.")
    lm: str = Field(default="lm", description="Zoo reference of the language model.")
    tokenizer: str = Field(default="tokenizer", description="Zoo reference of the tokenizer.")
    diffusion: str = Field(
        default="diffusion",
        description="Zoo reference of the diffusion model, including the control branch.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        default=(),
        description="LoRA adapters from the zoo, each applied to its base model.",
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of the diffusion model."
    )
    lm_text_column: str = Field(description="Column of text states for the language model.")
    diffusion_text_column: str = Field(description="Column of text states for the diffusion model.")
    prefix_frames: PositiveInt = Field(
        description=(
            "Latent frames of the clean prefix in the prefix test. The loss is compared on the "
            "frames after it."
        )
    )
    buckets: tuple[BucketName, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Clip shapes to evaluate separately, as frames x height x width. null: all shapes of "
            "the data."
        ),
    )
    samples: PositiveInt = Field(
        default=32,
        description=(
            "Number of clips per seed and clip shape, at least 2. If there are fewer clips, all "
            "are used."
        ),
    )
    validation: ValidationConfig | None = Field(
        default=None,
        description=(
            "Evaluate the held-out clips of training: set it to `data.validation` of the training "
            "runs. null: choose from all clips at random."
        ),
    )
    seeds: PositiveInt = Field(
        default=5,
        description=(
            "Number of repetitions, each with different clips, wrong conditions, noise and "
            "timesteps."
        ),
    )
    device: str = Field(
        default="auto",
        description="torch device; `auto` uses a GPU if there is one, otherwise the CPU.",
    )


class VideoMetricsConfig(Config):
    """`landiff evaluate videos`: metrics of a folder of videos that need no download."""

    videos: Path = Field(
        description="Folder of mp4 files, for instance the output of `landiff sample`."
    )
    reference: Path | None = Field(
        default=None,
        description=(
            "Folder of real videos with which FVD and KVD compare `videos`; null: no FVD and KVD."
        ),
    )
    out: Path = Field(default=Path("video-metrics.json"), description="JSON file of the results.")
    features: VisionConfig = Field(
        default=EfficientNetConfig(),
        description="Network that computes the features for FVD and KVD.",
    )
    num_frames: PositiveInt | None = Field(
        default=None,
        description=(
            "Number of frames of each video that are evaluated, from the start; null means all."
        ),
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames per second of the videos.")
    device: str = Field(
        default="auto",
        description="torch device; `auto` uses a GPU if there is one, otherwise the CPU.",
    )
