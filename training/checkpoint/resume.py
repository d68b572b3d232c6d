"""Check, from the documents of its checkpoints, whether a run can resume. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import read_json, read_yaml
from landiff.configs.problems import Problem, problems_of
from landiff.data_pipeline.loading.position import check_position
from landiff.training.checkpoint.parent import find_parent
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    CONFIG,
    DAMAGED,
    FILES,
    STATE,
    committed_steps,
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
    if isinstance(state.get("loader"), dict):
        known = {
            "seed": config.data.seed,
            "shuffle_window": config.data.shuffle_window,
            "global_batch_size": config.data.global_batch_size,
        }
        problems += problems_of(lambda: check_position(state["loader"], known))
    problems += problems_of(lambda: check_same_split(folder, stored, config))
    return problems


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
        raise ConfigError(
            f"data.validation holds out other clips than in {folder}: {_given(after)} "
            f"(checkpoint: {_given(before)}); the run would train on clips that it has validated, "
            "or the other way round. Set it back, or start a new run (run=...)"
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
                folders += sorted(path for path in parent.iterdir() if path.is_dir())
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
