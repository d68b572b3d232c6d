"""What a dry run says about costs, and the check of one config."""

from __future__ import annotations

import pytest

from landiff.configs import load
from landiff.launchers.budget.total import TrainingCost, total_days
from landiff.launchers.cli import main
from landiff.launchers.project import space
from landiff.launchers.project.outlook import outlook
from landiff.launchers.project.presets import PRESET_CONFIGS, preset_config


def test_a_dry_run_begins_with_the_cost_of_each_training_and_of_all(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# plan" and lines[1].split()[1] == "tokenizer"
    total = next(number for number, line in enumerate(lines) if line.startswith("# total: "))
    assert total < lines.index("cd runs/quickstart") and "GPU hours" in lines[total]


def test_costs_are_steps_times_seconds_times_gpus(tmp_path):
    configs = {stem: load(cls, preset_config("nano", stem)) for stem, cls in PRESET_CONFIGS.items()}
    lines = outlook(configs, {"lm": 2}, tmp_path)
    assert lines[0] == "plan" and lines[1].split()[:5] == ["lm", "200", "steps", "on", "2"]
    assert "their number is not known yet" in lines[2] and lines[3].startswith("total: 0.0 GPU")
    day = 86400.0
    costs = {
        "tokenizer": TrainingCost("tokenizer", 1, 1, day, 0),
        "lm": TrainingCost("lm", 1, 8, 2 * day, 0),
        "diffusion-main": TrainingCost("diffusion-main", 1, 4, day, 0),
        "diffusion-control": TrainingCost("diffusion-control", 1, 4, day / 2, 0),
    }
    assert total_days(costs) == 3 and costs["lm"].gpu_hours == 8 * 48


def test_one_config_is_checked_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--config", "nano/shards"]) == 0
    assert "valid config of shards" in capsys.readouterr().out
    assert main(["check", "--config", "nano/lm", "run=lm"]) == 2
    assert "data/manifest.json does not exist" in capsys.readouterr().err
    assert main(["check", "--config", "nano/lm", "optim.lr=-1"]) == 2
    assert "optim.lr = -1" in capsys.readouterr().err


def test_a_full_disk_is_found_before_anything_starts(tmp_path, monkeypatch):
    assert space.check_least_space(tmp_path / "not-there-yet") == []
    monkeypatch.setattr(space, "LEAST_FREE", 1 << 60)
    assert "of free space" in str(space.check_least_space(tmp_path)[0])


@pytest.mark.parametrize("captions", ["file_name", None])
def test_a_project_says_what_becomes_of_clips_without_captions(tmp_path, captions, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the folder of the source is in the files
    command = ["new", str(tmp_path / "project"), "--source", "videos"]
    assert main([*command, *(["--captions", captions] if captions else [])]) == 0
    text = (tmp_path / "project" / "shards.yaml").read_text()
    assert ("missing_captions: file_name" in text) == (captions == "file_name")
    readme = (tmp_path / "project" / "README.md").read_text()
    (made_by,) = [line for line in readme.splitlines() if "landiff new" in line]
    again = [*made_by.replace(" new project ", f" new {tmp_path}/second ").split()[1:]]
    assert main(again) == 0
    for name in ("shards.yaml", "README.md"):
        found = (tmp_path / "second" / name).read_text()
        assert found.replace("second", "project") == (tmp_path / "project" / name).read_text()
