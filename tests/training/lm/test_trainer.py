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
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.megatron import export_lm
from landiff.model_zoo.lm import LanguageModel
from landiff.training.checkpoint.run_folder import EVENTS, read_metrics
from landiff.training.lm.model import InitialWeights
from landiff.training.observe.events import read_events
from tests.chaos import Trainer, prove_kill_safety
from tests.data_pipeline.data_sets import keys_of
from tests.training.lm.data_set import write_mixed_data
from tests.training.lm.samples import tiny_config
from tests.training.mixed import BAD, IMAGE, TALL, VIDEO
from tests.writer_chaos import prove_writer_kill_safety


def write_config(
    run: Path,
    parallel: dict[str, Any] | None = None,
    loop: dict[str, Any] | None = None,
    bad: str = "",
    **changes: Any,
) -> Path:
    """12 steps with a checkpoint after every second, tensor parallel, on data beside the runs.

    bad: key of a clip that is not finite.

    Images, from step 3 on images and videos in batches of equal tokens, from step 8 on videos, at
    a checkpoint, and with another schedule, weight decay and clipping.
    """
    folder = run.parent
    if not (folder / "data").exists():
        write_mixed_data(folder / "data", tiny_config(folder).model, bad)
    phases = [
        {"from_step": 3, "data": {"buckets": [IMAGE, VIDEO, TALL], "balance_tokens": True}},
        {
            "from_step": 8,
            "data": {"buckets": [VIDEO, TALL]},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.2, "clip_grad": 0.5},
            "text_dropout": 0.3,
        },
    ]
    # The kills count the operations of this process.
    defaults = {"steps": 12, "seed": 7, "log_every": 1, "save_every": 2, "async_save": False}
    defaults["max_skipped_fraction"] = 1.0
    config = tiny_config(
        folder,
        parallel or {"tensor": 2},
        data={"buckets": [IMAGE]} | changes.pop("data", {}),
        loop=defaults | (loop or {}),
        phases=phases,
        **changes,
    )
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(config.model_copy(update={"run": run})))
    return path


def write_shipped_config(run: Path) -> Path:
    """The same in the layout and precision of landiff/lm, with everything that keeps state."""
    held_out = [*keys_of(0, 30)[:2], *keys_of(1, 9)[:2]]
    groups = [{"match": "token_embedding.*", "weight_decay_scale": 0.0, "lr_scale": 0.5}]
    return write_config(
        run,
        {"distributed_optimizer": True, "overlap": True},
        {"val_every": 6, "spikes": {"window": 8, "action": "rollback"}},
        keys_of(1, 9)[4],
        precision="bf16",
        data={"validation": {"clips": held_out}},
        optim={"lr": 3e-3, "weight_decay": 0.1, "decay": "linear", "groups": groups},
        ema={"decay": 0.9, "every": 2},
        validation_samples=1,
    )


def all_tensors(checkpoint: Path) -> dict[str, Any]:
    """Complete weights, moments and averages, and the optimizer's step.

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
    optimizer = common["optimizer"]
    if "state" in optimizer:
        return {**state, "step": optimizer["state"]["common_step"]}
    groups = optimizer["optimizer"]["param_groups"]  # of the distributed optimizer
    return {**state, "step": [group["step"] for group in groups]}


MAIN = "landiff.training.lm.__main__:main"


def write_adapter_config(run: Path) -> Path:
    """The same with an adapter, which starts from a model in the zoo."""
    folder = run.parent
    if not (folder / "zoo").exists():
        model = tiny_config(folder).model
        registry.export(folder / "zoo", "base", "lm", model, dict(InitialWeights(model, 5)), {})
    return write_config(
        run,
        {"distributed_optimizer": True, "overlap": True},
        {"on_nonfinite": "rollback"},
        BAD,
        precision="bf16",
        init_from="base",
        lora={"rank": 4, "alpha": 8.0, "targets": ["wqkv", "wo", "w1", "w3", "w2"]},
        ema={"decay": 0.9},
    )


LM = Trainer(MAIN, write_config, world_size=2, read=all_tensors)
SHIPPED = Trainer(MAIN, write_shipped_config, world_size=2, read=all_tensors)
ADAPTER = Trainer(MAIN, write_adapter_config, world_size=2, read=all_tensors)


def not_finite(run: Path) -> set[str]:
    """What followed on the steps of a run that were not finite."""
    events = read_events(run / EVENTS)
    return {event["kind"] for event in events if event.get("cause") == "not finite"}


def test_killed_run_equals_uninterrupted_and_exports(tmp_path):
    report = prove_kill_safety(SHIPPED, tmp_path, __name__, kills=5)
    assert len(report.plans) == 5
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert len([tag for tag in lines[0] if tag.startswith("start/")]) == 8
    assert [line["train/phase"] for line in lines] == [0] * 3 + [1] * 5 + [2] * 4
    assert [line["step"] for line in lines if "val_ema/loss" in line] == [6, 12]
    assert not_finite(tmp_path / "straight") == {"skip"}
    config, weights = export_lm(tmp_path / "straight" / "checkpoints" / "step_00000012")
    assert config == tiny_config(tmp_path).model
    LanguageModel(config).load_state_dict(weights, strict=True)


@pytest.mark.long
@pytest.mark.parametrize("trainer", [LM, SHIPPED], ids=["tensor", "shipped"])
def test_killed_run_equals_uninterrupted_at_length(tmp_path, trainer):
    assert len(prove_kill_safety(trainer, tmp_path, __name__, kills=50, seed=1).plans) == 50


def write_async_config(run: Path) -> Path:
    """In the layout of landiff/lm, with checkpoints that other processes write."""
    layout = {"distributed_optimizer": True, "overlap": True}
    return write_config(run, layout, {"async_save": True, "on_save_failure": "fatal"})


@pytest.mark.long
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path):
    trainer = Trainer(MAIN, write_async_config, world_size=2, read=all_tensors)
    assert prove_writer_kill_safety(trainer, tmp_path, __name__, kills=12) > 60


@pytest.mark.long
def test_a_killed_run_of_an_adapter_that_rolls_back_equals_an_uninterrupted_one(tmp_path):
    assert len(prove_kill_safety(ADAPTER, tmp_path, __name__, kills=10).plans) == 10
    assert not_finite(tmp_path / "straight") == {"rollback"}
