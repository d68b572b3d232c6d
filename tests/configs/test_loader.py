"""Typed configs from YAML and overrides, and error messages for mistakes."""

import pytest
import yaml
from pydantic import Field

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


class KeysConfig(Config):
    keys: tuple[str, ...]


@pytest.mark.parametrize("key", ["940549e96508", "12e3", "1.5E-3", "+1_0e2", "1e5x", "0x1f", "no"])
def test_a_string_that_looks_like_a_number_stays_a_string(tmp_path, key):
    path = tmp_path / "config.yaml"
    path.write_text(dump(KeysConfig(keys=(key,))))
    assert load(KeysConfig, path).keys == (key,)


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


# -------------------------------------------------------------------- extends


class Encoder(Config):
    kind: str
    path: str = ""


class Extending(Config):
    name: str = ""
    inner: Inner = Inner()
    columns: dict[str, Encoder] = Field(default={})
    steps: tuple[int, ...] = ()


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_extends_another_key_by_key(tmp_path):
    write(
        tmp_path,
        parts="small: {width: 7, rate: 0.5}\n",
        base="name: base\ninner: parts.yaml#small\nsteps: [1, 2]\n"
        "columns: {a: {kind: vae, path: x}, b: {kind: vae, path: x}}\n",
        main="extends: base.yaml\ninner: {rate: 0.25}\nsteps: [3]\n"
        "columns: {a: {kind: dct}, b: {path: y}}\n",
    )
    config = load(Extending, tmp_path / "main.yaml")
    assert config.name == "base" and config.inner == Inner(width=7, rate=0.25)
    assert config.steps == (3,), "lists are replaced"
    assert config.columns["a"] == Encoder(kind="dct"), "another kind replaces the section"
    assert config.columns["b"] == Encoder(kind="vae", path="y")


def test_references_reach_what_a_file_extends(tmp_path):
    write(tmp_path, model="extends: nano/model\nlm: {num_layers: 2}\n")
    own = load(ModelConfig, {"lm": f"{tmp_path}/model.yaml#lm"}).lm
    nano = load(ModelConfig, "nano/model").lm
    assert own == nano.model_copy(update={"num_layers": 2})
    tokenizer = load(ModelConfig, {"tokenizer": f"{tmp_path}/model.yaml#tokenizer"}).tokenizer
    assert tokenizer == load(ModelConfig, "nano/model").tokenizer


def test_overrides_take_references_too(tmp_path):
    write(tmp_path, model="extends: nano/model\nlm: {num_layers: 2}\n")
    overrides = [f"lm={tmp_path}/model.yaml#lm", "lm.num_layers=3"]
    config = load(ModelConfig, "landiff/model", overrides)
    assert config.lm == load(ModelConfig, "nano/model", ["lm.num_layers=3"]).lm
    with pytest.raises(ConfigError, match="lm: 'nano/model#ln' names the section 'ln'"):
        load(ModelConfig, "landiff/model", ["lm=nano/model#ln"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"main": "extends: main.yaml"}, ["extend or refer to each other", "main.yaml"]),
        ({"main": "extends: a.yaml", "a": "extends: main.yaml"}, ["main.yaml", "a.yaml"]),
        ({"main": "inner: a.yaml#x", "a": "x: a.yaml#x"}, ["extend or refer to each other"]),
        ({"main": "extends: nano/ml"}, ["main.yaml: extends = 'nano/ml'", "did you mean"]),
        ({"main": "extends: a.yaml"}, ["main.yaml: extends = 'a.yaml'", "does not exist"]),
        ({"main": "extends: [nano/lm]"}, ["must be one name of a config"]),
    ],
)
def test_bad_bases_are_refused(tmp_path, files, words):
    write(tmp_path, **files)
    with pytest.raises(ConfigError) as error:
        load(Extending, tmp_path / "main.yaml")
    for word in words:
        assert word in str(error.value)


def test_errors_name_the_file_of_the_value(tmp_path):
    write(
        tmp_path,
        parts="small: {width: 7, rate: fast}\n",
        base="extends: more.yaml\nname: base\nsteps: [x]\n",
        more="inner: parts.yaml#small\n",
        main="extends: base.yaml\nstep: 1\n",
    )
    with pytest.raises(ConfigError) as error:
        load(Extending, tmp_path / "main.yaml")
    text = str(error.value)
    main = tmp_path / "main.yaml"
    assert f"{main} (from {tmp_path}/parts.yaml): inner.rate = 'fast'" in text
    assert f"{main} (from {tmp_path}/base.yaml): steps.0 = 'x'" in text
    assert f"{main}: unknown config key 'step'" in text
    with pytest.raises(ConfigError) as error:
        load(Extending, main, ["inner.rate=slow"])
    assert f"{main}: inner.rate = 'slow'" in str(error.value)
