"""The command `landiff config`: lists packaged configs, prints one, or explains a key."""

from __future__ import annotations

import argparse

from landiff.configs import Config, ConfigError, find
from landiff.configs.loader import load_leniently, packaged_names, top_level_keys
from landiff.configs.reference import explain_field
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.stages import STAGE_CONFIGS
from landiff.model_zoo.config import ModelConfig

EXPLAINED: dict[str, type[Config]] = {
    **STAGE_CONFIGS,
    "model": ModelConfig,
    "cluster": ClusterConfig,
}
"""Config classes that `landiff config explain` searches: stages, model sizes and cluster files."""


def config_command(args: argparse.Namespace) -> int:
    """Prints what the arguments ask for. Returns the exit code."""
    if args.name == "explain":
        if not args.key:
            raise ConfigError("landiff config explain needs a key, e.g. loop.keep_every")
        print(explain_key(args.key, args.explained_config))
        return 0
    if args.key or args.explained_config:
        extra = args.key or f"--config {args.explained_config}"
        raise ConfigError(f"{extra} belongs to `landiff config explain KEY`")
    if args.name:
        print(find(args.name).read_text(encoding="utf-8"), end="")
    else:
        print("\n".join(packaged_names()))
    return 0


def explain_key(key: str, config_name: str | None = None) -> str:
    """Type, default and meaning of a dotted key, and the names of the configs that have it.

    `config_name` restricts the search to the class of this config file. Keys of several configs
    with the same text are explained once. Raises ConfigError if no config has the key.
    """
    names = list(EXPLAINED) if config_name is None else class_names_of(config_name)
    configs_by_text: dict[str, list[str]] = {}
    section = key.partition(".")[0]
    errors: list[ConfigError] = []
    near_errors: list[ConfigError] = []  # of configs that have the first part of the key
    for name in names:
        try:
            text = explain_field(EXPLAINED[name], key)
        except ConfigError as error:
            errors.append(error)
            if section in EXPLAINED[name].model_fields:
                near_errors.append(error)
        else:
            configs_by_text.setdefault(text, []).append(name)
    if not configs_by_text:
        if near_errors:
            raise near_errors[0]
        if len(errors) == 1:
            raise errors[0]
        raise ConfigError(f"unknown config key {key!r}: it is no key of {', '.join(names)}")
    parts = []
    for text, found in configs_by_text.items():
        parts.append(f"{text.rstrip()}\n  configs: {', '.join(found)}")
    return "\n\n".join(parts)


def class_names_of(config_name: str) -> list[str]:
    """Names in `EXPLAINED` of the classes that a config file is written for.

    These are the classes that accept the file. If none does, because a value is wrong, they are
    the classes that have all of its top-level keys. Raises ConfigError if there is none.
    """
    keys = top_level_keys(find(config_name))
    candidates = [name for name, cls in EXPLAINED.items() if keys <= set(cls.model_fields)]
    if not candidates:
        raise ConfigError(f"{config_name} is not a config of {', '.join(EXPLAINED)}")
    accepting = []
    for name in candidates:
        config, _ = load_leniently(EXPLAINED[name], config_name)
        if config is not None:
            accepting.append(name)
    return accepting or candidates
