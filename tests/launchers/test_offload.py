"""`offload` of `landiff sample`: the same videos with one part in memory at a time."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from landiff.configs.base import ConfigError
from landiff.launchers.budget import sampling
from landiff.launchers.budget.sampling import choose_offload, memory_of_parts, parse_memory
from landiff.launchers.results.loading import models_on_demand
from landiff.launchers.results.sample import load_models, sample_videos
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.on_demand import OnDemand, OnDemandText, Place
from tests.launchers.random_zoo import sample_config, write_random_zoo

PARTS = ("lm", "tokenizer", "diffusion", "lm_text", "diffusion_text")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_random_zoo(tmp_path_factory.mktemp("offload") / "zoo")


@pytest.fixture(scope="module")
def wanted(zoo, tmp_path_factory):
    """Two prompts, one of them for a long video, with all parts in memory."""
    out = tmp_path_factory.mktemp("offload") / "none"
    sample_videos(config_of(zoo, out))
    return out


def config_of(zoo, out, **options):
    values = {"prompts": ("a fox", "a bird"), "num_latent_frames": 8, "precision": "bf16"}
    return sample_config(zoo, out, **values | options)


def loaded(models: Models) -> list[str]:
    """Names of the parts that are in memory."""
    return [name for name in PARTS if getattr(models, name).is_loaded]


@pytest.mark.parametrize("offload", ["model", "disk"])
def test_videos_do_not_depend_on_offload(zoo, wanted, tmp_path, monkeypatch, offload):
    """Bit for bit, into a folder that may have been begun without it; one part at a time."""
    config = config_of(zoo, tmp_path, offload=offload)
    models = models_on_demand(config, torch.device("cpu"))
    monkeypatch.setattr("landiff.launchers.results.sample.load_models", lambda *_: models)
    counts = []
    give = Place.give

    def counted(place, part):
        give(place, part)
        counts.append(len(loaded(models)))

    monkeypatch.setattr(Place, "give", counted)
    first = sorted(wanted.glob("*.mp4"))[0]
    (tmp_path / "settings.json").write_bytes((wanted / "settings.json").read_bytes())
    sample_videos(config)
    for path in wanted.glob("*.mp4"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), first
    assert max(counts) == (5 if offload == "model" else 1)


def test_load_models_loads_nothing_before_it_is_used(zoo, tmp_path):
    models = load_models(config_of(zoo, tmp_path, offload="disk"), torch.device("cpu"))
    models.check()
    assert next(models.lm.parameters()).device.type == "cpu"
    assert models.lm.layout.segment_frames and not loaded(models)


def test_a_part_is_freed_before_the_next_is_loaded():
    place = Place(torch.device("cpu"))
    alive: list[weakref.ref] = []

    def load() -> nn.Module:
        gc.collect()
        assert not any(reference() for reference in alive), "the part before is still there"
        module = nn.Linear(4, 4)
        alive.append(weakref.ref(module))
        return module

    parts = [OnDemand(place, load) for _ in range(3)]
    for part in (*parts, parts[0], parts[0]):
        part(torch.zeros(1, 4))
    assert len(alive) == 4  # the last call finds its module


def test_a_text_encoder_is_loaded_once_for_the_texts_of_a_request():
    loads = []

    class Encoder(nn.Module):
        def cut_off(self, texts):
            return ["" for _ in texts]

        def forward(self, texts):
            return torch.full((len(texts), 1, 1), float(len(texts[0]))), torch.ones(len(texts))

    def load() -> nn.Module:
        loads.append("text")
        return Encoder()

    place = Place(torch.device("cpu"))
    text = OnDemandText(place, load)
    other = OnDemand(place, lambda: nn.Linear(1, 1))
    assert text.cut_off(["fox", "birds"]) == ["", ""]
    other(torch.zeros(1, 1))
    assert text(["birds"])[0].item() == 5.0 and text(["fox"])[0].item() == 3.0
    assert loads == ["text"]


def test_memory_chooses_the_fastest_offload_that_fits(zoo, tmp_path, monkeypatch):
    config = config_of(zoo, tmp_path, precision="fp32", device="cpu")
    parts = memory_of_parts(config)
    everything = sum(part.loaded for part in parts.values())
    one = max(part.loading for part in parts.values()) + parts["codec"].loaded
    enough = int(everything / sampling.FOR_WEIGHTS) + 2
    assert choose_offload(config, enough) == "none"
    assert choose_offload(config, enough - 4) == "disk"
    assert choose_offload(config, int(one / sampling.FOR_WEIGHTS) + 2) == "disk"
    with pytest.raises(ConfigError, match="GB are needed"):
        choose_offload(config, int(one / sampling.FOR_WEIGHTS) - 2)
    on_gpu = config.model_copy(update={"device": "cuda"})
    assert choose_offload(on_gpu, enough - 4) == "model"
    free = SimpleNamespace(available=everything - 1)
    monkeypatch.setattr(sampling.psutil, "virtual_memory", lambda: free)
    assert choose_offload(on_gpu, enough - 4) == "disk"


def test_sizes_of_memory():
    assert parse_memory("24GB") == 24 * 10**9 and parse_memory("1.5 gib") == 3 << 29
    for wrong in ("24", "-1GB", "0GB", "GB", "24GBs"):
        with pytest.raises(ConfigError, match="no size"):
            parse_memory(wrong)
