"""The loop and its checkpoints under SIGKILL, with the smallest engine."""

import pytest

from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.training.config import LoopConfig
from tests.chaos import Trainer, prove_kill_safety
from tests.training.toy import ToyConfig


def write_config(run):
    loop = LoopConfig(steps=40, log_every=1, save_every=2, async_save=False)
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(ToyConfig(run=run, loop=loop)))
    return path


TOY = Trainer(
    "tests.training.toy:main", write_config, world_size=2, loader="tests.training.toy:ToyLoader"
)


def test_killed_run_equals_uninterrupted(tmp_path):
    report = prove_kill_safety(TOY, tmp_path, __name__, kills=10)
    assert len(report.plans) == 10
    print(report)


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_run_equals_uninterrupted_at_length(tmp_path, seed):
    report = prove_kill_safety(TOY, tmp_path, __name__, kills=50, seed=seed)
    assert len(report.plans) == 50
    print(report)
