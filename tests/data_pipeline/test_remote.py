"""Data sets at fsspec URLs: the same samples as local ones, and a cache of bounded size."""

from __future__ import annotations

import time

import fsspec
import numpy as np
import pytest

from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.format.schema import RAW
from landiff.data_pipeline.format.shards import ShardError, read_manifest
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.loading.remote import Remote
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw

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
        deadline = time.monotonic() + 20
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


def test_a_cache_that_cannot_hold_one_window_is_refused(data, tmp_path):
    with pytest.raises(ShardError, match="data.cache_gigabytes"):
        loader(tmp_path / "cache", f"file://{data}", cache_gigabytes=1e-6)
