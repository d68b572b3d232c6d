"""Loading a checkpoint of unknown origin runs no code from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest

from landiff.configs import ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.training.checkpoint.errors import first_error, read_message
from landiff.training.diffusion.__main__ import main
from landiff.training.diffusion.engine import build_engine
from tests.distributed import nursery, run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo, write_data
from tests.training.payload import MARK, list_again, with_payload

MODEL_FILE, OPTIMIZER_FILE = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
)
LAYOUTS = [(1, "bf16"), (2, "fp32"), (3, "bf16")]


def files_of(stage: int, precision: str) -> list[str]:
    """Names of what DeepSpeed writes on one rank."""
    model = f"zero_pp_rank_0_{MODEL_FILE}" if stage == 3 else MODEL_FILE
    optimizer = f"bf16_{OPTIMIZER_FILE}" if precision == "bf16" else OPTIMIZER_FILE
    return [model, optimizer]


ATTACKS = [(*layout, name) for layout in LAYOUTS for name in files_of(*layout)]


def load_all(world, folder: Path) -> dict[tuple[int, str, str], str]:
    """Load every attacked copy of a checkpoint in its own layout. Returns the errors."""
    os.chdir(folder)
    found = {}
    for stage, precision in LAYOUTS:
        settings = config(folder, zero__stage=stage, precision=precision)
        right = folder / f"right-{stage}"
        engine = build_engine(settings, world)
        engine.train_step(batch(settings, 0))
        right.mkdir()
        saving.save(engine, right)
        engine = build_engine(settings, world)
        for attack in (attack for attack in ATTACKS if attack[0] == stage):
            copy = folder / f"copy-{len(found)}"
            shutil.copytree(right, copy)
            with_payload(copy / "zero" / attack[2])
            try:
                engine.load(copy)
                found[attack] = "loaded"
            except ConfigError as error:
                found[attack] = str(error)
        engine.load(right)
    return found


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[tuple[int, str, str], str]]:
    folder = tmp_path_factory.mktemp("foreign")
    make_zoo(folder)
    return folder, run_distributed(load_all, 1, folder)[0]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_payload_is_refused_and_does_not_run(refused, attack):
    folder, errors = refused
    assert f"{attack[2]} is refused" in errors[attack] and "system" in errors[attack], errors[
        attack
    ]
    assert not (folder / MARK).exists()


def train(path: str) -> None:
    main(path)


def test_a_trainer_refuses_a_run_folder_with_a_payload(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_zoo(tmp_path)
    write_data(tmp_path / "data")
    for steps, code in ((2, 0), (4, 1)):
        settings = config(
            tmp_path,
            run=tmp_path / "run",
            data__manifest=tmp_path / "data",
            data__adopt="true",
            zero__stage=2,
            loop__steps=steps,
            loop__log_every=1,
        )
        write_text(tmp_path / "run.yaml", dump(settings))
        assert nursery(__name__).start(train, 1, [str(tmp_path / "run.yaml")]).wait(120) == [code]
        checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
        with_payload(checkpoint / "zero" / MODEL_FILE)
        list_again(checkpoint)
        Path(MARK).unlink(missing_ok=True)  # from reading the file to write the payload
    message = read_message(first_error(tmp_path / "run"))
    assert f"{MODEL_FILE} is refused" in message and "system" in message
    assert not Path(MARK).exists()
