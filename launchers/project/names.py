"""Checks of names in the configs of a preset: zoo entries, columns and further data sets.

A name is looked up in what the pipeline makes, and then in the zoo and the data folder. Torch-free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError
from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem, problems_of
from landiff.data_pipeline.format.column_checks import main_caption
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.loading.config import SourceConfig
from landiff.data_pipeline.loading.where import Where, require_names, score_columns
from landiff.data_pipeline.precompute.config import PrecomputeConfig, TextColumn, TokensColumn
from landiff.launchers.checks import check_captions_column
from landiff.launchers.project.selection import EXPORTED, KINDS
from landiff.training.checks import check_data, find_entry
from landiff.training.config import TrainConfig

TRAINERS = tuple(EXPORTED)


@dataclass(frozen=True)
class Reference:
    """A zoo entry that a config names. `key`: stage and config key."""

    key: str
    zoo: Path
    name: str | None
    kind: str


def check_names(configs: Mapping[str, Any], left: Collection[str]) -> list[Problem]:
    """All names in the configs of a preset that neither the pipeline nor a folder has.

    Paths are relative to the current folder. `configs`: by stem, as far as they could be read;
    `precompute` has the columns of all precompute stages. left: stems of the stages that are not
    skipped. Any: instances of the class of each stage.
    """
    problems = []
    found = []
    for reference in references(configs):
        wrong = check_reference(reference)
        if reference.key.partition(".")[0] in left:
            problems += wrong
        if not wrong:
            found.append(reference)
    problems += check_one_tokenizer(found)
    if "precompute" not in configs:
        return problems
    precompute: PrecomputeConfig = configs["precompute"]
    columns = known_columns(precompute)
    if {"features", "precompute"} & set(left):
        problems += check_caption_columns(precompute)
    for stem in TRAINERS:
        if stem in left and stem in configs:
            for problem in check_sources(configs[stem], precompute.data, columns):
                problems.append(Problem(f"{stem}: {problem}"))
    return problems


# -------------------------------------------------------------------- zoo entries


def references(configs: Mapping[str, Any]) -> Iterator[Reference]:
    """The models that stages read from the zoo, except for those that trainers start from."""
    if "precompute" in configs:
        precompute: PrecomputeConfig = configs["precompute"]
        for name, column in precompute.columns.items():
            if isinstance(column, TokensColumn):
                key = f"precompute.columns.{name}.tokenizer"
                yield Reference(key, precompute.zoo, column.tokenizer, "tokenizer")
    for stem in ("lm", "diffusion-control"):
        if stem in configs:
            config = configs[stem]
            yield Reference(f"{stem}.tokenizer", config.zoo, config.tokenizer, "tokenizer")
    for stem in ("evaluate", "sample"):
        if stem not in configs:
            continue
        config = configs[stem]
        for kind in ("lm", "tokenizer", "diffusion"):
            yield Reference(f"{stem}.{kind}", config.zoo, getattr(config, kind), kind)
        for number, use in enumerate(config.adapters):
            key = f"{stem}.adapters.{number}.adapter"
            yield Reference(key, config.zoo, use.adapter, "adapter")


def check_reference(reference: Reference) -> list[Problem]:
    """A problem if the pipeline does not export the entry and the zoo does not have it either."""
    made = {entry: KINDS[stage] for stage, (_run, entry) in EXPORTED.items()}
    if reference.name is None or made.get(reference.name) == reference.kind:
        return []
    problems = find_entry(reference.key, reference.zoo, reference.name, reference.kind)[1]
    exported = [entry for entry, kind in made.items() if kind == reference.kind]
    way_out = f"; the pipeline exports {exported[0]!r}" if exported else ""
    return [Problem(f"{problem}{way_out}") for problem in problems]


def check_one_tokenizer(found: Sequence[Reference]) -> list[Problem]:
    """Whether all stages use the tokenizer that makes the tokens."""
    problems: list[Problem] = []
    tokenizers = [each for each in found if each.kind == "tokenizer" and each.name is not None]
    for each in tokenizers[1:]:
        first = tokenizers[0]
        if entry_name(each) != entry_name(first):
            text = f"{each.key} = {each.name}, but {first.key} = {first.name}; set them alike"
            problems.append(Problem(text))
    return problems


def entry_name(reference: Reference) -> str:
    """The name of an entry without its fingerprint."""
    return str(reference.name).partition("@")[0]


# -------------------------------------------------------------------- columns and data sets


def known_columns(precompute: PrecomputeConfig) -> list[str]:
    """Columns that the pipeline makes, or that the data folder has already."""
    columns = list(precompute.columns)
    with contextlib.suppress(ConfigError, OSError):  # reported by the stages that read the data
        columns += read_manifest(precompute.data).columns
    return list(dict.fromkeys(columns))


def columns_read(config: TrainConfig, known: Iterable[str]) -> list[str]:
    """The columns that a trainer reads in any phase, with other captions and scores.

    known: all columns, in which the scores of conditions are looked up.
    """
    found = list(config.columns)
    scores = score_columns(list(known))
    for index in range(len(config.phases) + 1):
        data = config.in_phase(index).data
        found += data.captions or ()
        for source in data.sources:
            names = Where(source.where).names if source.where else ()
            found += [scores[name] for name in names if name in scores]
    return list(dict.fromkeys(found))


def check_caption_columns(precompute: PrecomputeConfig) -> list[Problem]:
    """Whether the captions that text columns encode are made, or are there already."""
    problems = []
    for name, column in precompute.columns.items():
        if isinstance(column, TextColumn) and column.captions is not None:
            key = f"precompute.columns.{name}.captions"
            problems += check_captions_column(key, column.captions, precompute)
    return problems


def check_sources(config: TrainConfig, made: Path, columns: Sequence[str]) -> list[Problem]:
    """Whether the data of every phase have what the config names.

    made: the data folder of the pipeline, which need not exist yet. columns: those that it will
    have.
    """
    problems = []
    for index in range(len(config.phases) + 1):
        data = config.in_phase(index).data
        place = f"phases.{index - 1}." if index else ""
        for number, source in enumerate(data.sources):
            key = f"{place}data.blend.{number - 1}" if number else f"{place}data"
            problems += check_source(key, config, source, made, columns)
        if data.captions is not None:
            captions = data.captions
            problems += problems_of(partial(main_caption, captions, config.columns))
            for name in captions:
                if name not in columns:
                    text = f"{place}data.captions names {name}, a column that no precompute makes"
                    problems.append(Problem(f"{text}{nearest_name(name, columns)}"))
    return problems


def check_source(
    key: str, config: TrainConfig, source: SourceConfig, made: Path, columns: Sequence[str]
) -> list[Problem]:
    """Whether one data set and the values of its condition exist. `key`: its section."""
    if not source.remote and source.manifest in (made, made / "manifest.json"):
        if not source.where:
            return []
        return problems_of(partial(require_names, f"{key}.where", source.where, columns))
    values = {**source.model_dump(), "blend": (), "captions": None, "buckets": None, "where": None}
    own = config.data.model_copy(update={**values, "manifest": source.manifest})
    manifests, problems = check_data(own, config.columns, f"{key}.manifest")
    if source.where:
        for manifest in manifests:
            check = partial(require_names, f"{key}.where", source.where, list(manifest.columns))
            problems += problems_of(check)
    return problems
