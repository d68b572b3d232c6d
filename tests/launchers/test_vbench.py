"""`landiff evaluate vbench`: scores, checks of official result files, and the whole command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.launchers.config import SampleConfig
from landiff.launchers.evaluation import vbench
from landiff.launchers.evaluation.vbench import VBenchPrompt, read_result, video_name
from landiff.model_zoo.evaluate.vbench import DIMENSIONS, PUBLISHED, PublishedRow, aggregate

PROMPTS = [
    VBenchPrompt("a cat", ("scene", "color")),
    VBenchPrompt("a dog, running", ("scene",)),
    VBenchPrompt("rain", ("color",)),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.model)
def test_published_rows_follow_from_their_dimensions(row):
    """Within 0.01: the published inputs are rounded."""
    scores = aggregate(row.by_dimension())
    assert scores.quality == pytest.approx(row.quality, abs=0.01)
    assert scores.semantic == pytest.approx(row.semantic, abs=0.01)
    assert scores.total == pytest.approx(row.total, abs=0.01)
    assert row.inconsistencies() == []


def test_a_row_that_contradicts_itself_is_named():
    row = PUBLISHED[0]
    wrong = PublishedRow(row.model, row.quality, row.semantic, row.total + 1, row.results)
    assert wrong.inconsistencies() == ["total: 80.23 is published, 79.23 follows"]


def test_bounds_give_0_and_100():
    lowest = {name: dimension.lowest for name, dimension in DIMENSIONS.items()}
    highest = {name: dimension.highest for name, dimension in DIMENSIONS.items()}
    assert aggregate(lowest).total == pytest.approx(0)
    assert aggregate(highest).total == pytest.approx(100)


def test_a_missing_dimension_leaves_its_group_without_a_score():
    results = PUBLISHED[0].by_dimension()
    del results["scene"]
    scores = aggregate(results)
    assert scores.quality is not None and scores.semantic is None and scores.total is None
    with pytest.raises(ConfigError, match="no dimension"):
        aggregate({"style": 0.5})
    with pytest.raises(ConfigError, match="between 0 and 1"):
        aggregate({"scene": 45.0})


def write_result(path: Path, names: list[str], score: object = 0.5, folder: str = "/v") -> None:
    """A result file as VBench writes it."""
    rows = [{"video_path": f"{folder}/{name}", "video_results": 0.5} for name in names]
    path.write_text(json.dumps({"scene": [score, rows]}))


def all_names() -> list[str]:
    return [video_name(prompt.text, i) for prompt in PROMPTS[:2] for i in range(5)]


def test_a_complete_result_is_read(tmp_path):
    write_result(tmp_path / "r.json", all_names())
    assert read_result(tmp_path / "r.json", "scene", PROMPTS) == 0.5


def test_results_of_vbench_long_name_clips_of_the_videos(tmp_path):
    clips = []
    for name in all_names():
        stem = name.removesuffix(".mp4")
        clips += [f"split_clip/{stem}/{stem}_{number:03d}.mp4" for number in range(2)]
    write_result(tmp_path / "r.json", clips)
    assert read_result(tmp_path / "r.json", "scene", PROMPTS, long=True) == 0.5
    write_result(tmp_path / "r.json", clips[2:])
    with pytest.raises(ConfigError, match="1 missing, such as 'a cat-0.mp4'"):
        read_result(tmp_path / "r.json", "scene", PROMPTS, long=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (all_names()[1:], "1 missing, such as 'a cat-0.mp4'"),
        ([*all_names(), "a cat-0.mp4"], "1 doubled, such as 'a cat-0.mp4'"),
        ([*all_names(), "rain-0.mp4"], "1 of no prompt, such as 'rain-0.mp4'"),
        ([*all_names()[1:], "a Cat-0.mp4"], "1 missing.*; 1 of no prompt"),
    ],
)
def test_results_of_other_videos_are_refused(tmp_path, names, message):
    write_result(tmp_path / "r.json", names)
    with pytest.raises(ConfigError, match=message):
        read_result(tmp_path / "r.json", "scene", PROMPTS)


@pytest.mark.parametrize("text", ["{}", "[]", '{"scene": [0.5]}', '{"scene": [true, []]}', "{"])
def test_files_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.json"):
        read_result(tmp_path / "r.json", "scene", PROMPTS)


def test_units_have_official_names_five_seeds_and_augmented_prompts():
    config = load(SampleConfig, "nano/sample")
    units = vbench.vbench_units(config, PROMPTS, {"a cat": "a grey cat on a sofa"})
    assert [unit.name for unit in units[:5]] == [f"a cat-{i}.mp4" for i in range(5)]
    assert {unit.prompt for unit in units[:5]} == {"a grey cat on a sofa"}
    assert [unit.seed for unit in units[5:10]] == [42, 43, 44, 45, 46]
    assert len({unit.key for unit in units}) == 15


def test_augmented_prompts_must_cover_the_official_ones():
    texts = {"a cat": "a grey cat", "a dog, running": "a brown dog"}
    vbench.check_augmented(texts, PROMPTS, PROMPTS[:2])
    with pytest.raises(ConfigError, match="1 text.s. missing, such as 'rain'"):
        vbench.check_augmented(texts, PROMPTS, PROMPTS)
    with pytest.raises(ConfigError, match="1 text.s. of no official prompt, such as 'a Cat'"):
        vbench.check_augmented(texts | {"a Cat": "a grey cat"}, PROMPTS, PROMPTS[:2])


def test_prompts_of_the_info_file_are_merged(tmp_path):
    entries = [
        {"prompt_en": "a cat", "dimension": ["scene"]},
        {"prompt_en": "a cat", "dimension": ["color", "scene"]},
    ]
    (tmp_path / "info.json").write_text(json.dumps(entries))
    assert vbench.read_prompts(tmp_path / "info.json") == [
        VBenchPrompt("a cat", ("scene", "color"))
    ]
    (tmp_path / "info.json").write_text('[{"prompt_en": "../a", "dimension": []}]')
    with pytest.raises(ConfigError, match="name of a file"):
        vbench.read_prompts(tmp_path / "info.json")


def test_an_interpreter_without_vbench_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no package vbench"):
        vbench.find_info(Path(sys.executable))
    with pytest.raises(ConfigError, match="cannot be run"):
        vbench.find_info(tmp_path / "python")


def test_the_table_stands_beside_published_models_with_its_limits(tmp_path):
    evaluation = vbench.Evaluation({"scene": 0.5}, aggregate({"scene": 0.5}), long=True)
    vbench.write_scores(tmp_path, evaluation, "diffusion", augmented=True)
    page = (tmp_path / "scores.html").read_text()
    assert "HunyuanVideo" in page and "not run" in page and "VBench-Long" in page
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["total"] is None and document["results"] == {"scene": 0.5}
