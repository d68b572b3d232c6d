"""Rules by which the stages of a pipeline fit each other: clips, columns, models, sampler.

Torch-free. The rules compare configs only, so that a mistake in the last stage is found before the
first one starts. Checks of one stage alone are in launchers/checks.py. A rule ends early where it
needs a config that could not be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem
from landiff.data_pipeline.precompute.config import (
    FeaturesColumn,
    LatentsColumn,
    ScoreColumn,
    TextColumn,
    TokensColumn,
)
from landiff.launchers.checks import MAX_CODEBOOK
from landiff.launchers.project.chain import EXPORTED, Chain, MissingConfig
from landiff.launchers.project.sizes import DECORD_REFUSES, ClipSizes, frames_of
from landiff.model_zoo.frozen.checks import width_of
from landiff.model_zoo.sample.sizes import Sizes, check_length
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.tokenizer.config import COLUMN


def check_chain(configs: Mapping[str, Any]) -> list[Problem]:
    """All reasons why stages of a pipeline do not fit each other.

    `configs` maps the stems of a preset to their configs, as far as they could be read;
    `precompute` has the columns of all precompute stages. Any: instances of the class of each
    stage.
    """
    chain = Chain(configs)
    texts: list[str] = []
    for rule in RULES:
        with contextlib.suppress(MissingConfig):
            for text in rule(chain):
                texts.append(text)
    return [Problem(text) for text in dict.fromkeys(texts)]


# -------------------------------------------------------------------- clips


def check_clips(chain: Chain) -> Iterator[str]:
    """Whether clips can be divided into latents and features."""
    for number, shape in enumerate(chain.shards.shapes):
        key = f"shards.buckets.{number}" if chain.shards.buckets else "shards"
        sizes = ClipSizes(shape.num_frames, shape.height, shape.width)
        for text in sizes.problems():
            yield f"{key}.{text}"
        for stage, config in chain.read("features", "precompute").items():
            if shape.width in DECORD_REFUSES and config.decoder == "decord":
                yield (
                    f"{key}.width = {shape.width}, but {stage}.decoder = decord cannot read clips "
                    "of this width; set decoder = pyav"
                )


def check_grids(chain: Chain) -> Iterator[str]:
    """Whether features of the clips have the size of the tokenizer.

    With `data.buckets` a model takes other sizes too.
    """
    tokenizer = chain.tokenizer.model
    for clip in chain.clips:
        clip_text = f"clips of {clip.height} x {clip.width} (shards)"
        grid = (tokenizer.grid_height, tokenizer.grid_width)
        if grid != clip.grid and chain.tokenizer.data.buckets is None:
            yield (
                f"tokenizer.model.grid_height, grid_width = {grid[0]}, {grid[1]}, but {clip_text} "
                f"have features of {clip.grid[0]} x {clip.grid[1]}; set them to that"
            )


def check_latent_sizes(chain: Chain) -> Iterator[str]:
    """Whether latents of the clips have the size of the diffusion model."""
    transformer = chain.control.model.transformer
    for clip in chain.clips:
        clip_text = f"clips of {clip.height} x {clip.width} (shards)"
        latents = (transformer.latent_height, transformer.latent_width)
        if latents != clip.latent_size and chain.control.data.buckets is None:
            height, width = clip.latent_size
            yield (
                f"diffusion-control.model.transformer.latent_height, latent_width = {latents[0]}, "
                f"{latents[1]}, but {clip_text} have latents of {height} x {width}; set them to "
                "that"
            )


def check_lengths(chain: Chain) -> Iterator[str]:
    """Whether the clips are as long as the window of the diffusion model.

    With `data.buckets` it takes shorter ones too.
    """
    window = chain.control.model.transformer.latent_frames
    for clip in chain.clips:
        if clip.latent_frames < window and chain.control.data.buckets is None:
            yield (
                f"shards.num_frames = {clip.num_frames} gives {clip.latent_frames} latent frames, "
                f"but diffusion-control.model.transformer.latent_frames = {window} takes clips of "
                f"at least {frames_of(window)} frames; set num_frames = {frames_of(window)}, or "
                f"latent_frames = {clip.latent_frames}"
            )


def check_buckets(chain: Chain) -> Iterator[str]:
    """Whether the shards hold clips of the shapes that are trained on."""
    made = [shape.name for shape in chain.shards.shapes]
    for stage, config in chain.trainers.items():
        for index in range(len(config.phases) + 1):
            key = f"{stage}.phases.{index - 1}.data.buckets" if index else f"{stage}.data.buckets"
            for name in config.in_phase(index).data.buckets or ():
                if name not in made:
                    yield (
                        f"{key} names {name}, but shards makes clips of {', '.join(made)}; name "
                        "one of these, or add the shape to shards.buckets"
                    )


# -------------------------------------------------------------------- columns


def check_columns(chain: Chain) -> Iterator[str]:
    """Whether every column that a stage reads is computed, and by an encoder of the right kind."""
    known = list(chain.precompute.columns)
    keys = {
        "lm": ("tokens_column", "text_column"),
        "diffusion-main": ("latents_column", "text_column"),
        "diffusion-control": ("latents_column", "text_column", "tokens_column"),
        "evaluate": ("lm_text_column", "diffusion_text_column"),
    }
    columns = {"the features": COLUMN}
    for stage, config in chain.read(*keys).items():
        for key in keys[stage]:
            columns[f"{stage}.{key}"] = getattr(config, key)
    for key, column in columns.items():
        if column not in known:
            meant = nearest_name(column, known)
            yield f"{key} = {column} is a column that no precompute makes{meant}"


def check_vision(chain: Chain) -> Iterator[str]:
    """Whether tokens come from the features that the tokenizer is trained on."""
    features = chain.precompute.columns.get(COLUMN)
    if not isinstance(features, FeaturesColumn):
        return
    for name, column in chain.columns_of(TokensColumn).items():
        key = f"precompute.columns.{name}"
        if column.encoder != features.encoder:
            yield (
                f"{key}.encoder = {encoder_text(column.encoder)}, but the tokenizer is trained on "
                f"the column {COLUMN} of {encoder_text(features.encoder)}; set them alike"
            )
        if column.frame_stride != features.frame_stride:
            yield (
                f"{key}.frame_stride = {column.frame_stride}, but that of the column {COLUMN} is "
                f"{features.frame_stride}; set them alike"
            )
    model = chain.tokenizer.model
    channels = width_of(features.encoder)
    if channels is not None and channels != model.feature_channels:
        yield (
            f"tokenizer.model.feature_channels = {model.feature_channels}, but the encoder "
            f"{features.encoder.kind} of the column {COLUMN} makes {channels}; set it to that"
        )
    if model.codebook_size > MAX_CODEBOOK:
        yield (
            f"tokenizer.model.codebook_size = {model.codebook_size}, but tokens are uint16; the "
            f"largest is {MAX_CODEBOOK}"
        )


def check_lm_text(chain: Chain) -> Iterator[str]:
    """Whether text states have the width and the length that the language model takes."""
    texts = chain.columns_of(TextColumn)
    lm_text = texts.get(chain.lm.text_column)
    model = chain.lm.model
    if lm_text is not None:
        key = f"precompute.columns.{chain.lm.text_column}.encoder"
        width = width_of(lm_text.encoder)
        if width is not None and width != model.text_dim:
            yield f"lm.model.text_dim = {model.text_dim}, but {key} makes {width}; set it to that"
        if lm_text.encoder.max_length > model.max_text_tokens:
            yield (
                f"{key}.max_length = {lm_text.encoder.max_length} is more than "
                f"lm.model.max_text_tokens = {model.max_text_tokens}; lower it to that"
            )


def check_diffusion_text(chain: Chain) -> Iterator[str]:
    """Whether text states have the width, the length and the padding of the diffusion model."""
    texts = chain.columns_of(TextColumn)
    for stage, config in chain.diffusion.items():
        text = texts.get(config.text_column)
        if text is None:
            continue
        key = f"precompute.columns.{config.text_column}.encoder"
        transformer = config.model.transformer
        if not getattr(text.encoder, "padded", text.encoder.kind == "t5-v1.1"):
            yield (
                f"{stage}.text_column = {config.text_column}, whose text states are not padded; "
                f"set {key}.padded = true"
            )
        if text.encoder.max_length != transformer.text_length:
            yield (
                f"{stage}.model.transformer.text_length = {transformer.text_length}, but "
                f"{key}.max_length = {text.encoder.max_length}; set them alike"
            )
        width = width_of(text.encoder)
        if width is not None and width != transformer.text_dim:
            yield (
                f"{stage}.model.transformer.text_dim = {transformer.text_dim}, but {key} makes "
                f"{width}; set it to that"
            )


def check_latents(chain: Chain) -> Iterator[str]:
    """Whether latents have the channels of the diffusion model."""
    for stage, config in chain.diffusion.items():
        latents = chain.precompute.columns.get(config.latents_column)
        if not isinstance(latents, LatentsColumn):
            continue
        channels = width_of(latents.encoder)
        wanted = config.model.transformer.latent_channels
        if channels is not None and channels != wanted:
            yield (
                f"{stage}.model.transformer.latent_channels = {wanted}, but the codec "
                f"{latents.encoder.kind} of the column {config.latents_column} makes {channels}; "
                "set it to that"
            )


# -------------------------------------------------------------------- models


def check_models(chain: Chain) -> Iterator[str]:
    """Whether the models trained by the stages fit each other."""
    models = chain.models()
    sizes = Sizes(
        lm=models.get("lm"),
        tokenizer=models.get("tokenizer"),
        diffusion=models.get("diffusion-control"),
    )
    if "sample" in chain.configs:
        sizes = replace(
            sizes,
            lm_text_width=width_of(chain.sample.lm_text),
            diffusion_text_width=width_of(chain.sample.diffusion_text),
            codec_channels=width_of(chain.sample.codec),
        )
    for text in sizes.differences():
        yield f"these models do not fit each other: {text}"
    if chain.main.model.transformer != chain.control.model.transformer:
        yield (
            "diffusion-main.model.transformer and diffusion-control.model.transformer differ, but "
            "the second run starts from the first; set them to the same values"
        )


def check_noise(chain: Chain) -> Iterator[str]:
    """Whether all stages use the noise schedule that the main transformer is trained with."""
    schedule = chain.main.schedule
    for stage, config in chain.read("diffusion-control", "evaluate", "sample").items():
        if config.schedule != schedule:
            yield (
                f"{stage}.schedule and diffusion-main.schedule differ; a model is used with the "
                "noise schedule that it was trained with, so set them to the same values"
            )


def check_positions(chain: Chain) -> Iterator[str]:
    """Whether the longest clips and the samples fit into the positions of the language model."""
    model = chain.lm.model
    text = chain.columns_of(TextColumn).get(chain.lm.text_column)
    rows = model.max_text_tokens if text is None else text.encoder.max_length
    layout = TokenLayout.of(model)
    lengths: dict[str, int] = {}
    if "shards" in chain.configs:
        for clip in chain.clips:
            lengths[f"shards.num_frames = {clip.num_frames}"] = clip.latent_frames
    if "sample" in chain.configs:
        frames = chain.sample.num_latent_frames
        lengths[f"sample.num_latent_frames = {frames}"] = frames
    for what, frames in lengths.items():
        needed = layout.sequence_length(frames, rows)
        if needed > model.max_positions:
            yield (
                f"lm.model.max_positions = {model.max_positions}, but {what} takes {needed} with a "
                f"text of {rows} tokens; set it to at least that"
            )


def check_prefixes(chain: Chain) -> Iterator[str]:
    """Whether clean prefixes and samples fit the window of the diffusion model."""
    window = chain.control.model.transformer.latent_frames
    lengths: dict[str, int] = {}
    if "evaluate" in chain.configs:
        lengths["evaluate.prefix_frames"] = chain.evaluate.prefix_frames
    if "sample" in chain.configs:
        lengths["sample.clean_frames"] = chain.sample.clean_frames
    for stage, config in chain.diffusion.items():
        if config.prefix.probability:
            lengths[f"{stage}.prefix.frames"] = max(config.prefix.lengths)
    for key, frames in lengths.items():
        if frames >= window:
            yield (
                f"{key} = {frames} must be less than "
                f"diffusion-control.model.transformer.latent_frames = {window}; the largest is "
                f"{window - 1}"
            )
    if chain.sample.clean_frames < window:
        length = chain.sample.num_latent_frames
        try:
            check_length(length, window, chain.sample.clean_frames)
        except ValueError as error:
            yield f"sample.num_latent_frames = {length}: {error}"


# -------------------------------------------------------------------- sampler, places


def check_sampler(chain: Chain) -> Iterator[str]:
    """Whether samples and previews are made with the encoders of the training data."""
    columns = chain.precompute.columns
    uses = {
        "sample.lm_text": ("lm", "text_column"),
        "sample.diffusion_text": ("diffusion-control", "text_column"),
        "sample.codec": ("diffusion-control", "latents_column"),
        "lm.preview_text": ("lm", "text_column"),
        "diffusion-main.preview_text": ("diffusion-main", "text_column"),
        "diffusion-main.preview_codec": ("diffusion-main", "latents_column"),
        "diffusion-control.preview_codec": ("diffusion-control", "latents_column"),
    }
    for key, (stage, column_key) in uses.items():
        user, _, encoder_key = key.partition(".")
        if user not in chain.configs or stage not in chain.configs:
            continue
        encoder = getattr(chain.configs[user], encoder_key)
        name = getattr(chain.configs[stage], column_key)
        column = columns.get(name)
        if encoder is None or column is None or isinstance(column, ScoreColumn):
            continue
        if column.encoder != encoder:
            yield (
                f"{key} = {encoder_text(encoder)}, but the models are trained on the column {name} "
                f"of {encoder_text(column.encoder)}; set them alike"
            )


def check_speed(chain: Chain) -> Iterator[str]:
    """Whether videos are played as fast as the clips that the models are trained on."""
    if chain.sample.fps != chain.shards.fps:
        yield (
            f"sample.fps = {chain.sample.fps:g}, but the models are trained on clips of "
            f"shards.fps = {chain.shards.fps:g}; set them alike"
        )


def check_places(chain: Chain) -> Iterator[str]:
    """Whether each stage reads what the stages before it write: data, zoo, runs."""
    zoos = {}
    for stage, config in chain.read("precompute", "evaluate", "sample").items():
        zoos[f"{stage}.zoo"] = config.zoo
    for stage, config in chain.trainers.items():
        if stage != "tokenizer":
            zoos[f"{stage}.zoo"] = config.zoo
        run, _name = EXPORTED[stage]
        if str(config.run) != run:
            yield f"{stage}.run = {config.run}, but the pipeline exports {run}; set it to that"
    for key, zoo in zoos.items():
        if str(zoo) != "zoo":
            yield f"{key} = {zoo}, but the pipeline exports to zoo; set it to that"
    for stage, config in chain.diffusion.items():
        phase = stage.removeprefix("diffusion-")
        if config.phase != phase:
            yield f"{stage}.phase = {config.phase} must be {phase}"


def check_data_folders(chain: Chain) -> Iterator[str]:
    """Whether all stages use the data folder of the shards."""
    data = chain.shards.data
    folders = {}
    for stage, config in chain.read("features", "precompute", "evaluate").items():
        folders[f"{stage}.data"] = config.data
    for stage, config in chain.trainers.items():
        folders[f"{stage}.data.manifest"] = config.data.manifest
    for key, folder in folders.items():
        if folder not in (data, data / "manifest.json"):
            yield f"{key} = {folder}, but shards.data = {data}; set them alike"


def encoder_text(encoder: Any) -> str:
    """An encoder's config as text: kind, and the values that are not the defaults."""
    values = encoder.model_dump(exclude_defaults=True, exclude={"kind"})
    parts = [f"kind: {encoder.kind}", *(f"{key}: {value}" for key, value in values.items())]
    return f"{{{', '.join(parts)}}}"


RULES: tuple[Callable[[Chain], Iterator[str]], ...] = (
    check_clips,
    check_grids,
    check_latent_sizes,
    check_lengths,
    check_buckets,
    check_columns,
    check_vision,
    check_lm_text,
    check_diffusion_text,
    check_latents,
    check_models,
    check_noise,
    check_positions,
    check_prefixes,
    check_sampler,
    check_speed,
    check_places,
    check_data_folders,
)
