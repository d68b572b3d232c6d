"""Trainings with MLflow: `python -m tests.training.mlflow_run FOLDER`.

One is restarted, and the server of the other does not answer. test_mlflow.py runs it where MLflow
is installed. Writes found.json.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from mlflow import MlflowClient

from landiff.training.config import LoopConfig
from landiff.training.observe.config import MlflowConfig
from landiff.training.observe.trackers import Trackers
from tests.training.toy import ToyConfig, alone, train


def train_with_silent_server(folder: Path) -> int:
    """The step that a training reaches whose server accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        trackers = (MlflowConfig(kind="mlflow", uri=uri),)
        loop = LoopConfig(steps=3, log_every=1)
        state, _ = train(ToyConfig(run=folder, loop=loop, trackers=trackers), alone())
    return state.step


def main(folder: Path) -> None:
    def config(steps: int) -> ToyConfig:
        trackers = (MlflowConfig(kind="mlflow"),)
        loop = LoopConfig(steps=steps, log_every=1)
        return ToyConfig(run=folder, loop=loop, trackers=trackers)

    train(config(3), alone())
    lost = Trackers(folder, config(6))
    lost.log(4, {"train/loss": 1.0})  # of an attempt that was killed after step 4
    lost.close()
    train(config(6), alone())
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("landiff")
    (run,) = client.search_runs([experiment.experiment_id])
    metrics = {}
    for tag in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, tag)
        metrics[tag] = [[metric.step, metric.value] for metric in history]
    silent_step = train_with_silent_server(folder / "silent")
    found = {
        "silent_step": silent_step,
        "status": run.info.status,
        "params": run.data.params,
        "metrics": metrics,
    }
    Path(folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
