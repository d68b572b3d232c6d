"""Mistakes in a project: each case must be found by `landiff check`, together with all others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from landiff.launchers.cli import main
from landiff.launchers.project.check import check_preset
from landiff.launchers.project.new import write_project

CHAIN_MISTAKE = "sample.fps = 24, but the models are trained on clips of shards.fps = 8"


@dataclass(frozen=True)
class Case:
    """Lines added to configs by stem, texts that must be found, and texts that must not."""

    lines: dict[str, str]
    found: tuple[str, ...]
    absent: tuple[str, ...] = ()


WRONG_VALUES = {
    "a value of a wrong type": Case(
        {"lm": "loop: {steps: many}"},
        ("loop.steps = 'many': Input should be a valid integer",),
    ),
    "an unknown key": Case(
        {"lm": "loop: {step: 3}"},
        ("unknown config key 'loop.step'; did you mean 'steps'?",),
    ),
    "an unknown key of a section whose kind is known": Case(
        {"precompute": "columns: {text-minilm: {encoder: {max_len: 3}}}"},
        ("'columns.text-minilm.encoder.max_len'; did you mean 'max_length'?",),
    ),
    "an unknown kind": Case(
        {"sample": "codec: {kind: dtc}"},
        ("codec.kind = 'dtc' is unknown; did you mean 'dct'?",),
        ("sample.codec = ",),
    ),
    "columns whose names have no kind": Case(
        {"precompute": "columns: {feature: {}, others: {}}"},
        ("did you mean 'features'?", "columns.others: the name of a column begins with its kind"),
        ("is a column that no precompute makes",),
    ),
    "a list with a wrong item": Case(
        {"sample": "seeds: [1, two]"}, ("seeds.1 = 'two': Input should be a valid integer",)
    ),
    "a section that is a number": Case(
        {"tokenizer": "optim: 3"}, ("optim = 3: Input should be a valid dictionary",)
    ),
    "wrong sizes of a model": Case(
        {"tokenizer": "model: {codebook_size: x}"},
        ("model.codebook_size = 'x': Input should be a valid integer",),
        ("codebook of the language model",),
    ),
    "a value that another stage needs": Case(
        {"diffusion-control": "schedule: {shift_scale: x}"},
        ("schedule.shift_scale = 'x'",),
        ("diffusion-control.schedule and diffusion-main.schedule differ",),
    ),
    "a config that extends nothing": Case(
        {"diffusion-main": "extends: nano/diffusion-mian"},
        ("diffusion-main.yaml: extends = 'nano/diffusion-mian'", "did you mean"),
    ),
    "a config that is no YAML": Case({"features": "columns: {"}, ("features.yaml",)),
    "shards without a size": Case({"shards": "height: null"}, ("num_frames, height and width",)),
}


def write_lines(project: Path, lines: dict[str, str]) -> None:
    """Add lines to configs of a project, in place of lines with the same key."""
    for stem, text in lines.items():
        path = project / f"{stem}.yaml"
        key = text.partition(":")[0]
        kept = []
        for line in path.read_text().splitlines():
            if line.partition(":")[0] != key:
                kept.append(line)
        if key == "model":
            (project / f"{stem}-base.yaml").write_text(path.read_text())
            kept[0] = f"extends: {stem}-base.yaml"
        path.write_text("\n".join([*kept, text, ""]))


def problems_of(project: Path) -> str:
    return "\n".join(str(problem) for problem in check_preset(str(project)).problems)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_hides_no_other_mistake(tmp_path, name):
    """Neither those between other stages nor those of the stage itself."""
    case = WRONG_VALUES[name]
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    write_lines(project, case.lines)
    found = problems_of(project)
    for text in case.found:
        assert text in found
    lines = found.splitlines()
    assert len(lines) == 1, "nothing else follows from it"
    for stem, text in {"sample": "fps: 24", "lm": "run: runs/other"}.items():
        if stem not in case.lines:
            write_lines(project, {stem: text})
    if "sample" in case.lines:
        write_lines(project, {"evaluate": "prefix_frames: 5"})
    found = problems_of(project)
    for text in case.found:
        assert text in found
    for text in case.absent:
        assert text not in found
    if "shards" not in case.lines and "sample" not in case.lines:
        assert CHAIN_MISTAKE in found
    if "lm" not in case.lines:
        assert "lm.run = runs/other, but the pipeline exports runs/lm" in found
    if "sample" in case.lines:
        assert "evaluate.prefix_frames = 5 must be less than" in found


def test_a_wrong_value_is_in_one_list_with_mistakes_of_its_own_stage(tmp_path, capsys):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    write_lines(project, {"lm": "loop: {steps: many, save_every: 0}"})
    write_lines(project, {"lm": "init_from: gone"})
    write_lines(project, {"sample": "fps: 24"})
    words = ["lm.yaml", "loop.steps = 'many'", "loop.save_every = 0", "init_from = gone"]
    commands = [
        ["check", "--preset", str(project)],
        ["quickstart", "--preset", str(project)],
        ["submit", "pipeline", "--preset", str(project), "--cluster", "local"],
    ]
    for command in commands:
        assert main(command) == 2
        err = capsys.readouterr().err
        for text in (*words, CHAIN_MISTAKE):
            assert text in err, command
    for command in (["check"], ["train", "lm"], ["train", "lm", "--dry-run"]):
        assert main([*command, "--config", str(project / "lm.yaml")]) == 2
        captured = capsys.readouterr()
        for text in words[1:3]:
            assert text in captured.err, command
        assert captured.out == "", "no config with other values is shown"
    names = {path.name for path in project.iterdir()}
    assert not names & {"data", "runs", "zoo"}


def test_a_project_is_run_in_its_folder_by_all_commands(tmp_path, monkeypatch, capsys):
    """Relative paths of `source` and `data` are those of the project."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "project", "--source", "packaged"]) == 0
    project = tmp_path / "project"
    write_lines(project, {"shards": "source: videos"})
    preset = ["--preset", "project"]
    commands = [
        ["check", *preset],
        ["quickstart", *preset, "--dry-run"],
        ["submit", "pipeline", *preset, "--cluster", "project/cluster.yaml", "--dry-run"],
    ]
    (tmp_path / "videos").mkdir()
    for command in commands:
        assert main(command) == 2
        assert "source = 'videos' does not exist" in capsys.readouterr().err
    shutil.move(tmp_path / "videos", project / "videos")
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "cd project\n" in out and f"{project}/runs/lm" in out
    (project / "data").mkdir()
    manifest = {"num_samples": 0, "shards": []}
    (project / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["plan", "all", *preset]) == 0
