"""`offload` of `landiff sample`: the same videos with one part in memory at a time."""

from __future__ import annotations

import gc
import math
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from landiff.configs.base import ConfigError
from landiff.launchers.budget import sampling
from landiff.launchers.budget.sampling import (
    PartMemory,
    choose_offload,
    memory_of_parts,
    parse_memory,
)
from landiff.launchers.results.sample import sample_videos
from landiff.launchers.results.sampling import loading
from landiff.launchers.results.sampling.loading import in_precision, load_models, models_on_demand
from landiff.model_zoo import registry
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.placement.offload import OffloadedModule, _Tensors
from landiff.model_zoo.sample.placement.on_demand import OnDemand, OnDemandText, Place
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
    values["control_guidance"] = 0.5
    return sample_config(zoo, out, **values | options)


def loaded(models: Models) -> list[str]:
    """Names of the parts that are in memory."""
    return [name for name in PARTS if getattr(models, name).is_loaded]


def enter_as_copies(tensors) -> None:
    """Moves weights to a new address, as on a GPU. `Tensor.to` of the same device does not."""
    for tensor, host in tensors._host:
        tensor.data = host.clone()


@pytest.mark.parametrize("offload", ["model", "group", "sequential", "disk"])
def test_videos_do_not_depend_on_offload(zoo, wanted, tmp_path, monkeypatch, offload):
    """Bit for bit, into a folder that may have been begun without it; one part at a time."""
    monkeypatch.setattr(_Tensors, "enter", lambda tensors, *_: enter_as_copies(tensors))
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
    assert max(counts) == (1 if offload == "disk" else 5)


def test_load_models_loads_nothing_before_it_is_used(zoo, tmp_path):
    models = load_models(config_of(zoo, tmp_path, offload="disk"), torch.device("cpu"))
    models.check()
    assert next(models.lm.parameters()).device.type == "cpu"
    assert models.lm.layout.segment_frames and not loaded(models)


@pytest.mark.parametrize("kind", ["lm", "tokenizer", "diffusion"])
def test_weights_are_cast_while_they_are_read(zoo, kind):
    """To the same as weights that are cast afterwards."""
    entry = registry.resolve(zoo, kind, kind)
    wanted = in_precision(registry.load_model(entry), "bf16").state_dict()
    found = registry.load_model(entry, cast=partial(in_precision, precision="bf16")).state_dict()
    assert list(found) == list(wanted)
    assert torch.bfloat16 in {tensor.dtype for tensor in found.values()}
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


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


class Blocks(nn.Module):
    """Four blocks of two layers, and a head that shares a weight with the first layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4)
        )
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.blocks[0][0].weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize(("level", "matrices"), [("part", 8), ("block", 3), ("layer", 2)])
def test_only_what_runs_is_on_the_device(level, matrices):
    """`matrices` are there at once, one of them that of the head."""
    torch.manual_seed(0)
    model = Blocks().eval().requires_grad_(False)
    x = torch.randn(3, 8)
    wanted = model(x)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    offloaded = OffloadedModule(model, torch.device("cpu"), level)
    seen = []

    def look(*_):
        tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        held = [tensor for tensor in tensors.values() if tensor.numel()]
        num_matrices = sum(tensor.ndim == 2 for tensor in held)
        seen.append((sum(tensor.nbytes for tensor in held), num_matrices))

    for module in model.modules():
        module.register_forward_pre_hook(look)
    for _ in range(2):
        offloaded.enter()
        assert torch.equal(model(x), wanted)
        offloaded.leave()
        assert not any(tensor.numel() for tensor in model.state_dict().values())
    assert max(seen) == (offloaded.device_bytes, matrices)
    with pytest.raises(RuntimeError):
        model(x)  # its weights are elsewhere
    offloaded.restore()
    assert torch.equal(model(x), wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


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
    for _ in range(2):
        assert text.cut_off(["fox", "birds"]) == ["", ""]
        assert text(["birds"])[0].item() == 5.0 and text(["fox"])[0].item() == 3.0
        other(torch.zeros(1, 1))
    assert loads == ["text"]


def test_memory_chooses_the_fastest_offload_that_fits(zoo, tmp_path, monkeypatch):
    config = config_of(zoo, tmp_path, precision="fp32", device="cpu")
    parts = memory_of_parts(config)
    everything = sum(part.loaded for part in parts.values())
    codec = parts.pop("codec").loaded
    one = max(part.loading for part in parts.values()) + codec
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


def test_blocks_and_layers_are_what_the_device_holds_at_once(zoo, tmp_path, monkeypatch):
    sizes = {"embed.weight": 10, "blocks.0.a.weight": 4, "blocks.0.a.bias": 1}
    sizes |= {"blocks.0.b.weight": 6, "blocks.1.a.weight": 3, "head.weight": 2}
    text = PartMemory.of_tensors(sizes, largest=20)
    assert text == PartMemory(loaded=26, loading=46, in_groups=23, in_layers=18)
    parts = {"lm": PartMemory.whole(5), "lm_text": text, "codec": PartMemory.whole(1)}
    monkeypatch.setattr(sampling, "memory_of_parts", lambda _: dict(parts))
    config = config_of(zoo, tmp_path, device="cuda")
    for needed, offload in ((27, "model"), (24, "group"), (19, "sequential")):
        assert choose_offload(config, math.ceil(needed / sampling.FOR_WEIGHTS)) == offload
    with pytest.raises(ConfigError, match="GB are needed"):
        choose_offload(config, int(18 / sampling.FOR_WEIGHTS))


def test_sizes_of_memory():
    assert parse_memory("24GB") == 24 * 10**9 and parse_memory("1.5 gib") == 3 << 29
    for wrong in ("24", "-1GB", "0GB", "GB", "24GBs"):
        with pytest.raises(ConfigError, match="no size"):
            parse_memory(wrong)


def test_blocks_are_compiled_on_cuda_unless_their_weights_are_exchanged(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "require_compiler", lambda device: None)
    cuda = torch.device("cuda")
    for offload in ("none", "model", "disk"):
        config = config_of(zoo, tmp_path, compile_blocks=True, offload=offload)
        assert loading.is_compiled(config, cuda)
        assert not loading.is_compiled(config, torch.device("cpu"))
    for options in ({"offload": "group"}, {"offload": "sequential"}, {"compile_blocks": False}):
        assert not loading.is_compiled(
            config_of(zoo, tmp_path, **{"compile_blocks": True, **options}), cuda
        )


def test_the_diffusion_model_is_loaded_with_compiled_blocks(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "is_compiled", lambda *_: True)
    models = models_on_demand(config_of(zoo, tmp_path), torch.device("cpu"))
    for block in models.diffusion.module().transformer.blocks:
        assert block._compiled_call_impl is not None
    assert models.lm.module().blocks[0]._compiled_call_impl is None  # it is decoded by graphs
