"""Config of `landiff shards`. Torch-free."""

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


class DecoderJobConfig(Config):
    """How the work is done. None of it changes a byte of the result."""

    workers: PositiveInt = 2  # threads, each with a decoder process
    timeout_s: PositiveFloat = 120.0  # for one video
    memory_limit_mb: PositiveInt = 3072  # of one decoder process


class ColumnsConfig(Config):
    """Names of the columns of a CSV or the keys of a JSONL. `caption` is also the key in JSON caption files."""

    file: str = "file"
    caption: str = "caption"
    start_s: str = "start_s"  # optional in the file
    end_s: str = "end_s"  # optional in the file
    timestamp: str = (
        "timestamp"  # optional in the file: a list of [start, end], one for each caption of a list
    )

    def recorded(self) -> dict[str, str]:
        """The names, those of columns that came later only where they are set, so that older data stays what it is."""
        is_set = self.timestamp != type(self).model_fields["timestamp"].default
        return self.model_dump(exclude=set() if is_set else {"timestamp"})


class EncodingConfig(Config):
    """x264 settings of the clips in the shards."""

    crf: NonNegativeInt = (
        14  # lower is better; at 14 the loss is small against that of halving the chroma
    )
    preset: Preset = "slow"


class Bucket(Config):
    """One shape of clips."""

    num_frames: PositiveInt
    height: PositiveInt
    width: PositiveInt

    @field_validator("height", "width")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even (yuv420p)")
        return value

    @property
    def name(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


class ShotsConfig(Config):
    """Where videos are cut before spans are laid, so that no clip holds two shots."""

    detector: Literal["scenedetect", "transnetv2"] = "scenedetect"
    threshold: PositiveFloat | None = (
        None  # the detector's own when not given (scenedetect 3.0, transnetv2 0.5)
    )
    margin_s: NonNegativeFloat = 0.0  # left out on both sides of a cut: fades


class FiltersConfig(Config):
    """What clips must be like. Nothing is asked for unless it is given."""

    motion_min: NonNegativeFloat | None = None  # motion score, frame heights per second
    motion_max: NonNegativeFloat | None = None
    brightness_min: Fraction | None = None  # mean luma, 0 black, 1 white
    brightness_max: Fraction | None = None
    static_max: Fraction | None = None  # share of frames that repeat the one before
    text_area_max: Fraction | None = (
        None  # share of the picture under recognised text; needs the extra [text]
    )
    letterbox: bool = False  # find black bars and crop them away


class VideoConfig(Config):
    """What happens to videos that are not progressive SDR."""

    hdr: Literal["convert", "reject"] = "convert"  # PQ, HLG, BT.2020 and P3: convert to SDR BT.709
    interlaced: Literal["convert", "reject"] = "convert"  # convert: deinterlace with bwdif


class QuarantineConfig(Config):
    """Bytes of rejected clips that are kept in `<data>/rejected`, to be looked at."""

    max_mb: NonNegativeInt = 64  # for each shard; 0: none
    filtered: bool = False  # also clips that a filter refused, as they would have been in the shard


class ShardsConfig(Config):
    """Which videos become which clips.

    `source` is "packaged" (the clips that come with the project), a folder (its captions.jsonl, captions.csv
    or captions.tsv, else every video with a caption in the .txt beside it), a .csv, .tsv or .jsonl with
    captions and spans, or WebDataset tars of clips (a .tar, a folder of them, or names with
    {000000..000123}). A caption may be a list of captions; all of them stay with the clip.

    All clips have num_frames, height and width; or each has the nearest of `buckets` that it fits.
    """

    source: str
    fps: PositiveFloat
    num_frames: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    buckets: tuple[Bucket, ...] = ()
    max_spans: PositiveInt = 1  # clips cut from one video or span, one after the other
    samples_per_shard: PositiveInt = 256
    max_pixels: PositiveInt = 4096 * 2304  # of a frame of the source; larger ones are set aside
    max_caption: PositiveInt = 20_000  # characters; clips with longer ones are set aside
    video: VideoConfig = VideoConfig()
    shots: ShotsConfig | None = None  # null: videos are single shots
    filters: FiltersConfig = FiltersConfig()
    max_bad_fraction: Fraction = 0.2  # of all clips; more damaged ones stop the job
    columns: ColumnsConfig = ColumnsConfig()
    encoding: EncodingConfig = EncodingConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    job: DecoderJobConfig = DecoderJobConfig()

    @model_validator(mode="after")
    def _one_shape_or_buckets(self) -> ShardsConfig:
        given = [
            name for name in ("num_frames", "height", "width") if getattr(self, name) is not None
        ]
        if self.buckets and given:
            raise ValueError(
                f"{', '.join(given)} and buckets exclude each other; put the shape into the list of buckets"
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
        if value is not None and value % 2:
            raise ValueError("must be even (yuv420p)")
        return value

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        return self.buckets or (
            Bucket(num_frames=self.num_frames, height=self.height, width=self.width),
        )

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to write into one folder.

        The keys that came later count where they are used only, so that older folders stay what they are.
        """
        unused = {
            name
            for name, value in self.resting().items()
            if self.model_dump(mode="json", include={name})[name] == value
        }
        return self.model_dump(mode="json", exclude={*NO_CONTENT, "source", "columns", *unused})

    def resting(self) -> dict[str, Any]:
        """The later keys, with the values at which they change nothing."""
        fields = type(self).model_fields
        return {
            "buckets": [],
            "video": VideoConfig().model_dump(mode="json"),
            "shots": None,
            "filters": FiltersConfig().model_dump(mode="json"),
            "max_caption": fields["max_caption"].default,
        }

    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps: all but how the work was done, and later keys only where they are set."""
        plain = self.model_dump(mode="json", exclude=NO_CONTENT)
        plain["columns"] = self.columns.recorded()
        return plain


NO_CONTENT = {"job", "quarantine", "max_bad_fraction"}
