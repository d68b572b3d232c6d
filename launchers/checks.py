"""Checks before a job starts: all problems of its config and inputs, found without torch.

`check(stage, config, launch)` is called by the command itself, by its `--dry-run` and by `landiff
submit`. Checks of trainers are beside their configs (training/<trainer>/checks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from landiff.configs import Config
from landiff.configs.loader import load_leniently, nearest_name
from landiff.configs.problems import (
    Problem,
    check_writable,
    nearest_path,
    problems_of,
    require_none,
)
from landiff.configs.wrong_values import without_consequences
from landiff.data_pipeline.format.schema import column_stem
from landiff.data_pipeline.ingest.config import ShardsConfig
from landiff.data_pipeline.precompute.config import (
    CaptionFileConfig,
    DuplicateScore,
    MeasureScore,
    PrecomputeConfig,
    ScoreColumn,
    TextColumn,
    TokensColumn,
)
from landiff.data_pipeline.precompute.units import CARD
from landiff.launchers.config import ShardsJobConfig
from landiff.launchers.evaluation.checks import check_videos
from landiff.launchers.results.sampling.checks import check_evaluate, check_sample
from landiff.launchers.stages import TRAINERS
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.registry import ZooEntry
from landiff.training.checks import Launch, check_package, find_entry, read_data

C = TypeVar("C", bound=Config)

MAX_CODEBOOK = 1 << 16  # token columns are uint16


def check(stage: str, config: Any, launch: Launch) -> list[Problem]:
    """All problems of a stage's config.

    `stage` is a trainer, shards, precompute, sample or evaluate; `config` is of its config class.
    """
    if stage in TRAINERS:
        return TRAINERS[stage].check(config, launch)
    return CHECKS[stage](config, launch)


def load_checked(
    stage: str,
    cls: type[C],
    source: str,
    overrides: Sequence[str],
    *,
    launch: Launch,
    values: Mapping[str, Any] | None = None,
) -> tuple[C, list[Problem]]:
    """The config of a stage and all its problems: wrong values, and those that `check` finds.

    Arguments and errors are those of `load_with_problems`.
    """
    config, problems = load_with_problems(cls, source, overrides, values)
    return config, without_consequences([*problems, *check(stage, config, launch)])


def load_with_problems(
    cls: type[C],
    source: str,
    overrides: Sequence[str],
    values: Mapping[str, Any] | None = None,
) -> tuple[C, list[Problem]]:
    """A config and the problems of its values. With problems, it only serves further checks.

    `values` replace top-level keys without being parsed as YAML. Raises ConfigError if the file
    cannot be read or lacks a value: then there is no config for further checks.
    """
    config, problems = load_leniently(cls, source, overrides, values)
    if config is None:
        require_none(problems)
    assert config is not None, problems
    return config, problems


# -------------------------------------------------------------------- shards


def check_shards(config: ShardsJobConfig, launch: Launch) -> list[Problem]:
    """Problems of `landiff shards`: output folder, source, optional packages."""
    problems = check_writable("data", config.data)
    for source in config.sources if launch.inputs_exist else ():
        problems += problems_of(partial(check_source, config.content, source))
    if config.shots is not None:
        # Imported here, because it imports OpenCV.
        from landiff.data_pipeline.ingest.shots import EXTRAS, PACKAGES

        detector = config.shots.detector
        way_out = f"pip install 'landiff-pretrain[{EXTRAS[detector]}]', or set shots=null"
        problems += check_package(PACKAGES[detector], "shots.detector", detector, way_out)
    if config.filters.text_area_max is not None:
        way_out = "pip install 'landiff-pretrain[text]', or set filters.text_area_max=null"
        problems += check_package(
            "rapidocr_onnxruntime", "filters.text_area_max", config.filters.text_area_max, way_out
        )
    return problems


def check_source(config: ShardsConfig, source: str) -> None:
    """Raises ConfigError if a source is missing, holds no videos, or is a table without columns."""
    # Imported here, because it loads PyAV.
    from landiff.data_pipeline.ingest.sources.listing import list_source

    list_source(config.model_copy(update={"source": source}))


# -------------------------------------------------------------------- precompute


def check_precompute(config: PrecomputeConfig, launch: Launch) -> list[Problem]:
    """Problems of `landiff precompute`: output folder, encoders, tokenizers, raw shards."""
    problems = check_writable("data", config.data)
    for name, column in config.columns.items():
        key = f"columns.{name}.encoder"
        if isinstance(column, ScoreColumn):
            problems += _check_score(f"columns.{name}.head", column)
        else:
            encoder = column.encoder
            if isinstance(encoder, CaptionFileConfig):
                problems += _check_caption_file(f"{key}.path", encoder.path)
            else:
                problems += check_encoder(key, encoder)
        if isinstance(column, TextColumn) and column.captions and launch.inputs_exist:
            key = f"columns.{name}.captions"
            problems += check_captions_column(key, column.captions, config)
        if isinstance(column, TokensColumn) and launch.inputs_exist:
            key = f"columns.{name}.tokenizer"
            entry, found = find_entry(key, config.zoo, column.tokenizer, "tokenizer")
            problems += found
            if entry is not None:
                problems += _check_tokenizer(key, entry, width_of(column.encoder))
    if launch.inputs_exist:
        problems += read_data(config.data, ())[1]
    return problems


def _check_score(key: str, column: ScoreColumn) -> list[Problem]:
    """Whether the files and packages of a column of scores are there."""
    head = column.head
    if isinstance(head, MeasureScore):
        if head.measure != "text_area":
            return []
        way_out = "pip install 'landiff-pretrain[text]'"
        return check_package("rapidocr_onnxruntime", f"{key}.measure", head.measure, way_out)
    if isinstance(head, DuplicateScore):
        return []
    problems = check_encoder(f"{key}.encoder", head.encoder)
    if not head.path.is_file():
        meant = nearest_path(head.path)
        text = "does not exist; name a safetensors file with the layers of the head"
        problems.append(Problem(f"{key}.path = {head.path} {text}{meant}"))
    return problems


def _check_caption_file(key: str, path: Path) -> list[Problem]:
    """Whether the file of captions exists, and parquet can be read."""
    if not path.is_file():
        text = f"does not exist; name a JSONL or parquet file of captions{nearest_path(path)}"
        return [Problem(f"{key} = {path} {text}")]
    if path.suffix != ".parquet":
        return []
    way_out = "pip install 'landiff-pretrain[parquet]', or write the captions as JSONL"
    return check_package("pyarrow", key, path, way_out)


def check_captions_column(key: str, captions: str, config: PrecomputeConfig) -> list[Problem]:
    """Whether the captions that a text column encodes are a column of the config or the data."""
    is_finished = (config.data / captions / CARD).is_file()
    if captions in config.columns or is_finished:
        return []
    known = [name for name in config.columns if column_stem(name) == "captions"]
    return [
        Problem(
            f"{key} = {captions} is neither in columns nor in {config.data}"
            f"{nearest_name(captions, known) if known else '; write it with `landiff captions`'}"
        )
    ]


def _check_tokenizer(key: str, entry: ZooEntry, channels: int | None) -> list[Problem]:
    """Checks that a tokenizer accepts the encoder's features and that its codes fit a column."""
    tokenizer = entry.config
    assert isinstance(tokenizer, TokenizerConfig), (entry.reference, entry.kind)
    problems = []
    if channels is not None and channels != tokenizer.feature_channels:
        problems.append(
            Problem(
                f"{key} = {entry.reference} takes features of {tokenizer.feature_channels} "
                f"channels, the encoder makes {channels}; name the encoder that the tokenizer was "
                "trained on"
            )
        )
    if tokenizer.codebook_size > MAX_CODEBOOK:
        problems.append(
            Problem(
                f"{key} = {entry.reference} has a codebook of {tokenizer.codebook_size}; tokens "
                f"are stored as uint16, so use a tokenizer with at most {MAX_CODEBOOK} codes"
            )
        )
    return problems


CHECKS: dict[str, Callable[[Any, Launch], list[Problem]]] = {
    "shards": check_shards,
    "precompute": check_precompute,
    "captions": check_precompute,
    "sample": check_sample,
    "evaluate": check_evaluate,
    "videos": check_videos,
}
"""Checks of the stages that are not trainers. Any: an instance of the stage's config class."""
