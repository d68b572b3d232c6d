"""Trackers beside TensorBoard, with the real library of Weights & Biases, offline."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.config import LoopConfig
from landiff.training.observe.config import MlflowConfig, WandbConfig
from landiff.training.observe.trackers import Trackers
from tests.training.toy import ToyConfig, alone, train

WANDB = WandbConfig(kind="wandb", project="toy")


def config(folder: Path, steps: int, *trackers: WandbConfig | MlflowConfig) -> ToyConfig:
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, log_every=1), trackers=trackers)


def wandb_records(folder: Path) -> list[Record]:
    """Everything that the offline runs of a run folder hold, in order."""
    records = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, in blocks of 32 KiB, after 7 bytes of W&B's own."""
    position = 7
    parts = b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def history(folder: Path) -> dict[int, dict[str, float]]:
    """Scalars by step. Fails if a step occurs twice."""
    found: dict[int, dict[str, float]] = {}
    for record in wandb_records(folder):
        if not record.HasField("history"):
            continue
        items = {}
        for item in record.history.item:
            items["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        step = record.history.step.num
        assert step not in found, f"step {step} was sent twice"
        found[step] = {key: value for key, value in items.items() if not key.startswith("_")}
    return found


def test_a_resumed_run_continues_the_run_of_the_tracker(tmp_path):
    train(config(tmp_path, 3, WANDB), alone())
    lost = Trackers(tmp_path, config(tmp_path, 6, WANDB))
    lost.log(4, {"train/loss": 1.0})  # of an attempt that was killed after step 4
    lost.close()
    train(config(tmp_path, 6, WANDB), alone())
    sent = history(tmp_path)
    assert list(sent) == [1, 2, 3, 4, 5, 6]
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        step = line.pop("step")
        line.pop("time")
        if step != 4:
            assert sent[step] == line
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    settings = {}
    for update in runs[0].config.update:
        settings["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    assert settings["loop.steps"] == 3 and settings["optim.lr"] == 0.1


ONLINE = WandbConfig(kind="wandb", mode="online")
FAILURES = [
    (MlflowConfig(kind="mlflow", uri="nowhere://"), "trackers.0.mlflow failed and is off"),
    (ONLINE, "trackers.0.wandb failed and is off; training continues: no login is stored here"),
]


@pytest.mark.parametrize(("tracker", "message"), FAILURES, ids=["mlflow", "wandb"])
def test_a_tracker_that_fails_warns_once_and_training_goes_on(
    tmp_path, monkeypatch, caplog, tracker, message
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    state, _ = train(config(tmp_path, 3, tracker), alone())
    assert state.step == 3 and len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    own = [record for record in caplog.records if record.name.startswith("landiff")]
    warnings = [record for record in own if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and message in warnings[0].getMessage()
