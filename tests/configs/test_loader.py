"""Typed configs from YAML and overrides, and error messages for mistakes."""

import pytest
import yaml

from landiff.configs import Config, ConfigError, dump, load
from landiff.configs.loader import packaged_names
from landiff.model_zoo.config import LMConfig, ModelConfig


class Inner(Config):
    width: int = 4
    rate: float = 0.1


class Outer(Config):
    name: str
    inner: Inner = Inner()


def test_overrides_come_last_and_are_typed():
    config = load(Outer, {"name": "a", "inner": {"width": 2}}, ["inner.rate=3e-4", "name=b"])
    assert config == Outer(name="b", inner=Inner(width=2, rate=3e-4))


def test_a_section_may_be_a_reference_into_another_file(tmp_path):
    (tmp_path / "parts.yaml").write_text("small: {inner: {width: 7}}\n")
    (tmp_path / "main.yaml").write_text("name: x\ninner: parts.yaml#small.inner\n")
    assert load(Outer, tmp_path / "main.yaml").inner.width == 7
    assert load(ModelConfig, {"lm": "nano/model#lm"}).lm == load(ModelConfig, "nano/model").lm


def test_dump_reads_back_equal():
    config = load(ModelConfig, "nano/model")
    assert load(ModelConfig, yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ({"name": "a", "iner": {}}, [], ["'iner'", "did you mean 'inner'"]),
        ({"name": "a", "inner": {"widht": 1}}, [], ["'inner.widht'", "did you mean 'width'"]),
        ({"name": "a"}, ["inner.rat=1"], ["'inner.rat'", "did you mean 'rate'"]),
        ({"name": "a"}, ["inner.width"], ["inner.width", "key=value"]),
        ({"name": "a", "inner": {"width": "wide"}}, [], ["inner.width", "wide"]),
        ({}, [], ["name", "required"]),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_way_out(source, overrides, words):
    with pytest.raises(ConfigError) as error:
        load(Outer, source, overrides)
    for word in words:
        assert word in str(error.value)


def test_unknown_packaged_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'nano/model'"):
        load(ModelConfig, "nano/modle")


def test_validators_speak_plainly():
    with pytest.raises(ConfigError, match="hidden_size / num_heads = 100 / 16"):
        load(LMConfig, {"hidden_size": 100})


def test_there_are_packaged_configs():
    assert {"nano/model", "landiff/model"} <= set(packaged_names())
