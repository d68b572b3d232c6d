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
        description="Data folder. Shards go to its subfolder `raw`, the manifest to "
        "`manifest.json`. Does not affect the bytes of the shards."
    )

    @property
    def content(self) -> ShardsConfig:
        """The part of the config that determines the bytes of the shards."""
        return ShardsConfig.model_validate(self.model_dump(exclude={"data"}))


class WorldConfig(Config):
    """Clips of moving shapes that a pipeline makes first, in the folder `world`."""

    clips: PositiveInt = Field(description="Number of training clips.")
    true_clips: NonNegativeInt = Field(
        default=108, description="Clips of each set that nothing is trained on."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of places, sizes and order.")


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
        description="Zoo reference of the diffusion model, control branch included.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        default=(),
        description="LoRA adapters from the zoo, each added to the model that it was trained on.",
    )
    merge_adapters: bool = Field(
        default=True,
        description="Add the adapters to the weights before sampling, which costs no time in it. "
        "`false` keeps them in layers of their own.",
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
        description="One video is sampled for each prompt. Prompts on the command line replace "
        "them.",
    )
    prompts_file: Path | None = Field(
        default=None,
        description="File of prompts, in place of `prompts`: .txt with one per line, .csv with a "
        "header, or .jsonl, with `prompt` or `schedule` and optionally `seed`, `frames` (latent "
        "frames), `motion` and `negative`; or .schedule with lines `FRAME: TEXT`. `-` reads lines "
        "from standard input.",
    )
    prompt_schedule: tuple[str, ...] = Field(
        default=(),
        description="One video whose prompt changes, in place of `prompts`: lines `FRAME: TEXT`, "
        "as in `97: the fox jumps`, each for the chunks from that RGB frame on.",
    )
    num_latent_frames: PositiveInt = Field(
        default=13,
        description="Length of each video in latent frames: one chunk, or one chunk and whole "
        "strides of further chunks.",
    )
    size: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*x[1-9]\d*$",
        description="Height and width of the videos in pixels, such as 480x720, of a clip shape "
        "that the models were trained on (`data.buckets`). null: the size of the models.",
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames per second of the mp4 files.")
    motion_score: NonNegativeFloat | None = Field(
        default=None,
        description="Motion score for the language model, in frame heights per second; null "
        "means 0.1.",
    )
    tokens: TokenSamplingConfig = Field(
        default=TokenSamplingConfig(),
        description="How the language model draws semantic tokens.",
    )
    steps: PositiveInt = Field(
        default=50, description="Sampling steps of the diffusion model for each chunk, at least 2."
    )
    guidance: NonNegativeFloat = Field(
        default=6.0,
        description="Guidance of the diffusion model. The scale varies between 1 and "
        "1 + `guidance` over the sampling steps.",
    )
    guidance_schedule: Literal["timestep", "step", "constant"] = Field(
        default="timestep",
        description="How the scale varies. `timestep` jumps between its bounds, as in the release; "
        "`step` rises smoothly; `constant` is 1 + `guidance` in all steps.",
    )
    guidance_interval: tuple[Fraction, Fraction] = Field(
        default=(0.0, 1.0),
        description="Part of the sampling steps with guidance, from 0 (noise) to 1 (the video). "
        "Other steps take half the time.",
    )
    guidance_rescale: Fraction = Field(
        default=0.0,
        description="Part of the contrast that guidance adds which is taken back; 0.7 is common "
        "for high guidance.",
    )
    control_guidance: NonNegativeFloat = Field(
        default=0.0,
        description="Guidance by the semantic tokens: what the control branch changes is "
        "multiplied by 1 + `control_guidance`. Videos follow their tokens more closely. Above 0 "
        "each step runs the main transformer once more.",
    )
    solver: Literal["sde-dpm++", "ddim", "unipc", "euler"] = Field(
        default="sde-dpm++",
        description="`sde-dpm++` is the release's sampler. The others are deterministic solvers of "
        "diffusers: `ddim` and `euler` of first order, `unipc` of second.",
    )
    clean_frames: NonNegativeInt = Field(
        default=7,
        description="Latent frames that each further chunk of a long video takes from the end of "
        "the chunk before, as its clean prefix.",
    )
    seed: NonNegativeInt = Field(
        default=42, description="Random seed of the first prompt; prompt i uses seed + 1000 i."
    )
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(),
        description="Seeds of every prompt, in place of `seed`: one video for each. A seed in the "
        "file of prompts takes precedence.",
    )
    num_videos: PositiveInt = Field(
        default=1, description="Videos for each prompt and seed s, with seeds s, s + 1, and so on."
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        default=1,
        description="Videos that are generated at once on one device. A video depends on it only "
        "by rounding, and not on the other videos of its batch. `auto` measures which size is "
        "fastest, once: later runs in the same folder keep the size.",
    )
    vision: VisionConfig | None = Field(
        default=None,
        description="Vision features that the tokenizer was trained on. `first_frame`, "
        "`continue_video` and `tokens_from` of a video need them, and the report of a long video "
        "then measures in them how far each chunk is from the first.",
    )
    first_frame: Path | None = Field(
        default=None, description="Image or video whose first frame the videos begin with."
    )
    continue_video: Path | None = Field(
        default=None,
        description="Video that the videos continue: they begin with its last `clean_frames` "
        "latent frames.",
    )
    tokens_from: Path | None = Field(
        default=None,
        description="Video, or file of `tokens_only`, whose semantic tokens the videos have. The "
        "language model is not used.",
    )
    tokens_only: bool = Field(
        default=False,
        description="Draw the semantic tokens only, into `tokens/NAME.safetensors`. The same "
        "command without it renders them.",
    )
    split_guidance: bool = Field(
        default=False,
        description="Generate each video on two devices: a second process computes half of the "
        "rows of the diffusion model, with guidance one of its two branches. `--nproc` is then an "
        "even number. Videos differ by rounding, as with another `batch_size`.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="`fp32` computes in float32, in whatever precision the weights are stored. "
        "`bf16` samples as the release does (§4.5, §5.11): norms, output head and quantizer stay "
        "float32.",
    )
    quantize: Literal["none", "int8"] = Field(
        default="none",
        description="Weights of the transformer blocks of language and diffusion model. `int8`: a "
        "quarter of the memory of `fp32`, half of that of `bf16`, by torchao (extra `quantize`). "
        "Videos differ by rounding.",
    )
    offload: Literal["none", "model", "group", "sequential", "disk"] = Field(
        default="none",
        description="Where models and text encoders are that are not in use. `none`: on the "
        "device. `model`: in the memory of the host. `group`: there too, and that in use moves to "
        "the device block by block, `sequential`: layer by layer, except for the language model. "
        "`disk`: nowhere; each is loaded when its turn comes. `--memory` chooses. Videos do not "
        "depend on it.",
    )
    device: str = Field(
        default="auto", description="torch device; `auto` uses a GPU if there is one, else the CPU."
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
    """`landiff evaluate`: losses under right and wrong conditions, on clips of a data folder."""

    zoo: Path = Field(description="Zoo folder with the three models.")
    data: Path = Field(description="Data folder with the columns named below, tokens and latents.")
    out: Path = Field(description="JSON file of the results.")
    lm: str = Field(default="lm", description="Zoo reference of the language model.")
    tokenizer: str = Field(default="tokenizer", description="Zoo reference of the tokenizer.")
    diffusion: str = Field(
        default="diffusion",
        description="Zoo reference of the diffusion model, control branch included.",
    )
    adapters: tuple[AdapterUse, ...] = Field(
        default=(),
        description="LoRA adapters from the zoo, each added to the model that it was trained on.",
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of the diffusion model."
    )
    lm_text_column: str = Field(description="Column of text states for the language model.")
    diffusion_text_column: str = Field(description="Column of text states for the diffusion model.")
    prefix_frames: PositiveInt = Field(
        description="Latent frames of the clean prefix in the prefix test; the loss is compared "
        "on the later frames."
    )
    buckets: tuple[BucketName, ...] | None = Field(
        default=None,
        min_length=1,
        description="Clip shapes to evaluate, each by itself, as frames x height x width. null: "
        "all shapes of the data.",
    )
    samples: PositiveInt = Field(
        default=32,
        description="Clips for each seed and clip shape, at most all of the shape; at least 2.",
    )
    validation: ValidationConfig | None = Field(
        default=None,
        description="Measure held-out clips, the same for every seed: the `data.validation` of the "
        "training runs. null draws from all clips.",
    )
    seeds: PositiveInt = Field(
        default=5,
        description="Number of repetitions. Each draws its own clips, wrong conditions, noise and "
        "timesteps.",
    )
    device: str = Field(
        default="auto", description="torch device; `auto` uses a GPU if there is one, else the CPU."
    )


class VideoMetricsConfig(Config):
    """`landiff evaluate videos`: metrics of a folder of videos that need no download."""

    videos: Path = Field(description="Folder of mp4 files, that of `landiff sample` for instance.")
    reference: Path | None = Field(
        default=None,
        description="Folder of real videos, from which FVD and KVD are the distances; null "
        "measures `videos` alone.",
    )
    out: Path = Field(default=Path("video-metrics.json"), description="JSON file of the results.")
    features: VisionConfig = Field(
        default=EfficientNetConfig(), description="Network whose features FVD and KVD compare."
    )
    num_frames: PositiveInt | None = Field(
        default=None, description="First frames of each video that are measured; null means all."
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames per second of the videos.")
    device: str = Field(
        default="auto", description="torch device; `auto` uses a GPU if there is one, else the CPU."
    )
