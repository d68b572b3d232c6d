"""The diffusion trainer on data from disk: both phases, under SIGKILL, and into the zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest

from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.deepspeed import CLASSES, export_diffusion
from landiff.model_zoo.convert.pickles import read_pickle
from landiff.training.checkpoint.run_folder import EVENTS, read_metrics
from landiff.training.diffusion.__main__ import main
from landiff.training.observe.events import read_events
from tests.chaos import Trainer, prove_kill_safety
from tests.data_pipeline.data_sets import keys_of
from tests.distributed import nursery
from tests.training.diffusion.tiny import config, make_zoo, write_data, write_mixed_data
from tests.training.mixed import BAD, IMAGE, TALL, VIDEO
from tests.writer_chaos import prove_writer_kill_safety


def write_config(run: Path, phase: str = "control", steps: int = 12, **changes: object) -> Path:
    """Config of a run whose data and zoo lie beside it."""
    folder = run.parent
    if not (folder / "zoo").exists():
        make_zoo(folder)
        write_data(folder / "data")
    defaults = {
        "data__manifest": folder / "data",
        "loop__steps": steps,
        "loop__log_every": 1,
        "loop__save_every": 2,
        "loop__async_save": "false",  # the kills count the operations of this process
        "zero__stage": 2,
    }
    settings = config(folder, phase, run=run, data__adopt="true", **defaults | changes)
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(settings))
    return path


def write_main_config(run: Path) -> Path:
    """Images, then images and videos of two sizes in batches of equal tokens, then videos.

    In the precision and layout of landiff/diffusion-main, with everything that keeps state. Steps
    that read the clip that is not finite roll back.
    """
    mixed = run.parent / "mixed"
    if not mixed.exists():
        write_mixed_data(mixed, BAD)
    joint = {"buckets": [IMAGE, VIDEO, TALL], "balance_tokens": True}
    phases = [
        {"from_step": 3, "data": joint},
        {
            "from_step": 7,
            "data": {"buckets": [VIDEO, TALL]},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.2, "clip_grad": 0.1},
            "prefix": {"probability": 0.5, "noise": 0.1},
        },
    ]
    held_out = [*keys_of(0, 30)[:2], *keys_of(1, 9)[:2]]
    groups = [{"match": "blocks.0.*", "lr_scale": 0.5}]
    return write_config(
        run,
        "main",
        steps=10,
        data__manifest=mixed,
        data__buckets=f"[{IMAGE}]",
        loop__log_every=2,
        loop__save_every=1,
        loop__val_every=5,
        loop__spikes=json.dumps({"window": 8, "action": "rollback"}),
        loop__on_nonfinite="rollback",
        loop__max_skipped_fraction=1.0,
        data__validation=json.dumps({"clips": held_out}),
        precision="bf16",
        zero__overlap_communication="true",
        optim__decay="linear",
        optim__groups=json.dumps(groups),
        ema__decay=0.9,
        phases=json.dumps(phases),
    )


def write_adapter_config(run: Path) -> Path:
    """An adapter of the main transformer, which starts from the zoo, at ZeRO-3 in bfloat16."""
    return write_config(
        run,
        "main",
        init_from="main",
        lora__rank=4,
        lora__alpha=8,
        zero__stage=3,
        precision="bf16",
        ema__decay=0.9,
    )


MAIN = Trainer("landiff.training.diffusion.__main__:main", write_main_config, world_size=2)
CONTROL = Trainer("landiff.training.diffusion.__main__:main", write_config, world_size=2)
ADAPTER = Trainer("landiff.training.diffusion.__main__:main", write_adapter_config, world_size=2)


def test_killed_run_equals_uninterrupted(tmp_path):
    report = prove_kill_safety(MAIN, tmp_path, __name__, kills=5)
    assert len(report.plans) == 5
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert len([tag for tag in lines[0] if tag.startswith("start/")]) == 8
    assert [line["step"] for line in lines if "val_ema/loss" in line] == [5, 10]
    events = read_events(tmp_path / "straight" / EVENTS)
    assert {each["kind"] for each in events if each.get("cause") == "not finite"} == {"rollback"}
    assert f"train/loss_{IMAGE}" in lines[0]
    assert f"train/loss_{IMAGE}" not in lines[-1]
    # In these ten steps every batch of VIDEO reads the clip that is not finite.
    assert f"train/loss_{TALL}" in set().union(*lines)
    print(report)


@pytest.mark.long
@pytest.mark.parametrize("trainer", [MAIN, CONTROL], ids=["main", "control"])
def test_killed_run_equals_uninterrupted_at_length(tmp_path, trainer):
    assert len(prove_kill_safety(trainer, tmp_path, __name__, kills=50, seed=1).plans) == 50


def write_async_config(run: Path) -> Path:
    """The same with checkpoints that other processes write."""
    return write_config(run, loop__async_save="true", loop__on_save_failure="fatal")


@pytest.mark.long
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path):
    trainer = Trainer(CONTROL.main, write_async_config, world_size=2)
    assert prove_writer_kill_safety(trainer, tmp_path, __name__, kills=12) > 60


@pytest.mark.long
def test_a_killed_run_of_an_adapter_equals_an_uninterrupted_one(tmp_path):
    assert len(prove_kill_safety(ADAPTER, tmp_path, __name__, kills=10).plans) == 10


def run_main(path):
    """One rank of the trainer, as the launcher starts it."""
    main(str(path))


def test_both_phases_learn_and_the_second_starts_from_the_first(tmp_path):
    ranks = nursery(__name__)
    path = write_config(
        tmp_path / "first",
        "main",
        steps=60,
        optim__lr=0.01,
        loop__save_every=60,
        prefix__probability=0.0,
    )
    assert ranks.start(run_main, 2, [path]).wait(120) == [0, 0]
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "first" / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    kind, model, tensors = export_diffusion(tmp_path / "first" / "checkpoints" / "step_00000060")
    main = registry.export(tmp_path / "zoo", "second", kind, model, tensors, {}).load()
    path = write_config(
        tmp_path / "next", "control", steps=4, init_from="second", loop__save_every=2
    )
    assert ranks.start(run_main, 2, [path]).wait(120) == [0, 0]
    frozen = sorted((tmp_path / "next" / "checkpoints").glob("step_*/zero/*_frozen.pt"))
    assert len(frozen) == 2 and frozen[0].samefile(frozen[1])
    longer = {"steps": 6, "loop__save_every": 2, "loop__keep_last": 3}
    path = write_config(tmp_path / "next", "control", init_from="second", **longer)
    assert ranks.start(run_main, 2, [path]).wait(120) == [0, 0]
    (last,) = (tmp_path / "next" / "checkpoints" / "step_00000006").glob("zero/*_frozen.pt")
    assert last.samefile(frozen[0]), "the process that resumed wrote frozen weights again"
    shutil.rmtree(last.parents[1])
    model_file = frozen[1].with_name("mp_rank_00_model_states.pt")
    left = read_pickle(model_file, CLASSES)["module"]
    assert left and not any(name.startswith("transformer.") for name in left)
    shutil.rmtree(frozen[0].parents[1])
    shutil.rmtree(tmp_path / "zoo" / "second")  # the checkpoint does not need where they came from
    kind, model, tensors = export_diffusion(tmp_path / "next" / "checkpoints" / "step_00000004")
    assert kind == "diffusion"
    for name, tensor in main.items():
        assert tensors[f"transformer.{name}"].equal(tensor), name
    registry.build_module(kind, model).load_state_dict(tensors, strict=True)
