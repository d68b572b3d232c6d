"""The loader on real shards: order, resume, errors."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from landiff.configs import ConfigError
from landiff.data_pipeline.format.schema import RAW, Reject
from landiff.data_pipeline.format.shards import (
    ShardError,
    ShardWriter,
    read_manifest,
    read_sidecar,
    write_manifest,
)
from landiff.data_pipeline.format.tensors import Buffers, pack_tensor, parse_tensor
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader, require_encoder
from tests.data_pipeline.data_sets import keys_of, raw_sample, value_of, write_column, write_raw

SIZES = [7, 5, 0, 9, 4, 5]  # 30 samples
BAD_TOKENS = {keys_of(0, 7)[2], keys_of(3, 9)[0], keys_of(3, 9)[8]}
BAD_TEXT = {keys_of(0, 7)[2], keys_of(1, 5)[4]}
COLUMNS = ["tokens", "text-minilm"]
NUM_GOOD = 30 - 4


@pytest.fixture
def data(tmp_path):
    write_raw(tmp_path, SIZES)
    write_column(tmp_path, "tokens", bad=BAD_TOKENS)
    write_column(tmp_path, "text-minilm", bad=BAD_TEXT)
    return tmp_path


def loader(data: Path, rank: int = 0, size: int = 1, columns=COLUMNS, **config) -> Loader:
    fields = {"manifest": data, "global_batch_size": 30, "shuffle_window": 2, "seed": 5} | config
    return Loader(DataConfig(**fields), columns, dp_rank=rank, dp_size=size)


def take(source: Loader, steps: int) -> list[list[tuple]]:
    """Position, key and tokens of the samples of `steps` batches."""
    batches = []
    for _ in range(steps):
        batch = []
        for sample in source.next_batch().samples:
            tokens = sample.tensors["tokens"].tolist()
            batch.append((sample.index, sample.epoch, sample.position, sample.key, tokens))
        batches.append(batch)
    return batches


def interleave(parts: list[list]) -> list:
    """Global batch of the parts that ranks read."""
    return list(itertools.chain.from_iterable(zip(*parts, strict=True)))


def all_keys() -> list[str]:
    """Keys of all raw samples, in order."""
    keys = []
    for shard, samples in enumerate(SIZES):
        keys += keys_of(shard, samples)
    return keys


def test_each_sample_once_per_epoch_and_equal_global_batches_on_any_number_of_ranks(data):
    steps = NUM_GOOD // 2  # 15 epochs of 26 samples, 13 steps of 30: batches straddle epochs' ends
    with loader(data) as alone:
        expected = take(alone, steps)
        assert alone.num_samples == NUM_GOOD
    seen = Counter((epoch, key) for batch in expected for _, epoch, _, key, _ in batch)
    good = set(all_keys()) - BAD_TOKENS - BAD_TEXT
    assert seen == Counter({(epoch, key): 1 for epoch in range(15) for key in good})
    for step, batch in enumerate(expected):
        assert [index for index, *_ in batch] == list(range(step * 30, step * 30 + 30))
        assert [position for _, _, position, *_ in batch] == list(range(30))
    for ranks in (2, 3, 5):
        loaders = [
            loader(data, r, ranks, micro_batch_size={2: 5, 3: 2, 5: 3}[ranks]) for r in range(ranks)
        ]
        parts = [take(one, steps) for one in loaders]
        for step in range(steps):
            assert interleave([part[step] for part in parts]) == expected[step]
        for one in loaders:
            one.close()


def test_a_sample_brings_its_own_columns_and_its_metadata(data):
    with loader(data) as source:
        batch = source.next_batch()
        assert batch.step == 0 and batch.global_batch_size == 30
        for sample in batch.samples:
            assert sample.meta == raw_sample(sample.key, source="raw")
            assert set(sample.tensors) == set(COLUMNS)
            for tensor in sample.tensors.values():
                assert tensor.dtype == torch.uint16 and tensor.equal(value_of(sample.key))


def test_micro_batches_divide_the_part_of_a_rank_and_peers_get_equal_batches(data):
    with (
        loader(data, 1, 3, micro_batch_size=5) as one,
        loader(data, 1, 3, micro_batch_size=5) as peer,
    ):
        batch = one.next_batch()
        assert [len(micro) for micro in batch.micro_batches] == [5, 5]
        assert [s.position for s in batch.samples] == list(range(1, 30, 3))
        assert [s.key for s in batch.samples] == [s.key for s in peer.next_batch().samples]


def test_resume_in_the_middle_on_another_number_of_ranks_equals_the_straight_run(data):
    with loader(data) as straight:
        expected = take(straight, 7)
    halves = [loader(data, r, 2) for r in range(2)]
    for half in halves:
        take(half, 3)
    states = [json.loads(json.dumps(half.state_dict())) for half in halves]
    assert states[0] == states[1]
    for ranks in (1, 3, 5):
        loaders = [loader(data, r, ranks) for r in range(ranks)]
        for one in loaders:
            one.next_batch()  # a running loader discards what it read ahead
            one.load_state_dict(states[0])
        parts = [take(one, 4) for one in loaders]
        for step in range(4):
            assert interleave([part[step] for part in parts]) == expected[3 + step]


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_state_counts_what_was_handed_out_not_what_was_read_ahead(data, ahead):
    with loader(data, prefetch_batches=ahead) as source, loader(data, prefetch_batches=0) as plain:
        assert take(source, 2) == take(plain, 2)
        assert source.state_dict() == plain.state_dict()
        assert source.state_dict()["consumed_samples"] == 60


def test_reading_ahead_is_bounded_and_ends_with_the_loader(data):
    before = threading.active_count()
    source = loader(data, prefetch_batches=3)
    source.next_batch()
    assert len(source._ahead) == 3
    source.close()
    assert threading.active_count() == before


def test_seeds_and_windows_give_other_orders(data):
    keys = set()
    for seed, window in ((5, 2), (6, 2), (5, 3)):
        with loader(data, seed=seed, shuffle_window=window) as source:
            keys.add(tuple(s.key for s in source.next_batch().samples))
    assert len(keys) == 3


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("size", "micro"), [(4, 1), (2, 4), (31, 1)])
def test_a_global_batch_that_the_ranks_do_not_divide_is_refused(data, size, micro):
    with pytest.raises(
        ConfigError, match=rf"global_batch_size = 30 is not a multiple .* = {size} \* {micro}"
    ):
        loader(data, 0, size, micro_batch_size=micro)


@pytest.mark.parametrize("change", [{"seed": 6}, {"global_batch_size": 15}, {"shuffle_window": 3}])
def test_a_state_of_another_order_is_refused_by_name(data, change):
    state = loader(data).state_dict()
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        loader(data, **change).load_state_dict(state)


def test_a_state_of_another_data_set_or_of_columns_with_other_rejects_is_refused(data, tmp_path):
    other = tmp_path / "other"
    write_raw(other, SIZES, mark="others")
    for name in COLUMNS:
        write_column(other, name)
    state = loader(data).state_dict()
    with pytest.raises(ConfigError, match="data = "):
        loader(other).load_state_dict(state)
    with pytest.raises(ConfigError, match="num_samples"):
        loader(data, columns=["tokens"]).load_state_dict(state)
    same_number = {keys_of(4, 4)[i] for i in range(3)} | {keys_of(0, 7)[2]}
    write_column(data, "tokens", bad=same_number)
    write_column(data, "text-minilm")
    with pytest.raises(ConfigError, match="exclusions"):
        loader(data).load_state_dict(state)


def test_a_missing_column_or_data_set_is_named_with_the_command_that_makes_it(data, tmp_path):
    with pytest.raises(
        ShardError, match=r"no column 'latents'; it has: text-minilm, tokens.*landiff precompute"
    ):
        loader(data, columns=["tokens", "latents"])
    with pytest.raises(ShardError, match="landiff shards"):
        loader(tmp_path / "nowhere")


def test_a_data_set_without_one_whole_clip_is_refused(tmp_path):
    write_raw(tmp_path, [2])
    write_column(tmp_path, "tokens", bad=keys_of(0, 2))
    with pytest.raises(ShardError, match="holds no clip"):
        loader(tmp_path, columns=["tokens"])


def test_columns_of_other_raw_shards_are_refused_naming_both_unless_adopted(data):
    old = read_manifest(data).fingerprint
    columns = read_manifest(data).columns
    new = write_raw(data, SIZES, mark="again")
    write_manifest(data, new.model_copy(update={"columns": columns}))
    with pytest.raises(ShardError, match=rf"(?s){old}.*{new.fingerprint}"):
        loader(data)
    with loader(data, adopt=True) as source:
        assert source.next_batch()


def test_a_shard_of_another_encoder_is_refused_naming_both_unless_adopted(data):
    manifest = read_manifest(data)
    mixed = write_column(data, "tokens", bad=BAD_TOKENS, mark="newer").columns["tokens"]
    mixed = mixed.model_copy(update={"fingerprint": "column"})
    write_manifest(
        data, manifest.model_copy(update={"columns": {**manifest.columns, "tokens": mixed}})
    )
    with pytest.raises(
        ShardError, match="fingerprint newer, the rest of column 'tokens' with column"
    ):
        loader(data).next_batch()
    with loader(data, adopt=True) as source:
        assert source.next_batch()


def test_a_shard_made_again_behind_the_manifest_is_refused(data):
    manifest = read_manifest(data)
    write_column(data, "tokens")
    write_manifest(data, manifest)
    with pytest.raises(ShardError, match="precompute finalize"):
        loader(data).next_batch()


def test_the_encoder_of_a_column_is_checked_against_the_trainers(data):
    manifest = read_manifest(data)
    require_encoder(manifest, "tokens", "1111222233334444", "model.tokenizer")
    with pytest.raises(
        ShardError, match=r"'tokens' was made by test 1111222233334444, but model.tokenizer is feed"
    ):
        require_encoder(manifest, "tokens", "feed", "model.tokenizer")
    require_encoder(manifest, "tokens", "feed", "model.tokenizer", adopt=True)


# -------------------------------------------------------------------- damage


def damage(path: Path, at: int, size: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + size] = b"\xa5" * size
    path.write_bytes(content)


def all_of(data: Path) -> None:
    with loader(data, columns=["tokens"], global_batch_size=27) as source:
        source.next_batch()


def test_a_truncated_tar_is_named(data):
    tar = data / "tokens" / "000003.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"tokens/000003.tar is damaged: it has"):
        all_of(data)


def test_an_overwritten_member_is_named_with_its_key(data):
    key = keys_of(0, 7)[0]
    damage(data / "tokens" / "000000.tar", 0, 300)
    with pytest.raises(
        ShardError, match=rf"tokens/000000.tar is damaged: where {key}.tokens.safetensors"
    ):
        all_of(data)


@pytest.mark.parametrize(("at", "size"), [(512, 8), (520, 30)])
def test_a_damaged_tensor_header_is_named_with_its_key(data, at, size):
    damage(data / "tokens" / "000000.tar", at, size)
    with pytest.raises(ShardError, match=rf"tokens/000000.tar, sample {keys_of(0, 7)[0]}"):
        all_of(data)


def test_a_damaged_or_missing_sidecar_is_named(data):
    sidecar = data / "tokens" / "000001.json"
    sidecar.write_text(sidecar.read_text()[:-40])
    with pytest.raises(ShardError, match=r"tokens/000001.json is not a shard sidecar"):
        all_of(data)
    sidecar.unlink()
    with pytest.raises(ShardError, match=r"tokens/000001.json does not exist"):
        all_of(data)


def test_a_missing_tar_is_named(data):
    (data / "tokens" / "000001.tar").unlink()
    with pytest.raises(ShardError, match=r"tokens/000001.tar"):
        all_of(data)


def test_columns_that_are_not_aligned_are_refused_with_the_key(data):
    manifest = read_manifest(data)
    keys = keys_of(1, 5)
    with ShardWriter(
        data / "tokens", "000001", fingerprint="column", raw_sha256=manifest.shards[1].sha256
    ) as writer:
        for key in [keys[1], keys[0], *keys[2:]]:
            writer.add(key, {"tokens.safetensors": pack_tensor("tokens", value_of(key))})
    shards = list(manifest.columns["tokens"].shards)
    shards[1] = writer.sidecar.entry
    column = manifest.columns["tokens"].model_copy(update={"shards": shards})
    write_manifest(data, manifest.model_copy(update={"columns": {"tokens": column}}))
    with pytest.raises(
        ShardError, match=rf"(?s)tokens/000001.tar is not aligned.*({keys[0]}|{keys[1]})"
    ):
        all_of(data)


def test_flipped_bits_inside_a_tensor_are_noticed_with_checksum(data):
    tar = data / "tokens" / "000000.tar"
    offset, size = read_sidecar(tar).index[0][1]["tokens.safetensors"]
    content = bytearray(tar.read_bytes())
    content[offset + size - 1] ^= 16
    tar.write_bytes(content)
    all_of(data)  # names and sizes are as they should be
    with (
        loader(data, checksum=True) as source,
        pytest.raises(
            ShardError, match=rf"sample {keys_of(0, 7)[0]}: the tensor's bytes have CRC-32"
        ),
    ):
        source.next_batch()


def test_memory_is_reused_only_when_no_tensor_of_its_batch_is_left():
    buffers = Buffers(2)
    first = buffers.take(5 << 20)
    tensor = torch.frombuffer(first[100:200], dtype=torch.bfloat16).view(10, 5)[2:]
    tensor.fill_(3)
    address = first.ctypes.data
    del first
    second = buffers.take(5 << 20)
    second[:] = 0
    assert second.ctypes.data != address and tensor.eq(3).all()
    del tensor
    assert buffers.take(5 << 20).ctypes.data == address


@pytest.mark.parametrize("threads", [2, 7])
def test_several_threads_read_the_same_batches(data, threads):
    with loader(data) as one, loader(data, read_threads=threads, prefetch_batches=3) as several:
        assert take(several, 4) == take(one, 4)


def test_an_error_does_not_lose_the_place(data):
    tar = data / "tokens" / "000000.tar"
    whole = tar.read_bytes()
    with loader(data, columns=["tokens"], global_batch_size=3, prefetch_batches=2) as source:
        good = [[s.key for s in source.next_batch().samples] for _ in range(20)]
    damage(tar, 0, len(whole))
    got = []
    with loader(data, columns=["tokens"], global_batch_size=3, prefetch_batches=2) as source:
        while len(got) < 20:
            try:
                got.append([s.key for s in source.next_batch().samples])
            except ShardError:
                tar.write_bytes(whole)
    assert got == good


def test_a_sidecar_is_read_without_its_index_and_its_damage_noticed(data):
    tar = data / "tokens" / "000000.tar"
    whole, short = read_sidecar(tar), read_sidecar(tar, index=False)
    assert whole.index and short == whole.model_copy(update={"index": []})
    path = tar.with_suffix(".json")
    detail = 'a detail with ,"index":[ in it' * 1000  # longer than the first read
    reject = Reject(key="k", stage="tokens", reason="r", detail=detail)
    path.write_text(whole.model_copy(update={"rejects": [reject]}).model_dump_json())
    assert read_sidecar(tar, index=False).rejects == [reject]
    assert not read_sidecar(tar, index=False).index
    reversed_fields = dict(reversed(whole.model_dump(mode="json").items()))
    path.write_text(json.dumps(reversed_fields))
    assert read_sidecar(tar, index=False) == whole
    for cut in (30, 1):
        path.write_text(whole.model_dump_json()[:-cut])
        with pytest.raises(ShardError, match="is not a shard sidecar"):
            read_sidecar(tar, index=False)


# -------------------------------------------------------------------- formats


def test_plain_webdataset_reads_the_column_tars(data):
    urls = sorted(str(p) for p in (data / "tokens").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    keys = [key for key in all_keys() if key not in BAD_TOKENS]
    assert [s["__key__"] for s in samples] == keys
    for sample in samples:
        tensors = load_safetensors(sample["tokens.safetensors"])
        assert tensors["tokens"].equal(value_of(sample["__key__"]))
    raw = list(webdataset.WebDataset([str(data / RAW / "000000.tar")], shardshuffle=False).decode())
    assert raw[0]["json"]["caption"] == f"a clip called {raw[0]['__key__']}"


@pytest.mark.parametrize("dtype", [torch.uint16, torch.bfloat16, torch.float16, torch.int64])
def test_our_tensor_files_and_those_of_safetensors_are_the_same_format(dtype):
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    assert load_safetensors(pack_tensor("x", tensor))["x"].equal(tensor)
    theirs = bytearray(
        save_safetensors({"other": torch.zeros(3), "x": tensor}, metadata={"a": "b"})
    )
    assert parse_tensor(np.frombuffer(theirs, np.uint8), "x").equal(tensor)
