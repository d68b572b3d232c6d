"""Loading a checkpoint of unknown origin runs no code from it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from landiff.configs import ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.model_zoo.convert.formats.dist_checkpoint import METADATA, read_metadata
from landiff.training.checkpoint.errors import first_error, read_message
from landiff.training.lm.__main__ import main
from landiff.training.lm.engine import MegatronEngine
from tests.distributed import nursery, run_distributed
from tests.training import saving
from tests.training.lm.data_set import write_data_set
from tests.training.lm.samples import tiny_batch, tiny_config
from tests.training.payload import MARK, PAYLOADS, Payload, list_again, with_payload


def in_metadata(payload: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder / METADATA).write_bytes(PAYLOADS[payload])

    return attack


def in_common(folder: Path) -> None:
    with_payload(folder / "common.pt")


def replace_entry(folder: Path, value: object, *, is_object: bool) -> None:
    """Append `value` to a data file and point the first object or tensor to it."""
    metadata = read_metadata(folder)
    entries = metadata.state_dict_metadata.items()
    key = next(
        key for key, entry in entries if isinstance(entry, BytesStorageMetadata) == is_object
    )
    [index] = [index for index in metadata.storage_data if index.fqn == key]
    path = folder / metadata.storage_data[index].relative_path
    start = path.stat().st_size
    with open(path, "ab") as file:
        torch.save(value, file)
    metadata.storage_data[index] = _StorageInfo(path.name, start, path.stat().st_size - start)
    metadata.storage_meta = None
    with open(folder / METADATA, "wb") as file:
        pickle.dump(metadata, file)


def in_object(folder: Path) -> None:
    replace_entry(folder, Payload(), is_object=True)


def in_tensor(folder: Path) -> None:
    replace_entry(folder, [Payload()], is_object=False)


def in_extra_state(folder: Path) -> None:
    """As Transformer Engine keeps the state of FP8 scaling, which it unpickles itself."""
    state = torch.frombuffer(bytearray(pickle.dumps(Payload())), dtype=torch.uint8)
    replace_entry(folder, [state], is_object=True)


ATTACKS: dict[str, Callable[[Path], None]] = {
    **{f".metadata: {payload}": in_metadata(payload) for payload in PAYLOADS},
    "common.pt": in_common,
    "an object": in_object,
    "a tensor": in_tensor,
    "an extra state": in_extra_state,
}


def load_all(world, folder: Path) -> dict[str, str]:
    """Load every attacked copy of one checkpoint -> the error, by name of the attack."""
    os.chdir(folder)
    engine = MegatronEngine(tiny_config(folder))
    engine.train_step(tiny_batch(engine.config, 0))
    (folder / "right").mkdir()
    saving.save(engine, folder / "right")
    found = {}
    for number, (name, attack) in enumerate(ATTACKS.items()):
        copy = folder / f"copy-{number}"
        shutil.copytree(folder / "right", copy)
        attack(copy)
        try:
            engine.load(copy)
            found[name] = "loaded"
        except ConfigError as error:
            found[name] = str(error)
    engine.load(folder / "right")
    engine.close()
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("foreign")
    return folder, run_distributed(load_all, 1, folder)[0]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_payload_is_refused_and_does_not_run(refused, attack):
    folder, errors = refused
    assert "is refused" in errors[attack] or "is damaged" in errors[attack], errors[attack]
    assert str(folder) in errors[attack]
    assert not (folder / MARK).exists()


def train(path: str) -> None:
    main(path)


def test_a_trainer_refuses_a_run_folder_with_a_payload(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "data", tiny_config(tmp_path).model, [7, 6], 3)
    for steps, code in ((2, 0), (4, 1)):
        config = tiny_config(tmp_path, loop={"steps": steps, "log_every": 1})
        write_text(tmp_path / "run.yaml", dump(config))
        assert nursery(__name__).start(train, 1, [str(tmp_path / "run.yaml")]).wait(120) == [code]
        checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
        (checkpoint / METADATA).write_bytes(PAYLOADS["a function"])
        list_again(checkpoint)
    message = read_message(first_error(tmp_path / "run"))
    assert f"{checkpoint / METADATA} is refused" in message and "system" in message
    assert not Path(MARK).exists()
