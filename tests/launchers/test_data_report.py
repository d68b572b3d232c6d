"""`landiff data report`, of a folder with kept and rejected clips."""

from __future__ import annotations

import json

import numpy as np
import pytest

from landiff.data_pipeline.format.schema import Reject
from landiff.data_pipeline.format.shards import write_manifest
from landiff.data_pipeline.ingest.config import QuarantineConfig
from landiff.data_pipeline.ingest.quarantine import Quarantine
from landiff.data_pipeline.video.codec import encode_clip
from landiff.launchers.cli import main
from landiff.launchers.pages.histogram import bin_edges, histogram, note_of
from tests.data_pipeline.precompute_data import pan, write_clips
from tests.launchers.html_pages import Page, assert_harmless


@pytest.fixture
def data(tmp_path):
    """Three clips, one clip that a filter rejected, and one damaged video."""
    folder = tmp_path / "data"
    manifest = write_clips(folder, [2, 1], odd={1: pan(1, size=48)})
    rejects = [
        Reject(key="dark", stage="shards", reason="too_dark", detail="brightness <0.1>"),
        Reject(key="cut.mp4", stage="shards", reason="damaged"),
    ]
    counts = {"shards/damaged": 1, "shards/too_dark": 1}
    write_manifest(
        folder, manifest.model_copy(update={"rejects": rejects, "reject_counts": counts})
    )
    with Quarantine(folder, "000000", "raw", QuarantineConfig()) as quarantine:
        clip = encode_clip(pan(9), 8.0, preset="ultrafast")
        quarantine.keep_clip("dark", "too_dark", "mp4", clip, detail="brightness <0.1>")
        quarantine.keep_clip("cut", "damaged", "mp4", clip[:200], detail="no frames")
    return folder


def test_the_page_has_reasons_histograms_contact_sheets_and_disk(data, capsys):
    assert main(["data", "report", str(data), "--clips", "2"]) == 0
    page = assert_harmless((data / "report.html").read_text(encoding="utf-8"))
    images = [values["src"] for tag, values in page.elements if tag == "img"]
    assert len(images) == 3  # two of three kept clips, and the reject that can be decoded
    assert all(source.startswith("data:image/jpeg;base64,") for source in images)
    for text in ("shardstoo_dark120.0%dark: brightness <0.1>", "17 x 48 x 48", "no picture"):
        assert text in page.text
    assert "height, pixels" in page.text and "frames per second" not in page.text  # all equal
    assert "brightness of the pictured clips" in page.text and "rawfree" not in page.text


def test_the_blend_of_a_trainer_is_shown_with_its_weights(data, tmp_path, capsys):
    second = tmp_path / "second"
    write_clips(second, [1], fingerprint="other")
    values = {"extends": "nano/lm", "data": {"manifest": str(data), "weight": 2.0}}
    values["data"]["blend"] = [{"manifest": str(second), "weight": 0.5}]
    (tmp_path / "lm.yaml").write_text(json.dumps(values))
    out = tmp_path / "page.html"
    command = ["data", "report", "--config", str(tmp_path / "lm.yaml"), "--clips", "1"]
    assert main([*command, "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    assert f"{data}3292.3%" in page.text and f"{second}10.57.7%" in page.text
    assert main(["data", "report"]) == 2 and "either a data folder" in capsys.readouterr().err


def test_histograms_count_every_finite_value_once():
    values = [0.0, 1.0, 1.0, 7.0, float("nan")]
    edges = bin_edges(np.array(values[:4]), 30)
    assert edges[0] == -0.5 and edges[-1] == 7.5 and len(edges) == 9
    assert np.histogram(values[:4], edges)[0].tolist() == [1, 2, 0, 0, 0, 0, 0, 1]
    assert bin_edges(np.array([0.25, 0.75]), 2).tolist() == [0.25, 0.5, 0.75]
    assert "1 not finite" in note_of(values) and note_of([float("nan")]) == ""
    bars = [values for tag, values in Page(histogram(values, "x")).elements if tag == "rect"]
    assert len(bars) == 8
    assert "no finite values" in histogram([float("inf")], "x")
