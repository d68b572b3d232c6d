"""Checkpoints that another process writes while training continues."""

import errno
import logging
import os
import resource
import shutil
import signal
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from landiff.model_zoo.convert.pickles import read_pickle
from landiff.training.checkpoint.background import BackgroundWriter
from landiff.training.checkpoint.errors import CheckpointError
from landiff.training.checkpoint.files import differences
from landiff.training.checkpoint.parts import (
    StateFile,
    contents,
    safetensors_file,
    torch_archive,
    write_files,
)
from landiff.training.checkpoint.run_folder import committed_steps, read_metrics, step_folder
from landiff.training.checkpoint.staging import COPIED_AT_ONCE, StagingBuffer, staged_bytes
from landiff.training.checkpoint.store import CheckpointStore
from landiff.training.checkpoint.writer import NICENESS
from landiff.training.config import LoopConfig
from landiff.training.engine import TrainState
from landiff.training.loop import fit
from landiff.training.run import Run
from tests.chaos import file_hashes
from tests.distributed import run_distributed
from tests.training.toy import ToyConfig, ToyEngine, ToyLoader, alone, train


def config(folder, steps=6, **loop):
    loop = {"save_every": 2, "keep_last": 9, "log_every": 1} | loop
    return ToyConfig(run=folder, loop=LoopConfig(steps=steps, **loop))


def hashes(run):
    """Hashes of the engine's files in all checkpoints."""
    folder = run / "checkpoints"
    return {step: file_hashes(step_folder(folder, step)) for step in committed_steps(folder)}


def begin(settings, step=2):
    """A store that is writing the checkpoint of `step`, and its engine."""
    store = CheckpointStore(
        settings.run / "checkpoints", settings, alone(), retry_waits_s=(0, 0, 0)
    )
    engine = ToyEngine(settings, alone())
    store.background.prepare(engine.state_files())
    os.kill(store.background.process.pid, signal.SIGSTOP)
    store.save(TrainState(step), engine, ToyLoader(settings, alone()))
    return store, engine


def resume_writing(store):
    os.kill(store.background.process.pid, signal.SIGCONT)


def advance(store, engine, step=3):
    """Call `advance` as after steps, until the save has ended."""
    while store.saver.current is not None:
        store.advance(TrainState(step), engine)


def test_checkpoints_are_byte_identical_to_those_written_at_once(tmp_path):
    train(config(tmp_path / "at_once", async_save=False), alone())
    train(config(tmp_path / "async"), alone())
    found = hashes(tmp_path / "async")
    assert found == hashes(tmp_path / "at_once")
    assert list(found) == [2, 4, 6]
    last = read_metrics(tmp_path / "async" / "metrics.jsonl")[-1]
    assert {"time/save_stall_s", "time/save_wait_s", "time/save_write_s"} <= last.keys()


def test_a_checkpoint_holds_the_state_at_the_save_and_not_that_of_later_steps(tmp_path):
    store, engine = begin(config(tmp_path))
    before = engine.weight.clone()
    engine.weight.fill_(7)
    assert committed_steps(store.folder) == []
    resume_writing(store)
    advance(store, engine)
    stored = load_file(step_folder(store.folder, 2) / "toy.safetensors")
    assert torch.equal(stored["weight"], before)
    store.background.close()


class ConstantEngine(ToyEngine):
    """Has a file that is the same in all checkpoints."""

    def state_files(self):
        files = super().state_files()
        return [*files, replace(safetensors_file("a/frozen.st", FROZEN), constant=True)]


FROZEN = {"frozen": torch.arange(1000.0)}


def save_twice(store, engine, between=lambda: None):
    """Folders of the checkpoints of steps 2 and 4."""
    loader = ToyLoader(store.config, alone())
    for step in (2, 4):
        store.save(TrainState(step), engine, loader)
        store.finish()
        between()
    store.background.close()
    return [step_folder(store.folder, step) for step in (2, 4)]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_constant_file_is_written_once(tmp_path, async_save):
    settings = config(tmp_path, async_save=async_save)
    store = CheckpointStore(settings.run / "checkpoints", settings, alone())
    first, second = save_twice(store, ConstantEngine(settings, alone()))
    assert (first / "a/frozen.st").samefile(second / "a/frozen.st")
    assert not (first / "toy.safetensors").samefile(second / "toy.safetensors")
    assert differences(first) == differences(second) == []
    shutil.rmtree(first)
    assert torch.equal(load_file(second / "a/frozen.st")["frozen"], FROZEN["frozen"])


def save_and_resume(settings, engine):
    """Checkpoints of step 2 and, by a process that resumed from it with `engine`, of step 4."""
    store = CheckpointStore(settings.run / "checkpoints", settings, alone())
    loader = ToyLoader(settings, alone())
    store.save(TrainState(2), ConstantEngine(settings, alone()), loader)
    store.finish()
    store.background.close()
    resumed = CheckpointStore(store.folder, settings, alone())
    assert resumed.load_latest(engine, loader).step == 2
    resumed.save(TrainState(4), engine, loader)
    resumed.finish()
    resumed.background.close()
    return [step_folder(store.folder, step) for step in (2, 4)]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_resumed_process_does_not_write_a_constant_file_again(tmp_path, async_save):
    settings = config(tmp_path, async_save=async_save)
    first, second = save_and_resume(settings, ConstantEngine(settings, alone()))
    assert (first / "a/frozen.st").samefile(second / "a/frozen.st")
    assert differences(first) == differences(second) == []


class OtherConstantEngine(ConstantEngine):
    """The same with another content of the same size, as after a change of layout."""

    def state_files(self):
        other = safetensors_file("a/frozen.st", {"frozen": -FROZEN["frozen"]})
        return [*ToyEngine.state_files(self), replace(other, constant=True)]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_constant_file_of_another_content_is_written(tmp_path, async_save):
    settings = config(tmp_path, async_save=async_save)
    first, second = save_and_resume(settings, OtherConstantEngine(settings, alone()))
    assert torch.equal(load_file(first / "a/frozen.st")["frozen"], FROZEN["frozen"])
    assert torch.equal(load_file(second / "a/frozen.st")["frozen"], -FROZEN["frozen"])
    assert differences(first) == differences(second) == []


@pytest.mark.parametrize("async_save", [False, True])
def test_a_constant_file_is_written_again_if_the_last_checkpoint_is_gone(tmp_path, async_save):
    settings = config(tmp_path, async_save=async_save)
    store = CheckpointStore(settings.run / "checkpoints", settings, alone())

    def remove():
        shutil.rmtree(step_folder(store.folder, 2), ignore_errors=True)

    _, second = save_twice(store, ConstantEngine(settings, alone()), remove)
    assert differences(second) == []
    assert torch.equal(load_file(second / "a/frozen.st")["frozen"], FROZEN["frozen"])


def test_a_constant_file_is_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refused)
    settings = config(tmp_path, async_save=False)
    store = CheckpointStore(settings.run / "checkpoints", settings, alone())
    first, second = save_twice(store, ConstantEngine(settings, alone()))
    assert not (first / "a/frozen.st").samefile(second / "a/frozen.st")
    assert differences(first) == differences(second) == []


def test_tensors_larger_than_a_piece_are_staged_whole():
    count = COPIED_AT_ONCE + 12345
    large = torch.arange(count, dtype=torch.int64).to(torch.uint8)
    parts = [b"head", large, b"between", large.flip(0), torch.zeros(0, dtype=torch.uint8)]
    files = [StateFile("a", parts), StateFile("b", [large[:7]])]
    buffer = StagingBuffer(staged_bytes(files), torch.device("cpu"))
    placed = buffer.stage(files)
    for file, place in zip(files, placed, strict=True):
        expected = b"".join(bytes(content) for content in contents(file.parts))
        staged = buffer.bytes[place["start"] : place["start"] + place["bytes"]]
        assert staged.numpy().tobytes() == expected
    buffer.close()


def test_the_writer_yields_to_the_trainer(tmp_path):
    store, engine = begin(config(tmp_path))
    resume_writing(store)
    advance(store, engine)
    niceness = os.getpriority(os.PRIO_PROCESS, store.background.process.pid)
    assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    store.background.close()


def test_a_save_that_is_due_waits_for_the_one_before(tmp_path):
    store, engine = begin(config(tmp_path))
    resume_writing(store)
    store.save(TrainState(4), engine, ToyLoader(store.config, alone()))
    assert committed_steps(store.folder) == [2]
    assert store.finish() == step_folder(store.folder, 4)
    store.background.close()


def test_the_last_save_of_a_stopped_run_follows_the_one_that_is_being_written(tmp_path):
    store, engine = begin(config(tmp_path))
    resume_writing(store)
    store.save(TrainState(3), engine, ToyLoader(store.config, alone()), last=True)
    assert committed_steps(store.folder) == [2, 3]
    store.background.close()


def test_retention_counts_the_checkpoint_that_is_being_written(tmp_path):
    train(config(tmp_path, 12, keep_last=2, keep_every=4), alone())
    assert committed_steps(tmp_path / "checkpoints") == [4, 8, 10, 12]


def test_a_rollback_returns_to_a_checkpoint_that_was_still_being_written(tmp_path):
    store, engine = begin(config(tmp_path))
    resume_writing(store)
    engine.weight.fill_(7)
    assert store.roll_back(TrainState(3), engine) == 2
    assert torch.equal(engine.weight, torch.zeros(3))
    store.background.close()


def limit_file_size(store, size):
    pid = store.background.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("policy", ["fatal", "warn", "retry"])
def test_a_full_disk_is_an_error_of_a_following_step(tmp_path, caplog, policy):
    store, engine = begin(config(tmp_path, on_save_failure=policy))
    resume_writing(store)
    advance(store, engine)
    limit_file_size(store, 1)
    store.save(TrainState(4), engine, ToyLoader(store.config, alone()))
    if policy == "warn":
        advance(store, engine)
        assert "training continues" in caplog.text
    else:
        with pytest.raises(CheckpointError, match=r"step 4 .*File too large.*older checkpoints"):
            advance(store, engine)
        assert caplog.text.count("trying again") == (3 if policy == "retry" else 0)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000002"]
    store.background.close()


@pytest.mark.parametrize("policy", ["fatal", "retry"])
def test_a_killed_writer_is_an_error_or_replaced(tmp_path, caplog, policy):
    store, engine = begin(config(tmp_path, on_save_failure=policy))
    os.kill(store.background.process.pid, signal.SIGKILL)
    if policy == "retry":
        advance(store, engine)
        assert (
            committed_steps(store.folder) == [2]
            and store.damage(step_folder(store.folder, 2)) == []
        )
        store.background.close()
        return
    with pytest.raises(CheckpointError, match="was killed.*loop.async_save=false"):
        advance(store, engine)
    assert list(store.folder.iterdir()) == []


def test_an_error_in_a_later_step_does_not_lose_a_checkpoint(tmp_path):
    class Fails(ToyEngine):
        def train_step(self, batch):
            if batch.step == 2:
                raise RuntimeError("step 3")
            return super().train_step(batch)

    settings = config(tmp_path)
    run = Run(tmp_path, settings, alone())
    with pytest.raises(RuntimeError, match="step 3"):
        fit(Fails(settings, alone()), ToyLoader(settings, alone()), run, settings.loop)
    assert committed_steps(tmp_path / "checkpoints") == [2]


def on_two_ranks(world, folder):
    """The writer of rank 1 dies; both ranks write again, and commit together."""
    settings = config(folder)
    store = CheckpointStore(folder / "checkpoints", settings, world, retry_waits_s=(0,))
    engine = ToyEngine(settings, world)
    store.background.prepare(engine.state_files())
    if world.rank == 1:
        os.kill(store.background.process.pid, signal.SIGKILL)
    store.save(TrainState(2), engine, ToyLoader(settings, world))
    advance(store, engine)
    damage = store.damage(step_folder(store.folder, 2))
    store.background.close()
    return damage, sorted(file_hashes(step_folder(store.folder, 2)))


def test_ranks_commit_together_after_one_writer_died(tmp_path):
    for damage, files in run_distributed(on_two_ranks, 2, tmp_path):
        assert damage == []
        assert files == ["rank_0.txt", "rank_1.txt", "toy.safetensors"]


def test_the_buffer_grows_with_the_state_and_archives_get_their_checksums(tmp_path):
    writer = BackgroundWriter(torch.device("cpu"))
    for number, size in enumerate((10, 100_000)):
        value = {"x": torch.arange(size), "y": torch.ones(3, dtype=torch.bfloat16)}
        files = [StateFile("deep/a.pt", torch_archive(value)), StateFile("b", [b"text"])]
        folder = tmp_path / str(number)
        writer.begin_write(folder, files)
        entries = writer.answer()["entries"]
        write_files(tmp_path / "at_once", files)
        for entry in entries:
            content = (folder / entry["path"]).read_bytes()
            assert content == (tmp_path / "at_once" / entry["path"]).read_bytes()
            assert len(content) == entry["bytes"]
        assert torch.equal(torch.load(folder / "deep" / "a.pt")["x"], value["x"])
    writer.close()


def test_lazy_readers_find_tensors_of_all_sizes_in_an_archive(tmp_path):
    values = {str(size): torch.arange(size, dtype=torch.uint8) for size in range(1, 256)}
    write_files(tmp_path, [StateFile("a.pt", torch_archive(values))])
    content = (tmp_path / "a.pt").read_bytes()
    for name, stored in read_pickle(tmp_path / "a.pt").items():
        assert content[stored.start :].startswith(bytes(range(int(name)))), name
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_the_process_ends_with_the_trainer(tmp_path):
    store, _ = begin(config(tmp_path))
    process = store.background.process
    resume_writing(store)
    store.background._connection.close()
    assert process.wait(timeout=60) == 0


def test_without_memory_for_the_buffer_a_checkpoint_is_written_at_once(tmp_path, caplog):
    settings = config(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", settings, alone())
    engine = ToyEngine(settings, alone())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # less than a page
    try:
        with caplog.at_level(logging.WARNING):
            store.save(TrainState(2), engine, ToyLoader(settings, alone()))
            store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "written at once" in caplog.text
    assert committed_steps(store.folder) == [2]
