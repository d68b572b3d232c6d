"""Linear layers in float8: errors of products, parameters, and devices that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.training.diffusion.model import build_phase_model
from landiff.training.float8 import layers as float8
from tests.quantize_package import torchao  # noqa: F401 - a fixture
from tests.training.diffusion.tiny import config

pytestmark = pytest.mark.usefixtures("torchao")

ROWS = 37  # not a multiple of 16


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def make_layer(device: str = "cpu") -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(64, 128).to(device)


def products(layer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients of a layer for inputs that are always the same."""
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 64, generator=generator).to(device, dtype).requires_grad_()
    gradient = torch.randn(ROWS, 128, generator=generator).to(device, dtype)
    out = layer.to(dtype)(x)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(out, inputs, gradient)
    return {"output": out.detach(), "input": found[0], "weight": found[1], "bias": found[2]}


def converted(layer: nn.Linear) -> nn.Module:
    model = nn.Sequential(layer)
    float8.convert(model, lambda name: name == "0")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_rounding_the_operands(dtype):
    """A tensor in e4m3 has a relative error of 2.6 % (root mean square), in e5m2 of 5.2 %.

    Rounding to a grid of q = 2**-3 (2**-2) in [1, 2) errs by q / sqrt(12), relative to numbers of
    about 1.4. Errors of two operands are independent, so that their squares add up: 3.7 % of the
    output, where both are e4m3, and 5.8 % of gradients. A second rounding, a scale that is off by
    more than the last bits, or saturation would exceed these bounds.
    """
    wanted = products(make_layer())
    found = products(converted(make_layer()), dtype)
    assert 0.03 < relative_error(found["output"], wanted["output"]) < 0.045
    assert 0.05 < relative_error(found["input"], wanted["input"]) < 0.07
    assert 0.05 < relative_error(found["weight"], wanted["weight"]) < 0.07
    assert relative_error(found["bias"], wanted["bias"]) < 0.01  # is not rounded to float8
    assert all(tensor.dtype == dtype for tensor in found.values())


@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_the_error_does_not_depend_on_the_magnitude(magnitude):
    """e4m3 itself ends at 2**-9 and 448: without scales, all would be 0 or saturated."""
    layer = make_layer()
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight *= magnitude
    wanted = products(layer)
    found = products(converted(layer))
    assert relative_error(found["output"], wanted["output"]) < 0.045
    assert relative_error(found["input"], wanted["input"]) < 0.07


def test_torchs_own_float8_product_computes_the_same(monkeypatch):
    """The kernel is the one that GPUs run, here in torch's implementation for the CPU."""
    emulated = products(converted(make_layer()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = converted(make_layer())
    monkeypatch.undo()
    for name, tensor in products(model).items():
        assert relative_error(tensor, emulated[name]) < 1e-5, name  # sums in another order


def test_chosen_layers_keep_their_parameters_and_names():
    model = nn.ModuleDict({"block": make_layer(), "head": make_layer()})
    before = dict(model.named_parameters())
    float8.convert(model, lambda name: name == "block")
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert type(model["head"]) is nn.Linear
    assert type(model["block"]) is not nn.Linear


def test_a_product_shares_its_weight():
    weight = nn.Parameter(torch.ones(32, 16))
    layer = float8.product(weight)
    assert dict(layer.named_parameters()).keys() == {"weight"} and layer.weight is weight
    with torch.no_grad():
        weight *= 2  # as an optimizer does
    assert layer(torch.ones(1, 16)).tolist() == [[32.0] * 32]


def test_compiling_leaves_out_gradients_of_frozen_weights():
    """Eagerly torchao computes them and drops them."""
    model = converted(make_layer()).requires_grad_(False)
    x = torch.randn(16, 64, requires_grad=True)
    counts = []
    for compiled in (False, True):
        if compiled:
            model.compile(backend="aot_eager")
        model(x).sum().backward()  # compiles
        out = model(x)
        with torch.profiler.profile() as profile:
            out.sum().backward()
        counts.append(sum(event.name == "aten::mm" for event in profile.events()))
    assert counts[1] * 2 < counts[0] and counts[1] > 0


def test_compiled_blocks_of_the_diffusion_model_compute_the_same(tmp_path):
    model = build_phase_model(config(tmp_path, fp8=True, model__transformer__num_layers=1))
    sizes = model.config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # also those that are 0 at first
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    shape = (2, 3, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    latents = torch.randn(shape, generator=generator)
    text = torch.randn(2, sizes.text_length, sizes.text_dim, generator=generator)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(backend="aot_eager")
        out = model(latents, torch.tensor([10, 900]), text)
        found.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    for eager, compiled_one in zip(*found, strict=True):
        assert torch.equal(eager, compiled_one)


def test_a_gpu_without_float8_is_refused_with_the_way_out(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability in ((7, 5), (8, 0), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        text = rf"8\.9 or newer, and NVIDIA A100 has {capability[0]}\.{capability[1]}; .*fp8 = fa"
        with pytest.raises(ConfigError, match=text):
            float8.require_device(device)
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        float8.require_device(device)
    float8.require_device(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_the_gpu_compute_what_the_cpu_emulates(dtype, monkeypatch):
    """Also for 37 rows, which the kernels cannot multiply without padding."""
    device = torch.device("cuda", 0)
    float8.require_device(device)
    found = products(converted(make_layer("cuda")), dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    emulated = products(converted(make_layer("cuda")), dtype)
    # Fast accumulation of the output keeps 14 bits, bfloat16 8.
    bound = 2e-3 if dtype == torch.float32 else 1e-2
    for name, tensor in found.items():
        assert relative_error(tensor, emulated[name]) < bound, name
