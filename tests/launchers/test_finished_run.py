"""`landiff train` on a run that has finished: no rank is started unless something has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from landiff.configs.loader import load
from landiff.training.checkpoint.resume import is_complete
from landiff.training.checkpoint.run_folder import DONE, step_folder
from landiff.training.tokenizer.__main__ import main as train
from landiff.training.tokenizer.config import TokenizerTrainConfig
from tests.distributed import nursery
from tests.launchers.local_jobs import landiff
from tests.training.tokenizer.test_train import write_config
from tests.training.tokenizer.tiny import write_data

STEPS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config file of a finished run with two checkpoints, made once."""
    folder = tmp_path_factory.mktemp("finished")
    write_data(folder / "data")
    path = write_config(folder / "run", loop={"steps": STEPS, "log_every": 1, "save_every": 1})
    nursery(__name__).start(train, 1, (str(path),)).results(60)
    return path


@pytest.fixture
def config_file(finished, tmp_path):
    """The same. What the test changes in the run folder is undone."""
    run = finished.with_name("run")
    shutil.copytree(run, tmp_path / "copy")
    yield finished
    shutil.rmtree(run)
    shutil.move(tmp_path / "copy", run)


def files_of(run: Path) -> dict[Path, int]:
    """When each file and folder of a run was changed, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}


def test_a_finished_run_is_left_alone(config_file, capsys):
    run = config_file.with_name("run")
    before = files_of(run)
    code, out, _ = landiff(capsys, "train", "tokenizer", "--config", str(config_file))
    assert code == 0
    assert f"{run} is already trained to step {STEPS}" in out
    assert files_of(run) == before


def test_a_changed_model_is_refused_after_the_last_step_too(config_file, capsys):
    words = ("train", "tokenizer", "--config", str(config_file), "model.num_layers=2")
    code, _, err = landiff(capsys, *words)
    assert code == 2
    assert "checkpoint of another model" in err


@pytest.mark.parametrize("change", ["loop.steps=3", "loop.steps=1", "optim.lr=1e-3"])
def test_ranks_decide_about_a_changed_config(config_file, change):
    assert is_complete(load(TokenizerTrainConfig, config_file))
    assert not is_complete(load(TokenizerTrainConfig, config_file, [change]))


def damage_weights(run: Path) -> None:
    """Changes one byte of the largest file of the last checkpoint."""
    files = [path for path in step_folder(run / "checkpoints", STEPS).iterdir() if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)


def remove_checkpoint(run: Path) -> None:
    """Removes the last checkpoint. That of step 1 remains."""
    shutil.rmtree(step_folder(run / "checkpoints", STEPS))


def remove_done(run: Path) -> None:
    """Leaves the run as a kill after its last save does."""
    (run / DONE).unlink()


@pytest.mark.parametrize("damage", [damage_weights, remove_checkpoint, remove_done])
def test_ranks_decide_about_a_damaged_run(config_file, damage: Callable[[Path], None]):
    config = load(TokenizerTrainConfig, config_file)
    assert is_complete(config)
    damage(config.run)
    assert not is_complete(config)
