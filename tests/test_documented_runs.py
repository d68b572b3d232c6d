"""Every `landiff` command in the documentation runs, in a folder where the preset nano has run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from landiff.launchers.cli import main
from landiff.launchers.pipeline import pipeline_stages
from tests.docs_commands import ROOT, commands, words_of

pytestmark = pytest.mark.timeout(2400)

SHORT = ("loop.steps=4", "loop.log_every=2", "optim.warmup_steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which all stages up to the exports have run, with a few steps of training."""
    out = tmp_path_factory.mktemp("nano")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        # Without --nproc, each trainer has as many processes as its config needs.
        for stage in pipeline_stages("nano", None):
            words = list(stage.command)
            if stage.name in ("evaluate", "sample"):
                continue
            if stage.run is not None:
                words += SHORT
            assert main(words) == 0, stage.name
    return out


OFFLINE = "HF_HUB_OFFLINE is set"  # by tests/conftest.py
# What commands in the documentation need that this folder does not have, by the error they give.
# The start of a command that is listed first decides. "" is success.
MISSING_INPUTS = {
    # The runs are finished, with other clips held out.
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
    "landiff evaluate videos": "is not a folder",
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
    "landiff captions stats": "no column",
    "landiff captions": OFFLINE,  # the vision-language model
    "landiff submit precompute --config landiff/captions": OFFLINE,
    "landiff precompute status --config landiff/": "",
    "landiff precompute retry": "",
    "landiff precompute finalize --config landiff/": "column",
    "landiff precompute estimate --config landiff/": OFFLINE,  # encoders of the landiff preset
    "landiff precompute verify --config landiff/": OFFLINE,
    "landiff precompute --config landiff/": OFFLINE,
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


def test_documented_commands_run(folder, monkeypatch, capsys):
    """The documentation uses the paths of the folder.

    Trainings and submissions run with --dry-run, and evaluations on few samples. Commands for
    inputs that are not here, such as the released weights, must say what is missing.
    """
    monkeypatch.chdir(folder)
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
        if words[:3] == ["evaluate", "--config", "nano/evaluate"]:
            words.append("samples=4")
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
