"""Stages of a pipeline that need not run: `--from`, `--skip`, and models that the zoo has already.

Torch-free. A trainer is skipped together with the export of its run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from landiff.configs import Config, ConfigError
from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem
from landiff.launchers.project.chain import EXPORTED
from landiff.training.checks import different_fields, find_entry, read_data

KINDS = {
    "tokenizer": "tokenizer",
    "lm": "lm",
    "diffusion-main": "transformer",
    "diffusion-control": "diffusion",
}
"""Trainer -> kind of the zoo entry that the pipeline exports."""
STAGES = (
    "shards",
    "features",
    "tokenizer",
    "columns",
    "lm",
    "diffusion-main",
    "diffusion-control",
    "evaluate",
    "sample",
)
"""Stages that can be named, in order. Exports follow their trainers."""
EXPORTS = {
    "tokenizer": "export tokenizer",
    "lm": "export lm",
    "diffusion-main": "export main",
    "diffusion-control": "export diffusion",
}
BESIDE = {"shards": "world", "columns": "latents"}
"""Stages that are skipped with another one."""


def skipped_stages(
    configs: Mapping[str, Any], workdir: Path, first: str | None, skip: Sequence[str]
) -> dict[str, str]:
    """Stages that do not run, with the reason of each.

    `configs`: those of the preset by stem, as far as they could be read. `first` and `skip` are the
    values of --from and --skip.
    Raises ConfigError for a stage that does not exist.
    """
    for option, names in (("--from", [first] if first else []), ("--skip", skip)):
        for name in names:
            if name not in STAGES:
                raise ConfigError(
                    f"{option} {name} is no stage of the pipeline{nearest_name(name, STAGES)}"
                )
    reasons: dict[str, str] = {}
    if first is not None:
        for name in STAGES[: STAGES.index(first)]:
            reasons[name] = f"it is before --from {first}"
    for name in skip:
        reasons.setdefault(name, f"--skip {name}")
    for name in KINDS:
        if name not in configs:
            continue
        entry = found_in_zoo(name, configs[name], workdir)
        if entry is not None:
            reasons.setdefault(name, f"the zoo has {entry}, a model of its sizes")
    if "the zoo has" in reasons.get("diffusion-control", ""):
        reasons.setdefault("diffusion-main", "only diffusion-control, which is skipped, needs it")
    control = configs.get("diffusion-control")
    if control is not None and not starts_from_main(control.init_from):
        start = control.init_from
        reasons.setdefault("diffusion-main", f"diffusion-control starts from {start} instead")
    return reasons


def starts_from_main(init_from: str | None) -> bool:
    """Whether the control branch is trained on the main transformer that the pipeline exports.

    init_from: of diffusion-control.
    """
    return init_from is None or init_from.partition("@")[0] == EXPORTED["diffusion-main"][1]


def found_in_zoo(stage: str, config: Any, workdir: Path) -> str | None:
    """The zoo entry that makes a training needless, or None. Any: the config of a trainer.

    A run folder means that the entry may be an earlier export of this run, which then continues;
    `init_from` of an entry means that it is trained further.
    """
    run, name = EXPORTED[stage]
    start = "main" if stage == "diffusion-control" else None
    if (workdir / run).exists() or config.init_from != start:
        return None
    entry, _problems = find_entry(name, workdir / "zoo", name, KINDS[stage])
    if entry is None or different_fields("model", model_of(stage, config), entry):
        return None
    return str(entry.reference)


def model_of(stage: str, config: Any) -> Config:
    """The model that a trainer exports. Any: the config of the trainer."""
    model: Config = config.model.transformer if stage == "diffusion-main" else config.model
    return model


def names_to_skip(reasons: Mapping[str, str]) -> set[str]:
    """Names of the pipeline stages that do not run, exports included."""
    names = {name.replace("diffusion-", "diffusion ") for name in reasons}
    names |= {BESIDE[name] for name in reasons if name in BESIDE}
    return names | {EXPORTS[name] for name in reasons if name in EXPORTS}


def check_skipped(
    configs: Mapping[str, Any], workdir: Path, reasons: Mapping[str, str]
) -> list[Problem]:
    """Whether what skipped stages would have made is there for the stages that run."""
    problems = []
    if "shards" in reasons and "shards" in configs:
        columns: list[str] = []
        for stage, stem in (("features", "features"), ("columns", "precompute")):
            if stage in reasons and stem in configs:
                columns += configs[stem].columns
        found = read_data(workdir / configs["shards"].data, columns)[1]
        problems += [Problem(f"shards is skipped, and {problem}") for problem in found]
    control = configs.get("diffusion-control")
    from_main = control is not None and starts_from_main(control.init_from)
    readers: dict[str, tuple[str, ...]] = {
        "tokenizer": ("columns", "lm", "diffusion-control", "evaluate", "sample"),
        "lm": ("evaluate", "sample"),
        "diffusion-main": ("diffusion-control",) if from_main else (),
        "diffusion-control": ("evaluate", "sample"),
    }
    for stage, later in readers.items():
        if stage not in reasons or all(name in reasons for name in later):
            continue
        _run, name = EXPORTED[stage]
        key = f"{stage} is skipped, and its model"
        entry, found = find_entry(key, workdir / "zoo", name, KINDS[stage])
        problems += found
        if entry is not None and stage in configs:
            problems += different_fields(f"{stage}.model", model_of(stage, configs[stage]), entry)
    return problems
