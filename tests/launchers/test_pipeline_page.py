"""`report.html` of the quickstart."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from landiff.data_pipeline.synthetic import world
from landiff.launchers.cli import main
from landiff.launchers.local.stage_summary import StageResult
from landiff.launchers.results.pipeline_page import nearest_clips, write_quickstart_report


def test_samples_stand_before_their_nearest_training_clips(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world.write_world(Path("world"), clips=3, true_clips=0)
    assert main(["shards", "--config", "shapes/shards"]) == 0
    rows = [json.loads(line) for line in Path("world/labels-train.jsonl").read_text().splitlines()]
    Path("samples").mkdir()
    for row in rows[:2]:
        shutil.copy(Path("world/train") / row["file"], Path("samples"))
    prompts = [rows[0]["caption"], "A rabbit runs over a meadow."]
    records = [{"file": row["file"], "prompt": p} for row, p in zip(rows, prompts, strict=False)]
    world.write_rows(Path("samples/samples.jsonl"), records)
    reading = {"name": "main: another caption", "timestep": 300, "right": 0.1, "wrong": 0.2}
    reading |= {"ratio": 2.0, "verdict": "uses the text"}
    Path("evaluation.json").write_text(json.dumps({"instruments": [reading]}))
    stage = StageResult("lm", 2.0, 1.5, 0, first_loss=3.0, last_loss=1.25, look="runs/lm")
    page = write_quickstart_report(Path(), [stage]).read_text()
    assert page.count("all five right") == 1, "only of the caption of the shapes world"
    assert prompts[1] in page and "uses the text" in page and "1.2500" in page
    distances = re.findall(r"nearest training clip, RMS difference (\d+) of 255", page)
    # The shards hold the clips encoded once more; other clips differ by 20 and more.
    assert len(distances) == 2 and max(map(int, distances)) < 10


def test_a_report_of_several_clip_shapes_shows_what_the_models_use_of_each(tmp_path: Path):
    results = {}
    for bucket, verdict in (("1x64x64", "ignores the text"), ("17x64x64", "uses the text")):
        reading = {"name": "main: another caption", "timestep": 300, "right": 0.1, "wrong": 0.2}
        results[bucket] = {"instruments": [reading | {"ratio": 2.0, "verdict": verdict}]}
    (tmp_path / "evaluation.json").write_text(json.dumps({"buckets": results}))
    page = write_quickstart_report(tmp_path, []).read_text()
    shown = ["clips of 1x64x64", "ignores the text", "clips of 17x64x64", "uses the text"]
    assert [text for text in re.split(f"({'|'.join(shown)})", page) if text in shown] == shown


def test_a_folder_without_samples_has_a_report(tmp_path: Path):
    page = write_quickstart_report(tmp_path, []).read_text()
    assert "Stages" in page and "Samples" not in page


def test_clips_of_another_size_are_no_neighbours():
    video = np.zeros((5, 8, 8, 3), np.uint8)
    near = np.full((9, 8, 8, 3), 2, np.uint8)
    far = np.full((5, 8, 8, 3), 9, np.uint8)
    other = np.zeros((5, 8, 16, 3), np.uint8)
    (found,) = nearest_clips([video], [(far, "far"), (other, "other"), (near, "near")])
    assert found is not None and (found.caption, found.distance) == ("near", 2.0)
    assert nearest_clips([video], [(other, "other")]) == [None]
