"""A training with MLflow, restarted once: `python -m tests.training.mlflow_run FOLDER`.

test_mlflow.py runs it where MLflow is installed. Prints what MLflow holds, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlflow import MlflowClient

from landiff.training.config import LoopConfig
from landiff.training.observe.config import MlflowConfig
from landiff.training.observe.trackers import Trackers
from tests.training.toy import ToyConfig, alone, train


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
    found = {"status": run.info.status, "params": run.data.params, "metrics": metrics}
    Path(folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
