"""Names in the configs of a preset: zoo entries, columns of captions and scores, data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from landiff.configs import load
from landiff.launchers.cli import main
from landiff.launchers.project.check import check_preset
from landiff.launchers.project.new import write_project
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    write_project(folder, "nano", 9, "32x48")
    return folder


def add(project: Path, stem: str, *lines: str) -> None:
    """Add lines to a config of the project."""
    path = project / f"{stem}.yaml"
    path.write_text("\n".join([path.read_text(), *lines, ""]))


def problems_of(project: Path) -> list[str]:
    return [str(problem) for problem in check_preset(str(project)).problems]


SCORES = "score-light: {head: {kind: measure, measure: brightness}}"
MISTAKES = {
    "precompute: columns: {tokens: {tokenizer: tokeniser}}": (
        "precompute.columns.tokens.tokenizer = tokeniser: the zoo zoo has no 'tokeniser'; it has: "
        "nothing yet; the pipeline exports 'tokenizer'"
    ),
    "lm: tokenizer: tokenizer@12ab": "lm.tokenizer = tokenizer@12ab: the zoo zoo has no",
    "sample: lm: main": "sample.lm = main: the zoo zoo has no 'main'",
    "sample: adapters: [{adapter: style}]": "sample.adapters.0.adapter = style: the zoo zoo has no",
    "evaluate: diffusion: other/diffusion": "evaluate.diffusion = other/diffusion: ",
    "lm: data: {where: moton > 0.1}": "unknown value 'moton' in 'moton > 0.1'; did you mean",
    "diffusion-main: phases: [{from_step: 9, data: {where: dark > 1}}]": (
        "diffusion-main: phases.0.data.where: unknown value 'dark'"
    ),
    "lm: data: {blend: [{manifest: gone}]}": "lm: data.blend.0.manifest = gone: gone/manifest.json",
    "lm: data: {captions: {text-minilm: 1, text-short: 1}}": (
        "lm: data.captions names text-short, a column that no precompute makes; known here"
    ),
    "lm: data: {captions: {text-minilm-padded: 1}}": "name exactly one of its text columns",
    "precompute: columns: {text-minilm: {captions: captions-qwen}}": (
        "precompute.columns.text-minilm.captions = captions-qwen is neither in columns nor in data"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_name_that_nothing_makes_is_found_before_the_first_stage(project, mistake, capsys):
    stem, _, text = mistake.partition(": ")
    add(project, stem, text)
    (found,) = problems_of(project)
    assert MISTAKES[mistake] in found
    assert main(["quickstart", "--preset", str(project)]) == 2
    assert not (project / "data").exists()


def test_stages_that_name_two_tokenizers_are_refused(project):
    model = load(ModelConfig, project / "model.yaml").tokenizer
    zoo = project / "zoo"
    registry.export(zoo, "released", "tokenizer", model, {"weight": torch.ones(1)}, {})
    add(project, "precompute", "columns: {tokens: {tokenizer: released}}")
    found = problems_of(project)
    assert (
        "lm.tokenizer = tokenizer, but precompute.columns.tokens.tokenizer = released" in found[0]
    )
    for stem in ("lm", "diffusion-control", "evaluate", "sample"):
        add(project, stem, "tokenizer: released")
    assert problems_of(project) == []


def test_the_zoo_may_have_what_the_pipeline_does_not_make(project):
    """Names are looked up in the project folder, not in the current one."""
    model = load(ModelConfig, project / "model.yaml").lm
    zoo = project / "zoo"
    registry.export(zoo, "released", "lm", model, {"weight": torch.ones(1)}, {})
    add(project, "sample", "lm: released")
    assert problems_of(project) == []
    add(project, "evaluate", "diffusion: released")
    (found,) = problems_of(project)
    assert "is a lm, where a diffusion is needed; the pipeline exports 'diffusion'" in found


def test_a_trainer_waits_for_other_captions_and_for_scores(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    text = "text-short: {encoder: {kind: minilm}}"
    add(project, "precompute", "columns:", f"  {text}", f"  {SCORES}")
    add(project, "lm", "data: {captions: {text-minilm: 1, text-short: 1}}")
    add(project, "lm", "phases: [{from_step: 100, data: {where: light > 0.1}}]")
    words = ["submit", "pipeline", "--preset", ".", "--cluster", "cluster.yaml", "--dry-run"]
    assert main(words) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("# lm: lm, ")
    ]
    assert line.endswith(
        "after enter-tokens, enter-text-minilm, enter-text-short, enter-score-light"
    )
    assert main([*words, "sample.lm=llm"]) == 2
    assert "landiff submit: sample.lm = llm: the zoo" in capsys.readouterr().err
