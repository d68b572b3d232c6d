"""The language model in Megatron against numbers of the reference, on 1 and 2 processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from landiff.configs import load
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.convert.formats.release_lm import RULES
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.batch import LMRow, pack
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import megatron_device
from landiff.training.lm.engine import MegatronEngine
from tests.data_pipeline.data_sets import raw_sample
from tests.distributed import run_distributed
from tests.golden.conftest import Case
from tests.golden.released_models import close, lm_config
from tests.training.lm.samples import evaluate


def train_config(case: Case, parallel: dict[str, Any]) -> LMTrainConfig:
    model = lm_config(case.config)
    return load(
        LMTrainConfig,
        {
            "run": "run",
            "zoo": "zoo",
            "data": {"manifest": "data", "global_batch_size": 2},
            "loop": {"steps": 1},
            "optim": {"lr": 1e-3},
            "model": model.model_dump(),
            "parallel": parallel,
            "precision": "fp32",
            "text_column": "text",
            "text_dropout": 0.0,
            "head_multiple": parallel.get("tensor", 1),
            "vocab_multiple": 64 * parallel.get("tensor", 1),  # a case may have 3 heads
        },
    )


def samples_of(case: Case) -> tuple[Sample, ...]:
    given = case.inputs
    return tuple(
        Sample(
            key=str(i),
            epoch=0,
            index=i,
            position=i,
            meta=raw_sample(str(i), motion_score=float(given["motion_score"][i])),
            tensors={"tokens": given["codes"][i], "text": given["text_embeddings"][i]},
        )
        for i in range(len(given["codes"]))
    )


def packed_case(case: Case, config: LMTrainConfig) -> LMRow:
    """All samples of the case in one row, packed by the trainer."""
    row = pack(samples_of(case), config, TokenLayout.of(config.model))
    assert torch.equal(row.frames_B, case.inputs["frames"].float())
    return row


def layout_for(case: Case, parallel: dict[str, Any]) -> dict[str, Any]:
    """`parallel` with as many ranks as divide the MLP of the case."""
    if "tensor" not in parallel:
        return parallel
    ranks = next((n for n in (2, 3) if case.config["mlp_dim"] % n == 0), 1)
    return parallel | {"tensor": ranks, "sequence": parallel.get("sequence", False) and ranks > 1}


def forward(world: Any, folder: Path, parallel: dict[str, Any]) -> dict[str, Tensor]:
    case = Case(folder)
    config = train_config(case, parallel)
    engine = MegatronEngine(config)
    engine.load_weights(apply_rules(case.weights, RULES, "to_ours"))
    with megatron_device(), torch.no_grad():
        row = packed_case(case, config)
        found = {
            "logits": engine.model(row, logits=True)[: row.num_tokens],
            "uncond_logits": engine.model(
                replace(row, drop_text_M=torch.ones_like(row.drop_text_M)), logits=True
            )[: row.num_tokens],
            "ids": row.ids_N[: row.num_tokens],
        }
    samples = samples_of(case)
    found["loss"] = evaluate(engine, Batch(0, len(samples), (samples,)))
    engine.close()
    return found


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}],
    ids=["one", "tensor 2", "sequence"],
)
@pytest.mark.golden("lm_teacher_forced")
def test_teacher_forced_through_megatron(case, parallel):
    wanted, parallel = case.outputs, layout_for(case, parallel)
    for found in run_distributed(forward, parallel.get("tensor", 1), case.path, parallel):
        assert torch.equal(found["ids"], wanted["tokens"].flatten())
        for name in ("logits", "uncond_logits"):
            close(found[name], wanted[name].flatten(0, 1))
        assert found["loss"] == pytest.approx(float(wanted["loss_packed"]), abs=1e-5)
