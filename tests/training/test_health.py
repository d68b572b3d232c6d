"""A run that diverges stops on all ranks and keeps the last healthy checkpoint."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.launchers.local.children import environment
from landiff.training.checkpoint.errors import NonFiniteError
from landiff.training.checkpoint.files import FileList, describe_file, latest_whole
from landiff.training.checkpoint.run_folder import (
    FILES,
    committed_steps,
    finished_step,
    read_metrics,
    step_folder,
)
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.config import LoopConfig
from landiff.training.engine import TrainState
from landiff.training.guard import Guard
from landiff.training.loop import fit
from landiff.training.run import Run
from tests.distributed import run_distributed
from tests.training.diverging import Diverging
from tests.training.toy import ToyConfig, ToyEngine, ToyLoader, alone, train


def config(folder, steps=6, **loop):
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, log_every=1, **loop))


def diverge(world, folder, value=math.nan):
    """Returns (message, weights, step of the loop)."""
    settings = config(folder, save_every=2, keep_last=1, on_nonfinite="stop")
    engine = Diverging(settings, world, value)
    run = Run(settings.run, settings, world)
    with pytest.raises(NonFiniteError) as caught:
        fit(engine, ToyLoader(settings, world), run, settings.loop)
    return str(caught.value), engine.weight.tolist(), world.step


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_diverging_run_stops_before_the_update_and_keeps_its_checkpoints(tmp_path, value):
    message, weight, step = diverge(alone(), tmp_path, value)
    assert "in step 5: training has diverged" in message and step == 4
    assert all(map(math.isfinite, weight))
    assert committed_steps(tmp_path / "checkpoints") == [4]
    assert (
        json.loads((step_folder(tmp_path / "checkpoints", 4) / "state.json").read_text())["healthy"]
        is True
    )
    assert finished_step(tmp_path) is None
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (
        train(config(tmp_path), alone())[0].step == 6
    )  # with the cause gone, the same folder resumes


def test_all_ranks_stop_in_the_same_step(tmp_path):
    found = run_distributed(diverge, 2, tmp_path)
    assert [step for _, _, step in found] == [4, 4]
    assert all("in step 5" in message for message, _, _ in found)


def decide(world):
    bad = math.nan if world.rank == 1 else 1.0
    skipping = Guard(LoopConfig(steps=10), world)
    assert skipping.decide(torch.tensor(1.0), 2.0)
    assert not skipping.decide(torch.tensor(1.0), bad)
    with pytest.raises(NonFiniteError):
        Guard(LoopConfig(steps=10, on_nonfinite="stop"), world).decide(torch.tensor(1.0), bad)
    return True


def test_one_rank_with_a_bad_norm_decides_for_the_others():
    assert run_distributed(decide, 2) == [True, True]


class Poisoned(ToyEngine):
    """An update that poisons the weights although loss and gradient norm are finite."""

    def train_step(self, batch):
        result = super().train_step(batch)
        if batch.step == 3:
            self.weight[1] = math.inf
        return result


def test_non_finite_weights_are_not_saved(tmp_path):
    settings, world = config(tmp_path, save_every=2, keep_last=1), alone()
    run = Run(tmp_path, settings, world)
    with pytest.raises(
        NonFiniteError, match="the weights after step 4 hold NaN or infinity in weight"
    ):
        fit(Poisoned(settings, world), ToyLoader(settings, world), run, settings.loop)
    assert committed_steps(tmp_path / "checkpoints") == [2]


def save(settings, step, healthy):
    store = CheckpointStore(settings.run / "checkpoints", settings, alone())
    store.save(
        TrainState(step, healthy=healthy),
        ToyEngine(settings, alone()),
        ToyLoader(settings, alone()),
    )
    store.finish()
    return store


def test_retention_and_latest_respect_the_last_healthy_checkpoint(tmp_path):
    settings = config(tmp_path, keep_last=2)
    for step, healthy in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        store = save(settings, step, healthy)
    folder = tmp_path / "checkpoints"
    assert committed_steps(folder) == [2, 4, 5]
    assert latest_whole(folder) == step_folder(folder, 2)
    engine, loader = ToyEngine(settings, alone()), ToyLoader(settings, alone())
    assert store.load_latest(engine, loader) == TrainState(step=2)
    assert committed_steps(folder) == [2, 4, 5]


def test_a_run_with_only_unhealthy_checkpoints_resumes_from_the_newest(tmp_path):
    save(config(tmp_path), 1, False)
    store = save(config(tmp_path), 2, False)
    engine, loader = ToyEngine(config(tmp_path), alone()), ToyLoader(config(tmp_path), alone())
    assert store.load_latest(engine, loader) == TrainState(step=2, healthy=False)
    assert latest_whole(tmp_path / "checkpoints") is None


def rewrite(folder, name, data):
    """Replace a file of a checkpoint and its entry in files.json."""
    (folder / name).write_bytes(data)
    listed = FileList.model_validate_json((folder / FILES).read_bytes())
    entries = [describe_file(folder, entry.path) for entry in listed.files]
    (folder / FILES).write_text(FileList(files=entries).model_dump_json())


def test_checkpoints_that_do_not_record_health_still_load(tmp_path):
    store = save(config(tmp_path), 3, True)
    folder = step_folder(tmp_path / "checkpoints", 3)
    state = json.loads((folder / "state.json").read_text())
    del state["healthy"]
    rewrite(folder, "state.json", json.dumps(state).encode())
    assert latest_whole(tmp_path / "checkpoints") == folder
    loaded = store.load_latest(
        ToyEngine(config(tmp_path), alone()), ToyLoader(config(tmp_path), alone())
    )
    assert loaded == TrainState(step=3)


def test_a_poisoned_checkpoint_of_an_old_run_is_named(tmp_path):
    from safetensors.torch import save as to_bytes

    store = save(config(tmp_path), 3, True)
    folder = step_folder(tmp_path / "checkpoints", 3)
    poisoned = {"weight": torch.full((3,), math.nan), "momentum": torch.zeros(3)}
    rewrite(folder, "toy.safetensors", to_bytes(poisoned))
    with pytest.raises(NonFiniteError, match="step_00000003 holds NaN or infinity in weight"):
        store.load_latest(
            ToyEngine(config(tmp_path), alone()), ToyLoader(config(tmp_path), alone())
        )


def test_the_rank_ends_with_one_line_and_code_1_and_is_not_restarted(tmp_path):
    run = tmp_path / "run"
    (run / "job").mkdir(parents=True)
    write_text(tmp_path / "config.yaml", dump(config(run, save_every=2, on_nonfinite="stop")))
    program = (
        "import sys\nimport tests.training.toy as toy\n"
        "from tests.training.diverging import Diverging\n"
        "toy.ToyEngine = Diverging\ntoy.main(sys.argv[1])\n"
    )
    (tmp_path / "diverging.py").write_text(program)
    paths = environment()["PYTHONPATH"] + os.pathsep + str(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "landiff.launchers.local.rank",
            str(run),
            "diverging",
            str(tmp_path / "config.yaml"),
        ],
        env=environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "loss = nan" in done.stderr and "Traceback" not in done.stderr
    assert "in step 5" in (run / "job" / "config_error").read_text()
