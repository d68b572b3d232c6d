"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow, see `trackers:`.

They get the scalars of metrics.jsonl under the same tags, and the config. A restarted run continues
the run of the tracker. `trackers.json` in the run folder holds the id and the last step of each, so
that no step is sent twice. A tracker that fails is switched off with one warning: it never stops
training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, assert_never

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import read_json
from landiff.configs.files import write_text
from landiff.configs.secrets import redact
from landiff.training.checkpoint.resume import flat_keys
from landiff.training.checkpoint.run_folder import TRACKERS
from landiff.training.config import TrainConfig
from landiff.training.observe.config import MlflowConfig, TrackerConfig, WandbConfig

log = logging.getLogger(__name__)

Item = tuple[int, dict[str, float]]  # step and scalars
MAX_WAITING = 1000  # logged steps that a slow tracker may be behind
CLOSE_TIMEOUT_S = 30.0
PARAMETERS_AT_ONCE = 100  # MLflow's limit for a request
LONGEST_PARAMETER = 500  # characters, the limit of older MLflow servers


class Tracker(Protocol):
    """One run of a tracker."""

    id: str

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        ...

    def close(self) -> None:
        """Send what is left and end the process of the run."""
        ...


class Trackers:
    """The trackers of a run, for the one rank that writes.

    A thread starts them and sends the numbers, so that training does not wait for a network.
    """

    def __init__(self, run: Path, config: TrainConfig) -> None:
        """`run`: the run folder."""
        self.run = run
        self.config = config
        self._waiting: queue.Queue[Item | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._full = False
        # Used by the thread only.
        self._state: dict[str, dict[str, Any]] = {}
        self._open: dict[str, Tracker] = {}

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Pass on the scalars of a step, for the trackers that have not had this step."""
        if self._thread is None:
            # A daemon does not keep the process alive if a server does not answer.
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((step, dict(scalars)))
        except queue.Full:
            if not self._full:
                log.warning("the trackers are too slow: step %d and others are not sent", step)
            self._full = True

    def close(self) -> None:
        """Send what is left and end the runs. Waits for half a minute at most."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the trackers do not answer; the last steps were not sent to them")
        self._thread = None

    # ------------------------------------------------------------ thread

    def _work(self) -> None:
        self._start()
        item = self._waiting.get()
        while item is not None:
            self._send(*item)
            item = self._waiting.get()
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.close)
        self._open = {}

    def _start(self) -> None:
        """Start or continue a run of each tracker."""
        known = _read_state(self.run / TRACKERS)
        for number, settings in enumerate(self.config.trackers):
            name = f"trackers.{number}.{settings.kind}"
            state = known.get(name, {"id": None, "step": 0})
            start = partial(build, settings, state["id"], self.run, self.config)
            tracker = self._guarded(name, start)
            if tracker is not None:
                self._open[name] = tracker
                self._state[name] = state | {"id": tracker.id}

    def _send(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step to the trackers that have not had this step."""
        for name, tracker in list(self._open.items()):
            if step <= self._state[name]["step"]:
                continue
            self._state[name]["step"] = step
            # Written first: a kill in between loses a step and repeats none.
            self._guarded(name, self._write_state)
            self._guarded(name, partial(tracker.log, step, scalars))

    def _guarded(self, name: str, action: Callable[[], Any]) -> Any:
        """The result of `action`; None and one warning if it fails, which ends the tracker."""
        try:
            return action()
        except Exception as error:  # libraries for networks raise errors of any kind
            self._open.pop(name, None)
            log.warning("%s failed and is off; training continues: %s", name, redact(str(error)))
            return None

    def _write_state(self) -> None:
        write_text(self.run / TRACKERS, json.dumps(self._state, indent=1) + "\n")


def _read_state(path: Path) -> dict[str, Any]:
    """Ids and last steps of an earlier attempt. Empty if there are none or they are damaged."""
    try:
        found = read_json(path) if path.exists() else {}
    except (OSError, ConfigError):
        return {}
    return {name: state for name, state in found.items() if set(state) == {"id", "step"}}


def build(settings: TrackerConfig, id: str | None, run: Path, config: Config) -> Tracker:
    """Start a run of a tracker, or continue the one with this `id`."""
    match settings:
        case WandbConfig():
            return WandbTracker(settings, id, run, config)
        case MlflowConfig():
            return MlflowTracker(settings, id, run, config)
        case _:
            assert_never(settings)


def public_config(config: Config) -> dict[str, Any]:
    """The config by dotted key, without secrets."""
    found: dict[str, Any] = {}
    for key, value in flat_keys(config.model_dump(mode="json")).items():
        found[key] = redact(value) if isinstance(value, str) else value
    return found


class WandbTracker:
    """A run of Weights & Biases."""

    def __init__(self, settings: WandbConfig, id: str | None, run: Path, config: Config) -> None:
        """Start a run, or continue the one with this `id`."""
        import wandb

        if settings.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError("no login is stored here: run `wandb login`, or use mode: offline")
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or str(run),
            id=id,
            resume="allow",
            mode=settings.mode,
            dir=run,
            config=public_config(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = self.run.id

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Send what is left and end the run."""
        self.run.finish()


class MlflowTracker:
    """A run of MLflow."""

    def __init__(self, settings: MlflowConfig, id: str | None, run: Path, config: Config) -> None:
        """Start a run, or continue the one with this `id`."""
        from mlflow import MlflowClient

        uri = settings.uri or f"sqlite:///{run.resolve() / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)
        if id is not None:
            self.id = id
            self.client.update_run(id, status="RUNNING")
            return
        experiment = self.client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            experiment_id = self.client.create_experiment(settings.experiment)
        else:
            experiment_id = experiment.experiment_id
        created = self.client.create_run(experiment_id, run_name=settings.name or str(run))
        self.id = created.info.run_id
        self._log_config(config)

    def _log_config(self, config: Config) -> None:
        from mlflow.entities import Param

        parameters = []
        for key, value in public_config(config).items():
            parameters.append(Param(_mlflow_name(key), str(value)[:LONGEST_PARAMETER]))
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            part = parameters[start : start + PARAMETERS_AT_ONCE]
            self.client.log_batch(self.id, params=part)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send the scalars of a step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = []
        for tag, value in scalars.items():
            if math.isfinite(value):  # databases store no NaN
                metrics.append(Metric(_mlflow_name(tag), value, now_ms, step))
        self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        """End the run."""
        self.client.set_terminated(self.id)


def _mlflow_name(name: str) -> str:
    """A tag or key with the characters that MLflow allows."""
    return re.sub(r"[^\w./ :-]", "_", name)
