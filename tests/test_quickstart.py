"""The product's main job in small, run once as a new user would, and looked at from all sides."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from landiff.data_pipeline.format.shards import read_manifest
from landiff.launchers.pipeline import pipeline_stages

PROMPT = "A white rabbit with black dots looks around on a green meadow."
ROOT = Path(__file__).resolve().parent.parent


def quickstart(out: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "landiff.launchers.cli",
        "quickstart",
        "--out",
        str(out),
        "--prompt",
        PROMPT,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=out.parent, env=env, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("walk") / "quickstart"
    done = quickstart(out)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return SimpleNamespace(
        out=out, text=done.stdout, summary=json.loads((out / "summary.json").read_text())
    )


def stage(walked, name: str) -> dict:
    return next(s for s in walked.summary["stages"] if s["name"] == name)


@pytest.mark.timeout(1600)
def test_every_stage_of_the_walk_ran_and_is_in_the_table(walked):
    assert [s["name"] for s in walked.summary["stages"]] == [
        s.name for s in pipeline_stages("nano", 2)
    ]
    table = walked.text[walked.text.rindex("first loss") :]
    for s in walked.summary["stages"]:
        assert s["exit_code"] == 0 and s["name"] in table
    assert "look next" in walked.text


def test_clips_that_cannot_be_used_are_set_aside_and_counted(walked):
    counts = read_manifest(walked.out / "data").reject_counts
    assert counts == {"shards/empty_caption": 1, "shards/too_short": 1}
    assert "1 shards/empty_caption" in walked.text


@pytest.mark.parametrize(
    ("name", "at_most"),
    [("tokenizer", 0.8), ("lm", 0.1), ("diffusion main", 0.8), ("diffusion control", 0.95)],
)
def test_every_loss_falls_clearly(walked, name, at_most):
    """`at_most`: mean of the last five logged losses over that of the first five. The control branch starts where the
    trained main transformer ended: it has less to gain."""
    trained = stage(walked, name)
    assert trained["last_loss"] < at_most * trained["first_loss"]


def rows(walked) -> list[dict]:
    found = walked.summary["evaluation"]["rows"]
    assert len(found) == 5
    return found


def test_the_language_model_beats_token_frequencies(walked):
    assert all(row["lm"] < 0.8 * row["token frequencies alone"] for row in rows(walked))


def test_the_language_model_listens_to_captions(walked):
    assert all(row["lm, another clip's caption"] > row["lm"] for row in rows(walked))


def test_the_control_branch_listens_to_tokens(walked):
    assert all(row["diffusion, another clip's tokens"] > row["diffusion"] for row in rows(walked))


def test_a_clean_prefix_helps_the_later_frames(walked):
    assert all(
        row["diffusion, later frames after a clean prefix"] < row["diffusion, later frames"]
        for row in rows(walked)
    )


def test_the_video_plays_everywhere(walked):
    (video,) = (walked.out / "samples").glob("*.mp4")
    assert [f"samples/{video.name}"] == walked.summary["videos"]
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == (
            "h264",
            "yuv420p",
            8,
        )
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 17 and frames[0].shape == (64, 64, 3)
    assert all(frame.std() > 5 for frame in frames), "a sample is flat"
    assert video.read_bytes().index(b"moov") < video.read_bytes().index(
        b"mdat"
    )  # starts before it is loaded


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("run", ["tokenizer", "lm", "diffusion-main", "diffusion-control"])
def test_tensorboard_has_the_curves_of(walked, run):
    tags = events(walked.out / "runs" / run / "tensorboard").Tags()["scalars"]
    for word in ("loss", "lr", "grad_norm", "throughput", "wait", "memory"):
        assert [t for t in tags if word in t], f"no {word} among {tags}"
    if run == "tokenizer":
        assert [t for t in tags if "codebook" in t]


def test_tensorboard_has_videos(walked):
    found = {}
    for run in ("precompute", "sample"):
        accumulator = events(walked.out / "runs" / run / "tensorboard")
        found |= {
            tag: accumulator.Images(tag)[0].encoded_image_string
            for tag in accumulator.Tags()["images"]
        }
    assert {"codec/input", "codec/round trip"} <= set(found) and [
        t for t in found if t.startswith("sample/")
    ]
    for tag, data in found.items():
        image = Image.open(io.BytesIO(data))
        assert image.format == "GIF" and image.n_frames == 17, tag


def digests(out: Path) -> dict[str, str]:
    """Everything that was made, but for logs that only ever grow."""
    kept = [
        p
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.suffix in {".tar", ".safetensors", ".jsonl", ".distcp", ".pt"}
    ]
    assert len(kept) > 20
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.mark.timeout(600)
def test_running_it_again_makes_nothing_anew(walked):
    before = digests(walked.out)
    again = quickstart(walked.out)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert digests(walked.out) == before
