"""Checks that the stages of a pipeline match: clips, columns, models, sampler. Torch-free.

The checks compare configs only, so that a mistake in the last stage is found before the first one
starts. Checks of one stage alone are in launchers/checks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem
from landiff.data_pipeline.precompute.config import (
    FeaturesColumn,
    LatentsColumn,
    PrecomputeConfig,
    ScoreColumn,
    TextColumn,
    TokensColumn,
)
from landiff.launchers.config import EvaluateConfig, SampleConfig, ShardsJobConfig
from landiff.launchers.project.sizes import DECORD_REFUSES, ClipSizes, frames_of
from landiff.model_zoo.frozen.checks import width_of
from landiff.model_zoo.sample.sizes import Sizes, check_length
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig

EXPORTED = {
    "tokenizer": ("runs/tokenizer", "tokenizer"),
    "lm": ("runs/lm", "lm"),
    "diffusion-main": ("runs/diffusion-main", "main"),
    "diffusion-control": ("runs/diffusion-control", "diffusion"),
}
"""Stage -> run folder and zoo entry that the pipeline exports between its stages."""


@dataclass(frozen=True)
class Chain:
    """The configs of a pipeline. `precompute` holds the columns of all its precompute stages."""

    shards: ShardsJobConfig
    features: PrecomputeConfig
    precompute: PrecomputeConfig
    tokenizer: TokenizerTrainConfig
    lm: LMTrainConfig
    main: DiffusionTrainConfig
    control: DiffusionTrainConfig
    evaluate: EvaluateConfig
    sample: SampleConfig

    @property
    def clips(self) -> list[ClipSizes]:
        """The clip shapes whose sizes divide."""
        sizes = [ClipSizes(s.num_frames, s.height, s.width) for s in self.shards.shapes]
        return [size for size in sizes if not size.problems()]

    @property
    def trainers(self) -> dict[str, TokenizerTrainConfig | LMTrainConfig | DiffusionTrainConfig]:
        """The configs of the trainers by stage."""
        return {
            "tokenizer": self.tokenizer,
            "lm": self.lm,
            "diffusion-main": self.main,
            "diffusion-control": self.control,
        }

    def columns_of(self, kind: type[Any]) -> dict[str, Any]:
        """The columns of a kind by name. Any: instances of `kind`."""
        columns = self.precompute.columns
        return {name: column for name, column in columns.items() if isinstance(column, kind)}


def check_chain(configs: Mapping[str, Any]) -> list[Problem]:
    """All reasons why stages of a pipeline do not fit each other.

    `configs` maps the stems of a preset to their configs; `precompute` has the columns of
    `features` too. Any: instances of the class of each stage.
    """
    chain = Chain(
        shards=configs["shards"],
        features=configs["features"],
        precompute=configs["precompute"],
        tokenizer=configs["tokenizer"],
        lm=configs["lm"],
        main=configs["diffusion-main"],
        control=configs["diffusion-control"],
        evaluate=configs["evaluate"],
        sample=configs["sample"],
    )
    texts: list[str] = []
    for rule in RULES:
        texts += rule(chain)
    return [Problem(text) for text in dict.fromkeys(texts)]


# -------------------------------------------------------------------- clips


def check_clips(chain: Chain) -> list[str]:
    """Whether clips can be divided into latents and features."""
    found = []
    for number, shape in enumerate(chain.shards.shapes):
        key = f"shards.buckets.{number}" if chain.shards.buckets else "shards"
        sizes = ClipSizes(shape.num_frames, shape.height, shape.width)
        found += [f"{key}.{text}" for text in sizes.problems()]
        for stage, config in (("features", chain.features), ("precompute", chain.precompute)):
            if shape.width in DECORD_REFUSES and config.decoder == "decord":
                found.append(
                    f"{key}.width = {shape.width}, but {stage}.decoder = decord cannot read clips "
                    "of this width; set decoder = pyav"
                )
    return found


def check_grids(chain: Chain) -> list[str]:
    """Whether features and latents of the clips have the sizes of the models.

    With `data.buckets` a model takes other sizes too.
    """
    tokenizer = chain.tokenizer.model
    transformer = chain.control.model.transformer
    found = []
    for clip in chain.clips:
        clip_text = f"clips of {clip.height} x {clip.width} (shards)"
        grid = (tokenizer.grid_height, tokenizer.grid_width)
        if grid != clip.grid and chain.tokenizer.data.buckets is None:
            found.append(
                f"tokenizer.model.grid_height, grid_width = {grid[0]}, {grid[1]}, but {clip_text} "
                f"have features of {clip.grid[0]} x {clip.grid[1]}; set them to that"
            )
        latents = (transformer.latent_height, transformer.latent_width)
        if latents != clip.latent_size and chain.control.data.buckets is None:
            height, width = clip.latent_size
            found.append(
                f"diffusion.model.transformer.latent_height, latent_width = {latents[0]}, "
                f"{latents[1]}, but {clip_text} have latents of {height} x {width}; set them to "
                "that"
            )
    return found


def check_lengths(chain: Chain) -> list[str]:
    """Whether the clips are as long as the window of the diffusion model.

    With `data.buckets` it takes shorter ones too.
    """
    window = chain.control.model.transformer.latent_frames
    found = []
    for clip in chain.clips:
        if clip.latent_frames < window and chain.control.data.buckets is None:
            found.append(
                f"shards.num_frames = {clip.num_frames} gives {clip.latent_frames} latent frames, "
                f"but diffusion.model.transformer.latent_frames = {window} takes clips of at least "
                f"{frames_of(window)} frames; set num_frames = {frames_of(window)}, or "
                f"latent_frames = {clip.latent_frames}"
            )
    return found


def check_buckets(chain: Chain) -> list[str]:
    """Whether the shards hold clips of the shapes that are trained on."""
    made = [shape.name for shape in chain.shards.shapes]
    found = []
    for stage, config in chain.trainers.items():
        for index in range(len(config.phases) + 1):
            key = f"{stage}.phases.{index - 1}.data.buckets" if index else f"{stage}.data.buckets"
            for name in config.in_phase(index).data.buckets or ():
                if name not in made:
                    found.append(
                        f"{key} names {name}, but shards makes clips of {', '.join(made)}; name "
                        "one of these, or add the shape to shards.buckets"
                    )
    return found


# -------------------------------------------------------------------- columns


def check_columns(chain: Chain) -> list[str]:
    """Whether every column that a stage reads is computed, and by an encoder of the right kind."""
    known = list(chain.precompute.columns)
    readers = {
        "tokenizer": {"the features": COLUMN},
        "lm": {
            "lm.tokens_column": chain.lm.tokens_column,
            "lm.text_column": chain.lm.text_column,
        },
        "evaluate": {
            "evaluate.lm_text_column": chain.evaluate.lm_text_column,
            "evaluate.diffusion_text_column": chain.evaluate.diffusion_text_column,
        },
    }
    for stage in ("diffusion-main", "diffusion-control"):
        config = chain.trainers[stage]
        assert isinstance(config, DiffusionTrainConfig), stage
        keys = {"latents_column": config.latents_column, "text_column": config.text_column}
        if config.phase == "control":
            keys["tokens_column"] = config.tokens_column
        readers[stage] = {f"{stage}.{key}": column for key, column in keys.items()}
    found = []
    for keys in readers.values():
        for key, column in keys.items():
            if column not in known:
                meant = nearest_name(column, known)
                found.append(f"{key} = {column} is a column that no precompute makes{meant}")
    return found


def check_vision(chain: Chain) -> list[str]:
    """Whether tokens come from the features that the tokenizer is trained on."""
    features = chain.precompute.columns.get(COLUMN)
    found: list[str] = []
    if not isinstance(features, FeaturesColumn):
        return found
    channels = width_of(features.encoder)
    wanted = chain.tokenizer.model.feature_channels
    if channels is not None and channels != wanted:
        found.append(
            f"tokenizer.model.feature_channels = {wanted}, but the encoder "
            f"{features.encoder.kind} of the column {COLUMN} makes {channels}; set it to that"
        )
    for name, column in chain.columns_of(TokensColumn).items():
        key = f"precompute.columns.{name}"
        if column.encoder != features.encoder:
            found.append(
                f"{key}.encoder = {encoder_text(column.encoder)}, but the tokenizer is trained on "
                f"the column {COLUMN} of {encoder_text(features.encoder)}; set them alike"
            )
        if column.frame_stride != features.frame_stride:
            found.append(
                f"{key}.frame_stride = {column.frame_stride}, but that of the column {COLUMN} is "
                f"{features.frame_stride}; set them alike"
            )
        if column.tokenizer.partition("@")[0] != EXPORTED["tokenizer"][1]:
            continue
        if chain.tokenizer.model.codebook_size > 1 << 16:
            found.append(
                f"tokenizer.model.codebook_size = {chain.tokenizer.model.codebook_size}, but "
                f"tokens are uint16; the largest is {1 << 16}"
            )
    return found


def check_text(chain: Chain) -> list[str]:
    """Whether text states have the width, the length and the padding that the models take."""
    found = []
    texts = chain.columns_of(TextColumn)
    lm_text = texts.get(chain.lm.text_column)
    model = chain.lm.model
    if lm_text is not None:
        key = f"precompute.columns.{chain.lm.text_column}.encoder"
        width = width_of(lm_text.encoder)
        if width is not None and width != model.text_dim:
            found.append(f"lm.model.text_dim = {model.text_dim}, but {key} makes {width}; set it")
        if lm_text.encoder.max_length > model.max_text_tokens:
            found.append(
                f"{key}.max_length = {lm_text.encoder.max_length} is more than "
                f"lm.model.max_text_tokens = {model.max_text_tokens}; lower it to that"
            )
    for stage, config in (("diffusion-main", chain.main), ("diffusion-control", chain.control)):
        text = texts.get(config.text_column)
        if text is None:
            continue
        key = f"precompute.columns.{config.text_column}.encoder"
        transformer = config.model.transformer
        if not getattr(text.encoder, "padded", text.encoder.kind == "t5-v1.1"):
            found.append(
                f"{stage}.text_column = {config.text_column}, whose text states are not padded; "
                f"set {key}.padded = true"
            )
        if text.encoder.max_length != transformer.text_length:
            found.append(
                f"{stage}.model.transformer.text_length = {transformer.text_length}, but "
                f"{key}.max_length = {text.encoder.max_length}; set them alike"
            )
        width = width_of(text.encoder)
        if width is not None and width != transformer.text_dim:
            found.append(
                f"{stage}.model.transformer.text_dim = {transformer.text_dim}, but {key} makes "
                f"{width}; set it to that"
            )
    return found


def check_latents(chain: Chain) -> list[str]:
    """Whether latents have the channels of the diffusion model, and previews their codec."""
    found = []
    for stage, config in (("diffusion-main", chain.main), ("diffusion-control", chain.control)):
        latents = chain.precompute.columns.get(config.latents_column)
        if not isinstance(latents, LatentsColumn):
            continue
        channels = width_of(latents.encoder)
        wanted = config.model.transformer.latent_channels
        if channels is not None and channels != wanted:
            found.append(
                f"{stage}.model.transformer.latent_channels = {wanted}, but the codec "
                f"{latents.encoder.kind} of the column {config.latents_column} makes {channels}; "
                "set it to that"
            )
    return found


# -------------------------------------------------------------------- models


def check_models(chain: Chain) -> list[str]:
    """Whether the models trained by the stages fit each other."""
    sample = chain.sample
    main = chain.main.model.transformer
    control = chain.control.model
    sizes = Sizes(
        lm=chain.lm.model,
        tokenizer=chain.tokenizer.model,
        diffusion=control,
        lm_text_width=width_of(sample.lm_text),
        diffusion_text_width=width_of(sample.diffusion_text),
        codec_channels=width_of(sample.codec),
    )
    found = [f"these models do not fit each other: {text}" for text in sizes.differences()]
    if main != control.transformer:
        found.append(
            "diffusion-main.model.transformer and diffusion-control.model.transformer differ, but "
            "the second run starts from the first; set them to the same values"
        )
    for stage, schedule in (
        ("diffusion-control", chain.control.schedule),
        ("evaluate", chain.evaluate.schedule),
        ("sample", chain.sample.schedule),
    ):
        if schedule != chain.main.schedule:
            found.append(
                f"{stage}.schedule and diffusion-main.schedule differ; a model is used with the "
                "noise schedule that it was trained with, so set them to the same values"
            )
    return found


def check_positions(chain: Chain) -> list[str]:
    """Whether the longest clips and the samples fit into the positions of the language model."""
    model = chain.lm.model
    text = chain.columns_of(TextColumn).get(chain.lm.text_column)
    rows = model.max_text_tokens if text is None else text.encoder.max_length
    layout = TokenLayout.of(model)
    lengths = {f"shards.num_frames = {clip.num_frames}": clip.latent_frames for clip in chain.clips}
    lengths[f"sample.num_latent_frames = {chain.sample.num_latent_frames}"] = (
        chain.sample.num_latent_frames
    )
    found = []
    for what, frames in lengths.items():
        needed = layout.sequence_length(frames, rows)
        if needed > model.max_positions:
            found.append(
                f"lm.model.max_positions = {model.max_positions}, but {what} takes {needed} with a "
                f"text of {rows} tokens; set it to at least that"
            )
    return found


def check_prefixes(chain: Chain) -> list[str]:
    """Whether clean prefixes and samples fit the window of the diffusion model."""
    window = chain.control.model.transformer.latent_frames
    lengths = {
        "evaluate.prefix_frames": chain.evaluate.prefix_frames,
        "sample.clean_frames": chain.sample.clean_frames,
    }
    for stage, config in (("diffusion-main", chain.main), ("diffusion-control", chain.control)):
        if config.prefix.probability:
            lengths[f"{stage}.prefix.frames"] = max(config.prefix.lengths)
    found = []
    for key, frames in lengths.items():
        if frames >= window:
            found.append(
                f"{key} = {frames} must be less than diffusion.model.transformer.latent_frames = "
                f"{window}; the largest is {window - 1}"
            )
    if chain.sample.clean_frames < window:
        length = chain.sample.num_latent_frames
        try:
            check_length(length, window, chain.sample.clean_frames)
        except ValueError as error:
            found.append(f"sample.num_latent_frames = {length}: {error}")
    return found


# -------------------------------------------------------------------- sampler, places


def check_sampler(chain: Chain) -> list[str]:
    """Whether samples and previews are made with the encoders of the training data."""
    columns = chain.precompute.columns
    uses = {
        "sample.lm_text": (chain.sample.lm_text, chain.lm.text_column),
        "sample.diffusion_text": (chain.sample.diffusion_text, chain.control.text_column),
        "lm.preview_text": (chain.lm.preview_text, chain.lm.text_column),
        "diffusion-main.preview_text": (chain.main.preview_text, chain.main.text_column),
        "sample.codec": (chain.sample.codec, chain.control.latents_column),
        "diffusion-main.preview_codec": (chain.main.preview_codec, chain.main.latents_column),
        "diffusion-control.preview_codec": (
            chain.control.preview_codec,
            chain.control.latents_column,
        ),
    }
    found = []
    for key, (encoder, name) in uses.items():
        column = columns.get(name)
        if encoder is None or column is None or isinstance(column, ScoreColumn):
            continue
        if column.encoder == encoder:
            continue
        found.append(
            f"{key} = {encoder_text(encoder)}, but the models are trained on the column {name} of "
            f"{encoder_text(column.encoder)}; set them alike"
        )
    return found


def check_places(chain: Chain) -> list[str]:
    """Whether each stage reads what the stages before it write: data, zoo, runs, names."""
    data = chain.shards.data
    folders = {"precompute.data": chain.precompute.data, "evaluate.data": chain.evaluate.data}
    zoos = {"precompute.zoo": chain.precompute.zoo, "evaluate.zoo": chain.evaluate.zoo}
    zoos["sample.zoo"] = chain.sample.zoo
    found = []
    for stage, config in chain.trainers.items():
        folders[f"{stage}.data.manifest"] = config.data.manifest
        if stage != "tokenizer":
            zoos[f"{stage}.zoo"] = config.zoo
        run, _name = EXPORTED[stage]
        if str(config.run) != run:
            found.append(f"{stage}.run = {config.run}, but the pipeline exports {run}; set it")
    for key, folder in folders.items():
        if folder not in (data, data / "manifest.json"):
            found.append(f"{key} = {folder}, but shards.data = {data}; set them alike")
    for key, zoo in zoos.items():
        if str(zoo) != "zoo":
            found.append(f"{key} = {zoo}, but the pipeline exports to zoo; set it to that")
    if chain.main.phase != "main" or chain.control.phase != "control":
        found.append(
            f"diffusion-main.phase = {chain.main.phase} and diffusion-control.phase = "
            f"{chain.control.phase}; they must be main and control"
        )
    return found


def encoder_text(encoder: Any) -> str:
    """An encoder's config as text: kind, and the values that are not the defaults."""
    values = encoder.model_dump(exclude_defaults=True, exclude={"kind"})
    parts = [f"kind: {encoder.kind}", *(f"{key}: {value}" for key, value in values.items())]
    return f"{{{', '.join(parts)}}}"


RULES: tuple[Callable[[Chain], list[str]], ...] = (
    check_clips,
    check_grids,
    check_lengths,
    check_buckets,
    check_columns,
    check_vision,
    check_text,
    check_latents,
    check_models,
    check_positions,
    check_prefixes,
    check_sampler,
    check_places,
)
