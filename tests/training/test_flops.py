"""Model FLOPs computed from sizes, compared with what torch counts on tiny models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from landiff.configs import load
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.config import AdapterConfig, BaseKind
from landiff.model_zoo.lora.modules import add_layers
from landiff.model_zoo.token_layout import TokenLayout
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.diffusion.model import freeze_main
from landiff.training.observe import flops

EXACT = 1e-9  # every matrix product is counted; only the order of summation differs


def counted(loss: Callable[[], Tensor]) -> flops.Flops:
    """FLOPs of a forward and a backward pass; attention counts as two matrix products."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            value = loss()
        with FlopCounterMode(display=False) as backward:
            value.backward()
    return flops.Flops(forward.get_total_flops(), backward.get_total_flops())


def assert_equal(found: flops.Flops, expected: flops.Flops) -> None:
    assert found.forward == pytest.approx(expected.forward, rel=EXACT)
    assert found.backward == pytest.approx(expected.backward, rel=EXACT)


def adapter_of_rank_1(kind: BaseKind) -> AdapterConfig:
    targets = ("qkv", "out", "mlp_in", "mlp_out")
    return AdapterConfig(base_kind=kind, base="0" * 16, rank=1, alpha=1.0, targets=targets)


def test_a_language_model():
    model = load(ModelConfig, "nano/model").lm
    layout = TokenLayout.of(model)
    text = 20
    length = layout.sequence_length(model.segment_frames, text)
    module = LanguageModel(model)
    codes = [0] * layout.num_codes(model.segment_frames)
    ids_BS = torch.from_numpy(layout.build(codes, text))[None]
    inputs = (ids_BS, torch.zeros(1, text, model.text_dim), torch.zeros(1), torch.zeros(1))
    found = counted(lambda: module(*inputs).sum())
    # The kernel multiplies the whole square of queries and keys.
    hidden = flops.attention(model.num_layers * length * (length - 1) / 2, model.hidden_size)
    assert_equal(found, flops.lm_flops(model, length, text) + hidden)


def test_a_tokenizer():
    model = load(ModelConfig, "nano/model").tokenizer
    module = SemanticTokenizer(model).train()
    module.quantizer._codebook.initted.fill_(True)  # k-means happens once in a training
    shape = (model.segment_frames, model.feature_channels, model.grid_height, model.grid_width)
    found = counted(lambda: module(torch.randn(1, *shape)).loss)
    expected = flops.tokenizer_flops(model, model.segment_frames)
    # Of the causal spans the kernel multiplies whole rectangles, and the codebook's moving average
    # sums its vectors with a matrix product.
    assert found.forward == pytest.approx(expected.forward, rel=0.02)
    assert found.backward == pytest.approx(expected.backward, rel=0.02)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("phase", ["main", "control"])
def test_a_diffusion_model(phase, adapter):
    model = load(ModelConfig, "nano/model").diffusion
    sizes = model.transformer
    latents = (1, sizes.latent_frames, sizes.latent_channels, sizes.latent_height)
    with torch.device("meta"):
        inputs = [
            torch.zeros(*latents, sizes.latent_width),
            torch.zeros(1),
            torch.zeros(1, sizes.text_length, sizes.text_dim),
        ]
        if phase == "main":
            module: nn.Module = DiffusionTransformer(sizes)
            expected = flops.main_flops(sizes, adapter=adapter)
        else:
            controlled = ControlledDiffusion(model)
            freeze_main(controlled)
            scale = controlled.semantic.scale
            grid = (sizes.latent_height // scale, sizes.latent_width // scale)
            channels = model.semantic.feature_channels
            inputs.append(torch.zeros(1, sizes.latent_frames, channels, *grid))
            expected = flops.control_flops(model, adapter=adapter)
            module = controlled
        if adapter:
            add_layers(module, adapter_of_rank_1("transformer" if phase == "main" else "diffusion"))
    if not adapter:
        assert_equal(counted(lambda: module(*inputs).sum()), expected)
        return
    found = counted(lambda: module(*inputs).sum())
    # Adapters of rank 1 are an 80th of the matrices of this width, and the first block of four
    # computes a fourth less.
    assert found.forward == pytest.approx(expected.forward, rel=0.02)
    assert found.backward == pytest.approx(expected.backward, rel=0.06)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_found_by_its_name(name, tflops):
    assert flops.peak_flops(name) == (tflops and tflops * 1e12)
