"""Presets: folders with one config for each stage of the pipeline, packaged or of a project."""

from __future__ import annotations

from pathlib import Path

from landiff.configs import Config, ConfigError
from landiff.configs.loader import nearest_name, packaged_names
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.config import EvaluateConfig, SampleConfig, ShardsJobConfig, WorldConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

PRESET_CONFIGS: dict[str, type[Config]] = {
    "shards": ShardsJobConfig,
    "features": PrecomputeConfig,
    "tokenizer": TokenizerTrainConfig,
    "precompute": PrecomputeConfig,
    "lm": LMTrainConfig,
    "diffusion-main": DiffusionTrainConfig,
    "diffusion-control": DiffusionTrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
}
"""File of each config of a preset, without its suffix, and the class of the config."""
FURTHER_CONFIGS: dict[str, type[Config]] = {"world": WorldConfig, "latents": PrecomputeConfig}
"""The same of configs that only some presets have. `world`: a source of clips that is made first.
`latents`: the columns that need no tokenizer, computed beside the features; two stages then run at
a time."""


def packaged_presets() -> list[str]:
    """Names of the packaged presets."""
    names = set(packaged_names())
    presets = {name.partition("/")[0] for name in names}
    return sorted(name for name in presets if f"{name}/shards" in names)


def preset_config(preset: str, stem: str) -> str:
    """Name of the config `stem` of a preset: packaged, e.g. `nano/lm`, or an absolute path.

    `preset` is the name of a packaged preset or a folder.
    """
    if preset in packaged_presets():
        return f"{preset}/{stem}"
    return str(Path(preset).absolute() / f"{stem}.yaml")


def project_folder(preset: str) -> Path:
    """The folder in which the stages of a preset run: that of a project, or the current one."""
    return Path(".") if preset in packaged_presets() else Path(preset)


def has_config(preset: str, stem: str) -> bool:
    """Whether a preset, packaged or a folder, has the config `stem`."""
    name = preset_config(preset, stem)
    return name in packaged_names() or Path(name).is_file()


def configs_of(preset: str) -> dict[str, type[Config]]:
    """Class of each config of a preset by stem, with the further ones that it has."""
    found = dict(PRESET_CONFIGS)
    for stem, cls in FURTHER_CONFIGS.items():
        if has_config(preset, stem):
            found[stem] = cls
    return found


def require_preset(preset: str) -> None:
    """Raise ConfigError unless `preset` is packaged or a folder with all configs."""
    if preset in packaged_presets():
        return
    if not Path(preset).is_dir():
        raise ConfigError(
            f"--preset {preset} is no folder and no packaged preset"
            f"{nearest_name(preset, packaged_presets())}"
        )
    missing = [stem for stem in PRESET_CONFIGS if not Path(preset_config(preset, stem)).is_file()]
    if missing:
        files = ", ".join(f"{stem}.yaml" for stem in missing)
        raise ConfigError(
            f"--preset {preset} lacks {files}; copy them from a folder that `landiff new` wrote, "
            "each may be one line such as  extends: nano/lm"
        )
