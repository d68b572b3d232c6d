"""The released VAE's keys against the model that diffusers builds."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from landiff.model_zoo.convert.formats.release_vae import read_release, to_diffusers, vae_to_release
from landiff.model_zoo.convert.rules import ConversionError, check_against
from landiff.model_zoo.frozen.cogvideox_vae import network_of

KEYS = Path(__file__).parents[2] / "golden" / "keys" / "cogvideox2b.json"


@pytest.fixture(scope="module")
def release():
    entries = json.loads(KEYS.read_text())
    return {
        k: torch.empty(v["shape"], device="meta")
        for k, v in entries.items()
        if v["file"] == "vae/3d-vae.pt"
    }


def test_every_released_tensor_fills_a_tensor_of_the_class_defaults(release):
    assert len(release) == 436
    state = to_diffusers(release)
    with torch.device("meta"):
        expected = {k: v.shape for k, v in AutoencoderKLCogVideoX().state_dict().items()}
        derived = {k: v.shape for k, v in network_of(state).state_dict().items()}
    check_against(state, expected, "the release")
    assert derived == expected
    assert vae_to_release(state).keys() == release.keys()


def test_loss_tensors_are_dropped_and_unknown_ones_refused(release):
    assert (
        to_diffusers(release | {"loss.logvar": torch.zeros(())}).keys()
        == to_diffusers(release).keys()
    )
    with pytest.raises(ConversionError, match=r"unexpected: encoder\.attention\.weight"):
        to_diffusers(release | {"encoder.attention.weight": torch.zeros(1)})
    with pytest.raises(ConversionError, match="no CogVideoX VAE"):
        to_diffusers({"weight": torch.zeros(1)})


def test_both_containers_are_read(tmp_path):
    from safetensors.torch import save_file

    tensors = {"encoder.x": torch.arange(3.0)}
    torch.save({"state_dict": tensors}, tmp_path / "3d-vae.pt")
    save_file(tensors, tmp_path / "vae.safetensors")
    for name in ("3d-vae.pt", "vae.safetensors"):
        assert torch.equal(read_release(tmp_path / name)["encoder.x"], tensors["encoder.x"])
