"""Whether a run can resume from the checkpoints in its folder, as far as their documents tell.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import read_json, read_yaml
from landiff.configs.problems import Problem, problems_of
from landiff.data_pipeline.loading.position import check_position
from landiff.training.checkpoint.run_folder import CONFIG, STATE, committed_steps, step_folder

# what `landiff convert` and other frameworks write for Megatron and DeepSpeed
FOREIGN_WEIGHTS = (".metadata", "common.pt", "layout.json", "zero", "latest", "provenance.json")


def check_resume(config: Config, must_match: Sequence[str]) -> list[Problem]:
    """Whether the newest checkpoint in `config.run` is one of this run.

    Damaged documents are left to the ranks.
    """
    steps = committed_steps(config.run / "checkpoints")
    if not steps:
        return check_no_other_weights(config.run)
    folder = step_folder(config.run / "checkpoints", steps[-1])
    try:
        state = read_json(folder / STATE)
        stored = read_yaml(folder / CONFIG)
    except (OSError, ConfigError):
        return []
    if not isinstance(state, dict) or not isinstance(stored, dict):
        return []
    problems = problems_of(
        lambda: changed_keys(folder, state.get("kind", ""), stored, config, must_match)
    )
    if isinstance(state.get("loader"), dict):
        known = {
            "seed": config.data.seed,
            "shuffle_window": config.data.shuffle_window,
            "global_batch_size": config.data.global_batch_size,
        }
        problems += problems_of(lambda: check_position(state["loader"], known))
    return problems


def check_no_other_weights(run: Path) -> list[Problem]:
    """Whether the folder holds converted weights, which a trainer would ignore."""
    try:
        found = [name for name in FOREIGN_WEIGHTS if (run / name).exists()]
        found += sorted(path.name for path in run.glob("*.safetensors"))
    except OSError:
        return []  # reported as a folder that cannot be written
    if not found:
        return []
    return [
        Problem(
            f"run = {run} holds converted weights ({', '.join(found)}) and no checkpoints, so "
            "training would ignore them; "
            f"to start from them, run `landiff convert {run} --name NAME` and set init_from=NAME "
            "with another run=..."
        )
    ]


def changed_keys(
    folder: Path, kind: str, stored: Mapping[str, Any], config: Config, must_match: Sequence[str]
) -> list[str]:
    """Keys in which `config` differs from the `stored` config of a checkpoint, with both values.

    Raises ConfigError where the checkpoint is of another trainer (`kind` names the class of its config), or where
    a section in `must_match` differs.
    """
    own = type(config).__name__
    if kind != own:
        raise ConfigError(
            f"{folder} was written by {kind}, this run is a {own}; choose another run folder "
            "(run=...)"
        )
    before, after = _flat(stored), _flat(config.model_dump(mode="json"))
    changed = []
    refused = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        changed.append(f"{key} = {after.get(key)!r} (checkpoint: {before.get(key)!r})")
        if key.partition(".")[0] in must_match:
            refused.append(changed[-1])
    if refused:
        raise ConfigError(
            f"{folder} is a checkpoint of another model: {', '.join(refused)}; "
            "set them back, or choose another run folder (run=...); what is not of the model "
            "itself, such as "
            "vocab_multiple, `landiff convert` can change (--to megatron or deepspeed)"
        )
    return changed


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
