"""Choosing an encoder by config: kinds, refusals, and no torch before something is built."""

import subprocess
import sys

import huggingface_hub
import pytest

from landiff.configs import Config, ConfigError, load
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.config import (
    CodecConfig,
    CogVideoXVaeConfig,
    FlanT5Config,
    T5V11Config,
    TextConfig,
    TheiaConfig,
    VisionConfig,
    semantic_frame_indices,
)


class _Encoders(Config):
    vision: VisionConfig
    codec: CodecConfig
    text: TextConfig


def test_kind_chooses_the_config_class():
    config = load(
        _Encoders,
        {
            "vision": {"kind": "theia", "path": "x/y"},
            "codec": {"kind": "dct"},
            "text": {"kind": "minilm", "max_length": 32, "padded": True},
        },
    )
    assert isinstance(config.vision, TheiaConfig) and config.vision.path == "x/y"
    assert (config.codec.kind, config.text.max_length, config.text.padded) == ("dct", 32, True)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("vision", {"kind": "dct"}),  # a codec where vision features are wanted
        ("vision", {"kind": "clip"}),
        ("vision", {}),
        ("text", {"kind": "minilm", "max_length": 513}),  # the network has 512 positions
        ("text", {"kind": "minilm", "path": "x/y"}),  # not an option of this kind
    ],
)
def test_wrong_kind_or_option_is_refused_by_dotted_name(section, value):
    good = {"vision": {"kind": "theia"}, "codec": {"kind": "dct"}, "text": {"kind": "minilm"}}
    with pytest.raises(ConfigError, match=section):
        load(_Encoders, good | {section: value})


@pytest.mark.parametrize("config_class", [TheiaConfig, CogVideoXVaeConfig, FlanT5Config])
def test_missing_weights_say_which_path_to_set(config_class, tmp_path):
    with pytest.raises(ConfigError, match=r"path = .*nowhere.*set path to"):
        build(config_class(path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "config_class", [TheiaConfig, CogVideoXVaeConfig, FlanT5Config, T5V11Config]
)
def test_a_hub_id_without_network_ends_in_a_message_with_the_way_out(config_class, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"(?s)no-such-owner/no-such-model.*without a network, set path to"
    ):
        build(config_class(path="no-such-owner/no-such-model"))


def test_configs_and_build_import_no_torch():
    code = (
        "import sys, landiff.model_zoo.frozen, landiff.model_zoo.frozen.config; "
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_semantic_frames_are_the_last_frames_of_their_latent_frames():
    assert semantic_frame_indices(49, 13) == list(range(0, 49, 4))
    assert semantic_frame_indices(17, 5) == [0, 4, 8, 12, 16]
    assert semantic_frame_indices(48, 13) == [0, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    assert semantic_frame_indices(9, 1) == [0]
    with pytest.raises(ValueError, match="num_latent_frames = 5"):
        semantic_frame_indices(4, 5)
