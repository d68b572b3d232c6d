"""Data sets at fsspec URLs: the same samples as local ones, and a cache of bounded size."""

from __future__ import annotations

import hashlib
import time
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.data_pipeline.loading.phases import DataPhase
from landiff.data_pipeline.loading.remote import Remote
from landiff.training.checks import check_data
from tests.data_pipeline.data_sets import keys_of, write_buckets, write_column, write_raw
from tests.data_pipeline.http_server import served

SIZES = [7, 5, 9, 4]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_raw(folder, SIZES)
    write_column(folder, "tokens", bad={keys_of(0, 7)[2]})
    return folder


def loader(manifest, remote="", **fields) -> Loader:
    defaults = {"global_batch_size": 8, "shuffle_window": 2}
    config = DataConfig(manifest=manifest, remote=remote, **(defaults | fields))
    return Loader(config, ["tokens"], dp_rank=0, dp_size=1)


def taken(source: Loader, steps: int) -> list:
    """Key, caption and tokens of the samples of `steps` batches; closes the loader."""
    batches = []
    with source:
        for _ in range(steps):
            batch = []
            for sample in source.next_batch().samples:
                batch.append((sample.key, sample.meta.caption, sample.tensors["tokens"].tolist()))
            batches.append(batch)
    return batches


def upload(data, name: str) -> str:
    """Copy a data folder to fsspec's memory file system. Returns its URL."""
    memory = fsspec.filesystem("memory")
    for path in data.rglob("*.*"):
        memory.pipe_file(f"/{name}/{path.relative_to(data)}", path.read_bytes())
    return f"memory://{name}"


def num_tars(cache) -> int:
    return len(list((cache / "tokens").glob("*.tar")))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_remote_data_set_gives_the_samples_of_a_local_one(data, tmp_path, where):
    url = upload(data, "train") if where == "memory" else f"file://{data}"
    expected = taken(loader(data), 6)
    assert taken(loader(tmp_path / "cache", url, read_threads=3, checksum=True), 6) == expected
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_cache_stays_within_its_bound_and_evicted_shards_come_again(data, tmp_path):
    size = max(entry.bytes for entry in read_manifest(data).columns["tokens"].shards)
    bound = 3 * size
    source = loader(
        tmp_path / "cache", f"file://{data}", cache_gigabytes=bound / 1e9, prefetch_batches=0
    )
    reader = source._sets[0]._readers["tokens"]
    seen = []
    with source:
        for _ in range(12):
            seen += [s.key for s in source.next_batch().samples]
            reader.close()  # as if many files had been opened since
            used = sum(p.stat().st_blocks * 512 for p in (tmp_path / "cache").glob("*/*.tar"))
            assert used <= bound
    expected = []
    with loader(data, prefetch_batches=0) as local:
        for _ in range(12):
            expected += [s.key for s in local.next_batch().samples]
    assert seen == expected


def test_raw_shards_are_fetched_without_their_clips(data, tmp_path):
    remote = Remote(f"file://{data}", tmp_path / "cache", 1 << 30)
    entry = read_manifest(data).shards[0]
    reader = FolderReader(tmp_path / "cache", RAW, "json", [entry], remote=remote)
    whole = FolderReader(data, RAW, "json", [entry])
    assert all(np.array_equal(reader.read(0, slot), whole.read(0, slot)) for slot in range(7))
    complete = tmp_path / "cache" / RAW / f"{entry.name}.tar"
    assert not complete.exists()


def test_shards_of_later_batches_come_while_earlier_ones_are_used(data, tmp_path):
    sizes = [entry.bytes for entry in read_manifest(data).columns["tokens"].shards]
    with loader(
        tmp_path / "cache", f"file://{data}", prefetch_batches=1, global_batch_size=2
    ) as source:
        first = [s.key for s in source.next_batch().samples]
        deadline = time.monotonic() + 120
        while num_tars(tmp_path / "cache") < len(SIZES) and time.monotonic() < deadline:
            time.sleep(0.01)  # the second window is downloaded before its first sample is read
        assert num_tars(tmp_path / "cache") == len(SIZES)
        state = source.state_dict()
        rest = taken(source, 3)
    bound = sum(sorted(sizes)[-2:]) / 0.75  # one window fits, and nothing more
    with loader(
        tmp_path / "small",
        f"file://{data}",
        prefetch_batches=1,
        global_batch_size=2,
        cache_gigabytes=bound / 1e9,
    ) as source:
        assert [s.key for s in source.next_batch().samples] == first
        time.sleep(0.2)
        assert num_tars(tmp_path / "small") <= 3
        source.load_state_dict(state)
        assert taken(source, 3) == rest


def test_a_loader_that_is_closed_does_not_wait_for_what_is_being_fetched(data, tmp_path):
    source = loader(tmp_path / "cache", f"file://{data}", prefetch_batches=1, global_batch_size=2)
    source.close()
    remote, entry = source._remotes[0], read_manifest(data).shards[3]
    (tmp_path / "cache" / "tokens" / f"{entry.name}.tar").unlink(missing_ok=True)
    with pytest.raises(ShardError, match=r"tokens/000003.tar is no longer needed"):
        remote.fetch(
            "tokens", read_manifest(data).columns["tokens"].shards[3], "tokens.safetensors"
        )
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_damage_on_the_way_and_what_is_missing_are_named(data, tmp_path):
    tar = data / "tokens" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ShardError, match=r"tokens/000001.tar has sha256"):
        taken(loader(tmp_path / "cache", f"file://{data}"), 6)
    tar.unlink()
    with pytest.raises(ShardError, match=r"tokens/000001.tar does not exist"):
        taken(loader(tmp_path / "second", f"file://{data}"), 6)
    with pytest.raises(ShardError, match=r"manifest.json does not exist"):
        loader(tmp_path / "third", f"file://{tmp_path}/nowhere")
    with pytest.raises(ShardError, match="data.remote = nosuch://x"):
        loader(tmp_path / "fourth", "nosuch://x")


class ClosedFiles(LocalFileSystem):
    """Files that need credentials that this user does not have, as s3fs reports it."""

    protocol = "closed"
    reads: ClassVar[list[str]] = []

    def cat_file(self, path: str, **kwargs: object) -> bytes:
        self.reads.append(path)
        raise PermissionError("Access Denied")


def test_wrong_credentials_are_named_at_once_with_the_key(data, tmp_path):
    """A wrong key does not become right: nothing is tried again."""
    fsspec.register_implementation("closed", ClosedFiles, clobber=True)
    for url, text in (
        (f"closed://{data}", "cannot be read: Access Denied; check the credentials"),
        (f"file://{tmp_path}/nowhere", "manifest.json does not exist"),
    ):
        config = DataConfig(manifest=tmp_path / "cache", remote=url, global_batch_size=1)
        manifests, problems = check_data(config, [])
        assert manifests == [] and len(problems) == 1
        assert str(problems[0]).startswith(f"data.remote = {url}: ") and text in str(problems[0])
    assert len(ClosedFiles.reads) == 1


def test_a_cache_that_cannot_hold_one_window_is_refused(data, tmp_path):
    with pytest.raises(ShardError, match="data.cache_gigabytes"):
        loader(tmp_path / "cache", f"file://{data}", cache_gigabytes=1e-6)


# -------------------------------------------------------------------- web servers, buckets

IMAGE, VIDEO, TALL = "1x32x32", "17x32x32", "17x32x16"


def video_of(key: str) -> dict[str, object]:
    """Each clip is of a video of its own."""
    return {"source_sha256": hashlib.sha256(key.encode()).hexdigest()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    pytest.importorskip("aiohttp", reason="pip install '.[test]'")
    folder = tmp_path_factory.mktemp("mixed")
    buckets = [IMAGE, VIDEO, IMAGE, TALL, VIDEO, IMAGE]
    sizes = [12, 9, 11, 7, 8, 6]
    return write_buckets(folder, buckets, sizes, meta_of=video_of)


def curriculum(manifest, remote="", **fields) -> tuple[DataPhase, ...]:
    """Videos, from step 4 on images too, in balanced batches; the first shard is held out."""

    def config(buckets, **changes):
        fixed = {"global_batch_size": 4, "shuffle_window": 2, "checksum": True, "buckets": buckets}
        fixed["validation"] = {"clips": keys_of(0, 12)}
        return DataConfig(manifest=manifest, remote=remote, **(fixed | fields | changes))

    every = config((IMAGE, VIDEO, TALL), balance_tokens=True, where="fps > 7")
    return (
        DataPhase(0, 0, config((VIDEO,))),
        DataPhase(1, 4, every, factors={IMAGE: 2}),
    )


def training_batches(phases, steps, ranks, state=None) -> tuple[list, dict]:
    """All that a trainer reads from the batches of all ranks, and the state after them."""
    found = []
    loaders = [PhasedLoader(phases, ["tokens"], dp_rank=r, dp_size=ranks) for r in range(ranks)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    for _ in range(steps):
        samples = {}
        batches = [loader.next_batch() for loader in loaders]
        for batch in batches:
            for sample in batch.samples:
                tensor = sample.tensors["tokens"].tolist()
                samples[sample.position] = (sample.index, sample.meta, tensor)
        place = (batches[0].step, batches[0].bucket, batches[0].global_batch_size)
        found.append((place, [samples[position] for position in sorted(samples)]))
    state = loaders[0].state_dict()
    for loader in loaders:
        loader.close()
    return found, state


def test_batches_of_buckets_from_a_web_server_are_those_of_local_data(mixed, tmp_path, monkeypatch):
    """Also if each first request fails, with a small cache, and after resuming."""
    monkeypatch.setattr("landiff.data_pipeline.loading.remote.FIRST_PAUSE_S", 0.0)
    expected, last = training_batches(curriculum(mixed), 20, 1)
    assert {place[1] for place, _ in expected} == {IMAGE, VIDEO, TALL}
    window = 6 * max(entry.bytes for entry in read_manifest(mixed).columns["tokens"].shards)
    with served(mixed, failures=1) as server:
        remote = {"remote": server.url, "cache_gigabytes": window / 1e9}
        phases = curriculum(tmp_path / "a", **remote)
        assert training_batches(phases, 20, 2) == (expected, last)
        for stop in (3, 9):  # in either phase, into an empty cache
            before, state = training_batches(phases, stop, 1)
            other = curriculum(tmp_path / f"b{stop}", **remote)
            after, end = training_batches(other, 20 - stop, 2, state)
            assert (before + after, end) == (expected, last)
        assert server.requests["/tokens/000001.tar"] > 1


def test_a_cache_holds_a_window_of_each_bucket(mixed, tmp_path):
    sizes = [entry.bytes for entry in read_manifest(mixed).columns["tokens"].shards]
    phase = {"global_batch_size": 4, "shuffle_window": 1, "buckets": (IMAGE, VIDEO)}
    with served(mixed) as server:
        phase |= {"manifest": tmp_path / "cache", "remote": server.url}
        needed = max(sizes[0], sizes[2], sizes[5]) + max(sizes[1], sizes[4])
        with pytest.raises(ShardError, match=r"data.cache_gigabytes.*shuffle_window"):
            Loader(
                DataConfig(**phase, cache_gigabytes=(needed - 2) / 1e9),
                ["tokens"],
                dp_rank=0,
                dp_size=1,
            )
        config = DataConfig(**phase, cache_gigabytes=(needed + 2) / 1e9)
        Loader(config, ["tokens"], dp_rank=0, dp_size=1).close()


def test_a_web_server_without_ranges_or_in_error_is_named(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("landiff.data_pipeline.loading.remote.FIRST_PAUSE_S", 0.0)
    with served(mixed, ranges=False) as server, pytest.raises(ShardError) as error:
        training_batches(curriculum(tmp_path / "a", server.url), 1, 1)
    assert "/raw/" in str(error.value) and "supports HTTP Range requests" in str(error.value)
    with served(mixed, failures=99) as server, pytest.raises(ShardError, match=r"cannot be.*503"):
        training_batches(curriculum(tmp_path / "b", server.url), 1, 1)


class ContendedRemote(Remote):
    """Other processes delete the first `limit` shards as soon as they are downloaded."""

    limit = 0
    deleted = 0

    def fetch(self, folder, entry, part):
        stored = super().fetch(folder, entry, part)
        if self.deleted < self.limit:
            self.deleted += 1
            stored.unlink()
        return stored


@pytest.mark.parametrize("limit", [5, 1000])
def test_a_shard_is_deleted_from_the_cache_before_it_is_opened(data, tmp_path, limit):
    manifest = read_manifest(data)
    local = FolderReader(data, "tokens", "tokens.safetensors", manifest.columns["tokens"].shards)
    with served(data) as server:
        remote = ContendedRemote(server.url, tmp_path / "cache", 10**9)
        remote.limit = limit
        reader = FolderReader(remote.cache, "tokens", local.part, local.shards, remote=remote)
        if limit > 5:
            with pytest.raises(ShardError, match=r"deleted from the cache.*cache_gigabytes"):
                reader.read(1, 2)
        else:
            assert reader.read(1, 2).tobytes() == local.read(1, 2).tobytes()
            assert remote.deleted == limit
