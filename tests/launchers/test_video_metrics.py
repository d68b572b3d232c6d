"""`landiff evaluate videos` on clips of the shapes world."""

from __future__ import annotations

import json

import pytest

from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.video.codec import write_mp4
from landiff.launchers.cli import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three videos as `landiff sample` writes them, the last of which shows something else."""
    root = tmp_path_factory.mktemp("metrics")
    labels = world.labels(held_out=False)[:4]
    for name in ("videos", "reference"):
        (root / name).mkdir()
        for number, label in enumerate(labels[:3]):
            frames_THWC = world.video(label, [number], num_frames=9)
            shown = labels[3] if name == "videos" and number == 2 else label
            record = {"key": "0", "prompt": world.caption(shown)}
            path = root / name / f"{number:02d}.mp4"
            write_mp4(path, frames_THWC, 8.0, comment=json.dumps(record))
    return root


def run(root, *words) -> int:
    return main(["-C", str(root), "evaluate", "videos", "--config", "nano/videos", *words])


def test_a_folder_is_measured_beside_a_reference(folders, capsys):
    assert run(folders, "videos=videos", "reference=reference", "out=both.json") == 0
    result = json.loads((folders / "both.json").read_text())
    assert result["fvd"] == pytest.approx(0.0, abs=1e-9)  # the pixels are equal
    assert result["videos"] == result["reference"] and result["videos"]["motion"] > 0.05
    assert [row["file"] for row in result["rows"]] == ["00.mp4", "01.mp4", "02.mp4"]
    text = capsys.readouterr().out
    assert "FVD of" in text and "text following" in text and "not with published ones" in text
    rates = result["text_following"]["right"]
    assert rates["all"] == pytest.approx(2 / 3) and rates["ground"] >= 2 / 3


def test_folders_that_cannot_be_measured_are_refused(folders, tmp_path, capsys):
    assert run(folders, "videos=nowhere") == 2
    assert "videos = nowhere is not a folder" in capsys.readouterr().err
    assert run(folders, f"videos={tmp_path}") == 2
    assert "at least 2" in capsys.readouterr().err
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    assert run(folders, f"videos={tmp_path}") == 2
    assert "a.mp4 cannot be read" in capsys.readouterr().err


def test_the_first_frames_of_a_folder_are_measured_without_a_reference(folders):
    assert run(folders, "videos=videos", "out=alone.json", "num_frames=5") == 0
    result = json.loads((folders / "alone.json").read_text())
    assert "fvd" not in result and {row["frames"] for row in result["rows"]} == {5}
    assert 0 < result["videos"]["flicker"] < result["videos"]["frame_difference"]
