"""`landiff learn` and `landiff attribute` around the preset `shapes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from landiff.configs import load
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.synthetic import world
from landiff.launchers.arguments import build_parser, parse_command
from landiff.launchers.cli import main
from landiff.launchers.learn import learn_stages
from landiff.launchers.pipeline import PipelineStage, local_stages
from landiff.launchers.project.check import check_preset
from landiff.launchers.project.presets import PRESET_CONFIGS
from tests.launchers.random_zoo import write_random_shapes_zoo


def check_stages(stages: list[PipelineStage]) -> None:
    """Commands parse, and stages wait for stages before them."""
    names = [stage.name for stage in stages]
    assert names[0] == "world" and len(set(names)) == len(names)
    for number, stage in enumerate(stages):
        parse_command(build_parser(), list(stage.command))
        assert set(stage.after) <= set(names[:number])


@pytest.mark.parametrize("long", [False, True])
def test_stages_of_learn_parse_and_wait_for_stages_before_them(long):
    stages = learn_stages(seed=3, long=long)
    check_stages(stages)
    assert stages[-1].name == ("long score" if long else "score")
    for stage in stages:
        if stage.run is not None:
            assert "loop.seed=3" in stage.command


def test_a_folder_that_extends_the_quickstart_has_all_its_stages(tmp_path):
    for stem in (*PRESET_CONFIGS, "latents"):
        (tmp_path / f"{stem}.yaml").write_text(f"extends: quickstart/{stem}\n")
    (tmp_path / "world.yaml").write_text("extends: quickstart/world\nclips: 7\n")
    stages = local_stages(str(tmp_path), ["a rabbit"])
    check_stages(stages)
    assert [stage.name for stage in stages] == [s.name for s in local_stages("quickstart")]
    assert "7" in stages[0].command
    assert check_preset(str(tmp_path)).problems == []


@pytest.mark.parametrize("preset", ["shapes", "quickstart"])
def test_diffusion_model_is_trained_beside_tokenizer_and_language_model(preset):
    stages = {stage.name: stage for stage in local_stages(preset)}

    def needed(name: str) -> set[str]:
        """All stages that must have ended before a stage starts."""
        found = set(stages[name].after)
        for other in stages[name].after:
            found |= needed(other)
        return found

    assert "tokenizer" not in needed("diffusion main") and "latents" in needed("diffusion main")
    assert {"columns", "diffusion main"} <= needed("diffusion control")
    assert "lm" not in needed("diffusion control")
    processes = {}
    for name in ("tokenizer", "lm", "diffusion main", "diffusion control"):
        command = stages[name].command
        processes[name] = command[command.index("--nproc") + 1]
    assert set(processes.values()) == {"1"}


@pytest.mark.parametrize("preset", ["shapes", "quickstart"])
def test_stage_latents_makes_columns_that_the_preset_names_too(preset):
    beside = load(PrecomputeConfig, f"{preset}/latents").columns
    whole = load(PrecomputeConfig, f"{preset}/precompute").columns
    assert set(whole) - set(beside) == {"tokens"}
    for name, column in beside.items():
        assert whole[name] == column


def test_a_dry_run_prints_the_commands(capsys):
    assert main(["learn", "--dry-run", "--out", "here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    make = "landiff shapes make --out world --clips 6000 --true-clips 108 --seed 0"
    assert lines[:2] == ["cd here", make]
    assert main(["learn", "--dry-run", "--out", "here", "--long"]) == 0
    longer = capsys.readouterr().out.splitlines()
    assert longer[: len(lines)] == lines
    assert any("lm --config shapes/long-lm" in line for line in longer)


def test_attribution_scores_every_stage_of_the_chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_random_shapes_zoo(Path("zoo"))
    world.write_world(Path("world"), clips=0, true_clips=2)
    words = ["attribute", "--config", "shapes/sample", "--out", "found.json", "steps=2"]
    words += ["--videos", "world/true-heldout", "--labels", "world/labels-true-heldout.jsonl"]
    assert main([*words, "--probe-clips", "4"]) == 0
    found = json.loads(Path("found.json").read_text())
    assert list(found["stages"]) == ["true clips", "codec", "true tokens", "language model"]
    assert found["stages"]["true clips"]["right"]["all"] == 1.0
    assert found["stages"]["codec"]["right"]["all"] == 1.0
    assert set(found["probes"]["language model"]) == set(world.ATTRIBUTES)
    assert found["tokenizer"]["unexplained variance"] > 0


def test_attribution_refuses_features_that_the_tokenizer_does_not_take(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_random_shapes_zoo(Path("zoo"))
    world.write_world(Path("world"), clips=0, true_clips=1)
    words = ["attribute", "--config", "shapes/sample"]
    words += ["--videos", "world/true-heldout", "--labels", "world/labels-true-heldout.jsonl"]
    assert main([*words, "--vision-blocks", "5", "--vision-pooling", "mean"]) == 2
    assert "features of 40 channels, and the tokenizer takes 160" in capsys.readouterr().err
    assert main([*words, "--vision-blocks", "11"]) == 2
    assert "pooling = stack needs blocks = 5" in capsys.readouterr().err
