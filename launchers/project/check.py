"""`landiff check`: all mistakes of a preset, found before its first stage starts. Torch-free."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from landiff.configs import ConfigError
from landiff.configs.durations import size
from landiff.configs.loader import load_leniently
from landiff.configs.problems import Problem, WrongValue, check_writable, nearest_path, require_none
from landiff.configs.wrong_values import without_consequences
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.checks import check, load_with_problems
from landiff.launchers.local.gpus import default_processes
from landiff.launchers.project.chain import EXPORTED
from landiff.launchers.project.further import check_further, without_made_sources
from landiff.launchers.project.names import check_names
from landiff.launchers.project.presets import (
    configs_of,
    has_config,
    preset_config,
    project_folder,
    require_preset,
)
from landiff.launchers.project.rules import check_chain
from landiff.launchers.project.selection import check_skipped, skipped_stages
from landiff.launchers.project.space import (
    check_least_space,
    check_preset_space,
    finished,
    free_bytes,
    preset_uses,
)
from landiff.launchers.show_config import class_names_of
from landiff.launchers.stages import STAGE_CONFIGS
from landiff.model_zoo.frozen.checks import ENCODERS, must_download
from landiff.training.checks import Launch, check_manifest, check_shard_files, find_entry
from landiff.training.config import TrainConfig

STAGE_OF = {
    "features": "precompute",
    "latents": "precompute",
    "diffusion-main": "diffusion",
    "diffusion-control": "diffusion",
}
"""Config of a preset -> the stage whose checks it has, where the names differ."""
START_KINDS = {"tokenizer": ("tokenizer",), "lm": ("lm",)}


@dataclass(frozen=True)
class PresetReport:
    """What was found in a preset.

    configs: without those that cannot be read; those with wrong values have others in their place,
    and only serve checks. skipped: stages that need not run, with the reason of each.
    """

    configs: dict[str, Any]
    problems: list[Problem]
    skipped: dict[str, str]


def check_command(args: argparse.Namespace) -> int:
    """Prints what was checked, or raises ConfigError with all mistakes. Returns the exit code."""
    if args.config is not None:
        return check_config(args.config, args.overrides)
    require_preset(args.preset)
    report = check_preset(args.preset)
    require_none(report.problems, shown=len(report.problems))
    clips = [shape.name for shape in report.configs["shards"].shapes]
    workdir = project_folder(args.preset)
    print_space(report.configs, workdir)
    with inside(workdir):
        notes = downloads(report.configs)
    for note in notes:
        print(f"check: {note}")
    print(f"check: {len(report.configs)} configs of {args.preset} fit each other")
    print(f"check: clips {', '.join(clips)} (frames x height x width)")
    print(f"check: next  landiff quickstart --preset {shlex.quote(args.preset)}")
    return 0


def print_space(configs: Mapping[str, Any], workdir: Path) -> None:
    """Prints the free space of a folder, and what a pipeline in it needs. Any: configs by stem."""
    with inside(workdir):
        needed = sum(use.bytes for use in preset_uses(configs, configs))
        free = free_bytes(Path("."))
    print(
        f"check: {size(free)} of free space in {workdir.absolute()}, and at least {size(needed)} "
        "are needed"
    )


def downloads(configs: Mapping[str, Any]) -> list[str]:
    """Notes on encoders whose files are not on this machine. Any: configs by stem."""
    users: dict[str, list[str]] = {}
    for stem, config in configs.items():
        for key, encoder in encoders_of(stem, config):
            hub_id = must_download(encoder)
            if hub_id is not None:
                users.setdefault(hub_id, []).append(key)
    notes = []
    for hub_id, keys in users.items():
        others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        notes.append(
            f"{keys[0]}.path{others} = {hub_id} will be downloaded from the hub, since neither a "
            f"folder nor the hub cache has it{nearest_path(Path(hub_id), only_folders=True)}"
        )
    return notes


def encoders_of(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Key and config of each frozen encoder in a config. Any: a config, or a value of one."""
    if isinstance(value, ENCODERS):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from encoders_of(f"{key}.{name}", getattr(value, name))
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from encoders_of(f"{key}.{name}", each)


def check_config(name: str, overrides: Sequence[str]) -> int:
    """Checks the config of one stage. Raises ConfigError with all mistakes. Returns 0."""
    classes = [known for known in class_names_of(name) if known in STAGE_CONFIGS]
    if not classes:
        raise ConfigError(f"--config {name} is no config of {', '.join(STAGE_CONFIGS)}")
    stage = classes[0]
    config, problems = load_with_problems(STAGE_CONFIGS[stage], name, overrides)
    ranks = default_processes(config) if isinstance(config, TrainConfig) else 1
    problems = without_consequences([*problems, *check(stage, config, Launch(ranks))])
    require_none(problems, shown=len(problems))
    for note in downloads({stage: config}):
        print(f"check: {note}")
    print(f"check: {name} is a valid config of {stage}, and its inputs are there")
    return 0


def load_preset(
    preset: str, overrides: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """The configs of a preset by stem, and the problems of their values.

    `overrides` are those of each stem. Any: instances of the classes in `PRESET_CONFIGS` and
    `FURTHER_CONFIGS`. Configs that cannot be read are left out; those with wrong values have others
    in their place. The keys of these problems begin with the stem.
    """
    configs: dict[str, Any] = {}
    problems: list[Problem] = []
    for stem, cls in configs_of(preset).items():
        own = (overrides or {}).get(stem, ())
        try:
            config, found = load_leniently(cls, preset_config(preset, stem), own)
        except ConfigError as error:
            config, found = None, [Problem(str(error))]
        for problem in found:
            if isinstance(problem, WrongValue):
                problem = replace(problem, key=f"{stem}.{problem.key}")
            problems.append(problem)
        if config is not None:
            configs[stem] = config
    return configs, problems


def check_preset(
    preset: str,
    workdir: Path | None = None,
    first: str | None = None,
    skip: Sequence[str] = (),
    overrides: Mapping[str, Sequence[str]] | None = None,
) -> PresetReport:
    """All problems of the configs of a preset, of each alone and with each other.

    `workdir` is the folder in which the stages will run; None for that of a project, or the current
    one for a packaged preset. `first` and `skip` are the values of --from and --skip, `overrides`
    those of each stem. A config with wrong values is checked with others in their place.
    """
    if workdir is None:
        workdir = project_folder(preset)
    configs, wrong = load_preset(preset, overrides)
    skipped = skipped_stages(configs, workdir, first, skip)
    left = {stem: config for stem, config in configs.items() if stage_name(stem) not in skipped}
    problems: list[Problem] = []
    with inside(workdir):
        found = check_writable("the folder of the pipeline", workdir.absolute())
        problems += found or check_writable("zoo", workdir.absolute() / "zoo")
        for stem, config in left.items():
            if stem == "shards" and has_config(preset, "world"):
                config = without_made_sources(config)
            if stem != "world":
                found = check_stage(stem, config, inputs_exist=stem == "shards")
                found = without_consequences(found, wrong_keys(wrong, stem))
                problems += [Problem(f"{stem}: {each}") for each in found]
    joined = with_all_columns(configs)
    with inside(workdir):
        problems += check_chain(joined)
        problems += check_names(joined, left)
        problems += check_preset_space(configs, left) or check_least_space(Path("."))
        problems += check_results(configs)
    problems += check_further(configs, workdir, left)
    problems += check_skipped(configs, workdir, skipped)
    return PresetReport(configs, without_consequences([*wrong, *problems]), skipped)


def wrong_keys(problems: Sequence[Problem], stem: str) -> list[str]:
    """The keys of the config `stem` that have wrong values, without the stem."""
    keys = [problem.key for problem in problems if isinstance(problem, WrongValue)]
    return [key.removeprefix(f"{stem}.") for key in keys if key.startswith(f"{stem}.")]


def stage_name(stem: str) -> str:
    """The stage of the pipeline that has the config `stem`, or with which it is skipped."""
    return {"precompute": "columns", "latents": "columns", "world": "shards"}.get(stem, stem)


@contextlib.contextmanager
def inside(workdir: Path) -> Iterator[None]:
    """Relative paths refer to `workdir`, or to the nearest folder above it that exists."""
    place = workdir.absolute()
    while not place.is_dir():
        place = place.parent
    with contextlib.chdir(place):
        yield


def check_stage(stem: str, config: Any, *, inputs_exist: bool) -> list[Problem]:
    """Problems of one stage. Any: an instance of its class.

    inputs_exist: False if earlier stages write its inputs.
    """
    stage = STAGE_OF.get(stem, stem)
    ranks = default_processes(config) if isinstance(config, TrainConfig) else 1
    problems = check(stage, config, Launch(ranks, inputs_exist=inputs_exist))
    if isinstance(config, TrainConfig):
        problems += check_start(stem, config)
    return problems


def check_results(configs: Mapping[str, Any]) -> list[Problem]:
    """Problems of what earlier runs of a pipeline left: shards, columns and exported models.

    Stages take them for finished. Any: configs by stem.
    """
    problems: list[Problem] = []
    if "shards" in configs:
        data = configs["shards"].data
        manifest = finished(data)
        if manifest is not None:
            problems += check_manifest(manifest, list(manifest.columns), data)
            if (data / RAW).is_dir():
                problems += check_shard_files(data / RAW, manifest.shards)
    for _run, name in EXPORTED.values():
        folder = Path("zoo") / name
        if (folder / "newest").is_file():
            for problem in find_entry("the exported model", Path("zoo"), name, None)[1]:
                text = f"{problem}; delete {folder}, so that the pipeline exports it again"
                problems.append(Problem(text))
    return problems


def check_start(stem: str, config: Any) -> list[Problem]:
    """Whether the zoo has the entry that a trainer starts from, unless the pipeline makes it."""
    made = {name for _run, name in EXPORTED.values()}
    reference = config.init_from
    if reference is None or (stem == "diffusion-control" and reference in made):
        return []
    kinds = START_KINDS.get(stem, ("transformer", "diffusion"))
    return find_entry("init_from", config.zoo, reference, kinds)[1]


def with_all_columns(configs: dict[str, Any]) -> dict[str, Any]:
    """The configs of a preset, with the columns of `features` and `latents` in `precompute`.

    Without `precompute` if one of them could not be read, since its columns are not known.
    """
    if not {"features", "precompute"} <= set(configs):
        return {stem: config for stem, config in configs.items() if stem != "precompute"}
    precompute: PrecomputeConfig = configs["precompute"]
    columns = {**configs["features"].columns, **precompute.columns}
    if "latents" in configs:
        columns = {**configs["latents"].columns, **columns}
    joined = precompute.model_copy(update={"columns": columns})
    return {**configs, "precompute": joined}
