import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.video.codec import SafeDecoder, VideoFile, Wanted
from tests.data_pipeline import hostile
from tests.data_pipeline.ingest_helpers import contents, raw_samples, shards_config, write_rows
from tests.data_pipeline.video_files import X264, encode, numbers

KNOWN = {
    "invalid_data",
    "undecodable",
    "too_short",
    "corrupt_frame",
    "no_video_stream",
    "cover_art_only",
    "unknown_codec",
    "no_dimensions",
    "too_large",
    "truncated",
    "out_of_memory",
    "timeout",
    "decoder_died",
    "duplicate",
    "no_timestamps",
    "field_coded",
    "unsupported_transfer",
    "unsupported_primaries",
    "unsupported_matrix",
}
GROWTH_MB = 300  # of this process over a whole test: frames of one request and the rest of the job


@pytest.fixture(scope="module")
def good() -> bytes:
    return encode(hostile.textured(36, 48, 64), container="mp4", codec="libx264", options=X264)


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def captioned(folder: Path, rows: list[tuple[str, str]]) -> Path:
    captions = [{"file": name, "caption": caption} for name, caption in rows]
    write_rows(folder / "captions.jsonl", captions)
    return folder


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_mutated_files_cost_themselves_only(tmp_path: Path, good: bytes, count: int) -> None:
    source, before = tmp_path / "in", peak_mb()
    source.mkdir()
    rows = []
    for name, data in hostile.mutations(count):
        (source / name).write_bytes(data)
        rows.append((name, name))
    for number in range(0, count, 50):  # good ones in between must not suffer
        (source / f"good{number}.mp4").write_bytes(good + bytes(number))
        rows.insert(number, (f"good{number}.mp4", "good"))
    captioned(source, rows)
    job = {
        "job": {"workers": 2, "timeout_s": 20},
        "max_bad_fraction": 1.0,
        "max_spans": 1,
        "samples_per_shard": 64,
    }
    manifest = make_shards(shards_config(source, **job), tmp_path / "data")
    reasons = Counter(reject.reason for reject in manifest.rejects)
    # each is a sample or a reject, none is lost
    assert manifest.num_samples + len(manifest.rejects) == len(rows)
    assert sum(meta.caption == "good" for meta in raw_samples(tmp_path / "data")) == count // 50
    assert set(reasons) <= KNOWN
    assert {"invalid_data", "corrupt_frame", "too_short"} <= set(reasons)
    assert len(manifest.rejects) > count / 4
    assert peak_mb() - before < GROWTH_MB
    if count <= 200:  # what is found does not depend on the worker
        again = make_shards(
            shards_config(source, **job | {"job": {"workers": 1, "timeout_s": 20}}),
            tmp_path / "again",
        )
        assert again == manifest


def test_tar_of_evil_members_gives_its_good_ones(tmp_path: Path, good: bytes) -> None:
    before = peak_mb()
    hostile.hostile_tar(tmp_path / "evil.tar", good)
    manifest = make_shards(
        shards_config(tmp_path / "evil.tar", max_spans=1, max_bad_fraction=1.0), tmp_path / "data"
    )
    reasons = {reject.key: reject.reason for reject in manifest.rejects}
    assert [meta.source for meta in raw_samples(tmp_path / "data")] == [
        "evil.tar:a/b.c/clip",
        "evil.tar:gefährlich/日本",
        "evil.tar:../../escape",
    ]
    assert reasons["evil.tar:packed"] == "invalid_data"
    assert reasons["evil.tar:png"] == "too_large"
    assert reasons["evil.tar:long"] == "long_caption"
    assert reasons["evil.tar:bad"] == "empty_caption"
    assert reasons["evil.tar:header"] in {"invalid_data", "out_of_memory", "undecodable"}
    assert any(
        reason in {"truncated", "damaged_tar", "empty_caption"}
        for key, reason in reasons.items()
        if key.endswith(("huge", "evil.tar"))
    )
    assert peak_mb() - before < GROWTH_MB


def test_truncated_tar_gives_what_is_whole(tmp_path: Path, good: bytes) -> None:
    hostile.hostile_tar(tmp_path / "evil.tar", good)
    data = (tmp_path / "evil.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(good) + 4000])
    manifest = make_shards(
        shards_config(tmp_path / "cut.tar", max_spans=1, max_bad_fraction=1.0), tmp_path / "data"
    )
    assert manifest.num_samples == 1
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "both").mkdir()
    for name in ("cut.tar", "noise.tar"):
        shutil.copy(tmp_path / name, tmp_path / "both")
    both = make_shards(
        shards_config(tmp_path / "both", max_spans=1, max_bad_fraction=1.0), tmp_path / "two"
    )
    assert both.num_samples == 1
    assert {"noise.tar": "damaged_tar"}.items() <= {
        reject.key: reject.reason for reject in both.rejects
    }.items()


def test_names_and_captions_of_every_kind(tmp_path: Path, good: bytes) -> None:
    source = tmp_path / "in"
    names = [
        "a.b.c.mp4",
        "one/clip.mp4",
        "two/clip.mp4",
        "Ünïcødé 日本 \N{PILE OF POO}.mp4",
        "new\nline.mp4",
        "-rf.mp4",
        "%s{}$HOME.mp4",
        "x" * 240 + ".mp4",
        " .mp4",
    ]
    for number, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(good + bytes(number))
        (source / name).with_suffix(".txt").write_text(f"caption {number}")
    for number, name in enumerate((b"/not\xffutf8", b"/latin")):
        raw = os.fsencode(source) + name
        with open(raw + b".mp4", "wb") as file:
            file.write(good + bytes(100 + number))
        with open(raw + b".txt", "wb") as file:
            file.write(b"caption \xff latin" if number else b"caption")
    manifest = make_shards(shards_config(source, max_spans=1), tmp_path / "data")
    assert [(reject.key, reject.reason) for reject in manifest.rejects] == [
        ("latin.mp4", "caption_encoding")
    ]
    found = {meta.source: meta.caption for meta in raw_samples(tmp_path / "data")}
    assert found == {name: f"caption {number}" for number, name in enumerate(names)} | {
        "not\\udcffutf8.mp4": "caption"
    }


def test_captions_of_every_length(tmp_path: Path, good: bytes) -> None:
    (tmp_path / "in").mkdir()
    captions = {
        "none": "",
        "blank": " \n\t",
        "long": "x" * 100_000,
        "most": "y" * 20_000,
        "null": "a\0b",
        "half": "\ud83d",
        "lines": "a\nb\r\nc",
    }
    for number, name in enumerate(captions):
        (tmp_path / "in" / f"{name}.mp4").write_bytes(good + bytes(number))
    source = captioned(
        tmp_path / "in", [(f"{name}.mp4", caption) for name, caption in captions.items()]
    )
    manifest = make_shards(shards_config(source, max_spans=1), tmp_path / "data")
    assert {reject.key: (reject.reason, reject.detail) for reject in manifest.rejects} == {
        "none.mp4": ("empty_caption", ""),
        "blank.mp4": ("empty_caption", ""),
        "long.mp4": ("long_caption", "100000 characters, more than max_caption = 20000"),
    }
    assert {meta.source: meta.caption for meta in raw_samples(tmp_path / "data")} == {
        "most.mp4": "y" * 20_000,
        "null.mp4": "a\0b",
        "half.mp4": "\\ud83d",
        "lines.mp4": "a\nb\r\nc",
    }


def test_specimens_are_rejected_one_by_one(tmp_path: Path, good: bytes) -> None:
    source, before = tmp_path / "in", peak_mb()
    source.mkdir()
    hostile.special_files(source)
    # FFmpeg itself refuses 16384 x 16384, it has no size for it; 16000 x 16000 it would decode
    specimens = {
        "empty": b"",
        "byte": b"\0",
        "png8k": hostile.png_bomb(8192),
        "png16000": hostile.png_bomb(16000),
        "png16k": hostile.png_bomb(16384),
        "gif64k": hostile.gif_of(65535, 65535),
        "header": hostile.compressed_header(1 << 31),
        "lying": hostile.lying_container(65535, 65535),
        "million": hostile.million_samples(),
        "good": good,
    }
    for name, data in specimens.items():
        (source / f"{name}.mp4").write_bytes(data)
    names = [*specimens, "pipe", "folder", "nowhere", "itself", "zero", "null\0byte"]
    captioned(source, [(f"{name}.mp4", name) for name in names])
    manifest = make_shards(
        shards_config(source, max_spans=1, max_bad_fraction=1.0), tmp_path / "data"
    )
    reasons = {reject.key: reject.reason for reject in manifest.rejects}
    kept = {meta.caption for meta in raw_samples(tmp_path / "data")}
    assert "good" in kept <= {"good", "lying", "million"}  # what the picture itself says may count
    assert {
        name: reasons[f"{name}.mp4"]
        for name in ("empty", "byte", "png8k", "png16000", "png16k", "gif64k")
    } == {
        "empty": "invalid_data",
        "byte": "invalid_data",
        "png8k": "too_large",
        "png16000": "too_large",
        "png16k": "no_dimensions",
        "gif64k": "no_dimensions",
    }
    assert {
        reasons[f"{name}.mp4"]
        for name in ("pipe", "folder", "nowhere", "itself", "zero", "null\0byte")
    } == {"unreadable_file"}
    assert len(reasons) + len(kept) == len(names)
    assert peak_mb() - before < GROWTH_MB


def test_picture_too_large_for_the_memory_limit_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "bomb.mp4"
    path.write_bytes(hostile.png_bomb(12288))
    with SafeDecoder(max_pixels=1 << 30, memory_limit=12 << 20) as decoder:
        found = decoder.decode(VideoFile(path), [0.0], Wanted(1, 8.0, 32, 32))[0]
        assert found.reason in {"out_of_memory", "decoder_died"}


class Barcodes:
    """`barcodes` one by one: all at once they would be the largest thing in memory."""

    def __init__(self, count: int) -> None:
        self.shape = (count, 96, 160, 3)

    def __iter__(self) -> Iterator[np.ndarray]:
        for number in range(self.shape[0]):
            bits = (number >> np.arange(15)) & 1
            yield (
                (bits.reshape(3, 5).astype(np.uint8) * 219 + 16)
                .repeat(32, 0)
                .repeat(32, 1)[..., None]
                .repeat(3, -1)
            )


def test_clip_of_ten_thousand_frames(tmp_path: Path) -> None:
    source, before = tmp_path / "in", peak_mb()
    source.mkdir()
    (source / "long.mp4").write_bytes(
        encode(
            Barcodes(10_000),
            container="mp4",
            codec="libx264",
            options={**X264, "preset": "ultrafast"},
        )
    )
    captioned(source, [("long.mp4", "long")])
    manifest = make_shards(
        shards_config(source, max_spans=10_000, samples_per_shard=50), tmp_path / "data"
    )
    assert (manifest.num_samples, manifest.rejects) == (int((10_000 / 24 - 1) / 1.125) + 1, [])
    assert peak_mb() - before < GROWTH_MB
    with SafeDecoder() as decoder:
        frames = decoder.decode(VideoFile(source / "long.mp4"), [400.0], Wanted(9, 8.0, 96, 160))[0]
    assert numbers(frames) == [9600 + 3 * k for k in range(9)]


def test_read_only_folder_is_one_clear_error(tmp_path: Path, good: bytes) -> None:
    source, data = tmp_path / "in", tmp_path / "data"
    source.mkdir()
    (source / "good.mp4").write_bytes(good)
    captioned(source, [("good.mp4", "good")])
    data.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    report = tmp_path / "report"
    report.touch()
    pid = os.fork()
    if pid == 0:
        try:
            with open(report, "w") as file:
                if os.geteuid() == 0:
                    os.seteuid(65534)  # root may write everywhere
                try:
                    make_shards(shards_config("packaged"), data)
                except OSError as error:
                    file.write(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert "cannot write the shards: Permission denied" in report.read_text()
    assert contents(data) == {}
