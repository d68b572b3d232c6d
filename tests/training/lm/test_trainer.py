"""`python -m landiff.training.lm` on a real data set: under SIGKILL, and into the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import landiff.training.lm.engine  # noqa: F401 - the nursery imports it once
from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.model_zoo.convert.formats.megatron import export_lm
from landiff.model_zoo.lm import LanguageModel
from tests.chaos import Trainer, prove_kill_safety
from tests.training.lm.data_set import write_mixed_data
from tests.training.lm.samples import tiny_config
from tests.training.mixed import IMAGE, TALL, VIDEO


def write_config(run: Path) -> Path:
    """12 steps with a checkpoint after every second, tensor parallel, on data beside the runs.

    Images, from step 3 on images and videos in batches of equal tokens, from step 8 on videos.
    """
    folder = run.parent
    if not (folder / "data").exists():
        write_mixed_data(folder / "data", tiny_config(folder).model)
    phases = [
        {"from_step": 3, "data": {"buckets": [IMAGE, VIDEO, TALL], "balance_tokens": True}},
        {"from_step": 8, "data": {"buckets": [VIDEO, TALL]}},
    ]
    config = tiny_config(
        folder,
        {"tensor": 2},
        data={"buckets": [IMAGE]},
        loop={"steps": 12, "seed": 7, "log_every": 1, "save_every": 2},
        phases=phases,
    )
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(config.model_copy(update={"run": run})))
    return path


def all_tensors(checkpoint: Path) -> dict[str, Any]:
    """Complete weights and moments, and the optimizer's step.

    Not the files: torch's writer orders their contents as threads end.
    """
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    return {**state, "step": common["optimizer"]["state"]["common_step"]}


LM = Trainer("landiff.training.lm.__main__:main", write_config, world_size=2, read=all_tensors)


def test_killed_run_equals_uninterrupted_and_exports(tmp_path):
    report = prove_kill_safety(LM, tmp_path, __name__, kills=10)
    assert len(report.plans) == 10
    config, weights = export_lm(tmp_path / "straight" / "checkpoints" / "step_00000012")
    assert config == tiny_config(tmp_path).model
    LanguageModel(config).load_state_dict(weights, strict=True)


@pytest.mark.long
def test_killed_run_equals_uninterrupted_at_length(tmp_path):
    assert len(prove_kill_safety(LM, tmp_path, __name__, kills=50, seed=1).plans) == 50
