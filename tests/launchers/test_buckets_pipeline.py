"""The whole pipeline on images, on videos of two sizes, and on both together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.video.codec import ClipDecoder, write_mp4
from landiff.launchers.cli import main
from landiff.launchers.project.new import write_project
from tests.data_pipeline.precompute_data import pan

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("tokenizer", "lm", "diffusion-main", "diffusion-control")
IMAGE, VIDEO, TALL = "1x64x64", "17x64x64", "17x96x64"


def write_source(folder: Path, buckets: list[str]) -> None:
    """Eight files with captions of each bucket: images, square and tall videos."""
    folder.mkdir()
    for number in range(24):
        if (IMAGE, VIDEO, TALL)[number % 3] not in buckets:
            continue
        frames = pan(number, 17, 96)
        name = folder / f"{number:02d}.mp4"
        if number % 3 == 0:
            name = name.with_suffix(".png")
            Image.fromarray(frames[0, :64, :64]).save(name)
        else:
            height = 64 if number % 3 == 1 else 96
            write_mp4(name, frames[:, :height, :64], 8)
        name.with_suffix(".txt").write_text(f"a moving picture, number {number}")


def write_configs(project: Path, source: Path, buckets: list[str]) -> None:
    """A project of the nano models for clips of `buckets`, whose samples are of the first."""
    write_project(project, "nano", source=str(source))
    shapes = []
    for name in buckets:
        frames, height, width = name.split("x")
        shapes.append(f"{{num_frames: {frames}, height: {height}, width: {width}}}")
    (project / "shards.yaml").write_text(
        f"extends: nano/shards\nsource: {source}\nnum_frames: null\nheight: null\nwidth: null\n"
        f"samples_per_shard: 4\nmax_spans: 1\nbuckets: [{', '.join(shapes)}]\n"
    )
    data = f"manifest: data, buckets: [{', '.join(buckets)}], balance_tokens: true"
    data += ", global_batch_size: 4, micro_batch_size: 2, validation: {fraction: 0.5}"
    loop = "steps: 3, log_every: 1, save_every: 3, preview_every: 3, val_every: 3"
    for stage in STAGES:
        path = project / f"{stage}.yaml"
        path.write_text(f"{path.read_text()}data: {{{data}}}\nloop: {{{loop}}}\n")
    path = project / "evaluate.yaml"
    path.write_text(f"{path.read_text()}samples: 2\nseeds: 1\n")
    path = project / "sample.yaml"
    frames, size = latent_frames_and_size(buckets[0])
    text = path.read_text().replace("num_latent_frames: 5", f"num_latent_frames: {frames}")
    path.write_text(f"{text}size: {size}\nsteps: 2\nprompts: [a picture]\n")


def latent_frames_and_size(bucket: str) -> tuple[int, str]:
    """Latent frames, and height and width, of a bucket."""
    frames, size = bucket.split("x", 1)
    return (int(frames) - 1) // 4 + 1, size


def check_sample(folder: Path, bucket: str) -> None:
    """The only video of a folder has the shape of a bucket."""
    (video,) = folder.glob("*.mp4")
    with ClipDecoder("pyav") as decoder:
        frames_THWC = decoder.decode(video.read_bytes())
    assert frames_THWC.shape == (*map(int, bucket.split("x")), 3)


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "buckets",
    [[IMAGE], [VIDEO, TALL], [IMAGE, VIDEO, TALL]],
    ids=["images", "videos", "both"],
)
def test_all_stages_pass(tmp_path, monkeypatch, buckets):
    write_source(tmp_path / "source", buckets)
    project = tmp_path / "project"
    write_configs(project, tmp_path / "source", buckets)
    command = [sys.executable, "-m", "landiff.launchers.cli", "quickstart", "--preset", "."]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found = {shard.bucket for shard in read_manifest(project / "data").shards}
    assert found == set(buckets)
    for stage in STAGES:
        lines = (project / "runs" / stage / "metrics.jsonl").read_text().splitlines()
        tags = {tag for line in lines for tag in json.loads(line)}
        losses = {tag for tag in tags if tag.startswith("train/loss_") and tag[11:12].isdigit()}
        assert losses and losses <= {f"train/loss_{bucket}" for bucket in buckets}
    check_sample(project / "samples", buckets[0])
    monkeypatch.chdir(project)
    for bucket in buckets[1:]:
        frames, size = latent_frames_and_size(bucket)
        values = [f"size={size}", f"num_latent_frames={frames}", f"out={bucket}"]
        assert main(["sample", "--config", "sample.yaml", *values]) == 0
        check_sample(project / bucket, bucket)
