"""Precompute over real clips with the small frozen encoders and a tiny tokenizer."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load as load_safetensors

from landiff.configs import Config, ConfigError
from landiff.configs.ownership import OwnedError, take
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.format.shards import (
    ShardError,
    ShardWriter,
    read_manifest,
    read_part,
    read_sidecar,
    write_manifest,
)
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader, require_encoder
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.interface import ProducerContext
from landiff.data_pipeline.precompute.job import PrecomputeTask, TooManyColumnRejects
from landiff.data_pipeline.precompute.producers import build_producers, clip_noise
from landiff.data_pipeline.precompute.units import ColumnCard, shards_of_task
from landiff.data_pipeline.video.codec import ClipDecoder
from landiff.model_zoo import frozen, registry
from landiff.model_zoo.frozen.base import NO_VARIANCE
from tests.data_pipeline.precompute_data import (
    COLUMNS,
    FAST,
    NUM_CLIPS,
    config,
    contents,
    copied,
    export_tokenizer,
    key_of,
    pan,
    write_clips,
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    export_tokenizer(folder, 0)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Raw shards that tests copy."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


@pytest.fixture
def data(clips, tmp_path):
    return copied(clips, tmp_path / "data")


@pytest.fixture(scope="module")
def whole(clips, zoo, tmp_path_factory):
    """A data set with all columns, the summary of the run, and the calls of `progress`."""
    data = copied(clips, tmp_path_factory.mktemp("whole"))
    calls = []
    summary = precompute.run(config(data, zoo), progress=lambda *args: calls.append(args))
    precompute.finalize(config(data, zoo))
    return data, summary, calls


# ----------------------------------------------------------------------------------------- content


def test_columns_hold_what_the_encoders_give(whole, zoo):
    data, _, _ = whole
    columns = config(data, zoo).columns
    vision = frozen.build(columns["features"].encoder)
    codec = frozen.build(columns["latents"].encoder)
    tokenizer = registry.load_model(registry.resolve(zoo, "tokenizer"))
    text = {
        name: frozen.build(columns[name].encoder) for name in ("text-minilm", "text-minilm-padded")
    }
    manifest = read_manifest(data)
    assert {name: (c.dtype, c.shape) for name, c in manifest.columns.items()} == {
        "features": ("float16", [5, 112, 4, 4]),
        "tokens": ("uint16", [28]),
        "latents": ("bfloat16", [5, 48, 8, 8]),
        "text-minilm": ("bfloat16", manifest.columns["text-minilm"].shape),
        "text-minilm-padded": ("bfloat16", [32, 384]),
    }
    with Loader(
        DataConfig(manifest=data, global_batch_size=NUM_CLIPS), list(COLUMNS), dp_rank=0, dp_size=1
    ) as loader:
        samples = list(loader.next_batch().samples)
    assert sorted(s.key for s in samples) == [key_of(i) for i in range(NUM_CLIPS)]
    with ClipDecoder() as decoder:
        clips = [
            decoder.decode(read_part(data, manifest, sample.key, "mp4")) for sample in samples[:4]
        ]
    for sample, clip in zip(samples, clips, strict=False):
        frames = torch.from_numpy(clip)[None]
        # other batch sizes may use another kernel: one unit in the last place of the stored dtype
        features = vision(frames[:, ::4])[0]
        torch.testing.assert_close(
            sample.tensors["features"], features.half(), rtol=2**-9, atol=2e-3
        )
        torch.testing.assert_close(
            sample.tensors["latents"], codec.encode(frames)[0].bfloat16(), rtol=2**-7, atol=1e-3
        )
        codes = tokenizer.encode(sample.tensors["features"].float()[None])[0]
        assert sample.tensors["tokens"].equal(codes.to(torch.uint16))
        for name, encoder in text.items():
            states, lengths = encoder([sample.meta.caption])
            assert sample.tensors[name].shape == (int(lengths[0]), 384)
            torch.testing.assert_close(
                sample.tensors[name], states[0, : lengths[0]].bfloat16(), rtol=2**-7, atol=1e-2
            )


def test_summary_progress_and_status_say_what_was_done(whole, zoo):
    data, summary, calls = whole
    for name in COLUMNS:
        column = summary.columns[name]
        assert (column.made, column.found, column.clips, column.rejects) == (3, 0, NUM_CLIPS, {})
    assert {
        "decode",
        "features",
        "tokens",
        "latents",
        "text",
        "write",
    } <= summary.stage_seconds.keys()
    for note in (
        "clips (text-minilm)",
        "clips (text-minilm-padded)",
        "clips (features, tokens, latents)",
    ):
        done = [done for done, total, what in calls if what.split(";")[0] == note]
        assert done == sorted(done) and (done[0], done[-1]) == (0, NUM_CLIPS)
    assert {total for _, total, _ in calls} == {NUM_CLIPS}
    assert "decode" in calls[-1][2] and "write" in calls[-1][2] and "%" in calls[-1][2]
    for row in precompute.status(config(data, zoo)):
        assert (row.done, row.left, row.stale, row.samples, row.rejects) == (3, 0, 0, NUM_CLIPS, 0)
    assert f"latents: {NUM_CLIPS} clips in 3 shards" in str(summary)


def test_plain_webdataset_reads_the_columns_aligned_with_raw(whole):
    data, _, _ = whole
    keys = {}
    for name in (RAW, *COLUMNS):
        urls = sorted(str(p) for p in (data / name).glob("*.tar"))
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        keys[name] = [s["__key__"] for s in samples]
        if name != RAW:
            stem = name.split("-")[0]
            assert all(set(load_safetensors(s[f"{stem}.safetensors"])) == {stem} for s in samples)
    assert all(k == [key_of(i) for i in range(NUM_CLIPS)] for k in keys.values())


def test_tokens_are_the_same_with_and_without_the_features_column(whole, data, zoo):
    precompute.run(config(data, zoo, ["tokens"]))
    assert not (data / "features").exists()
    assert contents(data, ["tokens"]) == contents(whole[0], ["tokens"])
    (data / "tokens" / "000001.json").unlink()
    precompute.run(config(data, zoo, ["features"]))
    summary = precompute.run(config(data, zoo, ["tokens"]))
    assert contents(data, ["tokens"]) == contents(whole[0], ["tokens"])
    assert (
        summary.columns["tokens"].made == 1
        and summary.stage_seconds["decode"] == 0
        and "features" not in summary.stage_seconds
    )


def test_the_manifest_tells_a_trainer_which_encoders_made_a_column(whole, zoo):
    manifest = read_manifest(whole[0])
    entry = registry.resolve(zoo, "tokenizer")
    assert manifest.columns["tokens"].encoder == entry.reference
    require_encoder(manifest, "tokens", entry.fingerprint, "model.tokenizer")
    with pytest.raises(ShardError, match=entry.fingerprint):
        require_encoder(manifest, "tokens", "0000000000000000", "model.tokenizer")


def test_sampled_noise_depends_on_the_clip_alone():
    first = clip_noise(0, "a", (2, 3))
    assert first.equal(clip_noise(0, "a", (2, 3)))
    assert not first.equal(clip_noise(0, "b", (2, 3))) and not first.equal(
        clip_noise(1, "a", (2, 3))
    )


def test_latents_hold_mean_and_log_variance_where_they_are_asked_for(data, zoo, whole):
    both = {"latents": {"encoder": {"kind": "dct"}, "moments": True}}
    precompute.run(config(data, zoo, both))
    column = precompute.finalize(config(data, zoo, both)).columns["latents"]
    assert (
        column.shape == [5, 96, 8, 8]
        and column.fingerprint != read_manifest(whole[0]).columns["latents"].fingerprint
    )

    def samples(folder: Path):
        with Loader(
            DataConfig(manifest=folder, global_batch_size=NUM_CLIPS),
            ["latents"],
            dp_rank=0,
            dp_size=1,
        ) as loader:
            return {s.key: s.tensors["latents"] for s in loader.next_batch().samples}

    means = samples(whole[0])
    for key, moments in samples(data).items():
        assert moments[:, :48].equal(means[key]) and moments[:, 48:].eq(NO_VARIANCE).all()
    (check,) = precompute.verify(config(data, zoo, both), 1.0)
    assert not check.problems and min(check.measures["psnr"]) > 15


class TwoAtATime:
    """A producer whose batches finish only in pairs.

    Batches in the middle of a shard finish once earlier ones are on disk.
    """

    card = ColumnCard.of("two at a time", {"encoders": {}, "dtype": "uint8"}, {})

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.together = threading.Barrier(2)

    def prepare(self, entry) -> bool:
        return True

    def begin(self, entry, clips):
        return self.encode

    def encode(self, batch, cache):
        self.together.wait(timeout=60)
        deadline = time.monotonic() + 60
        while batch[0].position >= 2 and not list(self.folder.glob(".*.tar.*.tmp")):
            assert time.monotonic() < deadline, "nothing is written while batches are encoded"
            time.sleep(0.001)
        return [torch.tensor([clip.frames[0, 0, 0, 0], clip.position]) for clip in batch]


def test_batches_are_encoded_at_the_same_time_and_written_meanwhile_in_order(clips, data, zoo):
    mine = config(data, zoo, ["latents"], batch_size=1, encode_threads=2)
    summary = PrecomputeTask(
        mine,
        read_manifest(data),
        (0, 1),
        lambda names, context: {"latents": TwoAtATime(data / "latents")},
    ).run()
    assert summary.columns["latents"].made == 3
    keys = []
    for entry in read_manifest(data).shards:
        sidecar = read_sidecar(data / "latents" / f"{entry.name}.tar")
        keys += [key for key, _ in sidecar.index]
    assert keys == [key_of(i) for i in range(NUM_CLIPS)]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_made_does_not_depend_on_the_number_of_threads(whole, data, zoo, threads):
    names = ["tokens", "text-minilm"]
    precompute.run(config(data, zoo, names, encode_threads=threads, decode_threads=threads))
    for name in names:
        assert contents(data, [name]) == contents(whole[0], [name])


@pytest.mark.parametrize(("device", "together"), [("cpu", True), ("cuda", False)])
def test_encoders_of_two_threads_run_together_on_a_cpu_and_in_turn_on_a_gpu(
    data, zoo, device, together
):
    context = replace(ProducerContext.of(config(data, zoo)), device=torch.device(device))
    inside = threading.Barrier(2)

    def encode() -> bool:
        with context.encoding("features"):
            try:
                inside.wait(timeout=60 if together else 0.3)
            except threading.BrokenBarrierError:
                return False
            return True

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(encode) for _ in range(2)]
        assert [call.result() for call in calls] == [together] * 2


@pytest.mark.gpu
def test_inputs_are_copied_to_a_gpu_unchanged_while_another_encoder_runs(data, zoo):
    context = ProducerContext.of(config(data, zoo, device="cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    for number in range(20):
        videos = [pan(2 * number), pan(2 * number + 1)]
        with context.encoding("features"):
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            stacked = context.stack(videos)
            doubled = stacked.int() * 2
        del stacked  # its memory is free for the next copy
        assert torch.equal(doubled.cpu(), 2 * torch.from_numpy(np.stack(videos)).int())


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_are_compiled_if_chosen_and_the_fingerprint_stays(data, zoo, compiled):
    names = ["tokens", "latents", "text-minilm"]
    made = build_producers(names, ProducerContext.of(config(data, zoo, names)))
    settings = config(data, zoo, names, compile_blocks=compiled)
    again = build_producers(names, ProducerContext.of(settings))
    blocks = [
        again["tokens"].tokenizer.encoder.blocks[0],
        again["text-minilm"].encoder.network.encoder.layer[0],
    ]
    assert [block._compiled_call_impl is not None for block in blocks] == [compiled] * 2
    assert all(again[name].card.fingerprint == made[name].card.fingerprint for name in names)


def encoded_captions(settings: PrecomputeConfig) -> list[str]:
    """What the text encoder of the column text-minilm is asked for, sorted."""
    seen = []

    def counting(names, context):
        made = build_producers(names, context)
        made["text-minilm"].encoder.register_forward_pre_hook(
            lambda encoder, inputs: seen.extend(inputs[0])
        )
        return made

    PrecomputeTask(settings, read_manifest(settings.data), (0, 1), counting).run()
    return sorted(seen)


def test_a_column_may_take_another_caption_of_each_clip(data, zoo):
    settings = config(data, zoo, ["text-minilm"])
    second = settings.columns["text-minilm"].model_copy(update={"caption": 1})
    found = encoded_captions(settings.model_copy(update={"columns": {"text-minilm": second}}))
    # clips 0 to 2 have two captions; the others give their only one
    assert found == sorted(
        [
            *(f"seen again, {i}" for i in range(3)),
            *(f"a picture that moves, number {k}" for k in (1, 2, 3, 3, 4, 5)),
        ]
    )


def test_a_caption_of_several_clips_is_encoded_once_for_its_shard(data, zoo):
    seen = encoded_captions(config(data, zoo, ["text-minilm"], batch_size=1, encode_threads=3))
    # clips 2k and 2k + 1 share a caption; shards are 0-3, 4-6, 7-11: number 3 lies in two of them
    assert seen == sorted(f"a picture that moves, number {k}" for k in (0, 1, 2, 3, 3, 4, 5))


# ------------------------------------------------------------------------------ restarts and tasks


def modification_times(data: Path) -> dict[Path, int]:
    """Modification time of each file of the columns FAST, in ns."""
    paths = [path for path in data.glob("*/*") if path.parent.name in FAST]
    return {path: path.stat().st_mtime_ns for path in paths}


def test_finished_units_are_never_made_again(data, zoo):
    precompute.run(config(data, zoo, FAST))
    before = modification_times(data)
    summary = precompute.run(config(data, zoo, FAST))
    assert modification_times(data) == before
    assert all((c.made, c.found) == (0, 3) for c in summary.columns.values())


def test_a_damaged_or_incomplete_unit_is_made_again(data, zoo):
    precompute.run(config(data, zoo, FAST))
    expected = contents(data)
    (data / "features" / "000000.json").write_text("{")
    (data / "latents" / "000001.json").unlink()
    (data / "latents" / "000002.tar").write_bytes(b"short")
    assert [row.left for row in precompute.status(config(data, zoo, FAST))] == [1, 2]
    precompute.run(config(data, zoo, FAST))
    assert contents(data) == expected


def run_task(data: Path, zoo: Path, number: int, of: int) -> None:
    torch.set_num_threads(1)
    precompute.run(config(data, zoo, FAST, batch_size=1), task=(number, of))


def test_killed_at_any_moment_and_started_again_gives_the_same_bytes(clips, zoo, tmp_path):
    straight = copied(clips, tmp_path / "straight")
    precompute.run(config(straight, zoo, FAST, batch_size=1))
    killed = copied(clips, tmp_path / "killed")
    context = multiprocessing.get_context("fork")
    draw, kills = np.random.default_rng(0), 0
    for _ in range(6):
        before = set(killed.glob("*/*"))
        process = context.Process(target=run_task, args=(killed, zoo, 0, 1))
        process.start()
        while process.is_alive() and set(killed.glob("*/*")) == before:
            time.sleep(0.002)  # the work begins where files change; before it, encoders are built
        process.join(draw.uniform(0.0, 0.1))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
    assert kills
    run_task(killed, zoo, 0, 1)
    assert contents(killed) == contents(straight)  # no temporaries either


def test_several_tasks_and_duplicates_on_one_folder_are_safe(clips, zoo, tmp_path):
    alone = copied(clips, tmp_path / "alone")
    precompute.run(config(alone, zoo, FAST, batch_size=1))
    shared = copied(clips, tmp_path / "shared")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_task, args=(shared, zoo, *task))
        for task in ((0, 2), (1, 2), (1, 2))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    first, *same = [process.exitcode for process in processes]
    assert first == 0 and 0 in same  # of two that make one unit, the second is refused
    assert contents(shared) == contents(alone)
    precompute.finalize(config(shared, zoo, FAST))


def test_a_unit_has_one_owner(clips, zoo, tmp_path):
    data = copied(clips, tmp_path / "data")
    (data / "latents").mkdir()
    first = read_manifest(data).shards[0].name
    with (
        take(data / "latents" / f".{first}.owner", "the unit"),
        pytest.raises(OwnedError) as refused,
    ):
        precompute.run(config(data, zoo, FAST))
    assert f"shard {first} of column 'latents' in {data} is in use by process {os.getpid()}" in str(
        refused.value
    )
    precompute.run(config(data, zoo, FAST))
    assert not list(data.rglob("*.owner")) and not list(data.rglob("*.failed"))


def test_each_shard_belongs_to_one_task(clips):
    shards = read_manifest(clips).shards
    for tasks in (1, 2, 3, 7):
        owned = []
        for task in range(tasks):
            owned += shards_of_task(shards, (task, tasks))
        assert sorted(owned) == [0, 1, 2]
    with pytest.raises(ConfigError, match="task 3/3"):
        shards_of_task(shards, (3, 3))


def test_temporaries_of_dead_processes_are_deleted_and_those_of_running_ones_kept(data, zoo):
    folder = data / "latents"
    folder.mkdir()
    host = os.uname().nodename
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    dead = folder / f".000000.tar.{host}.{process.pid}.tmp"
    alive = folder / f".000000.tar.{host}.{os.getppid()}.tmp"
    far = folder / ".000000.tar.elsewhere.7.tmp"
    old = folder / ".000001.tar.elsewhere.7.tmp"
    for path in (dead, alive, far, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    precompute.run(config(data, zoo, ["latents"]))
    assert sorted(folder.glob(".*.tmp")) == sorted([alive, far])


# ---------------------------------------------------------------------------------------- finalize


def test_finalize_lists_the_shards_that_are_missing(data, zoo):
    with pytest.raises(
        ShardError, match=r"column 'features' lacks 3 of 3 shards: 000000, 000001, 000002"
    ):
        precompute.finalize(config(data, zoo, FAST))
    precompute.run(config(data, zoo, FAST))
    (data / "latents" / "000001.json").unlink()
    with pytest.raises(ShardError, match=r"^column 'latents' lacks 1 of 3 shards: 000001\."):
        precompute.finalize(config(data, zoo, FAST))
    assert not read_manifest(data).columns


def test_finalize_adds_to_the_columns_that_are_there(data, zoo):
    for name in FAST:
        precompute.run(config(data, zoo, [name]))
        manifest = precompute.finalize(config(data, zoo, [name]))
    assert set(manifest.columns) == set(FAST) and manifest == read_manifest(data)


# --------------------------------------------------------------------------------------- bad clips


@pytest.fixture
def odd_data(tmp_path):
    """Of 15 clips, clip 1 has 16 frames, clip 5 an empty caption, clip 9 damaged bytes."""
    write_clips(tmp_path, [5, 5, 5], odd={1: pan(1, frames=16)})
    manifest = read_manifest(tmp_path)
    entry = manifest.shards[1]
    parts = {
        n: (
            read_part(tmp_path, manifest, key_of(n), "mp4"),
            json.loads(read_part(tmp_path, manifest, key_of(n), "json")),
        )
        for n in range(5, 10)
    }
    with ShardWriter(tmp_path / RAW, entry.name, fingerprint="raw") as writer:
        for number, (clip, meta) in parts.items():
            meta["caption"] = " " if number == 5 else meta["caption"]
            clip = clip[:-100] + bytes(100) if number == 9 else clip
            writer.add(key_of(number), {"mp4": clip, "json": json.dumps(meta).encode()})
    shards = [manifest.shards[0], writer.sidecar.entry, manifest.shards[2]]
    write_manifest(tmp_path, manifest.model_copy(update={"shards": shards}))
    return tmp_path


def test_a_bad_clip_costs_itself_and_only_in_the_columns_that_cannot_take_it(odd_data, zoo):
    names = ["features", "tokens", "latents", "text-minilm"]
    summary = precompute.run(config(odd_data, zoo, names, max_bad_fraction=0.2))
    manifest = precompute.finalize(config(odd_data, zoo, names, max_bad_fraction=0.2))
    assert summary.columns["latents"].rejects == {"frame_count": 1, "damaged": 1}
    assert manifest.reject_counts == {
        "features/damaged": 1,
        "features/frame_count": 1,
        "latents/damaged": 1,
        "latents/frame_count": 1,
        "text-minilm/empty_caption": 1,
        "tokens/damaged": 1,
        "tokens/frame_count": 1,
    }
    assert {(r.stage, r.key) for r in manifest.rejects} == {
        *((name, key_of(1)) for name in names[:3]),
        *((name, key_of(9)) for name in names[:3]),
        ("text-minilm", key_of(5)),
    }
    assert [s.missing for s in manifest.columns["latents"].shards] == [(1,), (4,), ()]
    with Loader(
        DataConfig(manifest=odd_data, global_batch_size=12), names, dp_rank=0, dp_size=1
    ) as loader:
        assert loader.num_samples == 12
        assert sorted(s.key for s in loader.next_batch().samples) == [
            key_of(n) for n in range(15) if n not in (1, 5, 9)
        ]


def test_tokens_leave_out_what_the_features_column_left_out(odd_data, zoo):
    precompute.run(config(odd_data, zoo, ["features"], max_bad_fraction=0.2))
    summary = precompute.run(config(odd_data, zoo, ["tokens"], max_bad_fraction=0.2))
    assert summary.columns["tokens"].rejects == {"no_features": 2}


def test_too_many_bad_clips_stop_the_job_and_name_the_reasons(odd_data, zoo):
    with pytest.raises(
        TooManyColumnRejects,
        match=r"'latents': 2 of 15 clips were rejected \(.*damaged 1.*max_bad_fraction = 0.1\.",
    ):
        precompute.run(config(odd_data, zoo, ["latents"], max_bad_fraction=0.1))
    assert not (odd_data / "latents" / "000002.json").exists()
    precompute.run(config(odd_data, zoo, ["latents"], max_bad_fraction=0.2))


def test_features_that_do_not_fit_the_tokenizer_are_rejected_by_size(tmp_path, zoo):
    write_clips(tmp_path, [2], odd={1: pan(1, size=128)})
    summary = precompute.run(config(tmp_path, zoo, ["tokens"], max_bad_fraction=0.5))
    assert summary.columns["tokens"].rejects == {"feature_size": 1}


def test_tokens_of_every_bucket_that_the_tokenizer_was_trained_on(tmp_path):
    write_clips(tmp_path, [3], odd={1: pan(1, frames=1), 2: pan(2, size=128)})
    export_tokenizer(tmp_path / "zoo", 0, buckets=["1x64x64", "17x128x128"])
    summary = precompute.run(config(tmp_path, tmp_path / "zoo", ["tokens"], max_bad_fraction=0.5))
    assert summary.columns["tokens"].rejects == {}


# ----------------------------------------------------------------------------------- stale columns


def test_a_changed_encoder_is_refused_naming_both_until_told_to_redo(data, tmp_path):
    zoo = tmp_path / "zoo"
    old = export_tokenizer(zoo, 0)
    precompute.run(config(data, zoo, ["tokens"]))
    precompute.finalize(config(data, zoo, ["tokens"]))
    before = contents(data, ["tokens"])
    new = export_tokenizer(zoo, 1)
    with pytest.raises(ConfigError) as refusal:
        precompute.run(config(data, zoo, ["tokens"]))
    assert (
        old.fingerprint in str(refusal.value)
        and new.fingerprint in str(refusal.value)
        and "redo=[tokens]" in str(refusal.value)
    )
    assert contents(data, ["tokens"]) == before
    summary = precompute.run(config(data, zoo, ["tokens"], redo=["tokens"]))
    assert summary.columns["tokens"].made == 3
    with pytest.raises(
        ShardError, match="precompute finalize"
    ):  # the manifest still lists the old shards
        Loader(
            DataConfig(manifest=data, global_batch_size=1), ["tokens"], dp_rank=0, dp_size=1
        ).next_batch()
    assert (
        precompute.finalize(config(data, zoo, ["tokens"])).columns["tokens"].encoder
        == new.reference
    )
    precompute.run(config(data, zoo, ["tokens"]))  # later runs need no redo


def test_an_interrupted_redo_leaves_no_mixture(data, tmp_path):
    zoo = tmp_path / "zoo"
    export_tokenizer(zoo, 0)
    precompute.run(config(data, zoo, ["tokens"]))
    export_tokenizer(zoo, 1)
    mine = config(data, zoo, ["tokens"], redo=["tokens"])
    shards = read_manifest(data).shards
    all_tasks = []
    for tasks in range(2, 99):
        all_tasks += [(number, tasks) for number in range(tasks)]
    task = next(task for task in all_tasks if 0 < len(shards_of_task(shards, task)) < 3)
    precompute.run(mine, task=task)
    (row,) = precompute.status(mine)
    assert row.left and row.stale == row.left
    with pytest.raises(ShardError, match="lacks"):
        precompute.finalize(mine)


def test_units_of_raw_shards_that_changed_are_made_again(data, zoo):
    precompute.run(config(data, zoo, ["latents"]))
    old = contents(data, ["latents"])
    write_clips(data, odd={0: pan(99)})
    summary = precompute.run(config(data, zoo, ["latents"]))
    assert (summary.columns["latents"].made, summary.columns["latents"].found) == (1, 2)
    changed = {
        name for name, content in contents(data, ["latents"]).items() if content != old[name]
    }
    assert changed == {"latents/000000.tar", "latents/000000.json"}


# ------------------------------------------------------------------------------------------ config


def problem(columns: dict, **fields) -> str:
    with pytest.raises(ConfigError) as error:
        config(Path("data"), Path("zoo"), columns, **fields)
    return str(error.value)


def test_mistakes_in_the_config_are_named():
    assert "columns.tokens" in problem(
        {"tokens": {"encoder": {"kind": "efficientnet-lite0"}}}
    ) and "columns is empty" in problem({})
    assert "colums" in problem({"colums": {"encoder": {"kind": "dct"}}})
    assert "leave one out" in problem(
        {"latents": {"encoder": {"kind": "dct"}, "moments": True, "sample_seed": 1}}
    )
    assert "redo names latents" in problem({"features": COLUMNS["features"]}, redo=["latents"])


def test_the_kind_of_a_column_follows_from_its_name(data, zoo):
    loaded = config(data, zoo)
    assert [c.kind for c in loaded.columns.values()] == [
        "features",
        "tokens",
        "latents",
        "text",
        "text",
    ]
    assert all(isinstance(c, Config) for c in loaded.columns.values())


def test_a_tokenizer_that_the_zoo_lacks_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match="has no 'tokenizer'"):
        precompute.run(config(data, tmp_path / "empty", ["tokens"]))
