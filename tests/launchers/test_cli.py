"""What a person types and reads."""

import os
import subprocess
import sys

import pytest

from configs.ownership import take
from launchers.children import environment
from launchers.cli import main
from launchers.pipeline import walk
from launchers.snapshot import ROOT


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(list(argv))
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", [["shards"], ["precompute"], ["train", "lm"], ["convert"], ["zoo"], ["sample"], ["evaluate"], ["config"], ["quickstart"]])
def test_every_command_explains_itself(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and "usage: landiff" in out


def test_a_typo_names_the_nearest_key(capsys):
    code, _, err = run(capsys, "train", "lm", "--config", "nano/lm", "--dry-run", "optim.rl=1")
    assert code == 2 and "'optim.rl'" in err and "did you mean 'lr'" in err


def test_a_mistyped_command_names_the_nearest(capsys):
    code, _, err = run(capsys, "trane")
    assert code == 2 and "did you mean 'train'?" in err
    code, _, err = run(capsys, "train", "difusion", "--config", "x")
    assert code == 2 and "did you mean 'diffusion'?" in err


def test_an_override_may_follow_a_flag(capsys):
    code, out, err = run(capsys, "train", "lm", "--config", "nano/lm", "--dry-run", "--adopt", "loop.steps=7")
    assert code == 0 and "steps: 7" in out and "adopt: true" in out, err


def test_an_argument_that_is_no_override_is_refused(capsys):
    code, _, err = run(capsys, "train", "lm", "--config", "nano/lm", "steps")
    assert code == 2 and "key=value" in err


def test_dry_run_prints_the_resolved_config_and_makes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in walk("nano", 2):
        if "--config" in stage.command:
            code, out, err = run(capsys, *stage.command, "--dry-run")
            assert code == 0 and "# would" in out, err
    code, out, _ = run(capsys, "quickstart", "--dry-run", "--out", "here")
    assert code == 0 and out.count("landiff ") == len(walk("nano", 2))
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_say_what_to_run(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "precompute", "--config", "nano/features")
    assert code == 2 and "landiff shards" in err and "Traceback" not in err


def test_an_empty_prompt_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "sample", "--config", "nano/sample", " ")
    assert code == 2 and "prompt 0 is empty" in err


def test_a_run_without_a_checkpoint_cannot_be_exported(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "convert", "runs/lm", "--name", "lm")
    assert code == 2 and "runs/lm does not exist" in err


def test_the_zoo_says_what_it_has(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "zoo", "show", "lm")
    assert code == 2 and "nothing yet" in err


def test_config_lists_and_prints(capsys):
    code, out, _ = run(capsys, "config")
    assert code == 0 and "nano/lm" in out.splitlines()
    code, out, _ = run(capsys, "config", "nano/sample")
    assert code == 0 and "prompts:" in out


def test_stages_come_after_what_they_wait_for():
    seen: set[str] = set()
    for stage in walk("nano", 2, ["a prompt"]):
        assert set(stage.after) <= seen, stage
        seen.add(stage.name)


@pytest.mark.parametrize("command", ["shards", "precompute"])
def test_overrides_stand_beside_an_action_that_is_left_out(capsys, tmp_path, command):
    key = {"shards": "max_spans=7", "precompute": "batch_size=7"}[command]
    code, out, err = run(capsys, "-C", str(tmp_path), command, "--config", f"nano/{command}", "--dry-run", key)
    assert code == 0 and key.replace("=", ": ") in out, err


def test_a_mistake_that_all_ranks_meet_is_told_once(capfd, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()  # a package of the user's, which is none of ours
    (tmp_path / "configs" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    code, _, err = run(capfd, "-C", str(tmp_path), "train", "tokenizer", "--config", "nano/tokenizer", "--nproc", "2")
    assert code == 2 and err.count("data/manifest.json does not exist; run `landiff shards` first") == 1, err
    assert "Traceback" not in err and "Traceback" in (tmp_path / "runs/tokenizer/errors/rank_0001.txt").read_text()
    assert list((tmp_path / "tmp").glob("torchelastic*")) == []
    code, out, _ = run(capfd, "-C", str(tmp_path), "status")
    assert code == 0 and [line.split()[:3] for line in out.splitlines()[1:]] == [["runs/tokenizer", "tokenizer", "failed"]]


@pytest.mark.parametrize("way, code, words", [("os.kill(os.getpid(), 9)", 137, "rank 0 was ended by SIGKILL"), ("sys.exit(7)", 7, "")])
def test_torchrun_ends_as_its_rank_did(tmp_path, way, code, words):
    (tmp_path / "dying.py").write_text(f"import os, sys; {way}")
    done = subprocess.run([sys.executable, "-m", "launchers.torchrun", "--standalone", "--nproc-per-node=1", "-m", "dying"],
                          env=environment() | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (code, words)


def test_stop_says_what_is_no_run_and_what_does_not_run(capsys, tmp_path):
    code, _, err = run(capsys, "stop", str(tmp_path / "lm"))
    assert code == 2 and "is no run folder" in err
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.yaml").touch()
    code, out, _ = run(capsys, "stop", str(tmp_path / "lm"))
    assert code == 0 and "nothing of it is running" in out and not (tmp_path / "lm" / "stop").exists()
    code, _, err = run(capsys, "stop", "--restart", str(tmp_path / "lm"))
    assert code == 2 and "was not submitted" in err


def test_a_second_training_of_a_run_folder_is_refused_before_any_rank_starts(capsys, tmp_path):
    with take(tmp_path / "runs" / "lm" / ".owner", "the first"):
        code, _, err = run(capsys, "-C", str(tmp_path), "train", "lm", "--config", "nano/lm")
    assert code == 2 and f"run folder runs/lm is in use by process {os.getpid()} of" in err
    assert [path.name for path in (tmp_path / "runs" / "lm").iterdir()] == []
