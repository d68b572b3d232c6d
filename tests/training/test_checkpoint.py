"""Checkpoints: complete or absent, never lost, never of another model."""

import errno
import logging
import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from landiff.configs.base import ConfigError
from landiff.configs.disk_errors import FREE_SPACE, PERMISSIONS, READ_ONLY
from landiff.training.checkpoint.errors import CheckpointError
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileList,
    describe_file,
    latest_whole,
    list_files,
)
from landiff.training.checkpoint.parts import StateFile
from landiff.training.checkpoint.run_folder import committed_steps, step_folder
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.config import LoopConfig, OptimConfig
from landiff.training.engine import TrainState
from tests.distributed import run_distributed
from tests.training.toy import ToyConfig, ToyEngine, ToyLoader, ToyModelConfig, alone, train


def config(folder, steps=6, **loop):
    loop = {"async_save": False} | loop
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, log_every=1, **loop))


@dataclass
class Failing(ToyEngine):
    """Fails as often as `failures` says to write its files: on a full disk, or with `number`."""

    failures: int = 0
    number: int | None = None

    def state_files(self):
        files = super().state_files()
        if self.failures:
            parts = FailingParts(self, [bytes(1 << 14)])  # more than Python buffers
            files.append(StateFile("failing.bin", parts))
        return files

    @contextmanager
    def fault(self):
        if not self.failures:
            yield
            return
        if self.number is not None:
            raise OSError(self.number, os.strerror(self.number), "weights")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            yield
        except GeneratorExit:
            self.failures -= 1
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass
class FailingParts:
    engine: Failing
    parts: list

    def __iter__(self):
        with self.engine.fault():
            yield from self.parts


def store(settings, world=None):
    return CheckpointStore(
        settings.run / "checkpoints",
        settings,
        world or alone(),
        retry_waits_s=(0, 0, 0),
    )


def save(settings, step, failures=0, *, last=False, world=None):
    """Save as step `step`; returns the folder or None."""
    world = world or alone()
    engine = Failing(settings, world, failures)
    saved = store(settings, world).save(
        TrainState(step), engine, ToyLoader(settings, world), last=last
    )
    assert engine.failures == 0
    return saved


def test_a_checkpoint_lists_every_file_and_says_what_made_it(tmp_path):
    settings = config(tmp_path)
    save(settings, 3)
    folder = tmp_path / "checkpoints" / "step_00000003"
    listed = FileList.model_validate_json((folder / "files.json").read_bytes()).files
    assert [entry.path for entry in listed] == [
        "config.yaml",
        "rank_0.txt",
        "state.json",
        "toy.safetensors",
    ]
    assert all(
        entry.sha256 and entry.bytes == (folder / entry.path).stat().st_size for entry in listed
    )
    document = CheckpointState.model_validate_json((folder / "state.json").read_bytes())
    assert (document.step, document.kind, document.loader) == (3, "ToyConfig", {"step": 0})
    assert document.versions["torch"] == torch.__version__


def truncated(folder):
    os.truncate(folder / "toy.safetensors", 10)


def flipped(folder):
    path = folder / "toy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def without_a_file(folder):
    (folder / "rank_0.txt").unlink()


def without_the_list(folder):
    (folder / "files.json").unlink()


@pytest.mark.parametrize("damage", [truncated, flipped, without_a_file, without_the_list])
def test_a_damaged_newest_is_named_and_the_one_before_it_is_used(tmp_path, caplog, damage):
    _, straight = train(config(tmp_path / "a"), alone())
    train(config(tmp_path / "b", 4, save_every=2), alone())
    checkpoints = tmp_path / "b" / "checkpoints"
    damage(checkpoints / "step_00000004")
    assert latest_whole(checkpoints) == checkpoints / "step_00000002"
    with caplog.at_level(logging.WARNING):
        state, resumed = train(config(tmp_path / "b"), alone())
    assert "step_00000004 is damaged" in caplog.text
    assert (state.step, resumed.seen[0]) == (6, 8)
    assert torch.equal(resumed.weight, straight.weight)
    assert (checkpoints / "step_00000004.damaged").is_dir()


def test_a_run_with_only_damaged_checkpoints_does_not_silently_begin_again(tmp_path):
    train(config(tmp_path, 4, save_every=2), alone())
    for step in (2, 4):
        truncated(step_folder(tmp_path / "checkpoints", step))
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        train(config(tmp_path), alone())


def test_half_written_folders_of_dead_processes_are_removed_and_never_used(tmp_path):
    train(config(tmp_path, 2), alone())
    checkpoints = tmp_path / "checkpoints"
    node = os.uname().nodename
    dead = [
        checkpoints / f".step_00000004.{node}.4194305.tmp",
        checkpoints / ".step_00000004.another-node.1.tmp",
    ]
    alive = checkpoints / f".step_00000004.{node}.1.tmp"
    for folder in (*dead, alive):
        shutil.copytree(checkpoints / "step_00000002", folder)
    assert train(config(tmp_path, 3), alone())[0].step == 3
    assert [folder.exists() for folder in (*dead, alive)] == [False, False, True]


def test_saving_an_existing_step_again_replaces_it(tmp_path):
    settings = config(tmp_path, on_save_failure="fatal")
    save(settings, 1)
    world, folder = alone(), step_folder(tmp_path / "checkpoints", 1)
    engine = ToyEngine(settings, world)
    engine.weight = torch.full((3,), 7.0)
    for _ in range(2):
        assert store(settings).save(TrainState(1), engine, ToyLoader(settings, world)) == folder
        assert store(settings).damage(folder) == []
        assert torch.equal(load_file(folder / "toy.safetensors")["weight"], engine.weight)
        assert list_folder(tmp_path) == ["step_00000001"]


def test_an_existing_step_survives_a_failure_to_save_it_again(tmp_path):
    settings = config(tmp_path, on_save_failure="fatal")
    save(settings, 1)
    with pytest.raises(CheckpointError, match="step 1"):
        save(settings, 1, failures=1)
    assert list_folder(tmp_path) == ["step_00000001"]
    assert store(settings).damage(step_folder(tmp_path / "checkpoints", 1)) == []


def test_a_kill_while_a_step_is_replaced_does_not_lose_it(tmp_path):
    train(config(tmp_path, 2), alone())
    checkpoints = tmp_path / "checkpoints"
    dead = f"{os.uname().nodename}.4194305.tmp"
    (checkpoints / "step_00000002").rename(checkpoints / f".step_00000002.replaced.{dead}")
    (checkpoints / f".step_00000002.{dead}").mkdir()  # the replacement
    (checkpoints / f".step_00000001.deleted.{dead}").mkdir()  # by retention
    state, engine = train(config(tmp_path, 3), alone())
    assert (state.step, engine.seen) == (3, [8, 9, 10, 11])
    assert list_folder(tmp_path) == ["step_00000002", "step_00000003"]


def test_retention_keeps_the_last_ones_and_every_mth(tmp_path):
    train(config(tmp_path, 10, save_every=1, keep_last=2, keep_every=4), alone())
    assert committed_steps(tmp_path / "checkpoints") == [4, 8, 9, 10]


def test_full_disk_warn_goes_on_and_keeps_the_last_good_one(tmp_path, caplog):
    settings = config(tmp_path, on_save_failure="warn", keep_last=1)
    save(settings, 1)
    assert save(settings, 2, failures=1) is None
    assert "rank 0" in caplog.text and "training continues" in caplog.text
    assert list_folder(tmp_path) == ["step_00000001"]
    with pytest.raises(CheckpointError, match="older checkpoints are untouched"):
        save(settings, 2, failures=1, last=True)
    assert list_folder(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EPERM, PERMISSIONS),
        (errno.EACCES, PERMISSIONS),
        (errno.EROFS, READ_ONLY),
        (errno.ENOSPC, FREE_SPACE),
        (errno.EDQUOT, FREE_SPACE),
    ],
)
def test_a_failed_save_asks_for_space_only_where_space_is_missing(tmp_path, number, advice):
    settings = config(tmp_path, on_save_failure="fatal")
    engine = Failing(settings, alone(), 1, number)
    with pytest.raises(CheckpointError) as error:
        store(settings).save(TrainState(1), engine, ToyLoader(settings, alone()))
    assert advice in str(error.value) and "weights" in str(error.value)
    assert (FREE_SPACE in str(error.value)) == (advice == FREE_SPACE)


@pytest.mark.parametrize(
    ("name", "says"), [("state.json", "is not valid JSON"), ("config.yaml", "is not UTF-8")]
)
def test_a_damaged_document_of_a_checkpoint_is_named_with_the_way_out(tmp_path, name, says):
    settings = config(tmp_path)
    save(settings, 1)
    folder = tmp_path / "checkpoints" / "step_00000001"
    (folder / name).write_bytes(b'{"step": \xff' if name == "config.yaml" else b'{"step": 1,')
    listed = FileList.model_validate_json((folder / "files.json").read_bytes())
    files = [describe_file(folder, entry.path) for entry in listed.files]
    (folder / "files.json").write_text(FileList(files=files).model_dump_json())
    with pytest.raises(ConfigError, match=says) as error:
        store(settings).load_latest(ToyEngine(settings, alone()), ToyLoader(settings, alone()))
    assert str(folder / name) in str(error.value) and f"remove {folder}" in str(error.value)


def test_full_disk_retry_tries_again_then_gives_up(tmp_path):
    settings = config(tmp_path, on_save_failure="retry", keep_last=1)
    assert save(settings, 1, failures=3) == step_folder(tmp_path / "checkpoints", 1)
    with pytest.raises(CheckpointError, match="step 2"):
        save(settings, 2, failures=4)
    assert list_folder(tmp_path) == ["step_00000001"]


def test_full_disk_fatal_raises_at_once(tmp_path):
    settings = config(tmp_path, on_save_failure="fatal")
    save(settings, 1)
    with pytest.raises(CheckpointError, match="step 2"):
        save(settings, 2, failures=1)
    assert list_folder(tmp_path) == ["step_00000001"]


def list_folder(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_of_another_model_is_refused_naming_the_keys(tmp_path):
    train(config(tmp_path, 2), alone())
    other = config(tmp_path).model_copy(update={"model": ToyModelConfig(width=5)})
    with pytest.raises(ConfigError, match=r"model\.width = 5 \(checkpoint: 3\)"):
        train(other, alone())


class OtherTrainerConfig(ToyConfig):
    pass


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    train(config(tmp_path, 2), alone())
    with pytest.raises(ConfigError, match="written by ToyConfig, this run is a OtherTrainerConfig"):
        train(OtherTrainerConfig(**config(tmp_path).model_dump()), alone())


def test_another_learning_rate_is_allowed_and_said(tmp_path, caplog):
    train(config(tmp_path, 2), alone())
    with caplog.at_level(logging.INFO):
        state, _ = train(
            config(tmp_path).model_copy(update={"optim": OptimConfig(lr=0.01)}), alone()
        )
    assert state.step == 6
    assert "optim.lr = 0.01 (checkpoint: 0.1)" in caplog.text


def on_two_ranks(world, folder):
    """Only rank 1 cannot write; both must see it, and the next save must work."""
    settings = config(folder, on_save_failure="warn")
    first = save(settings, 1, world=world)
    failed = save(settings, 2, failures=world.rank, world=world)
    after_failure = sorted(path.name for path in (folder / "checkpoints").iterdir())
    world.barrier()
    third = save(settings, 3, world=world)
    if world.rank == 0:
        truncated(third)
    world.barrier()
    with_damage = [bool(store(settings, world).damage(path)) for path in (first, third)]
    return failed, after_failure, list_files(third), with_damage


def test_ranks_agree_on_a_failed_save_and_on_damage(tmp_path):
    for said in run_distributed(on_two_ranks, 2, tmp_path):
        failed, after_failure, files, with_damage = said
        assert failed is None
        assert after_failure == ["step_00000001"]
        assert files == [
            "config.yaml",
            "files.json",
            "rank_0.txt",
            "rank_1.txt",
            "state.json",
            "toy.safetensors",
        ]
        assert with_damage == [False, True]
