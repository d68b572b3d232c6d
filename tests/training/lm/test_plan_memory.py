"""`landiff plan lm`: activations at real widths, compared with a trace of Megatron-core's layers.

The ranks of a layout are one process with a process group that sends nothing, and tensors have no
data.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from landiff.configs import load
from landiff.launchers.budget.models import make_plan
from landiff.model_zoo import layers as model_layers
from landiff.model_zoo.layers import rms_norm
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.batch import LMRow
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import (
    megatron_device,
    seed_tensor_parallel,
    without_replacements,
)
from landiff.training.lm.layers import Float8ColumnLinear, Float8RowLinear, RowPart
from landiff.training.lm.model import MegatronLM
from tests.launchers.tracing import fake_mode, kept_bytes, make_fake
from tests.quantize_package import torchao  # noqa: F401 - a fixture

LAYERS = 4
TEXT = 64
CLIPS = 4
# tensor, pipeline, context, recompute
LAYOUTS = [(1, 1, 1, False), (2, 1, 1, False), (2, 2, 1, False), (1, 1, 2, False), (2, 1, 1, True)]


def packed_row(config: LMTrainConfig, bounds: tuple[int, ...], cu_seqlens: torch.Tensor) -> LMRow:
    """A row of clips of one segment, without data. Call in a FakeTensorMode.

    cu_seqlens: real, since attention on the CPU reads it.
    """
    total = bounds[-1]

    def whole(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    return LMRow(
        ids_N=whole(total),
        targets_N=whole(total),
        weights_N=torch.zeros(total),
        positions_N=whole(total),
        cu_seqlens=cu_seqlens,
        max_seqlen=bounds[1],
        text_MD=torch.zeros(CLIPS * TEXT, config.model.text_dim),
        text_at_M=whole(CLIPS * TEXT),
        drop_text_M=torch.zeros(CLIPS * TEXT, dtype=torch.bool),
        frames_B=torch.zeros(CLIPS),
        motion_score_B=torch.zeros(CLIPS),
        grid_B2=torch.ones(CLIPS, 2),
        frames_at_B=whole(CLIPS),
        motion_at_B=whole(CLIPS),
        bounds=bounds,
        num_tokens=total,
        flops=0.0,
    )


def composite_norms(tokens: float, width: int, layers: int) -> int:
    """Bytes that rms_norm keeps on the CPU, where it is several operations, and not on CUDA."""
    x = torch.zeros(1000, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(width))
    module = torch.nn.ParameterList([weight])
    kept = kept_bytes(module, lambda: rms_norm(x, weight, 1e-6))
    fused = x.numel() * 4  # CUDA's kernel keeps its float32 input
    return int((kept - fused) / 1000 * tokens * 2 * layers)


def trace(
    tensor: int,
    pipeline: int,
    context: int,
    recompute: bool,
    fp8: bool = False,
    selective: bool = False,
) -> tuple[float, float]:
    """Bytes that autograd keeps on the first rank, and as planned."""
    config = load(
        LMTrainConfig,
        "landiff/lm",
        [
            f"model.num_layers={LAYERS}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.context={context}",
            f"parallel.sequence={str(tensor > 1).lower()}",
            f"recompute={str(recompute).lower()}",
            f"fp8={str(fp8).lower()}",
            f"selective_recompute={str(selective).lower()}",
            "compile_blocks=false",
            f"data.micro_batch_size={CLIPS}",
        ],
    )
    ranks = tensor * pipeline * context
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with megatron_device():
            parallel_state.initialize_model_parallel(
                tensor, pipeline, context_parallel_size=context, create_gloo_process_groups=False
            )
            seed_tensor_parallel(0)
            model = MegatronLM(config)
            length = TokenLayout.of(config.model).sequence_length(config.model.segment_frames, TEXT)
            bounds = tuple(range(0, CLIPS * length + 1, length))
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
            group = parallel_state.get_context_parallel_group()
            part = RowPart.of(bounds, group, torch.device("cpu"))
            with fake_mode(), without_replacements():
                make_fake(model, torch.bfloat16)
                for layer in model.modules():
                    if isinstance(layer, (Float8ColumnLinear, Float8RowLinear)):
                        layer._product[0].weight = layer.weight
                row = packed_row(config, bounds, cu_seqlens)
                kept = float(kept_bytes(model, lambda: model(row, part)))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    memory = make_plan(config, ranks).memory
    planned = memory["activations"] + (memory["logits"] if pipeline == 1 else 0)
    tokens = row.num_tokens / context / tensor  # norms are divided too, by `sequence`
    layers = LAYERS // pipeline
    if selective:
        full = config.model_copy(update={"recompute": True, "selective_recompute": False})
        one = make_plan(full, ranks).memory["activations"]
        one -= LAYERS * tokens * config.model.hidden_size * 2
        return kept + one, planned
    if recompute:
        # The trace ends before the backward pass, in which one layer has all its activations.
        one = planned - memory["logits"]
        one -= LAYERS * tokens * config.model.hidden_size * 2
        return kept + one, planned
    kept -= composite_norms(tokens, config.model.hidden_size, layers)
    # The schedule keeps as many micro-batches as there are stages.
    return kept * pipeline, planned


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_activations_are_those_of_the_layers(layout):
    kept, planned = trace(*layout)
    assert planned == pytest.approx(kept, rel=0.1)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("tensor", [1, 2])
def test_float8_keeps_whole_inputs_of_two_layers(tensor):
    kept, planned = trace(tensor, 1, 1, False, fp8=True)
    assert planned == pytest.approx(kept, rel=0.1)
    without, _ = trace(tensor, 1, 1, False)
    assert (kept > 1.05 * without) == (tensor > 1), kept / without


def test_selective_recompute_keeps_what_is_expensive(monkeypatch):
    """Of the blocks: inputs, which autograd keeps, and results of matmuls and attention."""
    results = []

    def keep(context, operator, *_, **__):
        policy = expensive(context, operator)
        if policy == CheckpointPolicy.MUST_SAVE:
            outputs = tree_leaves(context.op_output)
            results.append(sum(x.nbytes for x in outputs if isinstance(x, torch.Tensor)))
        return policy

    expensive = model_layers._keep_expensive
    monkeypatch.setattr(model_layers, "_keep_expensive", keep)
    kept, planned = trace(1, 1, 1, False, selective=True)
    assert planned == pytest.approx(kept + sum(results), rel=0.1)
    without, _ = trace(1, 1, 1, False)
    assert planned < 0.8 * without  # with logits, and one of four layers kept whole
