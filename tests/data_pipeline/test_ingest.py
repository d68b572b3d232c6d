import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.data_pipeline.format.schema import Column, RawSample, Reject
from landiff.data_pipeline.format.shards import (
    ShardError,
    count_rejects,
    read_manifest,
    read_sidecar,
    write_manifest,
)
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.synthetic.shapes import moving_shape, write_videos
from landiff.data_pipeline.video.codec import ClipDecoder, write_mp4
from landiff.launchers.config import ShardsJobConfig
from tests.data_pipeline.ingest_helpers import (
    FRAMES,
    ROOT,
    SIDE,
    contents,
    raw_samples,
    read_rows,
    shards_config,
    write_rows,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of two spans each, and everything that can be wrong with one."""
    folder = tmp_path_factory.mktemp("videos")
    rows = read_rows(write_videos(folder, 6, num_frames=20, height=48, width=64))
    (folder / "text.mp4").write_text("no video at all")
    (folder / "empty.mp4").touch()
    shutil.copy(folder / "shape_00001.mp4", folder / "copy.mp4")
    write_mp4(folder / "short.mp4", moving_shape(9, num_frames=6, height=48, width=64).frames, 8)
    rows[3:3] = [
        {"file": name, "caption": "something"}
        for name in ("text.mp4", "empty.mp4", "missing.mp4", "copy.mp4", "short.mp4")
    ]
    rows += [
        {"file": "shape_00000.mp4", "caption": " "},
        {"file": "shape_00002.mp4", "caption": "a part", "start_s": 1.0, "end_s": 1.9},
    ]
    write_rows(folder / "captions.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("made")
    make_shards(shards_config(videos), data)
    return data


def test_clips_are_cut_and_the_rest_is_rejected_with_its_reason(made: Path) -> None:
    manifest = read_manifest(made)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4]
    assert manifest.reject_counts == {
        "shards/duplicate": 2,
        "shards/empty_caption": 1,
        "shards/invalid_data": 2,
        "shards/too_short": 2,
        "shards/unreadable_file": 1,
    }
    assert {
        (reject.key, reject.reason) for reject in manifest.rejects if reject.reason == "too_short"
    } == {("short.mp4", "too_short"), ("shape_00002.mp4", "too_short")}
    sidecars = [read_sidecar(made / "raw" / f"{shard.name}.tar") for shard in manifest.shards]
    assert [sidecar.entry for sidecar in sidecars] == manifest.shards
    assert [reject for sidecar in sidecars for reject in sidecar.rejects] == manifest.rejects
    assert count_rejects(manifest.rejects) == manifest.reject_counts


def test_plain_webdataset_reads_the_shards(made: Path) -> None:
    tars = sorted(map(str, (made / "raw").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == 12
    with ClipDecoder() as decoder:
        clips = [decoder.decode(sample["mp4"]) for sample in samples]
    for number, (sample, frames) in enumerate(zip(samples, clips, strict=True)):
        meta = RawSample.model_validate_json(sample["json"])
        assert sample["__key__"] == meta.key
        assert len(meta.key) == 40
        assert hashlib.sha256(sample["mp4"]).hexdigest() == meta.video_sha256
        assert (meta.num_frames, meta.height, meta.width, meta.fps) == (FRAMES, SIDE, SIDE, 8.0)
        assert meta.start_s == (number % 2) * FRAMES / 8
        drawn = moving_shape(number // 2, num_frames=20, height=48, width=64)
        assert meta.caption == drawn.caption
        centre = drawn.frames[(number % 2) * FRAMES :][:FRAMES, ::3, 8:56:3][:, :, : SIDE // 2]
        difference = np.abs(frames[:, ::2, ::2].astype(int)[:, :, : SIDE // 2] - centre)
        assert difference.mean() < 12  # small shapes, halved chroma
        assert meta.motion_score > 0.001


def test_parts_lie_where_the_index_says(made: Path) -> None:
    for tar in (made / "raw").glob("*.tar"):
        data = tar.read_bytes()
        with tarfile.open(tar) as plain:
            members = {member.name: plain.extractfile(member).read() for member in plain}
        for key, parts in read_sidecar(tar).index:
            for part, (offset, size) in parts.items():
                assert data[offset : offset + size] == members[f"{key}.{part}"]


def test_number_of_workers_does_not_change_a_byte(videos: Path, made: Path, tmp_path: Path) -> None:
    make_shards(shards_config(videos, job={"workers": 1}), tmp_path / "one")
    make_shards(shards_config(videos, job={"workers": 5}), tmp_path / "five")
    assert contents(tmp_path / "one") == contents(tmp_path / "five") == contents(made)


def test_second_call_makes_nothing_again(videos: Path, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "raw").iterdir()}
    seen = []
    make_shards(shards_config(videos), made, progress=lambda *state: seen.append(state))
    assert {path: path.stat().st_mtime_ns for path in (made / "raw").iterdir()} == before
    text = "clips; rejected: 2 duplicate, 2 invalid_data, 2 too_short, 1 empty_caption, ..."
    assert seen[-1] == (12, 12, text)


def test_columns_stay_in_the_manifest_while_raw_is_the_same(
    videos: Path, made: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(made, data)
    manifest = read_manifest(data)
    column = Column(
        dtype="uint16",
        shape=[28],
        encoder="tokenizer@1",
        fingerprint="1",
        config={},
        shards=manifest.shards,
    )
    reject = Reject(key="k", stage="tokens", reason="not_finite")
    write_manifest(
        data,
        manifest.model_copy(
            update={"columns": {"tokens": column}, "rejects": [*manifest.rejects, reject]}
        ),
    )
    again = make_shards(shards_config(videos), data)
    assert again.columns == {"tokens": column}
    assert again.reject_counts["tokens/not_finite"] == 1
    assert again == read_manifest(data)


def test_other_config_is_refused_with_the_keys_that_differ(videos: Path, made: Path) -> None:
    with pytest.raises(ConfigError, match=r"height = 64 \(there: 32\); width = 16 \(there: 32\)"):
        make_shards(shards_config(videos, height=64, width=16), made)


def test_other_videos_are_refused(videos: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    shutil.copytree(made, tmp_path / "data")
    os.remove(tmp_path / "videos" / "shape_00003.mp4")
    with pytest.raises(ShardError, match=r"000001\.tar was made from other videos"):
        make_shards(shards_config(tmp_path / "videos"), tmp_path / "data")


def test_stale_temporaries_of_a_killed_run_are_removed(
    videos: Path, made: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(made, data)
    (data / "raw" / ".000001.tar.elsewhere.17.tmp").write_bytes(b"half a shard")
    (data / ".manifest.json.elsewhere.17.tmp").write_bytes(b"half a manifest")
    # of another machine, perhaps still being written
    young = data / "raw" / ".000002.tar.elsewhere.18.tmp"
    for path in data.rglob(".*.tmp"):
        os.utime(path, (0, 0))
    young.write_bytes(b"half a shard")
    make_shards(shards_config(videos), data)
    young.unlink()
    assert contents(data) == contents(made)


# ----------------------------------------------------------------------------------------- sources


def samples_of(source: Path | str, data: Path, **changes: object) -> list[tuple[str, str, float]]:
    """(source, caption, start in s) of the samples that a source gives."""
    make_shards(shards_config(source, **changes), data)
    return [(meta.source, meta.caption, meta.start_s) for meta in raw_samples(data)]


def test_csv_with_spans_and_other_column_names(videos: Path, tmp_path: Path) -> None:
    table = videos / "table.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                ["path", "text", "start_s", "end_s"],
                ["shape_00000.mp4", "whole, with a comma", "", ""],
                ["shape_00000.mp4", "täil", "1.25", "2.4"],
            ]
        )
    columns = {"file": "path", "caption": "text"}
    assert samples_of(table, tmp_path / "a", columns=columns) == [
        ("shape_00000.mp4", "whole, with a comma", 0.0),
        ("shape_00000.mp4", "whole, with a comma", 1.125),
        ("shape_00000.mp4", "täil", 1.25),
    ]
    with pytest.raises(
        ConfigError, match=r"table.csv, line 2: no column 'file', there are 'path'.*columns.file="
    ):
        make_shards(shards_config(table), tmp_path / "b")
    table.unlink()  # the other tests share the folder


def test_rows_that_name_no_file_or_a_folder_are_rejected(videos: Path, tmp_path: Path) -> None:
    """The data folder is created in the folder that the row names, whose time changes."""
    shutil.copy(videos / "shape_00001.mp4", tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text(f"file,caption\na.mp4,one\n,two\n{tmp_path},three\n")
    manifest = make_shards(
        shards_config(tmp_path / "clips.csv", max_bad_fraction=0.5), tmp_path / "data"
    )
    assert manifest.num_samples == 2
    assert manifest.reject_counts == {"shards/no_file_name": 1, "shards/unreadable_file": 1}


def test_folder_with_captions_beside_the_videos(videos: Path, tmp_path: Path) -> None:
    # equal names in two folders, a dot in one
    for folder, caption in (("a", "first"), ("b.v1", "second")):
        target = tmp_path / "in" / folder
        target.mkdir(parents=True)
        shutil.copy(videos / f"shape_0000{len(folder)}.mp4", target / "clip.one.mp4")
        (target / "clip.one.txt").write_text(caption)
    (tmp_path / "in" / "notes.md").write_text("not a video")
    assert samples_of(tmp_path / "in", tmp_path / "data", max_spans=1) == [
        ("a/clip.one.mp4", "first", 0.0),
        ("b.v1/clip.one.mp4", "second", 0.0),
    ]


def test_all_captions_of_a_clip_stay_with_it(videos: Path, tmp_path: Path) -> None:
    rows = [
        {"file": str(videos / "shape_00000.mp4"), "caption": ["first", " ", "second"]},
        {"file": str(videos / "shape_00001.mp4"), "caption": []},
    ]
    write_rows(tmp_path / "captions.jsonl", rows)
    manifest = make_shards(shards_config(tmp_path, max_spans=1), tmp_path / "data")
    (meta,) = raw_samples(tmp_path / "data")
    assert (meta.caption, meta.more_captions) == ("first", ("second",))
    assert meta.caption_number(1) == meta.caption_number(5) == "second"
    assert manifest.reject_counts == {"shards/empty_caption": 1}


def test_webdataset_tars_of_clips(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "in" / f"{number:02d}.tar", "w") as tar:
            parts = {"mp4": (videos / f"shape_0000{number}.mp4").read_bytes()}
            if number:
                parts["txt"] = b"from text"
            else:
                parts["json"] = json.dumps({"caption": "from json"}).encode()
            for part, data in parts.items():
                info = tarfile.TarInfo(f"dir/clip{number}.{part}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    expected = [("00.tar:dir/clip0", "from json", 0.0), ("01.tar:dir/clip1", "from text", 0.0)]
    assert samples_of(tmp_path / "in" / "{00..01}.tar", tmp_path / "a", max_spans=1) == expected
    assert samples_of(tmp_path / "in", tmp_path / "b", max_spans=1) == expected


def test_packaged_clips_make_the_quickstarts_samples(tmp_path: Path) -> None:
    manifest = make_shards(load(ShardsJobConfig, "nano/shards").content, tmp_path)
    assert manifest.num_samples >= 60
    assert manifest.reject_counts == {"shards/empty_caption": 1, "shards/too_short": 1}


# ------------------------------------------------------------------------------------------ errors


def test_missing_source_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere' does not exist"):
        make_shards(shards_config(tmp_path / "nowhere"), tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no videos"):
        make_shards(shards_config(tmp_path / "empty"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "a.mp4"', "line 1 is not JSON"),
        ('["a.mp4"]', "line 1 holds a list"),
        ('{"file": "a.mp4"}', "no column 'caption'"),
        ('{"file": "a.mp4", "caption": "b", "start_s": "soon"}', "start_s = 'soon' is not a time"),
    ],
)
def test_broken_caption_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        make_shards(shards_config(tmp_path / "captions.jsonl"), tmp_path / "data")


def test_captions_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_bytes("file,caption\na.mp4,Größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"captions\.csv is not UTF-8"):
        make_shards(shards_config(tmp_path), tmp_path / "data")


def test_source_without_a_usable_clip_says_why(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"file": str(videos / "text.mp4"), "caption": "x"}) + "\n"
    )
    with pytest.raises(
        ShardError, match=r"no clip .* could be used: 1 invalid_data \(.*text\.mp4: .+\)$"
    ):
        make_shards(shards_config(tmp_path), tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()
    (tmp_path / "in").mkdir()
    shutil.copy(videos / "shape_00000.mp4", tmp_path / "in")
    with pytest.raises(
        ShardError,
        match=r"1 empty_caption \(shape_00000\.mp4\); captions are read from a captions\.jsonl",
    ):
        make_shards(shards_config(tmp_path / "in"), tmp_path / "silent")


ON_A_SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from landiff.configs.loader import load
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.ingest.config import ShardsConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))
make_shards(load(ShardsConfig, Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(
    videos: Path, made: Path, tmp_path: Path
) -> None:
    file, data = tmp_path / "config.yaml", tmp_path / "data"
    file.write_text(shards_config(videos).model_dump_json())
    job = subprocess.run(
        [sys.executable, "-c", ON_A_SMALL_DISK, str(file), str(data)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 1
    assert (
        job.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "OSError: [Errno 27] cannot write the shards: File too large; finished shards are kept."
        )
    )
    assert [path.name for path in (data / "raw").iterdir()] == ["config.yaml"]
    make_shards(shards_config(videos), data)
    assert contents(data) == contents(made)


def test_output_that_is_a_file_is_one_clear_error(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(OSError, match="cannot write the shards: Not a directory"):
        make_shards(shards_config(videos), tmp_path / "data")


def test_ingest_does_not_import_torch() -> None:
    code = "import sys, landiff.data_pipeline.ingest.job; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
