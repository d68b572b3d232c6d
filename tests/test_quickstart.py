"""`landiff quickstart` with fewer clips and steps, run once, and checks of everything it writes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from landiff.configs import load
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.loading.where import Where
from landiff.launchers.cli import main
from landiff.launchers.data.survey import Survey
from landiff.launchers.pipeline import local_stages
from landiff.launchers.project.presets import FURTHER_CONFIGS, PRESET_CONFIGS
from landiff.training.diffusion.config import DiffusionTrainConfig

pytestmark = pytest.mark.timeout(2400)  # the first test waits for the whole pipeline

SHAPES = "A red circle moves up quickly over a white ground."
RABBIT = "A grey rabbit stands in a yellow meadow and looks down sadly."
PROMPTS = (SHAPES, RABBIT)
STEPS = "loop: {steps: 30, log_every: 2}\noptim: {warmup_steps: 5}\n"
SHORTER = {
    "world": "clips: 64\n",
    "shards": "max_spans: 1\nsamples_per_shard: 32\n",
    "tokenizer": f"{STEPS}quantize_from_step: 10\n",
    "lm": STEPS,
    "diffusion-main": STEPS,
    "diffusion-control": STEPS,
    "evaluate": "samples: 8\n",
}
"""What the configs change in those of the quickstart."""
ROOT = Path(__file__).resolve().parent.parent


def write_preset(folder: Path) -> None:
    """Writes a preset that extends that of the quickstart."""
    folder.mkdir()
    for stem in (*PRESET_CONFIGS, *FURTHER_CONFIGS):
        text = f"extends: quickstart/{stem}\n{SHORTER.get(stem, '')}"
        (folder / f"{stem}.yaml").write_text(text)


def words(out: Path) -> list[str]:
    """Words of the command, after `landiff`."""
    found = ["quickstart", "--preset", str(out.parent / "preset"), "--out", str(out)]
    for prompt in PROMPTS:
        found += ["--prompt", prompt]
    return found


def quickstart(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "landiff.launchers.cli", *words(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=out.parent, env=env, capture_output=True, text=True, timeout=2100
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("pipeline") / "quickstart"
    write_preset(out.parent / "preset")
    done = quickstart(out)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return SimpleNamespace(
        out=out, text=done.stdout, summary=json.loads((out / "summary.json").read_text())
    )


def stage(finished, name: str) -> dict:
    return next(result for result in finished.summary["stages"] if result["name"] == name)


def test_every_stage_of_the_pipeline_ran_and_is_in_the_table(finished):
    results = finished.summary["stages"]
    names = [stage.name for stage in local_stages("quickstart")]
    assert sorted(result["name"] for result in results) == sorted(names)
    table = finished.text[finished.text.rindex("first loss") :]
    for result in results:
        assert result["exit_code"] == 0 and result["name"] in table
    assert "next steps" in finished.text


def test_clips_that_cannot_be_used_are_rejected_and_counted(finished):
    counts = read_manifest(finished.out / "data").reject_counts
    assert counts == {"shards/empty_caption": 1, "shards/too_short": 1}
    assert "1 shards/empty_caption" in finished.text


@pytest.mark.parametrize(
    ("name", "at_most"),
    [("tokenizer", 0.9), ("lm", 0.85), ("diffusion main", 0.6), ("diffusion control", 0.92)],
)
def test_every_loss_falls_clearly(finished, name, at_most):
    """`at_most` bounds the mean of the last five logged losses, relative to that of the first five.

    The control branch starts from the trained main transformer, so its loss falls less.
    """
    trained = stage(finished, name)
    assert trained["last_loss"] < at_most * trained["first_loss"]


def rows(finished) -> list[dict]:
    found = finished.summary["evaluation"]["rows"]
    assert len(found) == 1
    return found


def test_the_language_model_uses_captions(finished):
    assert all(row["lm, another clip's caption"] > row["lm"] for row in rows(finished))


def test_the_control_branch_uses_tokens(finished):
    assert all(row["diffusion, another clip's tokens"] > row["diffusion"] for row in rows(finished))


def test_videos_play_everywhere(finished):
    videos = sorted((finished.out / "samples").glob("*.mp4"))
    assert [f"samples/{video.name}" for video in videos] == finished.summary["videos"]
    assert len(videos) == len(PROMPTS)
    for video in videos:
        check_video(video)


def check_video(video: Path) -> None:
    """A video has the codec and the shape that players expect, and its frames are not flat."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 17 and frames[0].shape == (64, 64, 3)
    assert all(frame.std() > 5 for frame in frames), "a sample is flat"
    data = video.read_bytes()
    # Players can start before the whole file is loaded.
    assert data.index(b"moov") < data.index(b"mdat")


def test_the_report_shows_samples_stages_and_losses(finished):
    page = (finished.out / "report.html").read_text()
    assert str(finished.out / "report.html") in finished.text
    for part in (*PROMPTS, "nearest training clip", "diffusion control", "loss of lm", "verdict"):
        assert part in page, part
    assert page.count("data:image/gif") == 2 * len(PROMPTS)
    wrong = page.count("wrong: ") + page.count("all five right")
    assert wrong == 1, "one prompt is of the shapes world"


def test_each_data_set_of_the_blend_holds_one_kind_of_clips(finished):
    data = load(DiffusionTrainConfig, "quickstart/diffusion-main").data
    survey = Survey(finished.out / "data", read_manifest(finished.out / "data"))
    sources = [meta.source for meta in survey.metadata()]
    survey.close()
    counts = []
    for part in (data, *data.blend):
        assert part.where is not None
        where = Where(part.where)
        counts.append(sum(where({"source": source}) for source in sources))
    assert counts == [64, len(sources) - 64] and counts[1] >= 40


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("run", ["tokenizer", "lm", "diffusion-main", "diffusion-control"])
def test_tensorboard_has_the_curves_of(finished, run):
    tags = events(finished.out / "runs" / run / "tensorboard").Tags()["scalars"]
    for word in ("loss", "lr", "grad_norm", "throughput", "wait", "memory"):
        assert any(word in tag for tag in tags), f"no {word} among {tags}"
    if run == "tokenizer":
        assert any("codebook" in tag for tag in tags)


def test_tensorboard_has_videos(finished):
    found = {}
    for run in ("precompute", "sample"):
        accumulator = events(finished.out / "runs" / run / "tensorboard")
        for tag in accumulator.Tags()["images"]:
            found[tag] = accumulator.Images(tag)[0].encoded_image_string
    assert {"codec/input", "codec/round trip"} <= set(found)
    assert any(tag.startswith("sample/") for tag in found)
    for tag, data in found.items():
        image = Image.open(io.BytesIO(data))
        assert image.format == "GIF" and image.n_frames == 17, tag


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of all data, weights, checkpoints and metrics, by path."""
    suffixes = {".tar", ".safetensors", ".jsonl", ".distcp", ".pt"}
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in suffixes:
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(found) > 20
    return found


def test_a_second_run_changes_nothing(finished, monkeypatch, capsys):
    """The commands run in this process, since importing torch for each of them takes longest."""
    before = digests(finished.out)
    monkeypatch.chdir(finished.out.parent)
    assert main([*words(finished.out), "--dry-run"]) == 0
    monkeypatch.chdir(finished.out)
    commands = landiff_commands(capsys.readouterr().out)
    assert len(commands) == len(finished.summary["stages"])
    for command in commands:
        assert main(command) == 0, command
    assert digests(finished.out) == before


def landiff_commands(text: str) -> list[list[str]]:
    """Words of the `landiff` commands in the output of --dry-run."""
    lines = [line for line in text.splitlines() if line.startswith("landiff ")]
    return [shlex.split(line)[1:] for line in lines]
