"""Mutated documents in every reader of the project: a result, or one clear error.

The mutations are drawn from fixed seeds, so failures are reproducible.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from landiff.configs import ConfigError, dump, load
from landiff.configs.loader import read_json_as
from landiff.data_pipeline.format.schema import Manifest, ShardEntry, Sidecar
from landiff.data_pipeline.format.shards import read_manifest, read_sidecar
from landiff.data_pipeline.format.tensors import pack_tensor, parse_tensor
from landiff.data_pipeline.ingest.plan.shard_plan import ShardPlan
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.units import CARD, ColumnFolder
from landiff.launchers.config import SampleConfig
from landiff.launchers.run.records import read_record
from landiff.launchers.run.status import last_metrics
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig, TransformerConfig
from landiff.model_zoo.convert.checkpoints import run_provenance
from landiff.model_zoo.convert.formats import deepspeed, diffusers_folder, megatron
from landiff.model_zoo.convert.formats.diffusers_transformer import diffusers_config
from landiff.model_zoo.convert.lazy import load_safetensors, read_safetensors
from landiff.model_zoo.convert.rules import ConversionError
from landiff.training.checkpoint.files import CheckpointState, FileList, latest_whole
from landiff.training.checkpoint.run_folder import finished_step, read_metrics
from landiff.training.lm.config import LMTrainConfig

MUTATIONS = 60  # of each document
NASTY = [
    b"\x00", b"\xff\xfe", b"\x80", b"\xef\xbb\xbf", b"[" * 200, b"{" * 200, b"&a [*a]", b"*a",
    b"!!python/object:x {}", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"null", b"true",
    b"''", b'""', b"[]", b"{}", b"[null]", b'{"a": 1, "a": 2}', b"\n", b"\t", b": ", b"- ",
    b"2024-13-45", b"\\ud800", b'"\\u0000"', b"../../../etc/passwd", b"%", b"'", b'"', b",",
    b"1099511627776", b"\xe6\xbc\xa2", b"!", b"|", b"<<: 1",
]  # fmt: skip


def mutate(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to three faults."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice([0, 1, 4, 40]))
        kind = draw.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + draw.choice(NASTY) + data[at:]
        elif kind == 2:
            data = data[:at] + draw.choice(NASTY) + data[end:]
        elif kind == 3:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif kind == 4:
            data = data[:end] + data[at:]
        else:
            data = replace_value(data, draw)
    return data


def replace_value(data: bytes, draw: random.Random) -> bytes:
    """`data` with another value after one of its colons, so that more of the documents parse."""
    colons = [at for at, byte in enumerate(data) if byte == ord(":")]
    if not colons:
        return data
    at = draw.choice(colons) + 1
    ends = [end for end in (data.find(mark, at) for mark in (b",", b"\n", b"}")) if end >= 0]
    return data[:at] + b" " + draw.choice(NASTY) + data[min(ends, default=len(data)) :]


@dataclass(frozen=True)
class Reader:
    """A reader: the name of its file, a valid document, and the call with the file's folder."""

    file: str
    sound: bytes
    read: Callable[[Path], object]


def yaml_reader(cls: type, name: str) -> Reader:
    return Reader(
        "x.yaml", dump(load(cls, name)).encode(), lambda folder: load(cls, folder / "x.yaml")
    )


def megatron_config(folder: Path) -> object:
    return megatron.stored_config(folder)


def with_config(folder: Path) -> Path:
    """The folder with a sound config.yaml."""
    (folder / "config.yaml").write_text(dump(load(LMTrainConfig, "nano/lm")))
    return folder


SIDECAR = Sidecar(
    entry=ShardEntry("000000", 2, 3072, "a" * 64),
    fingerprint="f" * 16,
    index=[("a", {"json": (512, 10)}), ("b", {"json": (1536, 10)})],
)
MANIFEST = Manifest(fingerprint="f" * 16, config={"seed": 1}, shards=[SIDECAR.entry])
STATE = CheckpointState(
    step=3,
    kind="LMTrainConfig",
    loader={"epoch": 0},
    manifest="m",
    columns={"a": "b"},
    world_size=1,
    versions={"torch": "2"},
)
FILES = FileList.model_validate({"files": [{"path": "a", "bytes": 1, "sha256": "0"}]})
RECORD = {"name": "lm", "stage": "lm", "job_ids": ["1"], "steps": 3}
LM = load(ModelConfig, "nano/model").lm.model_dump(mode="json")
ENTRY = {"kind": "lm", "name": "lm", "fingerprint": "0" * 16, "config": LM}
CARD_OF_COLUMN = {
    "encoder": "e",
    "fingerprint": "f",
    "parts": {"encoders": {"a": "b"}},
    "column": {},
}
DIFFUSERS = diffusers_config(TransformerConfig()) | {"_class_name": "CogVideoXTransformer3DModel"}
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors"}}
METRICS = "".join(
    json.dumps({"step": step, "time": float(step), "train/loss": 1.5}) + "\n" for step in range(4)
)
TENSORS = save({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, {"format": "pt"})
PACKED = pack_tensor("x", torch.arange(6).reshape(2, 3))


def text(value: object) -> bytes:
    """A document as the project writes it."""
    return json.dumps(value, indent=1).encode()


def read_entry(folder: Path) -> object:
    """Config and provenance of a zoo entry; the document takes the place of both."""
    (folder / registry.PROVENANCE).write_bytes((folder / "config.json").read_bytes())
    return registry.read_entry(folder).provenance


def parse_packed(folder: Path) -> torch.Tensor:
    data = (folder / "x").read_bytes()
    part = np.zeros(len(data) + 8, np.uint8)
    part[: len(data)] = np.frombuffer(data, np.uint8)
    try:
        return parse_tensor(part[: len(data)], "x", checksum=True)
    except ValueError as error:  # its callers name file and sample
        raise ConfigError(str(error)) from None


READERS = {
    "training config": yaml_reader(LMTrainConfig, "nano/lm"),
    "data config": yaml_reader(PrecomputeConfig, "nano/precompute"),
    "sample config": yaml_reader(SampleConfig, "nano/sample"),
    "cluster file": yaml_reader(ClusterConfig, "cluster/example"),
    "config of a checkpoint": Reader(
        "config.yaml", dump(load(LMTrainConfig, "nano/lm")).encode(), megatron_config
    ),
    "state.json": Reader(
        "state.json",
        text(STATE.model_dump()),
        lambda folder: read_json_as(CheckpointState, folder / "state.json"),
    ),
    "state.json for convert": Reader(
        "state.json", text(STATE.model_dump()), lambda folder: run_provenance(with_config(folder))
    ),
    "files.json": Reader("step_00000001/files.json", text(FILES.model_dump()), latest_whole),
    "layout.json": Reader(deepspeed.LAYOUT, text({"zero_stage": 1}), deepspeed.ZeroLayout.read),
    "manifest": Reader("manifest.json", MANIFEST.model_dump_json(indent=1).encode(), read_manifest),
    "sidecar": Reader(
        "x.json", SIDECAR.model_dump_json().encode(), lambda folder: read_sidecar(folder / "x.tar")
    ),
    "head of a sidecar": Reader(
        "x.json",
        SIDECAR.model_dump_json().encode(),
        lambda folder: read_sidecar(folder / "x.tar", index=False),
    ),
    "column card": Reader(
        f"x/{CARD}", text(CARD_OF_COLUMN), lambda folder: ColumnFolder(folder, "x").card()
    ),
    "plan": Reader(
        "x.json",
        text({"units": [["000000", "f", 0, 10, 1, 0, 0]]}),
        lambda folder: ShardPlan(folder / "x.json"),
    ),
    "zoo entry": Reader("config.json", text(ENTRY), read_entry),
    "diffusers folder": Reader(
        "config.json", text(DIFFUSERS), lambda folder: diffusers_folder.open_diffusers(folder)
    ),
    "job record": Reader("job/job.json", text(RECORD), read_record),
    "done": Reader("done", b"12\n", finished_step),
    "metrics": Reader(
        "metrics.jsonl", METRICS.encode(), lambda folder: read_metrics(folder / "metrics.jsonl")
    ),
    "metrics of status": Reader(
        "metrics.jsonl", METRICS.encode(), lambda folder: last_metrics(folder / "metrics.jsonl")
    ),
    "safetensors": Reader(
        "x.safetensors", TENSORS, lambda folder: dict(read_safetensors(folder / "x.safetensors"))
    ),
    "safetensors index": Reader(
        "x.index.json", text(INDEX), lambda folder: read_safetensors(folder / "x.index.json")
    ),
    "tensor of a sample": Reader("x", PACKED, parse_packed),
}


# the newest sound checkpoint, the sound lines of a log
SKIP_WHAT_IS_DAMAGED = {"files.json", "metrics", "metrics of status"}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_document_gives_an_answer_or_one_clear_error(tmp_path, name):
    reader = READERS[name]
    path = tmp_path / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = 0
    for seed in range(MUTATIONS):
        data = mutate(reader.sound, random.Random(f"{name} {seed}"))
        path.write_bytes(data)
        try:
            reader.read(tmp_path)
            answers += 1
        except ConfigError as error:
            message = str(error)
            assert message.strip() and len(message) < 20_000, (seed, message[:1000])
        except Exception as error:
            raise AssertionError(
                f"{name}, seed {seed}: {type(error).__name__}: {error}\n{data[:3000]!r}"
            ) from error
    assert (answers == MUTATIONS) == (name in SKIP_WHAT_IS_DAMAGED)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(READERS)
        - {"state.json for convert", "layout.json", "diffusers folder", "safetensors index"}
    ),
)
def test_a_sound_document_is_read(tmp_path, name):
    reader = READERS[name]
    path = tmp_path / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(reader.sound)
    reader.read(tmp_path)


# ---------------------------------------------------------------- safetensors headers


def file_of(header: bytes, data: int, length: int | None = None) -> bytes:
    """A safetensors file with `data` bytes behind its header, which claims `length` bytes."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**values: object) -> bytes:
    return json.dumps({"a": entry(**values)}).encode()


HUGE = 1 << 40
HEADERS = {
    "empty file": (b"", "not a safetensors file"),
    "short file": (b"\x08\0\0", "not a safetensors file"),
    "html": (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    "header beyond the file": (file_of(one(), 8, 1 << 62), "its header would have"),
    "nested": (file_of(b"[" * 100_000, 0), "nested deeper"),
    "no object": (file_of(b"[1, 2]", 0), "not an object"),
    "no json": (file_of(b"{'a': 1}", 0), "not valid JSON"),
    "no utf-8": (file_of(b'{"\xff": 1}', 0), "not UTF-8"),
    "huge shape": (file_of(one(shape=[HUGE, HUGE]), 8), "has 4835703278458516698824704 bytes"),
    "huge shape and offsets": (
        file_of(one(shape=[HUGE], offsets=[0, 4 * HUGE]), 8),
        "its header describes",
    ),
    "overflow to the right size": (
        file_of(one(shape=[1 << 62, 4, 2], offsets=[0, 0]), 0),
        "data_offsets 0..0 have 0",
    ),
    "negative shape": (file_of(one(shape=[-2]), 8), "has the shape"),
    "float shape": (file_of(one(shape=[2.0]), 8), "has the shape"),
    "boolean shape": (file_of(one(shape=[True]), 4), "has the shape"),
    "too many dimensions": (file_of(one(shape=[1] * 100, offsets=[0, 4]), 4), "has the shape"),
    "text shape": (file_of(one(shape="2"), 8), "has the shape"),
    "negative offset": (file_of(one(offsets=[-8, 0]), 8), "data_offsets"),
    "reversed offsets": (file_of(one(offsets=[8, 0]), 8), "data_offsets 8..0"),
    "three offsets": (file_of(one(offsets=[0, 4, 8]), 8), "data_offsets"),
    "beyond the end": (file_of(one(offsets=[8, 16]), 8), "leaves a gap"),
    "bytes behind": (file_of(one(), 80), "its header describes"),
    "unknown dtype": (file_of(one(dtype="F4"), 8), "unknown dtype 'F4'"),
    "list for a dtype": (file_of(one(dtype=["F32"]), 8), "unknown dtype"),
    "unsupported dtype": (
        file_of(one(dtype="F8_E4M3", offsets=[0, 2]), 2),
        "quantised weights, such as a (F8_E4M3)",
    ),
    "entry is a list": (file_of(b'{"a": [1]}', 0), "has no dtype"),
    "metadata is a list": (file_of(b'{"__metadata__": []}', 0), "__metadata__ is not an object"),
    "twice": (file_of(b'{"a": 1, "a": 2}', 0), "occurs twice"),
    "overlap": (
        file_of(json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}).encode(), 12),
        "overlaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies_is_refused_by_name(tmp_path, name):
    data, says = HEADERS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConversionError) as error:
        read_safetensors(path)
    assert str(path) in str(error.value) and says in str(error.value)
    with pytest.raises(ConversionError):
        load_safetensors(path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(ConversionError):
        read_safetensors(index)


def test_a_sound_safetensors_file_is_read_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(TENSORS)
    for tensors in (read_safetensors(path), load_safetensors(path)):
        assert torch.equal(tensors["a"], torch.arange(4.0)) and torch.equal(
            tensors["b"], torch.ones(2, 3)
        )
    path.write_bytes(save({"empty": torch.empty(0, 3), "scalar": torch.tensor(2)}))
    assert read_safetensors(path)["empty"].shape == (0, 3) and read_safetensors(path)["scalar"] == 2
