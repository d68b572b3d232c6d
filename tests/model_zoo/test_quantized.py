"""Int8 weights of transformer blocks: sizes, errors of outputs, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.model_zoo import registry
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.base import apply_adapter
from landiff.model_zoo.sample.decode import Decoder
from landiff.model_zoo.sample.placement.offload import OffloadedModule
from landiff.model_zoo.sample.placement.quantized import (
    is_quantized,
    plain_tensors,
    quantize_blocks,
    quantized_bytes,
)
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from tests.model_zoo.adapters import export_adapter
from tests.quantize_package import torchao  # noqa: F401 - a fixture

needs_torchao = pytest.mark.usefixtures("torchao")


def with_noise(model: nn.Module) -> nn.Module:
    """Without layers that are zero at first. In eval mode and without gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * 0.3 / max(1, parameter.shape[-1]) ** 0.5
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    model = with_noise(LanguageModel(load(LMTrainConfig, "nano/lm").model))
    assert isinstance(model, LanguageModel)
    return model


@pytest.fixture(scope="module")
def diffusion() -> ControlledDiffusion:
    config = load(DiffusionTrainConfig, "nano/diffusion-control").model
    model = with_noise(ControlledDiffusion(config))
    assert isinstance(model, ControlledDiffusion)
    return model


def num_bytes(model: nn.Module) -> int:
    tensors = [plain for tensor in model.parameters() for plain in plain_tensors(tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def quantized(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    quantize_blocks(changed)
    quantize_blocks(changed)  # which changes nothing
    return changed


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@needs_torchao
@pytest.mark.parametrize("kind", ["lm", "diffusion"])
def test_linear_layers_of_blocks_and_no_others_take_a_quarter(request, kind):
    model = request.getfixturevalue(kind)
    changed = quantized(model)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (".blocks." in f".{name}" or ".projections." in name):
            layers[f"{name}.weight"] = module.weight
    assert len(layers) >= 5
    found = dict(changed.named_parameters())
    assert {name for name, tensor in found.items() if is_quantized(tensor)} == set(layers)
    saved = sum(tensor.nbytes - quantized_bytes(*tensor.shape) for tensor in layers.values())
    assert num_bytes(changed) == num_bytes(model) - saved
    before = sum(tensor.nbytes for tensor in layers.values())
    assert 0.25 <= (before - saved) / before < 0.3


@needs_torchao
@torch.no_grad()
def test_outputs_of_the_diffusion_model_change_by_rounding(diffusion):
    sizes = diffusion.config.transformer
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    latents = torch.randn(shape, generator=generator)
    semantic = torch.randn(shape, generator=generator)
    text = torch.randn(2, sizes.text_length, sizes.text_dim, generator=generator)
    inputs = (latents, torch.tensor([10, 900]), text)
    wanted = diffusion(*inputs, semantic_BTCHW=semantic)
    found = quantized(diffusion)(*inputs, semantic_BTCHW=semantic)
    # Rounding to 1/254 of a row's largest weight is about 0.5 % of a product of random rows.
    assert 0 < relative_error(found, wanted) < 0.02


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_decoded_with_quantized_weights(lm, dtype):
    """The decoder computes the logits of the quantized model, those of the model by rounding."""
    lm = copy.deepcopy(lm).to_inference(dtype)
    changed = quantized(lm)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(lm.layout.codebook_size, (2, 9), generator=generator)
    with torch.no_grad():
        x_BSD = changed.embed_tokens(ids)
        wanted = changed.logits(changed.transform(x_BSD))
        before = lm.logits(lm.transform(x_BSD))
    decoder = Decoder(changed, 2, 9)
    found = [decoder.step(x_BSD[:, :6])]
    for position in range(6, 9):
        found.append(decoder.step(x_BSD[:, position : position + 1]))
    static = Decoder(changed, 2, 9, graphs=True)  # the operators of a CUDA graph
    static.step(x_BSD[:, :6])
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for number, logits in enumerate(found):
        assert relative_error(logits, wanted[:, 5 + number]) < tolerance
    assert relative_error(static.step(x_BSD[:, 6:7]), wanted[:, 6]) < tolerance
    assert 0 < relative_error(wanted, before) < 0.03


@needs_torchao
@pytest.mark.parametrize("level", ["part", "block", "layer"])
def test_quantized_weights_are_offloaded(lm, level):
    changed = quantized(lm)
    x_BSD = torch.randn(1, 4, lm.config.hidden_size)
    with torch.no_grad():
        wanted = changed.transform(x_BSD)
    size = num_bytes(changed)
    offloaded = OffloadedModule(changed, torch.device("cpu"), level)
    assert num_bytes(changed) == 0
    assert (offloaded.device_bytes == size) == (level == "part")
    if level == "part":
        with torch.no_grad(), pytest.raises(RuntimeError):
            changed.transform(x_BSD)  # its weights are elsewhere
    offloaded.enter()
    with torch.no_grad():
        assert torch.equal(changed.transform(x_BSD), wanted)
    offloaded.leave()
    assert num_bytes(changed) == 0
    offloaded.restore()
    assert num_bytes(changed) == size


@needs_torchao
def test_quantized_models_are_not_exported_or_adapted(lm, tmp_path):
    changed = quantized(lm)
    registry.export(tmp_path, "lm", "lm", lm.config, lm.state_dict(), {})
    adapter = export_adapter(tmp_path, "lm")
    state = changed.state_dict()
    with pytest.raises(ConfigError, match=r"such as blocks.*cannot be saved or exported; load"):
        registry.export(tmp_path, "lm", "lm", lm.config, state, {})
    with pytest.raises(ConfigError, match="cannot be saved or exported"):
        LazyTensors.of(state)
    with pytest.raises(ConfigError, match="cannot be changed by an adapter"):
        apply_adapter(changed, adapter, name="adapter", scale=1.0, merged=True)


def test_a_missing_torchao_is_named_with_the_way_out(lm, monkeypatch):
    monkeypatch.setattr(
        "landiff.model_zoo.sample.placement.quantized.PACKAGE", "torchao_that_is_missing"
    )
    with pytest.raises(ConfigError, match=r"missing; install it with pip install 'landiff-pre"):
        quantize_blocks(lm)
    assert not any(is_quantized(tensor) for tensor in lm.parameters())
