"""Check, from the documents of its checkpoints, whether a run can resume. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import read_json, read_yaml
from landiff.configs.problems import Problem, problems_of
from landiff.configs.reference import section_classes
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.loading.phases import DataPhase, order_at, order_plans, phase_at
from landiff.data_pipeline.loading.position import check_position, data_fingerprint, phase_identity
from landiff.training.checkpoint.files import latest_whole
from landiff.training.checkpoint.parent import find_parent
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    CONFIG,
    DAMAGED,
    FILES,
    STATE,
    committed_steps,
    finished_step,
    step_folder,
)
from landiff.training.config import TrainConfig

# Names of weights and of the documents beside them, as `landiff convert` and other programs write
# them: zoo, Megatron, DeepSpeed, diffusers, transformers, peft, plain torch.
FOREIGN_WEIGHTS = (
    ".metadata",
    "layout.json",
    "latest",
    "latest_checkpointed_iteration.txt",
    "provenance.json",
    "adapter_config.json",
    "model_index.json",
    "*.safetensors",
    "*.index.json",
    "*.distcp",
    "*.pt",
    "*.pth",
    "*.bin",
    "*.ckpt",
)
# Keys of a complete phase that may change: where its data lie, and how a batch is divided.
FREE_KEYS = ("data.manifest", "data.remote", "data.blend", "data.micro_batch_size")
NAMES_SHOWN = 4  # of weights in a run folder


def check_resume(config: TrainConfig) -> list[Problem]:
    """Whether the newest checkpoint in `config.run`, or else that of its parent, fits this run.

    Damaged documents are not reported here: the ranks report them.
    """
    checkpoints = config.run / CHECKPOINTS
    steps = committed_steps(checkpoints)
    if any(is_checkpoint(step_folder(checkpoints, step)) for step in steps):
        return check_checkpoint(step_folder(checkpoints, steps[-1]), config)
    problems = check_no_other_weights(config.run)
    if config.parent is None:
        return problems
    try:
        return problems + check_checkpoint(find_parent(config), config)
    except ConfigError as error:
        return [*problems, Problem(str(error))]


def is_complete(config: TrainConfig) -> bool:
    """Whether the run of `config` has nothing left to do, so that no rank needs to be started.

    It has finished at `loop.steps`, and its newest intact and healthy checkpoint is of that step
    and of the same config. All files of the checkpoint are read. In any other case, such as a
    damaged checkpoint or a changed key, the ranks decide and report.
    """
    if finished_step(config.run) != config.loop.steps:
        return False
    newest = latest_whole(config.run / CHECKPOINTS)
    if newest != step_folder(config.run / CHECKPOINTS, config.loop.steps):
        return False
    return read_yaml(newest / CONFIG) == config.model_dump(mode="json")


def check_checkpoint(folder: Path, config: TrainConfig) -> list[Problem]:
    """Whether a run with `config` can continue from the checkpoint `folder`."""
    try:
        state = read_json(folder / STATE)
        stored = read_yaml(folder / CONFIG)
    except (OSError, ConfigError):
        return []
    if not isinstance(state, dict) or not isinstance(stored, dict):
        return []
    kind = state.get("kind", "")
    problems = problems_of(lambda: changed_keys(folder, kind, stored, config, config.must_match))
    problems += problems_of(lambda: check_same_split(folder, stored, config))
    step = state.get("step")
    if not isinstance(step, int) or not isinstance(state.get("loader"), dict):
        return problems
    past = problems_of(lambda: check_past_phases(folder, stored, config, step))
    if past:
        return problems + past
    phase = phase_at(config.data_phases, max(0, step - 1))
    plan = order_at(order_plans(config.data_phases), max(0, step - 1))
    known = phase_identity(phase.config, plan)
    position = partial(check_position, state["loader"], known, phase.config, step)
    return problems + problems_of(position)


def check_same_data(config: TrainConfig, phase: DataPhase, manifests: Sequence[Manifest]) -> None:
    """Raise ConfigError if the checkpoint that the run continues from read other data sets.

    phase: that begins the order which the run reads next, and `manifests` those of its data sets.
    """
    state = next_state(config)
    step = state.get("step", 0)
    if step <= phase.first_step or not isinstance(state.get("loader"), dict):
        return
    known = {"data": data_fingerprint(manifests, phase.config)}
    check_position(state["loader"], known, phase_at(config.data_phases, step - 1).config, step)


def next_state(config: TrainConfig) -> dict[str, Any]:
    """state.json of the checkpoint that the run continues from: its newest, or its parent's.

    Empty without one, and if it cannot be read, which `check_resume` or the ranks report.
    """
    checkpoints = config.run / CHECKPOINTS
    steps = committed_steps(checkpoints)
    try:
        if steps:
            folder = step_folder(checkpoints, steps[-1])
        elif config.parent is not None:
            folder = find_parent(config)
        else:
            return {}
        state = read_json(folder / STATE)
    except (OSError, ConfigError):
        return {}
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        return {}
    return state


def check_past_phases(
    folder: Path, stored: Mapping[str, Any], config: TrainConfig, step: int
) -> None:
    """Raise ConfigError if `config` changes phases that a checkpoint of `step` has completed.

    The present phase keeps its first step. Its other values may change as those of a run without
    phases may; the order of samples has a check of its own (`check_position`).
    """
    before = [phase for phase in stored.get("phases") or [] if phase["from_step"] < step]
    phases = [phase.model_dump(mode="json") for phase in config.phases]
    after = [phase for phase in phases if phase["from_step"] < step]
    steps_before = [phase["from_step"] for phase in before]
    steps_after = [phase["from_step"] for phase in after]
    if steps_before != steps_after:
        raise ConfigError(
            f"phases with from_step {_listed(steps_after)} begin before step {step} of {folder}, "
            f"where those of the run are {_listed(steps_before)}; restore them. New phases can "
            f"begin at step {step} or later"
        )
    if not before:
        return
    refused = []
    for number, (old, new) in enumerate(zip(before[:-1], after[:-1], strict=True)):
        refused += _differences(flat_keys(old), flat_keys(new), f"phases.{number}.")
    top_level = _changeable(stored, config)
    refused += _differences(top_level, flat_keys(config.model_dump(mode="json")), "")
    if refused:
        raise ConfigError(
            f"{folder} is of step {step}, and phases before it are complete and cannot change: "
            f"{', '.join(refused)}; restore these values, and set the new ones in a phase with "
            f"from_step {step} or later"
        )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _changeable(stored: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The stored values, by dotted key, that phases change. Without places of data."""
    (phase_class,) = section_classes(type(config).model_fields["phases"].annotation)
    found = {}
    flat = flat_keys(stored)
    for name, field in phase_class.model_fields.items():
        keys = [name]
        for section in section_classes(field.annotation):
            keys = [f"{name}.{key}" for key in section.model_fields]
        for key in keys:
            if key in flat and key not in FREE_KEYS:
                found[key] = flat[key]
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    """Texts about the keys of `old` that have another value in `new`."""
    found = []
    for key, value in old.items():
        if new.get(key) != value:
            found.append(f"{prefix}{key} = {new.get(key)!r} (checkpoint: {value!r})")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether a trainer wrote the folder, possibly damaged since."""
    return (folder / STATE).exists() or (folder / FILES).exists()


def check_same_split(folder: Path, stored: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ConfigError if the checkpoint was trained on another side of `data.validation`."""
    data = stored.get("data")
    before = data.get("validation") if isinstance(data, Mapping) else None
    if isinstance(before, Mapping):
        before = {name: value for name, value in before.items() if name != "max_clips"}
    validation = config.data.validation
    after = None if validation is None else validation.split_values()
    if before != after:
        way_out = "Set it back"
        if before is None:
            way_out = "Set data.validation=null loop.val_every=0"
        raise ConfigError(
            f"data.validation holds out other clips than in {folder}: {_given(after)} "
            f"(checkpoint: {_given(before)}); the run would train on clips that it has validated, "
            f"or the other way round. {way_out}, or start a new run (run=...)"
        )


def _given(values: Mapping[str, Any] | None) -> str:
    """The values that are set, as text."""
    if values is None:
        return "null"
    return str({name: value for name, value in values.items() if value})


def check_no_other_weights(run: Path) -> list[Problem]:
    """Whether a run folder without checkpoints holds weights, which a trainer would ignore.

    Searched are the folder itself, its folder of checkpoints, and the folders in both.
    """
    checkpoints = run / CHECKPOINTS
    folders = [run]
    try:
        for parent in (run, checkpoints):
            if parent.is_dir():
                found_there = sorted(path for path in parent.iterdir() if path.is_dir())
                # A hidden folder is of a save that was interrupted.
                folders += [path for path in found_there if not path.name.startswith(".")]
        found = {folder: foreign_weights(folder) for folder in folders}
    except OSError:
        return []  # reported as a folder that cannot be written
    holders = [folder for folder in folders if found[folder]]
    if not holders:
        return []
    holder = holders[0]
    source = holder
    if holder.parent == run and holder != checkpoints:
        source = run  # the folder of one part of several
    where = "" if holder == run else f"{holder.relative_to(run)}: "
    return [
        Problem(
            f"run = {run} holds converted weights ({where}{', '.join(found[holder])}) and no "
            "checkpoints, so training would ignore them; to start from them, run `landiff convert "
            f"{source} --name NAME` and set init_from=NAME with another run=..."
        )
    ]


def foreign_weights(folder: Path) -> list[str]:
    """Names in `folder`, without its subfolders, that belong to weights. Few of many.

    Damaged checkpoints, and checkpoints that a killed run left half-written, do not count.
    """
    if folder.name.endswith(DAMAGED) or folder.name.startswith("."):
        return []
    names = []
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in FOREIGN_WEIGHTS):
            names.append(path.name)
    return names[:NAMES_SHOWN]


def changed_keys(
    folder: Path, kind: str, stored: Mapping[str, Any], config: Config, must_match: Sequence[str]
) -> list[str]:
    """Keys in which `config` differs from the `stored` config of a checkpoint, with both values.

    Raises ConfigError if the checkpoint belongs to another trainer (`kind` is the class name of
    its config), or if a section in `must_match` differs.
    """
    own = type(config).__name__
    if kind != own:
        raise ConfigError(
            f"{folder} was written by {kind}, this run is a {own}; choose another run folder "
            "(run=...)"
        )
    before = flat_keys(stored)
    after = flat_keys(config.model_dump(mode="json"))
    changed = []
    refused = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        difference = f"{key} = {after.get(key)!r} (checkpoint: {before.get(key)!r})"
        changed.append(difference)
        if key.partition(".")[0] in must_match:
            refused.append(difference)
    if refused:
        raise ConfigError(
            f"{folder} is a checkpoint of another model: {', '.join(refused)}; restore these "
            "values, or choose another run folder (run=...). `landiff convert` (--to megatron or "
            "deepspeed) can change what is not part of the model itself, such as vocab_multiple"
        )
    return changed


def flat_keys(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
