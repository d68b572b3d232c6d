"""Shared layers against formulas written out in float64, and bit by bit against their first forms.

Checkpoints were trained with the first forms, so the shared ones must not differ in the last bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.model_zoo import layers
from landiff.model_zoo.config import LMConfig, TokenizerConfig, TransformerConfig
from landiff.model_zoo.dit import position_table
from landiff.model_zoo.layers import (
    RMSNorm,
    gated_gelu,
    rotary_angles,
    rotary_table,
    rotate,
    run_block,
    sinusoid,
)
from landiff.model_zoo.tokenizer import SemanticTokenizer, sequence_angles


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rotation_turns_each_pair_by_its_angle():
    x_BSAd = random(2, 5, 3, 8)
    cos_Sd, sin_Sd = rotary_table(torch.arange(5), 8, 100.0)
    rotated = rotate(x_BSAd, cos_Sd, sin_Sd)
    for position in range(5):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            turn = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            expected = x_BSAd[:, position, :, 2 * pair : 2 * pair + 2] @ turn.T
            found = rotated[:, position, :, 2 * pair : 2 * pair + 2]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32 rounding


def test_rotation_is_computed_in_float32_and_cast_back():
    x_BSAd = random(1, 4, 2, 8).bfloat16()
    rotary = rotary_table(torch.arange(4), 8, 10000.0)
    rotated = rotate(x_BSAd, *rotary)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x_BSAd.float(), *rotary).bfloat16())


def test_packed_and_batched_rows_rotate_alike():
    x_BSAd = random(1, 6, 2, 4)
    rotary = rotary_table(torch.tensor([0, 1, 2, 0, 1, 2]), 4, 10000.0)
    assert torch.equal(rotate(x_BSAd[0], *rotary), rotate(x_BSAd, *rotary)[0])


@pytest.mark.parametrize("size", [16, 48, 64])
def test_angles_of_the_tokenizer_are_those_of_its_first_form(size: int):
    for dim in (size // 4, size * 3 // 8):
        positions = torch.arange(20_000)
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        first_form = (positions.double()[:, None] * 10000.0**-exponent).float()
        found = rotary_angles(positions, dim, 10000.0, dtype=torch.float64)
        assert torch.equal(found, first_form)


def test_angles_of_a_segment_are_ordered_time_row_column():
    config = TokenizerConfig(
        grid_height=2, grid_width=3, hidden_size=32, num_heads=2, iframe_tokens=3, pframe_tokens=2
    )
    with torch.device("meta"):
        tokenizer = SemanticTokenizer(config)
    sequence = tokenizer.sequence(2)
    angles = sequence_angles(sequence, 3, 16, 10000.0, torch.device("cpu"))
    assert angles.shape == (2 * 6 + 5, 8)
    # Frequency 1 of each part: elements 0, 2 and 5 of 2 + 3 + 3.
    assert angles[1 * 6 + 1 * 3 + 2, [0, 2, 5]].tolist() == [1, 1, 2]
    assert angles[12 + 4, [0, 2, 5]].tolist() == [4, 4, 4]


@pytest.mark.parametrize("dim", [256, TransformerConfig().hidden_size])
def test_sinusoid_has_cosines_then_sines_of_falling_frequencies(dim: int):
    values = torch.tensor([0.1, 13.0])
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    angles = values.double()[:, None] * 10000.0**-exponents
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    torch.testing.assert_close(sinusoid(values, dim), expected, atol=2e-6, rtol=0)
    swapped = sinusoid(values, dim, sines_first=True)
    assert torch.equal(swapped, sinusoid(values, dim).roll(dim // 2, dims=1))


@pytest.mark.parametrize("dim", [8, 16, 64, LMConfig().micro_frequency_dim])
def test_sinusoid_of_micro_conditions_is_that_of_its_first_form(dim: int):
    values = torch.cat([torch.arange(200.0), random(200).abs()])
    steps = torch.arange(dim // 2, dtype=torch.float32)
    angles = values[:, None] * torch.exp(steps * (-math.log(10000) / (dim // 2)))
    first_form = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert torch.equal(sinusoid(values, dim), first_form)


@pytest.mark.parametrize("dim", [32, 64, TransformerConfig().hidden_size])
def test_position_table_is_that_of_its_first_form(dim: int):
    def axis(positions: Tensor, width: int) -> Tensor:
        half = width // 2
        omega = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = positions[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    table = position_table(50, 40, 60, dim, 1.875)
    time, row, column = (torch.arange(n, dtype=torch.float64) for n in (50, 40, 60))
    quarter = dim // 4
    half = quarter + dim * 3 // 8
    assert torch.equal(table[:, 0, 0, :quarter], axis(time, quarter))
    assert torch.equal(table[0, 0, :, quarter:half], axis(column / 1.875, dim * 3 // 8))
    assert torch.equal(table[0, :, 0, half:], axis(row / 1.875, dim * 3 // 8))


def test_rms_norm_is_computed_in_float32_and_cast_back():
    norm = RMSNorm(6, 1e-5)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = random(3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=0)  # float32 rounding
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, norm(x.bfloat16().float()).bfloat16())
    assert list(norm.state_dict()) == ["weight"]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_runs_twice_only_with_recompute_and_gradients(recompute: bool):
    calls = []

    class Square(nn.Module):
        def forward(self, x: Tensor, factor: int) -> Tensor:
            calls.append(factor)
            return factor * x.square()

    x = random(4).requires_grad_()
    result = run_block(Square(), x, 3, recompute=recompute)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(gradient, 3 * 2 * x.detach())
    assert calls == [3] * (2 if recompute else 1)
    calls.clear()
    with torch.no_grad():
        run_block(Square(), x, 3, recompute=recompute)
    assert calls == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_activation_is_bit_equal_to_autograd(dtype):
    x = random(5, 1, 44).to(dtype).requires_grad_()
    grown = torch.ones(5, 1, 22, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    plain = torch.nn.functional.gelu(gate, approximate="tanh") * up
    fast = gated_gelu(x)
    assert torch.equal(fast, plain)
    for one, other in zip(*(torch.autograd.grad(y, x, grown) for y in (fast, plain)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gated_gelu(x.detach()), plain)


@pytest.mark.parametrize(
    ("device", "triton", "found", "message"),
    [
        ("cpu", False, ("gcc",), "needs a compiler, one of g\\+\\+, clang\\+\\+, c\\+\\+"),
        ("cpu", False, ("gcc", "g++"), None),
        ("cuda", True, ("clang",), None),
        ("cuda", True, (), "needs a compiler, one of gcc, clang, cc"),
        ("cuda", False, ("gcc",), "needs Triton"),
    ],
)
def test_a_missing_compiler_is_named(device, triton, found, message, monkeypatch):
    monkeypatch.setattr(layers, "has_triton", lambda: triton)
    monkeypatch.setattr(layers.shutil, "which", lambda name: name if name in found else None)
    if message is None:
        layers.require_compiler(torch.device(device))
    else:
        with pytest.raises(ConfigError, match=message):
            layers.require_compiler(torch.device(device))
