"""Captions: by vision-language models with random weights, and from files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.data_pipeline.format.schema import RAW, RawSample
from landiff.data_pipeline.format.shards import read_manifest, read_part
from landiff.data_pipeline.ingest.plan.rows import with_caption
from landiff.data_pipeline.ingest.sources.entries import SourceClip
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.captions import (
    pack_captions,
    read_captions,
    unpack_captions,
)
from landiff.data_pipeline.precompute.config import CaptionFileConfig, PrecomputeConfig
from landiff.data_pipeline.video.codec import VideoFile, encode_clip
from landiff.data_pipeline.video.protocol import DecodeFailure
from landiff.launchers.cli import main
from landiff.launchers.data.captions import read_column
from landiff.model_zoo.frozen import vlm
from landiff.model_zoo.frozen.config import VlmConfig
from tests.data_pipeline.precompute_data import NUM_CLIPS, key_of, pan, write_clips
from tests.model_zoo.frozen.tiny_vlm import write_llava, write_qwen

PROMPTS = [
    {"text": "the bird runs", "max_tokens": 10},
    {"text": "over {caption} {frames} {seconds}", "max_tokens": 4},
]
TEMPLATES = {"qwen": None, "llava": "USER: {images} {prompt} ASSISTANT:"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"qwen": write_qwen(folder / "qwen"), "llava": write_llava(folder / "llava")}


def encoder(models, name: str) -> dict:
    return {
        "kind": "vlm",
        "path": str(models[name]),
        "frames": 3,
        "prompts": PROMPTS,
        "template": TEMPLATES[name],
        "dtype": "float32",
    }


def config(data: Path, columns: dict, **values) -> PrecomputeConfig:
    plain = {"data": str(data), "zoo": str(data / "zoo"), "columns": columns, "device": "cpu"}
    return load(PrecomputeConfig, {**plain, **values})


@pytest.mark.parametrize("name", ["qwen", "llava"])
def test_a_model_writes_captions_that_depend_on_the_clip_and_not_on_its_batch(models, name):
    captioner = vlm.build(VlmConfig(**encoder(models, name)), "cpu")
    videos = [pan(0), pan(1), pan(2, size=48), pan(3)]
    fields = [{"caption": "red bird", "seconds": 2.0}] * 4
    together = captioner(videos, fields)
    assert together == [captioner([video], fields[:1])[0] for video in videos]
    assert len({captions[0] for captions in together}) > 1
    assert all(1 <= len(captions[1].split()) <= 4 for captions in together)
    other = VlmConfig(**encoder(models, name) | {"frames": 2})
    assert vlm.build(other, "cpu").fingerprint != captioner.fingerprint


def test_a_model_that_cannot_caption_is_refused_with_the_way_out(models, tmp_path):
    with pytest.raises(ConfigError, match="has no chat template; set template"):
        vlm.build(VlmConfig(**encoder(models, "llava") | {"template": None}), "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="type 't5', which takes no images"):
        vlm.build(VlmConfig(path=str(tmp_path)), "cpu")


def test_captions_are_encoded_by_text_columns_of_the_same_config(models, tmp_path, capsys):
    write_clips(tmp_path)
    columns = {
        "text-minilm": {"encoder": {"kind": "minilm"}, "captions": "captions-q", "caption": 1},
        "captions-q": {"encoder": encoder(models, "qwen")},
    }
    (tmp_path / "captions.yaml").write_text(
        json.dumps(config(tmp_path, columns).model_dump(mode="json"))
    )
    command = ["--config", str(tmp_path / "captions.yaml")]
    assert main(["captions", *command, "--no-finalize"]) == 0
    assert not read_manifest(tmp_path).columns
    assert main(["captions", "retry", "--tasks", "3", *command]) == 0
    assert capsys.readouterr().out.count("nothing is missing") == 2
    assert main(["captions", "finalize", *command]) == 0
    manifest = read_manifest(tmp_path)
    captions = read_column(tmp_path, "captions-q", manifest)
    assert len(captions) == NUM_CLIPS and all(len(texts) == 2 for texts in captions)
    part = read_part(tmp_path, manifest, key_of(0), "text.safetensors", "text-minilm")
    assert len(part) > 4 * 384 and manifest.columns["captions-q"].dtype == "uint8"
    assert main(["captions", "verify", "--sample", "1", *command]) == 0
    assert f"{NUM_CLIPS} bit-equal" in capsys.readouterr().out
    assert main(["captions", "stats", *command]) == 0
    printed = capsys.readouterr().out
    assert f"captions-q: {NUM_CLIPS} clips read; 0 clips" in printed and "caption 1:" in printed


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_captions_of_a_file_are_taken_by_key_or_by_source(tmp_path):
    write_clips(tmp_path)
    rows = [{"id": key_of(n), "long": f"long  {n}", "short": [f"s{n}", "x"]} for n in range(11)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    file = {"kind": "file", "path": str(path), "key": "id", "captions": ["long", "short"]}
    columns = {"captions-mine": {"encoder": file}}
    precompute.run(config(tmp_path, columns, max_bad_fraction=0.1))
    precompute.finalize(config(tmp_path, columns))
    manifest = read_manifest(tmp_path)
    assert read_column(tmp_path, "captions-mine", manifest)[3] == ["long 3", "s3", "x"]
    assert manifest.reject_counts == {"captions-mine/no_caption": 1}  # clip 11
    source = RawSample.model_validate_json(read_part(tmp_path, manifest, key_of(0), "json", RAW))
    path = write_jsonl(tmp_path / "by-source.jsonl", [{"key": source.source, "caption": "all"}])
    by_source = {"captions-s": {"encoder": {"kind": "file", "path": str(path), "by": "source"}}}
    precompute.run(config(tmp_path, by_source))
    assert read_column(tmp_path, "captions-s", precompute.finalize(config(tmp_path, by_source)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": "a"}\n', "line 1 has no column 'caption'; it has key"),
        ('{"key": "a", "caption": "b"}\n[1]\n', "line 2 is not a JSON object"),
        ('{"key": "a", "caption": "b"}\n' * 2, "line 2: the key 'a' occurs twice"),
        (b"\xff\xfe\n", "not UTF-8"),
    ],
)
def test_mistakes_in_a_file_of_captions_are_named_with_their_place(tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        read_captions(CaptionFileConfig(path=path))


def test_without_captions_the_way_out_is_named(tmp_path, capsys):
    assert main(["captions", "--config", "nano/precompute"]) == 2
    assert "vision-language model" in capsys.readouterr().err
    write_clips(tmp_path, [1])
    text = {"text-minilm": {"encoder": {"kind": "minilm"}, "captions": "captions-x"}}
    with pytest.raises(ConfigError, match=r"no column 'captions-x'.*landiff captions"):
        precompute.run(config(tmp_path, text))


def test_captions_are_packed_as_json():
    assert unpack_captions(pack_captions(["Ein Hase.", "兔"])) == ["Ein Hase.", "兔"]
    with pytest.raises(ValueError, match="not a list of captions"):
        unpack_captions(torch.tensor(list(b'{"a": 1}'), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("file_name", ["beach at night 2", "cat", "0001"]),
        ("folder_name", ["my trip", "my videos", "a tar"]),
        ("none", ["", "", ""]),
        ("reject", ["", "", ""]),
    ],
)
def test_captions_can_be_names_of_files_and_folders(missing, expected):
    names = ["my trip/beach_at-night 2.mp4", "cat.mp4", "x/a.tar:0001"]
    source = SimpleNamespace(sources=["/data/my_videos"], missing_captions=missing)
    clips = [SourceClip(name, VideoFile(Path(name)), "") for name in names]
    assert [with_caption(source, clip).caption for clip in clips] == expected
    failed = SourceClip("cat.mp4", VideoFile(Path("cat.mp4")), "", failure=DecodeFailure("other"))
    own = SourceClip("cat.mp4", VideoFile(Path("cat.mp4")), "its own")
    assert with_caption(source, failed) == failed and with_caption(source, own) == own


def test_clips_without_captions_are_kept_if_the_user_says_so(tmp_path, capsys):
    source = tmp_path / "videos"
    source.mkdir()
    clip = encode_clip(pan(1), 8.0, preset="ultrafast")
    (source / "cat.mp4").write_bytes(clip)
    (source / "cat.txt").write_text(" ")
    data = tmp_path / "data"
    command = ["shards", "--config", "nano/shards", f"source={source}", f"data={data}"]
    assert main(command) != 0
    assert "missing_captions=file_name" in capsys.readouterr().err
    assert main([*command, f"data={data}/own", "missing_captions=none"]) == 0
    settings = config(data / "own", {"text-minilm": {"encoder": {"kind": "minilm"}}})
    precompute.run(settings)
    assert precompute.finalize(settings).columns["text-minilm"].shards[0].samples == 1
