"""`landiff quickstart`, run once as a new user would run it, and checks of everything it writes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from landiff.data_pipeline.format.shards import read_manifest
from landiff.launchers.cli import main
from landiff.launchers.pipeline import pipeline_stages
from tests.docs_commands import commands, words_of

pytestmark = pytest.mark.timeout(2400)  # the first test waits for the whole pipeline

PROMPT = "A white rabbit with black dots looks around on a green meadow."
ROOT = Path(__file__).resolve().parent.parent


def quickstart(out: Path) -> subprocess.CompletedProcess:
    words = ["quickstart", "--out", str(out), "--prompt", PROMPT]
    command = [sys.executable, "-m", "landiff.launchers.cli", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=out.parent, env=env, capture_output=True, text=True, timeout=2100
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("pipeline") / "quickstart"
    done = quickstart(out)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return SimpleNamespace(
        out=out, text=done.stdout, summary=json.loads((out / "summary.json").read_text())
    )


def stage(finished, name: str) -> dict:
    return next(result for result in finished.summary["stages"] if result["name"] == name)


def test_every_stage_of_the_pipeline_ran_and_is_in_the_table(finished):
    results = finished.summary["stages"]
    stages = pipeline_stages("nano", 2)
    assert [result["name"] for result in results] == [stage.name for stage in stages]
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
    [("tokenizer", 0.8), ("lm", 0.1), ("diffusion main", 0.8), ("diffusion control", 0.95)],
)
def test_every_loss_falls_clearly(finished, name, at_most):
    """`at_most` bounds the mean of the last five logged losses, relative to that of the first five.

    The control branch starts from the trained main transformer, so its loss falls less.
    """
    trained = stage(finished, name)
    assert trained["last_loss"] < at_most * trained["first_loss"]


def rows(finished) -> list[dict]:
    found = finished.summary["evaluation"]["rows"]
    assert len(found) == 5
    return found


def test_the_language_model_beats_token_frequencies(finished):
    assert all(row["lm"] < 0.8 * row["token frequencies alone"] for row in rows(finished))


def test_the_language_model_uses_captions(finished):
    assert all(row["lm, another clip's caption"] > row["lm"] for row in rows(finished))


def test_the_control_branch_uses_tokens(finished):
    assert all(row["diffusion, another clip's tokens"] > row["diffusion"] for row in rows(finished))


def test_a_clean_prefix_helps_the_later_frames(finished):
    assert all(
        row["diffusion, later frames after a clean prefix"] < row["diffusion, later frames"]
        for row in rows(finished)
    )


def test_the_video_plays_everywhere(finished):
    (video,) = (finished.out / "samples").glob("*.mp4")
    assert [f"samples/{video.name}"] == finished.summary["videos"]
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
    for part in (PROMPT, "nearest training clip", "diffusion control", "loss of lm", "verdict"):
        assert part in page, part
    assert page.count("data:image/gif") == 2


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


def test_a_second_run_changes_nothing(finished):
    before = digests(finished.out)
    again = quickstart(finished.out)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert digests(finished.out) == before


# What commands in the documentation need that this folder does not have, by the error they give.
# The start of a command that is listed first decides. "" is success.
MISSING_INPUTS = {
    # The runs of the quickstart are finished, with other clips held out.
    "landiff train lm --config nano/lm data.validation": "holds out other clips",
    "landiff train lm --config nano/lm run=runs/lm-2": "distributed_optimizer",
    "landiff logs runs/lm --rank": "no log of rank",
    "landiff logs runs/lm": "",
    "landiff shards --config nano/shards source=": "exist",  # the reader's videos
    'landiff shards --config nano/shards "source=': "exist",
    "landiff shards --config landiff/": "exist",
    "landiff sample --config nano/sample --prompts prompts.txt": "No such file",
    'landiff sample --config nano/sample "vision=': "No such file",
    "landiff evaluate vbench": "max_text_tokens",
    "landiff evaluate videos": "at least 2",  # the quickstart samples one prompt
    "landiff submit evaluate --cluster my-site.yaml vbench": "max_text_tokens",
    "landiff shards --dry-run": "exist",
    "landiff shapes score --videos world/": "No such file",  # of the preset shapes
    "landiff shapes show --videos world/": "No such file",
    "landiff zoo pack": "has no rates.json",
    "landiff attribute": "do not fit",  # the models of the preset shapes
    "landiff convert inspect weights/": "exist",  # the released weights
    "landiff convert weights/": "exist",
    "landiff convert runs/my-": "exist",  # runs of docs/fine-tuning.md, which are not started here
    "landiff convert my-": "has no",
    "landiff convert diffusion my-": "has no",
    "landiff zoo show my-": "has no",
    "landiff sample --config landiff/sample 'adapters=": "has no",
    "landiff evaluate --config nano/evaluate 'adapters=": "has no",
    "landiff sample --config nano/sample 'adapters=": "has no",
    "landiff captions --dry-run": "",
    "landiff captions stats": "no column",
    "landiff captions": "offline",  # the vision-language model
    "landiff submit precompute --config landiff/captions": "",
    "landiff precompute --config landiff/precompute --task": "",  # this task has no shards
    "landiff precompute status --config landiff/": "",
    "landiff precompute retry": "",
    "landiff precompute finalize --config landiff/": "column",
    "landiff precompute estimate --config landiff/": "offline",  # encoders of the landiff preset
    "landiff precompute verify --config landiff/": "offline",
    "landiff precompute --config landiff/": "offline",
    "landiff train lm --config landiff/": "tokenizer",  # data of the landiff preset
    "landiff submit lm --config landiff/": "tokenizer",
    "landiff submit pipeline --preset landiff": "videos",
    "landiff train diffusion --config landiff/": "column",
    "landiff train diffusion --config runs/main-2": "ranks",  # made for 16 of them
    "landiff check --preset phone": "exist",  # the videos of the tutorials
    "landiff check --preset my-domain": "exist",
    "landiff data report phone/data": "exist",
    "landiff -C phone sample": "exist",
    "landiff stop --restart": "not submitted",
}


# Commands that take long and have tests of their own.
SLOW = ("doctor", "learn", "quickstart", "fit-codec", "attribute")


def expected_error(command: str) -> str:
    """Text in the error that a documented command gives here, empty if it must succeed."""
    for start, text in MISSING_INPUTS.items():
        if command.startswith(start):
            return text
    return ""


def test_documented_commands_run(finished, monkeypatch, capsys):
    """In the folder of the quickstart, whose paths the documentation uses.

    Trainings and submissions run with --dry-run. Commands for inputs that are not here, such as
    the released weights, must say what is missing.
    """
    monkeypatch.chdir(finished.out)
    shutil.copy(ROOT / "configs" / "cluster" / "example.yaml", "my-site.yaml")
    wrong = []
    for command in dict.fromkeys(line for _page, line in commands()):
        words = words_of(command)
        if words[0] in SLOW or words[:2] == ["shapes", "make"]:
            continue
        if words[0] == "-C":
            words = words[2:]
        if words[0] in ("train", "submit") and "--dry-run" not in words:
            words.insert(2, "--dry-run")
        if words[0] == "demo":
            words.insert(1, "--dry-run")
        if words[0] == "logs":
            words = [word for word in words if word != "--follow"]
        code, text = run_command(words, capsys)
        expected = expected_error(command)
        succeeded = code == 0
        if succeeded == bool(expected) or expected not in text:
            wrong.append(f"{command}: exit code {code}, {text[-300:]}")
    assert not wrong, "\n\n".join(wrong)


def run_command(words: list[str], capsys) -> tuple[int, str]:
    """Exit code and output of a `landiff` command."""
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err
