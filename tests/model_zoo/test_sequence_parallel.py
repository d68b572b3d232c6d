"""Ranks that compute a sequence together get the outputs and gradients of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.positions.division import SequencePart, shares
from landiff.training.diffusion.model import freeze_main
from tests.distributed import run_distributed

# 17 positions and 6 heads, which 2 and 4 ranks divide unevenly. With 4 ranks the text, 7 rows, ends
# within the second part.
SIZES = DiffusionConfig.model_validate(
    {
        "transformer": {
            "latent_channels": 4,
            "latent_frames": 5,
            "latent_height": 4,
            "latent_width": 2,
            "hidden_size": 96,
            "num_layers": 3,
            "num_heads": 6,
            "time_embed_dim": 16,
            "text_length": 7,
            "text_dim": 6,
        },
        "control_layers": 2,
        "semantic": {
            "feature_channels": 6,
            "base_channels": 32,
            "channel_multipliers": [1, 1],
            "num_res_blocks": 1,
            "out_channels": 8,
        },
    }
)
CASES = [(False, False, 10000.0), (True, True, None)]  # control, recompute, rotary_theta
# float64 with sums in another order. The rotary embedding rounds to float32 at either order.
CLOSE = {None: {"rtol": 1e-9, "atol": 1e-12}, 10000.0: {"rtol": 1e-4, "atol": 1e-7}}


def outputs_and_gradients(
    control: bool, recompute: bool, theta: float | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a model that has left its zero start, and gradients of a squared error."""
    torch.manual_seed(0)
    sizes = SIZES.transformer.model_copy(update={"rotary_theta": theta})
    model: DiffusionTransformer | ControlledDiffusion
    inputs = [
        torch.randn(2, 5, 4, 4, 2, dtype=torch.float64),
        torch.tensor([3, 700]),
        torch.randn(2, 7, 6),
    ]
    if control:
        model = ControlledDiffusion(SIZES.model_copy(update={"transformer": sizes}))
        freeze_main(model)
        inputs.append(torch.randn(2, 5, 6, 2, 1))
    else:
        model = DiffusionTransformer(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.double().recompute = recompute
    model.sequence_group = group
    out = model(*inputs)
    (out - torch.randn_like(out)).square().mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return out.detach(), gradients


def on_a_rank(world: Any, size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The cases with groups of `size` ranks, gradients averaged over all ranks."""
    group = world.group_of_neighbors(size)
    assert dist.get_process_group_ranks(group) == list(range(size))
    found = []
    for case in CASES:
        out, gradients = outputs_and_gradients(*case, group)
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= world.size
        found.append((out, gradients))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_one_rank(size):
    ranks = run_distributed(on_a_rank, size, size)
    for number, case in enumerate(CASES):
        out, gradients = outputs_and_gradients(*case, None)
        for rank in ranks:
            torch.testing.assert_close(rank[number][0], out, **CLOSE[case[2]])
        found = ranks[0][number][1]
        assert found.keys() == gradients.keys()
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                found[name], gradient, **CLOSE[case[2]], msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize(("length", "parts"), [(17776, 1024), (30, 4), (8, 8), (7, 3)])
def test_shares_add_up_and_differ_by_one_at_most(length, parts):
    found = shares(length, parts)
    assert sum(found) == length and len(found) == parts
    assert max(found) - min(found) <= 1 and found == sorted(found, reverse=True)


class Group:
    """Size and rank of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = lambda: rank
        self.size = lambda: size


def test_spans_cover_a_sequence_in_order():
    end = 0
    for rank in range(30):
        start, next_end = SequencePart(Group(rank, 30), 17776).span()  # type: ignore[arg-type]
        assert start == end
        end = next_end
    assert end == 17776
