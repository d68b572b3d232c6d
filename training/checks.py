"""Checks of a trainer's config before its ranks start, common to all trainers.

Torch-free, except for `optim.groups`, whose patterns are compared with the names of a model.

`check(config, launch)` of each trainer (training/<trainer>/checks.py) returns all problems of its
config. The command that starts the ranks calls it, and so do `--dry-run` and submission. A job of
a pipeline is submitted before its data exist, so rank 0 of every run calls it again.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from landiff.configs.base import Config, ConfigError
from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem, check_writable, problems_of
from landiff.configs.safetensors_header import read_header
from landiff.data_pipeline.format.buckets import bucket_names, check_buckets, column_shapes
from landiff.data_pipeline.format.column_checks import (
    check_blend,
    check_captions,
    check_column_fingerprints,
)
from landiff.data_pipeline.format.schema import RAW, Manifest, ShardEntry
from landiff.data_pipeline.format.shards import read_manifest, sidecar_path
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.phases import phases_from
from landiff.data_pipeline.loading.remote import data_folder, find_manifest
from landiff.data_pipeline.loading.where import checked_where, conditions
from landiff.model_zoo import registry
from landiff.model_zoo.config import ScheduleConfig
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.frozen.config import TextConfig
from landiff.training.checkpoint.resume import check_resume, check_same_data, next_state
from landiff.training.config import OptimConfig, TrainConfig
from landiff.training.layout import check_batches
from landiff.training.phases import begins_schedule


@dataclass(frozen=True)
class Launch:
    """How a job is started.

    inputs_exist: False if earlier jobs still have to write the data and zoo entries it reads.
    """

    ranks: int = 1
    inputs_exist: bool = True


class PromptedConfig(Protocol):
    """Config of a trainer that shows videos of prompts."""

    @property
    def preview_prompts(self) -> tuple[str, ...]:
        """The prompts."""
        ...

    @property
    def preview_text(self) -> TextConfig | None:
        """The encoder of their text states."""
        ...


MOST_SHARDS = 1000  # whose files are looked at

T = TypeVar("T", bound=TrainConfig)


@dataclass(frozen=True)
class PhaseData(Generic[T]):
    """The data of one phase: its config, and the manifest of its first data set."""

    config: T
    manifest: Manifest


def check_trainer(config: T, launch: Launch) -> tuple[list[PhaseData[T]], list[Problem]]:
    """Checks that all trainers have in common: layout, batch, learning rate, run folder, data.

    Returns the data of the phases that are still to come, or none if a column is missing, and the
    problems.
    """
    problems = problems_of(lambda: check_batches(config, launch.ranks))
    problems += check_schedules(config)
    problems += check_profile(config, launch.ranks)
    problems += check_trackers(config)
    problems += check_writable("run", config.run)
    problems += check_resume(config)
    if config.loop.val_every and config.data.validation is None:
        problems.append(
            Problem(
                f"loop.val_every = {config.loop.val_every} validates on held-out clips, but "
                "data.validation is null; set data.validation.fraction, for example 0.01, or "
                "loop.val_every = 0"
            )
        )
    if not launch.inputs_exist:
        return [], problems
    readable = []
    found = []
    next_step = next_state(config).get("step", 0)
    for phase in phases_from(config.data_phases, next_step):
        phase_config = config.in_phase(phase.index)
        manifests, phase_problems = check_data(phase_config.data, config.columns)
        if manifests and phase.index == 0:
            phase_problems += check_validation(config.data, config.columns, manifests[0])
        if manifests:
            same = partial(check_same_data, config, phase, manifests)
            phase_problems += problems_of(same)
        found += _of_phase(phase.index, phase_problems)
        readable += [PhaseData(phase_config, manifest) for manifest in manifests[:1]]
    if found:
        return [], problems + found
    return readable, problems


def _of_phase(index: int, problems: Sequence[Problem]) -> list[Problem]:
    """The problems of a phase, with its key in front unless it is the top level of the config."""
    if index == 0:
        return list(problems)
    return [Problem(f"phases.{index - 1}: {problem}") for problem in problems]


def check_schedules(config: TrainConfig) -> list[Problem]:
    """Whether the learning rate of every phase is in range."""
    problems = check_optim(config.optim, config.loop.steps)
    for index, phase in enumerate(config.phases, start=1):
        if begins_schedule(phase) and phase.from_step < config.loop.steps:
            optim = config.in_phase(index).optim
            problems += _of_phase(index, check_optim(optim, config.loop.steps - phase.from_step))
    return problems


def check_profile(config: TrainConfig, ranks: int) -> list[Problem]:
    """Whether the ranks that the profiler is to record exist."""
    profile = config.loop.profile
    if profile is None or max(profile.ranks, default=0) < ranks:
        return []
    return [
        Problem(
            f"loop.profile.ranks = {list(profile.ranks)} has a rank that does not exist: the "
            f"{ranks} launched ranks are 0 to {ranks - 1}"
        )
    ]


def check_trackers(config: TrainConfig) -> list[Problem]:
    """Whether the packages of the trackers are installed."""
    problems = []
    for number, tracker in enumerate(config.trackers):
        key = f"trackers.{number}.kind"
        way_out = f"install it with pip install 'landiff-pretrain[{tracker.kind}]', or remove it"
        problems += check_package(tracker.kind, key, tracker.kind, way_out)
    return problems


def check_optim(optim: OptimConfig, total_steps: int) -> list[Problem]:
    """Whether the values of the optimizer are in range and fit each other and `loop.steps`."""
    problems = check_decay(optim, total_steps)
    if optim.min_lr > optim.lr:
        problems.append(
            Problem(
                f"optim.min_lr = {optim.min_lr:g} is above optim.lr = {optim.lr:g}; the rate falls "
                "from lr to min_lr, so lower min_lr or raise lr"
            )
        )
    for number, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            problems.append(
                Problem(f"optim.betas.{number} = {beta:g} must be at least 0 and below 1")
            )
    return problems


def check_groups(optim: OptimConfig, names: Sequence[str]) -> list[Problem]:
    """Whether every entry of `optim.groups` applies to some parameter.

    names: of all parameters that are trained.
    """
    problems = []
    remaining = list(names)
    for number, group in enumerate(optim.groups):
        matched = [name for name in remaining if fnmatchcase(name, group.match)]
        remaining = [name for name in remaining if name not in matched]
        if matched:
            continue
        key = f"optim.groups.{number}.match = {group.match}"
        if any(fnmatchcase(name, group.match) for name in names):
            text = "matches only parameters of entries before it; move it up, or remove it"
        else:
            patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
            nearest = nearest_name(group.match, sorted(patterns))
            text = f"matches no parameter that is trained{nearest}"
        problems.append(Problem(f"{key} {text}"))
    return problems


def check_decay(optim: OptimConfig, total_steps: int) -> list[Problem]:
    """Whether `optim.decay_steps` is set where it is needed, and leaves steps for warmup."""
    steps = optim.decay_steps
    if optim.decay == "constant" and steps is not None:
        return [
            Problem(
                f"optim.decay_steps = {steps} has no effect with optim.decay = constant; set decay "
                "to wsd, linear or cosine, or remove decay_steps"
            )
        ]
    if optim.decay != "wsd":
        return []
    if steps is None:
        return [
            Problem(
                "optim.decay = wsd needs optim.decay_steps, the number of last steps over which "
                "the rate falls; a tenth to a fifth of loop.steps is usual"
            )
        ]
    if optim.warmup_steps + steps > total_steps:
        return [
            Problem(
                f"optim.warmup_steps + decay_steps = {optim.warmup_steps} + {steps} is more than "
                f"loop.steps = {total_steps}; lower one of them or raise loop.steps"
            )
        ]
    return []


def check_data(
    data: DataConfig, columns: Sequence[str], first: str = "data.manifest"
) -> tuple[list[Manifest], list[Problem]]:
    """Whether all data sets can be read and have `columns`. `first`: key of the first.

    Returns the manifests of all data sets, or none if there is a problem, and the problems.
    """
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for number, source in enumerate(data.sources):
        key = first if number == 0 else f"data.blend.{number - 1}.manifest"
        try:
            manifest = find_manifest(source)
        except ConfigError as error:
            text = str(error)
            if source.remote and not text.startswith("data.remote"):
                text = f"{key.removesuffix('manifest')}remote = {source.remote}: {text}"
            elif not source.remote:
                text = f"{key} = {source.manifest}: {text}"
            problems.append(Problem(text))
            continue
        except OSError as error:
            problems.append(Problem(f"{key} = {source.manifest} cannot be read: {error.strerror}"))
            continue
        manifests.append(manifest)
        folder = None if source.remote else data_folder(source)
        for problem in check_manifest(manifest, columns, folder, adopt=data.adopt):
            problems.append(Problem(f"{key} = {source.manifest}: {problem}"))
    if problems:
        return [], problems
    if not data.adopt:
        problems += problems_of(lambda: check_blend(manifests, columns))
    named = conditions([source.where for source in data.sources])
    for manifest, (key, where) in zip(manifests, named, strict=True):
        if where is not None:
            check = partial(checked_where, key, where, manifest, adopt=data.adopt)
            problems += problems_of(check)
        if data.captions is not None:
            caption_check = partial(check_captions, manifest, data.captions, columns)
            problems += problems_of(partial(caption_check, adopt=data.adopt))
    wanted = data.buckets
    if wanted is not None:
        problems += problems_of(lambda: check_buckets(manifests, wanted))
    return manifests, problems


def bucket_shapes(data: DataConfig, column: str) -> dict[str, list[int]]:
    """Shape of one clip's tensor of a column in each of `data.buckets`, if that is set.

    Those of remote data are not known before the ranks read them.
    """
    found: dict[str, list[int]] = {}
    for source in data.sources:
        if source.remote or data.buckets is None:
            continue
        shapes = column_shapes(data_folder(source), find_manifest(source), column)
        for name in data.buckets:
            if name in shapes:
                found.setdefault(name, shapes[name])
    return found


def several_buckets(manifest: Manifest) -> str:
    """End of a message about clips of a wrong shape: how to train on several. "" for one shape."""
    names = sorted({name for name in bucket_names(manifest) if name})
    if len(names) < 2:
        return ""
    return (
        f". The data set has clips of {', '.join(names)}: name those to train on, for example "
        f"data.buckets=[{','.join(names)}]"
    )


def check_validation(data: DataConfig, columns: Sequence[str], manifest: Manifest) -> list[Problem]:
    """Whether the file or the data set of held-out clips can be read and fits the training data.

    `manifest`: of the training data. Which clips are held out is only known when they are read.
    """
    if data.validation is None:
        return []
    source = data.validation.data_set
    if source is None:
        return problems_of(data.validation.read_clips)
    key = "data.validation.data_set"
    own = data.model_copy(
        update={**source.model_dump(), "manifest": source.manifest, "blend": (), "validation": None}
    )
    found, problems = check_data(own, columns, f"{key}.manifest")
    if found and not data.adopt:
        problems += problems_of(lambda: check_blend([manifest, *found], columns, key))
    return problems


def read_data(data: Path, columns: Sequence[str]) -> tuple[Manifest | None, list[Problem]]:
    """(manifest, problems) of a data folder; no manifest if it lacks clips or `columns`."""
    try:
        manifest = read_manifest(data)
        problems = check_manifest(manifest, columns, data)
    except ConfigError as error:
        problems = [Problem(str(error))]
    except OSError as error:
        problems = [Problem(f"it cannot be read: {error.strerror}")]
    if problems:
        return None, [Problem(f"data = {data}: {problem}") for problem in problems]
    return manifest, []


def check_manifest(
    manifest: Manifest, columns: Sequence[str], folder: Path | None = None, *, adopt: bool = False
) -> list[Problem]:
    """Whether a data set holds clips and the columns.

    `folder`: the data folder, which must hold the first shard of each column. None if it is
    remote.
    """
    if not manifest.num_samples:
        return [Problem("it holds no clips; see reject_counts in its manifest")]
    missing = [name for name in columns if name not in manifest.columns]
    problems = problems_of(lambda: check_column_fingerprints(manifest, missing))
    for name in columns:
        if name in missing:
            continue
        check = partial(check_column_fingerprints, manifest, [name], adopt=adopt)
        problems += problems_of(check)
        if folder is not None:
            problems += check_shard_files(folder / name, manifest.columns[name].shards)
    return problems


def check_shard_files(folder: Path, shards: Sequence[ShardEntry]) -> list[Problem]:
    """One problem if shards of a manifest are missing or have another size, with the first of them.

    Of many shards, `MOST_SHARDS` evenly spaced ones are looked at.
    """
    step = -(-len(shards) // MOST_SHARDS) or 1
    damaged = []
    for shard in shards[::step]:
        path = folder / f"{shard.name}.tar"
        index = sidecar_path(path)
        try:
            size = path.stat().st_size
            if size != shard.bytes:
                damaged.append(f"{path} has {size} bytes instead of {shard.bytes}")
            elif not index.is_file():
                damaged.append(f"{index} does not exist")
        except FileNotFoundError:
            damaged.append(f"{path} does not exist")
        except OSError as error:
            damaged.append(f"{path} cannot be read: {error.strerror}")
    if not damaged:
        return []
    command = "shards" if folder.name == RAW else "precompute"
    more = f" (and {len(damaged) - 1} more of {len(shards[::step])})" if len(damaged) > 1 else ""
    what = "raw" if folder.name == RAW else f"column {folder.name!r}"
    return [
        Problem(
            f"{what} is in the manifest, but {damaged[0]}{more}; restore the files, or delete .tar "
            f"and .json of these shards and run `landiff {command}` again"
        )
    ]


def find_entry(
    key: str, zoo: Path, reference: str | None, kind: str | Sequence[str] | None
) -> tuple[registry.ZooEntry | None, list[Problem]]:
    """The zoo entry that config key `key` refers to, or None, and its problem, if any."""
    if reference is None:
        return None, []
    try:
        entry = registry.resolve(zoo, reference, kind=kind)
        if not entry.weights_path.is_file():
            raise ConfigError(
                f"{entry.path} is damaged: {entry.weights_path.name} is missing; convert the "
                "weights again"
            )
        read_header(entry.weights_path)
    except ConfigError as error:
        return None, [Problem(f"{key} = {reference}: {error}")]
    except OSError as error:
        return None, [Problem(f"{key} = {reference} cannot be read: {error}")]
    return entry, []


def different_fields(
    key: str,
    wanted: Config,
    entry: registry.ZooEntry,
    fields: Sequence[str] | None = None,
    section: str | None = None,
) -> list[Problem]:
    """One problem that names every field in which a zoo entry differs from section `key`.

    `fields`: the fields to compare. None compares all. `section`: the section of the entry's config
    that is compared with `wanted`. None compares the whole config.
    """
    ours = wanted.model_dump()
    theirs = entry.config.model_dump()
    if section is not None:
        theirs = theirs[section]
    different = []
    for name in fields or ours:
        if ours[name] != theirs[name]:
            different.append(f"{key}.{name} = {ours[name]!r} (there {theirs[name]!r})")
    if not different:
        return []
    return [
        Problem(
            f"{entry.reference} is another model: {', '.join(different)}; set them alike, or name "
            "another entry"
        )
    ]


def check_package(module: str, key: str, value: object, way_out: str) -> list[Problem]:
    """Whether the Python package that a config key needs is installed. Does not import it."""
    if importlib.util.find_spec(module) is not None:
        return []
    return [
        Problem(f"{key} = {value} needs the package {module}, which is not installed; {way_out}")
    ]


def check_prompts(config: PromptedConfig, width: int, key: str) -> list[Problem]:
    """Whether the text encoder of `preview_prompts` exists and has the width of the model.

    width: of the model's text states. key: the config key of it.
    """
    if not config.preview_prompts or config.preview_text is None:
        return []
    problems = check_encoder("preview_text", config.preview_text)
    found = width_of(config.preview_text)
    if found is not None and found != width:
        problems.append(
            Problem(
                f"preview_text = {config.preview_text.kind} has states of width {found}, the model "
                f"takes {key} = {width}; name the encoder of text_column"
            )
        )
    for number, prompt in enumerate(config.preview_prompts):
        if not prompt.strip():
            problems.append(Problem(f"preview_prompts.{number} is empty; write what to show"))
    return problems


def check_steps(key: str, steps: int, schedule: ScheduleConfig) -> list[Problem]:
    """Whether a sampler can take `steps` steps: at least 2, at most those of the schedule."""
    if 2 <= steps <= schedule.num_timesteps:
        return []
    return [
        Problem(
            f"{key} = {steps}: a sampler takes at least 2 steps and at most "
            f"schedule.num_timesteps = {schedule.num_timesteps}"
        )
    ]
