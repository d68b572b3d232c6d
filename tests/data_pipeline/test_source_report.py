"""What `landiff shards` prints and records of a source."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.shards import (
    ShardError,
    read_manifest,
    read_sidecar,
    sidecar_path,
)
from landiff.data_pipeline.ingest import job as ingest
from landiff.data_pipeline.ingest.job import finalize_raw_shards, make_shards
from landiff.data_pipeline.synthetic.shapes import write_videos
from landiff.launchers.cli import main
from tests.data_pipeline.ingest_helpers import shards_config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips, one of them in a tar, one with a Latin-1 caption, and ignored files."""
    folder = tmp_path_factory.mktemp("source")
    videos = folder.parent / "videos"
    write_videos(videos, 1, num_frames=20, height=32, width=32)
    clip = (videos / "shape_00000.mp4").read_bytes()
    different = [clip + struct.pack(">I4sI", 12, b"free", number) for number in range(3)]
    with tarfile.open(folder / "t.tar", "w") as tar:
        for name, data in (
            ("clip 2.0.mp4", different[0]),
            ("clip 2.0.txt", b"in a tar"),
            ("clip 2.0.wav", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "a.mp4").write_bytes(different[1])
    (folder / "a.txt").write_text("loose")
    (folder / "b.mp4").write_bytes(different[2])
    (folder / "b.txt").write_bytes("M\xe4dchen".encode("latin-1"))
    (folder / "c.mp4.part").write_bytes(b"x")
    return folder


def shards(*arguments: str, source: Path, data: Path) -> int:
    overrides = [
        f"source={source}",
        f"data={data}",
        "num_frames=9",
        "height=32",
        "width=32",
        "max_spans=1",
        "max_bad_fraction=1",
        "encoding.preset=veryfast",
    ]
    return main(["shards", *arguments, "--config", "nano/shards", *overrides])


IGNORED = "1 .part (c.mp4.part), 1 .wav (t.tar:clip 2.0.wav)"
REJECTED = "1 caption_encoding (b.mp4: b.txt: byte 1 (0xe4) is not UTF-8; save it as UTF-8)"


def test_rejected_and_ignored_are_named_on_screen_and_in_the_manifest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards("--dry-run", source=source, data=tmp_path) == 0
    assert (
        f"# source: 2 clips in 1 tars; rejected: {REJECTED}; ignored: {IGNORED}\n"
        in capsys.readouterr().out
    )
    assert shards(source=source, data=tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"shards: rejected: {REJECTED}\nshards: ignored: {IGNORED}\n" in printed
    assert shards("status", source=source, data=tmp_path) == 0
    assert f"shards: ignored: {IGNORED}\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path)
    assert manifest.num_samples == 2
    assert manifest.reject_counts == {"shards/caption_encoding": 1}
    assert manifest.ignored_counts == {".part": 1, ".wav": 1}
    assert manifest.ignored_examples == {".part": ["c.mp4.part"], ".wav": ["t.tar:clip 2.0.wav"]}
    assert not list((tmp_path / "rejected").glob("*"))  # the video of a bad caption is not kept


def test_array_task_names_them_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards("--task", "0/2", source=source, data=tmp_path) == 0
    assert shards("--task", "1/2", source=source, data=tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"shards: ignored: {IGNORED}\n") == 2
    assert printed.count(f"shards: rejected: {REJECTED}\n") == 1


def test_manifest_of_a_clean_source_does_not_mention_ignored_files(
    source: Path, tmp_path: Path
) -> None:
    clean = tmp_path / "in"
    clean.mkdir()
    for name in ("a.mp4", "a.txt"):
        shutil.copy(source / name, clean)
    make_shards(shards_config(clean), tmp_path / "data")
    assert "ignored" not in (tmp_path / "data" / "manifest.json").read_text()
    columns = read_manifest(tmp_path / "data").config["columns"]
    assert list(columns) == ["file", "caption", "start_s", "end_s"]  # no later key
    assert list(columns.values()) == list(columns)


def test_status_of_another_config_says_what_differs(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = tmp_path / "in"
    clean.mkdir()
    for name in ("a.mp4", "a.txt"):
        shutil.copy(source / name, clean)
    data = tmp_path / "data"
    make_shards(shards_config(clean), data)
    found = ingest.other_shards(shards_config(clean, fps=6), data)
    made = "It holds 1 finished shards that were made with another config:"
    assert found == f". {made} fps = 6.0 (there: 8.0)"
    assert ingest.status(shards_config(clean, fps=6), data) is None
    with pytest.raises(
        ShardError,
        match=r"nothing is planned .* run `landiff shards` first\. "
        r"It holds 1 finished .* fps = 6\.0 \(there: 8\.0\)",
    ):
        finalize_raw_shards(shards_config(clean, fps=6), data)
    assert shards("status", source=clean, data=data) == 0  # samples_per_shard is the nano preset's
    differing = "max_spans = 1 (there: 2); samples_per_shard = 8 (there: 4)"
    assert f"{made} {differing}" in capsys.readouterr().out
    (clean / "a.txt").write_text("changed")
    assert "from other videos or captions than the source holds now" in ingest.other_shards(
        shards_config(clean), data
    )


def test_damaged_manifest_is_made_again_from_the_shards(source: Path, tmp_path: Path) -> None:
    settings = shards_config(source, max_bad_fraction=1.0)
    manifest = make_shards(settings, tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"[" * 100_000, whole.decode().encode("utf-16")):
        path.write_bytes(data)
        with pytest.raises(
            ShardError,
            match=r"manifest\.json is not a manifest.* "
            r"Delete it, then run `landiff shards finalize` and",
        ):
            finalize_raw_shards(settings, tmp_path)
        path.unlink()
        assert finalize_raw_shards(settings, tmp_path) == manifest
        assert path.read_bytes() == whole


def test_sidecar_that_claims_more_than_its_tar_holds_is_refused(
    source: Path, tmp_path: Path
) -> None:
    make_shards(shards_config(source, max_bad_fraction=1.0), tmp_path)
    tar = tmp_path / "raw" / "000000.tar"
    plain = json.loads(sidecar_path(tar).read_text())
    for place in ([512, 1 << 40], [1 << 40, 10], [-512, 10], [512, -1]):
        changed = json.loads(json.dumps(plain))
        changed["index"][0][1]["json"] = place
        sidecar_path(tar).write_text(json.dumps(changed))
        with pytest.raises(
            ShardError, match=r"000000\.json is damaged: it says that .*\.json has -?\d+ bytes at"
        ):
            read_sidecar(tar)


def test_too_many_missing_videos_are_named(source: Path, tmp_path: Path) -> None:
    rows = "".join(f"v{number:02d}.mp4,x\n" for number in range(30))
    (tmp_path / "captions.csv").write_text(f"file,caption\n{rows}")
    with pytest.raises(
        ConfigError,
        match=r"30 of 30 clips .* Rejected: 30 unreadable_file "
        r"\(v00\.mp4: No such file or directory; v01\.mp4",
    ):
        make_shards(shards_config(tmp_path / "captions.csv"), tmp_path / "data")


def test_second_caption_row_becomes_one_more_caption_or_a_reject_with_its_line(
    source: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    video = os.path.relpath(source / "a.mp4", tmp_path)
    other = os.path.relpath(source / "b.mp4", tmp_path)
    table.write_text(f"file,caption\n{video},one\n{video},two\n{other},three\n{video},four\n")
    manifest = make_shards(shards_config(table, max_spans=1), tmp_path / "data")
    assert manifest.num_samples == 2
    assert [(reject.key, reject.reason, reject.detail) for reject in manifest.rejects] == [
        (video, "duplicate", f"span at 0 s is that of {video}; the caption of line 5 is not used")
    ]


def test_video_that_is_something_else_is_named(source: Path, tmp_path: Path) -> None:
    clean = tmp_path / "in"
    clean.mkdir()
    for name in ("a.mp4", "a.txt"):
        shutil.copy(source / name, clean)
    for name, data in (
        ("page", b"<html><body>404</body></html>"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    ):
        (clean / f"{name}.mp4").write_bytes(data)
        (clean / f"{name}.txt").write_text("caption")
    manifest = make_shards(shards_config(clean, max_bad_fraction=1.0), tmp_path / "data")
    details = {reject.key: reject.detail for reject in manifest.rejects}
    assert details["page.mp4"].startswith("it is an HTML page; ")
    assert details["pointer.mp4"].startswith("it is a Git LFS pointer")
