"""What a user can get wrong in the LM's config, and what they are told."""

from pathlib import Path

import pytest

from landiff.configs import ConfigError, find, load
from landiff.training.layout import model_copies
from landiff.training.lm.config import LMTrainConfig
from tests.training.lm.samples import tiny_config


@pytest.mark.parametrize(("name", "copies"), [("nano/lm", 4), ("landiff/lm", 8)])
def test_packaged_configs_load(name, copies):
    config = load(LMTrainConfig, name)
    assert find(name).exists()
    assert config.data.global_batch_size % config.data.micro_batch_size == 0
    assert model_copies(config, 8) == copies


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (
            {"tensor": 3},
            {},
            r"model\.num_heads = 4 is not a multiple of parallel\.tensor = 3; .* "
            r"or head_multiple = 3",
        ),
        (
            {"tensor": 3},
            {"head_multiple": 3},
            r"model\.ffn_size = 80 is not a multiple of parallel\.tensor = 3",
        ),
        (
            {"tensor": 2},
            {"vocab_multiple": 1},
            r"vocab_multiple = 1 is not a multiple of parallel\.tensor = 2",
        ),
        ({"pipeline": 3}, {}, r"model\.num_layers = 2 is not a multiple of parallel\.pipeline = 3"),
        (
            {"sequence": True},
            {},
            "sequence = true divides activations among tensor ranks, and tensor is 1",
        ),
        ({"tensr": 2}, {}, r"unknown config key 'parallel\.tensr'; did you mean 'tensor'"),
        ({}, {"text_dropout": 1.5}, r"text_dropout = 1\.5"),
    ],
)
def test_bad_values_name_the_key_and_the_way_out(parallel, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(Path("."), parallel, **changes)


def test_ranks_that_do_not_come_out_even_are_refused():
    config = tiny_config(Path("."), {"tensor": 2, "pipeline": 2})
    assert model_copies(config, 12) == 3
    with pytest.raises(
        ConfigError,
        match=r"parallel\.tensor \* parallel\.pipeline = 2 \* 2 does not divide the 6 launched "
        r"ranks; launch a multiple of 4",
    ):
        model_copies(config, 6)
