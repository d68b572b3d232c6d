"""Shards of videos that are not progressive SDR: what is converted, rejected and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import RAW, RawSample
from landiff.data_pipeline.format.shards import ShardError
from landiff.data_pipeline.ingest.config import Bucket
from landiff.data_pipeline.ingest.job import make_shards
from landiff.data_pipeline.ingest.plan.planned_shard import PlannedShard, Span
from landiff.data_pipeline.video.codec import ClipDecoder, VideoFile
from tests.data_pipeline.ingest_helpers import parts_of, shards_config
from tests.data_pipeline.video_files import barcodes, encode
from tests.data_pipeline.video_kinds import (
    Color,
    color_video,
    interlaced,
    interlaced_video,
    moving_bar,
)

SDR = Color(1, primaries=1, matrix=1, pixels="yuv420p")
RAW_HEVC = {
    "container": "hevc",
    "codec": "libx265",
    "options": {
        "preset": "ultrafast",
        "x265-params": "log-level=none:pools=none:frame-threads=1:vui-timing-info=0",
    },
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video of each kind, 1.5 s long."""
    folder = tmp_path_factory.mktemp("kinds")
    videos = {
        "sdr.mp4": color_video(SDR, frames=36),
        "pq.mp4": color_video(Color(16), frames=36),
        "hlg.mp4": color_video(Color(18), frames=36),
        "fields.mp4": interlaced_video(interlaced(moving_bar(72))),
        "log.mp4": color_video(Color(1, primaries=1, matrix=1, tagged=(1, 9, 1)), frames=36),
        "raw.hevc": encode(barcodes(36), **RAW_HEVC),
    }
    rows = []
    for name, data in videos.items():
        (folder / name).write_bytes(data)
        rows.append(json.dumps({"file": name, "caption": name}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder


def samples(data: Path) -> dict[str, tuple[RawSample, np.ndarray, str]]:
    """Source -> sample, frames, the sample's JSON."""
    found = {}
    with ClipDecoder("pyav") as decoder:
        for path in sorted((data / RAW).glob("*.tar")):
            for parts in parts_of(path).values():
                sample = RawSample.model_validate_json(parts["json"])
                frames = decoder.decode(parts["mp4"])
                found[sample.source] = (sample, frames, parts["json"].decode())
    return found


def test_conversions_are_made_and_recorded_and_the_rest_is_rejected_by_name(
    source: Path, tmp_path: Path
) -> None:
    manifest = make_shards(shards_config(source, max_spans=1, max_bad_fraction=0.0), tmp_path)
    made = samples(tmp_path)
    assert {name: sample.conversions for name, (sample, _, _) in made.items()} == {
        "sdr.mp4": (),
        "pq.mp4": ("smpte2084/bt2020",),
        "hlg.mp4": ("arib-std-b67/bt2020",),
        "fields.mp4": ("bwdif",),
    }
    assert "conversions" not in made["sdr.mp4"][2]
    for name in ("pq.mp4", "hlg.mp4"):
        assert np.abs(made[name][1].astype(int) - made["sdr.mp4"][1]).max() <= 10
    rejects = {reject.key: (reject.reason, reject.detail) for reject in manifest.rejects}
    assert rejects["log.mp4"] == (
        "unsupported_transfer",
        "transfer log100 cannot be converted to SDR BT.709",
    )
    assert rejects["raw.hevc"][0] == "no_timestamps"
    assert "raw hevc stream without timestamps" in rejects["raw.hevc"][1]


def test_conversion_can_be_refused_and_belongs_to_the_folder(source: Path, tmp_path: Path) -> None:
    strict = shards_config(source, max_spans=1, video={"hdr": "reject", "interlaced": "reject"})
    manifest = make_shards(strict, tmp_path)
    assert manifest.reject_counts == {
        "shards/hdr": 2,
        "shards/interlaced": 1,
        "shards/no_timestamps": 1,
        "shards/unsupported_transfer": 1,
    }
    assert list(samples(tmp_path)) == ["sdr.mp4"]
    assert manifest.config["video"] == {"hdr": "reject", "interlaced": "reject"}
    with pytest.raises(ConfigError, match="video = "):
        make_shards(shards_config(source, max_spans=1), tmp_path)


def planned_shard(*conversions: str) -> PlannedShard:
    """A shard of one span."""
    span = Span(
        key="a" * 40,
        source="a.mp4",
        video=VideoFile(Path("a.mp4")),
        caption="a caption",
        source_sha256="b" * 64,
        start_s=0.0,
        crop=(0.0, 0.0, 0.0, 0.0),
        row=0,
        conversions=conversions,
    )
    return PlannedShard("000000", Bucket(num_frames=9, height=32, width=32), "", [span])


def test_shards_of_progressive_sdr_keep_their_fingerprint_and_others_have_a_new_one() -> None:
    settings = shards_config("made up")
    plain = planned_shard().fingerprint(settings)
    assert plain == "87517a1fac9832f2"  # of the version before
    deinterlaced = planned_shard("bwdif").fingerprint(settings)
    converted = planned_shard("smpte2084/bt2020").fingerprint(settings)
    assert len({plain, deinterlaced, converted}) == 3


def test_shards_that_were_made_before_there_were_conversions_are_refused(
    source: Path, tmp_path: Path
) -> None:
    settings = shards_config(source, max_spans=1)
    make_shards(settings, tmp_path)
    sidecar = tmp_path / RAW / "000000.json"
    document = json.loads(sidecar.read_text())
    document["fingerprint"] = "0" * 16
    sidecar.write_text(json.dumps(document))
    with pytest.raises(ShardError, match="before HDR and interlaced video were converted"):
        make_shards(settings, tmp_path)
