"""Config of `landiff shards`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from landiff.configs.base import Config

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
]
# Keys that do not change the content of the shards.
NO_CONTENT = {"job", "quarantine", "max_bad_fraction"}


def _require_even(value: int) -> int:
    """Return `value`. Raises ValueError if it is odd: yuv420p stores chroma at half resolution."""
    if value % 2:
        raise ValueError("must be even (yuv420p)")
    return value


class DecoderJobConfig(Config):
    """Resources of a job. None of these values changes the resulting shards."""

    workers: PositiveInt = Field(
        default=2, description="Number of threads. Each has its own decoder process."
    )
    timeout_s: PositiveFloat = Field(
        default=120.0,
        description=(
            "Timeout in seconds for one request to a decoder. A video that exceeds it is rejected."
        ),
    )
    memory_limit_mb: PositiveInt = Field(
        default=3072, description="Memory limit of one decoder process in MiB."
    )


class ColumnsConfig(Config):
    """Names of the columns of a CSV file, or of the keys of a JSONL file."""

    file: str = Field(
        default="file", description="Column with the path of the video, relative to the table."
    )
    caption: str = Field(
        default="caption",
        description="Column with the caption or list of captions. Also the key of the caption in "
        "JSON caption files.",
    )
    start_s: str = Field(
        default="start_s",
        description="Optional column with the start of the span, as seconds or h:m:s.",
    )
    end_s: str = Field(
        default="end_s",
        description="Optional column with the end of the span, as seconds or h:m:s.",
    )
    timestamp: str = Field(
        default="timestamp",
        description="Optional column with a list of [start, end], one for each caption of a list "
        "of captions.",
    )

    def recorded(self) -> dict[str, str]:
        """The column names as data folders store them.

        `timestamp` was added later and is stored only if it was changed, so that the stored value
        of older folders stays equal.
        """
        is_default = self.timestamp == type(self).model_fields["timestamp"].default
        return self.model_dump(exclude={"timestamp"} if is_default else set())


class EncodingConfig(Config):
    """x264 settings of the clips in the shards."""

    crf: NonNegativeInt = Field(
        default=14,
        description="Constant rate factor of x264; lower is better. At 14 the loss is small "
        "compared with that of chroma subsampling.",
    )
    preset: Preset = Field(
        default="slow", description="x264 preset: slower presets give smaller files."
    )


class Bucket(Config):
    """One clip shape: frames, height and width."""

    num_frames: PositiveInt = Field(description="Frames of a clip.")
    height: PositiveInt = Field(description="Height of a clip in pixels. Must be even.")
    width: PositiveInt = Field(description="Width of a clip in pixels. Must be even.")

    @field_validator("height", "width")
    @classmethod
    def _even(cls, value: int) -> int:
        return _require_even(value)

    @property
    def name(self) -> str:
        """The shape as text, for example "17x64x64"."""
        return f"{self.num_frames}x{self.height}x{self.width}"


class ShotsConfig(Config):
    """Shot detection: videos are cut at shot boundaries, so that no clip contains two shots."""

    detector: Literal["scenedetect", "transnetv2"] = Field(
        default="scenedetect",
        description='Shot detector: "scenedetect" (PySceneDetect, AdaptiveDetector) or '
        '"transnetv2" (a neural network that also finds gradual transitions).',
    )
    threshold: PositiveFloat | None = Field(
        default=None,
        description="Detection threshold; lower values find more cuts. null: the default of the "
        "detector, 3.0 for scenedetect and 0.5 for transnetv2.",
    )
    margin_s: NonNegativeFloat = Field(
        default=0.0, description="Seconds dropped on both sides of a cut, to exclude fades."
    )


class FiltersConfig(Config):
    """Filters on clips. A filter is off while its threshold is null."""

    motion_min: NonNegativeFloat | None = Field(
        default=None,
        description="Lowest motion score of a clip, in frame heights per second. null: no limit.",
    )
    motion_max: NonNegativeFloat | None = Field(
        default=None,
        description="Highest motion score of a clip, in frame heights per second. null: no limit.",
    )
    brightness_min: Fraction | None = Field(
        default=None,
        description="Lowest mean luma of a clip, from 0 (black) to 1 (white). null: no limit.",
    )
    brightness_max: Fraction | None = Field(
        default=None,
        description="Highest mean luma of a clip, from 0 (black) to 1 (white). null: no limit.",
    )
    static_max: Fraction | None = Field(
        default=None,
        description=(
            "Highest fraction of frames that are equal to the previous frame. null: no limit."
        ),
    )
    text_area_max: Fraction | None = Field(
        default=None,
        description=(
            "Highest fraction of the frame area covered by recognized text. Needs the extra "
            "[text]. null: no limit."
        ),
    )
    letterbox: bool = Field(
        default=False, description="Detect black borders and crop them before resizing."
    )


class VideoConfig(Config):
    """Handling of videos that are not progressive SDR."""

    hdr: Literal["convert", "reject"] = Field(
        default="convert",
        description="Action for PQ, HLG, BT.2020 and P3 videos: convert to SDR BT.709, or reject.",
    )
    interlaced: Literal["convert", "reject"] = Field(
        default="convert",
        description="Action for interlaced videos: deinterlace with bwdif, or reject.",
    )


class QuarantineConfig(Config):
    """Which bytes of rejected clips are kept in `<data>/rejected` for inspection."""

    max_mb: NonNegativeInt = Field(
        default=64, description="MiB of rejected clips to keep per shard. 0 keeps none."
    )
    filtered: bool = Field(
        default=False,
        description=(
            "Also keep clips that a filter rejects, encoded as they would have been stored in the "
            "shard."
        ),
    )


class ShardsConfig(Config):
    """Which videos become which clips.

    `source` is "packaged" (the clips that come with the project), a folder (its captions.jsonl,
    captions.csv or captions.tsv, else every video with a caption in the .txt beside it), a .csv,
    .tsv or .jsonl with captions and spans, or WebDataset tars of clips (a .tar, a folder of them,
    or names with {000000..000123}). A caption may be a list of captions; all of them stay with the
    clip.

    All clips have num_frames, height and width; or each clip has the nearest of `buckets` that it
    fits. With a shape of one frame, images are clips too.
    """

    source: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description=(
            'Raw videos: "packaged", a folder, a .csv, .tsv or .jsonl table, or WebDataset tars; '
            "see docs/sources.md. Several sources can be given as a list."
        )
    )
    fps: PositiveFloat = Field(description="Frames per second of the clips.")
    num_frames: PositiveInt | None = Field(
        default=None, description="Frames of a clip. Required unless buckets are given."
    )
    height: PositiveInt | None = Field(
        default=None,
        description="Height of a clip in pixels. Must be even. Required unless buckets are given.",
    )
    width: PositiveInt | None = Field(
        default=None,
        description="Width of a clip in pixels. Must be even. Required unless buckets are given.",
    )
    buckets: tuple[Bucket, ...] = Field(
        default=(),
        description=(
            "Clip shapes, instead of num_frames, height and width. For each clip, the shapes with "
            "the nearest aspect ratio are considered, and the longest that the video is long "
            "enough for is used. Shapes of one frame are for images, unless all shapes have one "
            "frame."
        ),
    )
    max_spans: PositiveInt = Field(
        default=1,
        description="Maximum number of consecutive clips cut from one video or span.",
    )
    samples_per_shard: PositiveInt = Field(
        default=256, description="Maximum number of clips per shard."
    )
    max_pixels: PositiveInt = Field(
        default=4096 * 2304,
        description=(
            "Maximum number of pixels of a source frame. Videos with larger frames are rejected."
        ),
    )
    max_caption: PositiveInt = Field(
        default=20_000,
        description=(
            "Maximum number of characters of a caption. Clips with longer ones are rejected."
        ),
    )
    missing_captions: Literal["reject", "file_name", "folder_name", "none"] = Field(
        default="reject",
        description=(
            "Handling of clips without a caption: reject them, use the words of their file name or "
            "folder name as the caption, or keep them without one (none), to train without text or "
            "to generate captions with `landiff captions`."
        ),
    )
    video: VideoConfig = Field(
        default=VideoConfig(), description="Handling of HDR and interlaced videos."
    )
    shots: ShotsConfig | None = Field(
        default=None, description="Shot detection. null: each video is treated as one shot."
    )
    filters: FiltersConfig = Field(default=FiltersConfig(), description="Filters on clips.")
    max_bad_fraction: Fraction = Field(
        default=0.2,
        description=(
            "Maximum fraction of all clips that may be damaged. If there are more, the job stops."
        ),
    )
    columns: ColumnsConfig = Field(
        default=ColumnsConfig(), description="Names of the columns of a table."
    )
    encoding: EncodingConfig = Field(
        default=EncodingConfig(), description="x264 settings of the clips."
    )
    quarantine: QuarantineConfig = Field(
        default=QuarantineConfig(), description="Rejected clips to keep for inspection."
    )
    job: DecoderJobConfig = Field(
        default=DecoderJobConfig(), description="Threads and limits of the decoders."
    )

    @model_validator(mode="after")
    def _one_shape_or_buckets(self) -> ShardsConfig:
        names = ("num_frames", "height", "width")
        given = [name for name in names if getattr(self, name) is not None]
        if self.buckets and given:
            raise ValueError(
                f"{', '.join(given)} and buckets exclude each other; "
                "put the shape into the list of buckets"
            )
        if not self.buckets and len(given) < 3:
            raise ValueError(
                "num_frames, height and width are required, or a list of buckets that have them"
            )
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets holds the same shape twice")
        return self

    @field_validator("height", "width")
    @classmethod
    def _even(cls, value: int | None) -> int | None:
        return None if value is None else _require_even(value)

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a list."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The clip shapes: `buckets`, or the only shape."""
        if self.buckets:
            return self.buckets
        shape = (self.num_frames, self.height, self.width)
        assert self.num_frames and self.height and self.width, shape  # checked by the validator
        return (Bucket(num_frames=self.num_frames, height=self.height, width=self.width),)

    @property
    def takes_images(self) -> bool:
        """Whether images are clips: a clip shape has one frame."""
        return any(shape.num_frames == 1 for shape in self.shapes)

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two runs to write into one folder.

        Keys that were added later are included only if they have an effect, so that the identity
        of older folders stays equal.
        """
        unused = set()
        for name, inactive in self.inactive_values().items():
            if self.model_dump(mode="json", include={name})[name] == inactive:
                unused.add(name)
        return self.model_dump(mode="json", exclude={*NO_CONTENT, "source", "columns", *unused})

    def inactive_values(self) -> dict[str, Any]:
        """The keys that were added later, with the values at which they have no effect."""
        fields = type(self).model_fields
        return {
            "buckets": [],
            "video": VideoConfig().model_dump(mode="json"),
            "shots": None,
            "filters": FiltersConfig().model_dump(mode="json"),
            "max_caption": fields["max_caption"].default,
            "missing_captions": fields["missing_captions"].default,
        }

    def recorded(self) -> dict[str, Any]:
        """The config as the manifest stores it: without the keys that do not change the content."""
        plain = self.model_dump(mode="json", exclude=NO_CONTENT)
        plain["columns"] = self.columns.recorded()
        return plain
