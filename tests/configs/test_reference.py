"""Config keys as the reference page and `landiff config explain` show them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, NonNegativeFloat, PositiveInt

from landiff.configs.base import Config, ConfigError
from landiff.configs.paths import IMPORT_ROOT
from landiff.configs.reference import (
    ConfigKey,
    all_sections,
    config_keys,
    explain_field,
    section_name,
)
from landiff.data_pipeline.loading.config import DataConfig, SourceConfig
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.stages import STAGE_CONFIGS

STAGES = ["shards", "precompute", "tokenizer", "lm", "diffusion", "sample", "evaluate"]


class InnerConfig(Config):
    kind: Literal["inner"] = "inner"
    size: PositiveInt = 3


class OtherConfig(Config):
    kind: Literal["other"] = "other"
    deeper: InnerConfig


class OuterConfig(Config):
    folder: Path = Field(description="where results\n    are written")
    rate: NonNegativeFloat = 1e-3
    share: float = Field(default=0.5, ge=0, le=1)
    limit: PositiveInt | None = None
    mode: Literal["fast", "exact"] = "fast"
    words: tuple[str, ...] = ("a", "b")
    betas: tuple[float, float] = (0.9, 0.95)
    single: InnerConfig = InnerConfig()
    either: dict[str, Annotated[InnerConfig | OtherConfig, Field(discriminator="kind")]]


@pytest.fixture
def keys() -> dict[str, ConfigKey]:
    return {key.name: key for key in config_keys(OuterConfig)}


def test_types_and_limits_are_in_words(keys):
    assert keys["folder"].type == "path"
    assert keys["rate"].type == "number ≥ 0"
    assert keys["share"].type == "number ≥ 0 and ≤ 1"
    assert keys["limit"].type == "integer > 0 or null"
    assert keys["mode"].type == "`fast` or `exact`"
    assert keys["words"].type == "list of text"
    assert keys["betas"].type == "list of 2: number, number"
    assert keys["single"].type == "Inner"
    assert keys["either"].type == "mapping of names to Inner or Other"


def test_defaults_are_as_in_yaml(keys):
    assert keys["folder"].default == "required"
    assert keys["rate"].default == "`0.001`"
    assert keys["limit"].default == "`null`"
    assert keys["words"].default == '`["a", "b"]`'
    assert keys["single"].default == "defaults of the section"


def test_the_meaning_is_the_description_on_one_line(keys):
    assert keys["folder"].meaning == "where results are written"
    assert keys["rate"].meaning == ""


def test_sections_are_found_at_any_depth_and_once():
    assert all_sections([OuterConfig]) == [InnerConfig, OtherConfig]


def test_a_key_is_explained_with_type_default_and_meaning():
    assert explain_field(OuterConfig, "share").splitlines() == [
        "share",
        "  type:    number ≥ 0 and ≤ 1",
        "  default: 0.5",
        "  meaning: not described",
    ]
    assert "  meaning: where results are written" in explain_field(OuterConfig, "folder")


def test_a_section_is_explained_with_its_keys():
    assert explain_field(OuterConfig, "single").splitlines()[-1] == "  keys of Inner: kind, size"
    assert explain_field(OuterConfig, "single.size").splitlines()[2] == "  default: 3"


def test_keys_of_several_classes_are_explained_for_each():
    text = explain_field(OuterConfig, "either.first.kind")
    assert "either.first.kind (Inner)" in text
    assert "either.first.kind (Other)" in text
    text = explain_field(OuterConfig, "either.first.deeper.size")
    assert text.startswith("either.first.deeper.size\n")
    assert explain_field(OuterConfig, "either.first").startswith("either.first\n  type:    mapping")


def test_an_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'single\.sise'; did you mean 'size'"):
        explain_field(OuterConfig, "single.sise")
    with pytest.raises(ConfigError, match=r"unknown config key 'rate\.x'"):
        explain_field(OuterConfig, "rate.x")


def test_every_key_of_every_command_has_words():
    roots = [*map(STAGE_CONFIGS.__getitem__, STAGES), ClusterConfig]
    classes = [*roots, *all_sections(roots)]
    for cls in classes:
        assert all(key.type for key in config_keys(cls)), cls
    names = [section_name(cls) for cls in all_sections(roots)]
    assert len(set(names)) == len(names)


def undescribed(classes: Sequence[type[Config]]) -> list[str]:
    """Fields without a description, as "Class.field"."""
    found = []
    for cls in classes:
        found += [f"{cls.__name__}.{key.name}" for key in config_keys(cls) if not key.meaning]
    return found


def test_every_field_of_the_data_config_is_described():
    assert not undescribed([SourceConfig, DataConfig])


def test_every_field_of_every_command_is_described():
    roots = [*map(STAGE_CONFIGS.__getitem__, STAGES), ClusterConfig]
    missing = undescribed([*roots, *all_sections(roots)])
    assert not missing, "give these fields a description: " + ", ".join(missing)


def test_reading_the_keys_needs_no_torch():
    code = "import sys, landiff.configs.reference; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=IMPORT_ROOT, check=True)
