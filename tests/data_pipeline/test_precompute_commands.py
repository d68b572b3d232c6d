"""status, retry, verify and estimate of precompute on real units, and concurrent tasks."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from landiff.configs import ConfigError
from landiff.configs.ownership import OwnedError
from landiff.data_pipeline.format.locks import locked
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.format.shards import (
    ShardWriter,
    read_manifest,
    read_part,
    read_sidecar,
    write_manifest,
)
from landiff.data_pipeline.format.tensors import pack_tensor
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.job import PrecomputeTask, TooManyColumnRejects
from landiff.data_pipeline.precompute.producers import build_producers
from landiff.data_pipeline.precompute.status import array_expression, format_table
from landiff.data_pipeline.precompute.units import (
    ColumnFolder,
    UnitWriter,
    shards_of_task,
    task_of_shard,
)
from landiff.data_pipeline.precompute.write import UnitWrite
from landiff.launchers.cli import main
from landiff.launchers.commands import parse_task
from landiff.launchers.data.commands import parse_fraction
from tests.data_pipeline.data_sets import write_column, write_raw
from tests.data_pipeline.precompute_data import (
    NUM_CLIPS,
    config,
    contents,
    copied,
    export_tokenizer,
    pan,
    write_clips,
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    export_tokenizer(folder, 0)
    return folder


@pytest.fixture(scope="module")
def finished(zoo, tmp_path_factory):
    """Raw shards with the columns latents and tokens."""
    folder = tmp_path_factory.mktemp("finished")
    write_clips(folder)
    precompute.run(config(folder, zoo, ["latents", "tokens"]))
    return folder


@pytest.fixture
def data(finished, tmp_path):
    return copied(finished, tmp_path / "data")


def latents(data, zoo, **fields):
    return config(data, zoo, ["latents"], **fields)


def write_latents_yaml(path, data, zoo) -> None:
    """Write a config of the column latents with batches of one clip."""
    settings = {
        "data": str(data),
        "zoo": str(zoo),
        "columns": {"latents": {"encoder": {"kind": "dct"}}},
        "device": "cpu",
        "batch_size": 1,
    }
    path.write_text(json.dumps(settings))


def test_status_counts_done_running_failed_and_left_with_rate_and_time_left(data, zoo):
    folder = ColumnFolder(data, "latents")
    entries = read_manifest(data).shards
    folder.withdraw(entries[0])
    folder.fail(entries[0], RuntimeError("no device"), "fingerprint")
    (data / "latents" / f".{entries[0].name}.tar.{os.uname().nodename}.{os.getppid()}.tmp").touch()
    (running,) = precompute.status(latents(data, zoo))
    assert (running.done, running.left, running.running, running.failed, running.samples) == (
        2,
        1,
        1,
        0,
        8,
    )
    next(folder.folder.glob(".*.tmp")).unlink()
    for entry, when in zip(entries[1:], (1000, 1010), strict=True):
        os.utime(folder.folder / f"{entry.name}.json", (when, when))
    (failed,) = precompute.status(latents(data, zoo))
    assert (failed.running, failed.failed, failed.samples_left) == (0, 1, 4)
    assert failed.rate == pytest.approx(0.5)  # 5 clips in 10 s
    assert failed.left_s == pytest.approx(8)  # 4 clips are left
    assert failed.bytes == sum(folder.sidecar(e).entry.bytes for e in entries[1:])
    text = format_table([failed])
    assert "000000: RuntimeError: no device" in text and "0:08" in text
    precompute.run(latents(data, zoo))
    (done,) = precompute.status(latents(data, zoo))
    assert (done.done, done.failed, done.errors) == (3, 0, ())
    assert not list(folder.folder.glob(".*.failed"))


def test_status_names_the_setting_that_makes_a_column_stale(data, zoo):
    changed = config(data, zoo, {"latents": {"encoder": {"kind": "dct"}, "sample_seed": 4}})
    (row,) = precompute.status(changed)
    assert row.changed == "sample_seed was None, is 4" and "sample_seed was None" in format_table(
        [row]
    )
    assert (row.done, row.left, row.stale) == (0, 3, 3)


def test_status_and_retry_detect_a_tokenizer_that_was_trained_again(data, tmp_path):
    zoo = tmp_path / "zoo"
    old = export_tokenizer(zoo, 0)
    tokens = config(data, zoo, ["tokens"])
    (row,) = precompute.status(tokens)
    assert (row.done, row.stale, row.changed) == (3, 0, "") and precompute.retry(tokens, 1) == {
        "tokens": ""
    }
    new = export_tokenizer(zoo, 1)
    (row,) = precompute.status(tokens)
    assert (row.done, row.left, row.stale) == (0, 3, 3)
    assert (
        row.changed == f"tokenizer was {old.reference}, is {new.reference}"
        and "redo=[tokens]" in format_table([row])
    )
    assert precompute.retry(tokens, 1) == {"tokens": "0"}


def test_a_task_without_a_shard_loads_no_encoder(data, zoo):
    shards = read_manifest(data).shards
    idle = next(number for number in range(50) if not shards_of_task(shards, (number, 50)))
    assert precompute.run(latents(data, zoo), task=(idle, 50)).stage_seconds == {"decode": 0.0}


def test_a_unit_that_fails_leaves_only_a_failure_record(tmp_path, zoo):
    write_clips(tmp_path, [2, 2], odd={2: pan(2, frames=16)})
    with pytest.raises(TooManyColumnRejects):
        precompute.run(latents(tmp_path, zoo))
    (row,) = precompute.status(latents(tmp_path, zoo))
    assert (row.done, row.failed) == (1, 1) and "frame_count 1" in row.errors[0]
    assert not list((tmp_path / "latents").glob(".*.tmp"))


def test_an_error_of_an_encoder_names_the_column_and_the_clips(tmp_path, zoo):
    def refuse(video, noise=None):
        raise RuntimeError("no memory")

    def failing(names, context):
        made = build_producers(names, context)
        made["latents"].codec.encode = refuse
        return made

    write_clips(tmp_path, [3])
    settings = latents(tmp_path, zoo)
    with pytest.raises(RuntimeError, match="no memory") as error:
        PrecomputeTask(settings, read_manifest(tmp_path), (0, 1), failing).run()
    assert error.value.__notes__ == ["column 'latents', clips clip0000, clip0001, clip0002"]
    (row,) = precompute.status(settings)
    assert "no memory; column 'latents', clips clip0000, clip0001" in row.errors[0]


def test_columns_are_finished_where_their_preview_cannot_be_written(
    data, zoo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "precompute").mkdir(parents=True)
    (tmp_path / "runs" / "precompute" / "tensorboard").touch()  # no folder
    write_latents_yaml(tmp_path / "latents.yaml", data, zoo)
    code = main(["precompute", "--config", "latents.yaml"])
    out, err = capsys.readouterr()
    assert code == 0 and "has the columns latents" in out
    assert "the columns are complete, but their preview in runs/precompute" in err
    assert "could not be written: File exists" in err


def test_an_interrupted_task_records_the_failure_and_leaves_no_temporaries(data, zoo, tmp_path):
    for entry in read_manifest(data).shards:
        ColumnFolder(data, "latents").withdraw(entry)
    write_latents_yaml(tmp_path / "latents.yaml", data, zoo)
    task = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(main(["precompute", "--config", str(tmp_path / "latents.yaml")]))
    )
    with locked(data / "latents"):  # it cannot commit
        task.start()
        while not list((data / "latents").glob(".*.tar.*.tmp")):
            assert task.is_alive()
            time.sleep(0.001)
        task.terminate()
        time.sleep(0.2)
    task.join()
    assert task.exitcode == 130
    assert not list((data / "latents").glob(".*.tmp"))
    (row,) = precompute.status(latents(data, zoo))
    assert row.running == 0 and (row.errors or not row.left)
    assert all("its task was interrupted" in error for error in row.errors)


def run_on_a_small_disk(data, zoo) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"File too large: '.*/latents/0000..\.tar'"):
        precompute.run(latents(data, zoo))


def test_a_full_disk_is_one_clear_error_and_costs_what_did_not_fit(data, zoo):
    expected = {
        name: content
        for name, content in contents(data, ["latents"]).items()
        if name.endswith((".tar", ".json"))
    }
    for entry in read_manifest(data).shards:
        ColumnFolder(data, "latents").withdraw(entry)
    task = multiprocessing.get_context("fork").Process(target=run_on_a_small_disk, args=(data, zoo))
    task.start()
    task.join()
    assert task.exitcode == 0
    assert not list((data / "latents").glob(".*.tmp"))
    (row,) = precompute.status(latents(data, zoo))
    assert (
        row.failed
        and row.failed == len(row.errors)
        and all("File too large" in error for error in row.errors)
    )
    precompute.run(latents(data, zoo))
    assert {
        name: content
        for name, content in contents(data, ["latents"]).items()
        if name.endswith((".tar", ".json"))
    } == expected


def test_retry_names_the_tasks_whose_shards_are_missing(data, zoo):
    entries = read_manifest(data).shards
    assert precompute.retry(latents(data, zoo), 50) == {"latents": ""}
    for entry in entries[:2]:
        ColumnFolder(data, "latents").withdraw(entry)
    expected = sorted({task_of_shard(entry, 50) for entry in entries[:2]})
    assert precompute.retry(latents(data, zoo), 50) == {"latents": array_expression(expected)}
    for task in expected:
        precompute.run(latents(data, zoo), task=(task, 50))
    assert precompute.retry(latents(data, zoo), 50) == {"latents": ""}
    assert array_expression([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_a_task_of_an_array_takes_its_number_from_slurm(monkeypatch):
    for name, value in {"ID": "7", "MIN": "3", "COUNT": "2"}.items():  # sbatch --array=3,7
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert parse_task(None, 50) == (7, 50)
    assert parse_fraction("1%") == 0.01 and parse_fraction("0.5") == 0.5
    for wrong in ("0", "200%", "few"):
        with pytest.raises(ConfigError, match="--sample"):
            parse_fraction(wrong)


def test_tasks_of_an_array_that_runs_again_in_part_leave_the_merge_to_a_later_job(
    data, zoo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shards = read_manifest(data).shards
    numbers = sorted({task_of_shard(entry, 50) for entry in shards})
    shutil.rmtree(data / "latents")
    manifest = read_manifest(data)
    write_manifest(data, manifest.model_copy(update={"columns": {}}))
    write_latents_yaml(tmp_path / "latents.yaml", data, zoo)
    words = ["precompute", "--config", "latents.yaml"]
    assert main([*words, "retry", "--tasks", "50"]) == 0
    assert f"--array={array_expression(numbers)}" in capsys.readouterr().out
    assert main([*words, "retry"]) == 2
    assert "needs --tasks N" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(numbers[0]))
    assert main([*words, "--tasks", "50"]) == 0
    made = {path.stem for path in (data / "latents").glob("*.tar")}
    assert made == {entry.name for entry in shards if task_of_shard(entry, 50) == numbers[0]}
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    assert main([*words, "--no-finalize"]) == 0
    assert len(list((data / "latents").glob("*.tar"))) == len(shards)
    assert not read_manifest(data).columns
    assert main([*words, "finalize"]) == 0
    assert list(read_manifest(data).columns) == ["latents"]


def test_verify_reads_back_decodes_back_and_encodes_again(data, zoo):
    back, tokens = precompute.verify(config(data, zoo, ["latents", "tokens"]), sample=1.0)
    assert (back.shards, back.clips, back.equal, back.problems) == (3, NUM_CLIPS, NUM_CLIPS, [])
    assert min(back.measures["psnr"]) > 15 and "psnr" in str(back)
    assert (tokens.clips, tokens.equal, tokens.problems) == (NUM_CLIPS, NUM_CLIPS, [])
    assert (
        tokens.histogram.sum() == 28 * NUM_CLIPS
        and tokens.measures == {"bad_values": [0.0] * NUM_CLIPS}
        and tokens.histogram[16:].sum() == 0
        and "codes in use" in str(tokens)
    )
    assert precompute.verify(latents(data, zoo), sample=0.01)[0].shards == 1


def replace_unit(data, change) -> None:
    """Replace shard 0 of the latents and its sidecar by the tensors that `change` returns."""
    column, entry = ColumnFolder(data, "latents"), read_manifest(data).shards[0]
    old = column.sidecar(entry)
    with ShardWriter(
        column.folder, entry.name, fingerprint=old.fingerprint, raw_sha256=entry.sha256
    ) as writer:
        for key, _ in old.index:
            writer.add(
                key,
                {
                    "latents.safetensors": pack_tensor(
                        "latents", change(torch.zeros(5, 48, 8, 8)).bfloat16()
                    )
                },
            )


def test_verify_names_other_values_values_that_are_not_finite_flipped_bits_and_other_encoders(
    data, zoo, tmp_path
):
    replace_unit(data, lambda zeros: zeros)
    assert "its relative error is" in str(precompute.verify(latents(data, zoo), 1.0)[0])
    replace_unit(data, lambda zeros: zeros / zeros)
    assert "values out of range or not finite" in str(precompute.verify(latents(data, zoo), 1.0)[0])
    tar = data / "tokens" / "000001.tar"
    content = bytearray(tar.read_bytes())
    offset, size = read_sidecar(tar).index[0][1]["tokens.safetensors"]
    content[offset + size - 2] ^= 1  # the last token of the first sample
    tar.write_bytes(content)
    found = precompute.verify(config(data, zoo, ["tokens"]), 1.0)[0].problems
    assert "sha256 of its sidecar" in found[0] and "CRC-32" in found[1]
    other = tmp_path / "zoo"
    export_tokenizer(other, 1)
    assert "stale: computed with tokenizer@" in str(
        precompute.verify(config(data, other, ["tokens"]), 1.0)[0]
    )


def test_estimate_gives_disk_and_hours_from_a_few_clips_and_writes_nothing(data, zoo):
    ColumnFolder(data, "latents").withdraw(read_manifest(data).shards[2])
    before = contents(data, ["latents", "tokens"])
    estimate = precompute.estimate(config(data, zoo, ["latents", "tokens"]), clips=4)
    by_name = {row.column: row for row in estimate.columns}
    assert (by_name["latents"].clips_left, by_name["tokens"].clips_left) == (5, 0)
    size = read_sidecar(data / "latents" / "000000.tar").entry.bytes / 4
    # the end of the tar is not counted
    assert by_name["latents"].bytes == pytest.approx(5 * size, rel=0.2)
    assert by_name["latents"].seconds > 0 and estimate.decode_s > 0 and "latents" in str(estimate)
    assert contents(data, ["latents", "tokens"]) == before


def test_a_refused_duplicate_leaves_no_failure_record_of_a_finished_unit(data, zoo):
    precompute.run(latents(data, zoo))
    folder, entry = ColumnFolder(data, "latents"), read_manifest(data).shards[0]
    late = UnitWrite(folder, entry, folder.card())  # begun while the other task committed the unit
    late.give_up(OwnedError("the next shard is in use"))
    assert folder.failure(entry.name) is None
    folder.withdraw(entry)
    UnitWrite(folder, entry, folder.card()).give_up(OwnedError("the next shard is in use"))
    assert folder.failure(entry.name) is not None


def test_two_finalizes_at_the_same_moment_both_count(data, zoo):
    parts = [config(data, zoo, [name]) for name in ("latents", "tokens")]
    with locked(data):  # both have read the manifest before either may write it
        threads = [threading.Thread(target=precompute.finalize, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    assert set(read_manifest(data).columns) == {"latents", "tokens"}


def write_duplicate(data, value: int, barrier) -> None:
    folder, entry = ColumnFolder(data, "tokens"), read_manifest(data).shards[0]
    writer = UnitWriter(folder, entry, "mark")
    with writer:
        writer.add(
            "clip",
            {
                "tokens.safetensors": pack_tensor(
                    "tokens", torch.full((1000,), value, dtype=torch.int64)
                )
            },
        )
        barrier.wait()


def test_duplicate_tasks_whose_encoders_disagree_leave_a_matching_tar_and_sidecar(tmp_path):
    write_raw(tmp_path, [1])
    context = multiprocessing.get_context("fork")
    entry = read_manifest(tmp_path).shards[0]
    for _ in range(10):
        barrier = context.Barrier(3)
        processes = [
            context.Process(target=write_duplicate, args=(tmp_path, value, barrier))
            for value in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        folder = ColumnFolder(tmp_path, "tokens")
        content = (folder.folder / f"{entry.name}.tar").read_bytes()
        sidecar = folder.finished(entry, "mark")
        assert sidecar.entry.sha256 == hashlib.sha256(content).hexdigest()
        assert not list(folder.folder.glob(".*.tmp"))
        folder.withdraw(entry)


def test_a_finished_unit_of_a_duplicate_task_is_kept(tmp_path):
    write_raw(tmp_path, [1])
    manifest = write_column(tmp_path, "tokens", mark="mark")
    before = contents(tmp_path, ["tokens"])
    folder = ColumnFolder(tmp_path, "tokens")
    with UnitWriter(folder, manifest.shards[0], "mark") as writer:
        writer.add("other", {"tokens.safetensors": b"other"})
    assert {
        k: v for k, v in contents(tmp_path, ["tokens"]).items() if not k.endswith(".lock")
    } == before
    assert writer.sidecar == read_sidecar(tmp_path / "tokens" / "000000.tar")


def test_pyav_decodes_in_a_child_and_a_clip_that_it_cannot_take_costs_itself(tmp_path, zoo):
    write_clips(tmp_path, [3])
    exact = precompute.run(latents(tmp_path, zoo, decoder="pyav"))
    assert exact.columns["latents"].rejects == {}
    other = tmp_path / "other"
    write_clips(other, [3])
    manifest, tar = read_manifest(other), other / RAW / "000000.tar"
    sidecar = read_sidecar(tar)
    with ShardWriter(other / RAW, "000000", fingerprint="raw") as writer:
        for number, (key, _) in enumerate(sidecar.index):
            clip, meta = (
                read_part(other, manifest, key, "mp4"),
                json.loads(read_part(other, manifest, key, "json")),
            )
            if number == 1:  # as written, but no video
                clip = b"\\x00\\x00\\x00\\x20ftypisom" + bytes(range(256)) * 4
                meta["video_sha256"] = hashlib.sha256(clip).hexdigest()
            writer.add(key, {"mp4": clip, "json": json.dumps(meta).encode()})
    write_manifest(other, manifest.model_copy(update={"shards": [writer.sidecar.entry]}))
    summary = precompute.run(latents(other, zoo, decoder="pyav", max_bad_fraction=0.5))
    assert (
        sum(summary.columns["latents"].rejects.values()) == 1
        and summary.columns["latents"].clips == 3
    )
