"""SIGKILL of the trainer, and of the process that writes its checkpoints, at every operation."""

import random
import signal

import pytest

from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.training.checkpoint.files import differences
from landiff.training.checkpoint.run_folder import committed_steps, finished_step, step_folder
from landiff.training.config import LoopConfig
from tests.chaos import Trainer, file_hashes
from tests.distributed import ROOT, nursery
from tests.training.toy import ToyConfig, alone, train
from tests.writer_chaos import HOOKS, VICTIMS, prove_writer_kill_safety


def run_toy(folder, *, async_save):
    loop = LoopConfig(
        steps=6,
        log_every=1,
        save_every=2,
        keep_last=1,
        on_save_failure="fatal",
        async_save=async_save,
    )
    train(ToyConfig(run=folder, loop=loop), alone())


def start(folder, **environment):
    """Exit code of a trainer whose writer has the hooks."""
    paths = {"PYTHONPATH": f"{HOOKS}:{ROOT}"}
    ranks = nursery(__name__).start(
        alive, 1, (folder,), environment=paths | environment, folder=folder.with_suffix(".notes")
    )
    (code,) = ranks.wait(120)
    return code


def alive(folder):
    run_toy(folder, async_save=True)


def prove(tmp_path, points):
    """Kill at `points` (all of them without) and resume. Returns their number."""
    count = tmp_path / "count"
    straight = tmp_path / "straight"
    assert start(straight, COUNT_IN=str(count)) == 0
    expected = file_hashes(step_folder(straight / "checkpoints", 6))
    operations = len(count.with_name("count_0").read_text())
    every = [(number, whom) for number in range(operations) for whom in VICTIMS]
    for number, whom in points(every):
        run = tmp_path / f"{number}_{whom}"
        code = start(run, KILL_AT=f"0:{number}:{whom}")
        assert code == (-signal.SIGKILL if whom == "trainer" else 1), (number, whom, code)
        assert finished_step(run) is None
        for step in committed_steps(run / "checkpoints"):
            assert differences(step_folder(run / "checkpoints", step)) == []
        run_toy(run, async_save=False)
        assert file_hashes(step_folder(run / "checkpoints", 6)) == expected
        left = [path.name for path in (run / "checkpoints").iterdir()]
        assert left == ["step_00000006"], (number, whom, left)
    return len(every)


def test_a_kill_during_a_background_save_loses_nothing(tmp_path):
    assert prove(tmp_path, lambda every: random.Random(0).sample(every, 4)) > 60


@pytest.mark.long
def test_a_kill_at_every_operation_of_a_background_save_loses_nothing(tmp_path):
    prove(tmp_path, lambda every: every)


def write_config(run):
    loop = LoopConfig(steps=20, log_every=1, save_every=2, on_save_failure="fatal")
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(ToyConfig(run=run, loop=loop)))
    return path


@pytest.mark.long
def test_a_kill_of_one_of_several_ranks_or_writers_loses_nothing(tmp_path):
    main, loader = "tests.training.toy:main", "tests.training.toy:ToyLoader"
    toy = Trainer(main, write_config, world_size=3, loader=loader)
    assert prove_writer_kill_safety(toy, tmp_path, __name__, kills=30) > 60
