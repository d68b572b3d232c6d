"""The animated picture of videos of the shapes world, and the report of `landiff learn`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image

from landiff.data_pipeline.synthetic import world
from landiff.launchers.cli import main
from landiff.launchers.learn import rates_text
from landiff.launchers.local.stage_summary import StageResult
from landiff.launchers.results.shapes_page import write_learn_report


def test_videos_are_shown_with_verdicts_and_nearest_clips(tmp_path: Path, capsys):
    world.write_world(tmp_path / "world", clips=3, true_clips=2)
    videos = tmp_path / "samples"
    videos.mkdir()
    rows = []
    # The first two training clips as samples of captions, the second one of a wrong caption.
    for number, row in enumerate(world_rows(tmp_path / "world" / "labels-train.jsonl")[:2]):
        shutil.copy(tmp_path / "world" / "train" / row["file"], videos / f"{number:03d}-x.mp4")
        rows.append(row | ({"color": "red" if row["color"] != "red" else "blue"} if number else {}))
    prompts = tmp_path / "world" / "prompts-heldout.jsonl"
    world.write_rows(prompts, [{k: v for k, v in row.items() if k != "file"} for row in rows])
    words = ["shapes", "show", "--videos", str(videos), "--labels", str(prompts)]
    assert main([*words, "--out", str(tmp_path / "shown.png")]) == 2
    assert main([*words, "--out", str(tmp_path / "shown.gif")]) == 0
    with Image.open(tmp_path / "shown.gif") as picture:
        assert picture.n_frames == world.NUM_FRAMES
        assert picture.width > 2 * 2 * world.SIZE  # two videos, enlarged
        width = picture.width
    assert main([*words, "--count", "1", "--out", str(tmp_path / "one.gif")]) == 0
    with Image.open(tmp_path / "one.gif") as picture:
        assert picture.width == width // 2
    rates = tmp_path / "rates.json"
    score = ["shapes", "score", "--videos", str(videos), "--labels", str(prompts)]
    assert main([*score, "--out", str(rates)]) == 0
    stage = StageResult("lm", 2.0, 1.5, 0, first_loss=3.0, last_loss=1.25, look="runs/lm")
    (tmp_path / "long").mkdir()
    assert main([*score, "--out", str(tmp_path / "long" / "rates.json"), "--chunks", "2"]) == 0
    page = write_learn_report(tmp_path, [stage], rates_text(tmp_path)).read_text()
    assert "held-out prompts" in page and "over 2 chunks the same" in page
    assert "all five right" in page and "wrong: color" in page and "1.2500" in page
    assert page.count("RMS difference 0 of 255") == 2


def world_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
