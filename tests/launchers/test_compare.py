"""`landiff compare` and `landiff report`, from run folders alone."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from landiff.configs.loader import dump
from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.cli import main
from landiff.launchers.pages import html
from landiff.launchers.pages.charts import Series, lay_out, svg, thin_out
from landiff.training.checkpoint.run_folder import CONFIG, METRICS, TENSORBOARD
from landiff.training.observe.event_file import EventFile
from landiff.training.observe.previews import Preview, write_preview
from tests.launchers.html_pages import Page, assert_harmless
from tests.training.tokenizer.tiny import config

HOSTILE = "</script><script>alert(1)</script>\"' onload=x & ]]>\u202e\x00\udce9 兔"


def write_run(folder: Path, every: int, last: int, lr: float = 1e-3, **values: float) -> Path:
    folder.mkdir(parents=True)
    settings = config(folder, optim={"lr": lr})
    (folder / CONFIG).write_text(dump(settings))
    lines = []
    for step in range(every, last + 1, every):
        line = {"step": step, "time": 1000.0 + step, "train/loss": 1 / step, "time/data_s": 0.1}
        lines.append(json.dumps(line | values))
    (folder / METRICS).write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"), 2, 8, **{"val/loss": 0.5, "val_ema/loss": 0.4})
    write_run(Path("runs/b"), 4, 12, lr=2e-3, **{"val/loss": math.nan})
    return ["runs/a", "runs/b"]


def test_runs_are_compared_by_key_step_and_last_validation(runs, capsys):
    assert main(["compare", *runs, "--metric", "train/loss"]) == 0
    keys, curves, final = capsys.readouterr().out.split("\n\n")
    assert keys.splitlines()[1:] == ["optim.lr  0.001   0.002"]
    rows = [line.split() for line in curves.splitlines()]
    assert rows[:3] == [["train/loss", *runs], ["2", "0.5", "-"], ["4", "0.25", "0.25"]]
    assert rows[3:] == [["6", "0.1667", "0.25"], ["8", "0.125", "0.125"], ["12", "-", "0.08333"]]
    raw, averaged = [re.split("  +", line) for line in final.splitlines()[1:]]
    assert raw == ["val/loss", "0.5 (step 8)", "nan (step 12)"]
    assert averaged == ["val_ema/loss", "0.4 (step 8)", "-"]


def test_json_holds_all_steps_and_no_number_that_json_does_not_know(runs, capsys):
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["config"] == {"optim.lr": ["0.001", "0.002"]}
    loss = found["curves"]["train/loss"]
    assert loss["steps"] == [2, 4, 6, 8, 12]
    assert loss["values"][1] == [None, 0.25, None, 0.125, 1 / 12]
    assert found["final_validation"]["val/loss"][1] == {"step": 12, "value": None}


def test_curves_are_drawn_into_a_png(runs, capsys):
    assert main(["compare", *runs, "--metric", "*/loss", "--plot", "loss.png"]) == 0
    image = Image.open("loss.png").convert("RGB")
    colors = {color for _, color in image.getcolors(1 << 20)}
    assert {(0x1F, 0x6F, 0xEB), (0xD9, 0x48, 0x0F)} <= colors  # a curve of each run
    assert image.width > 1000  # two charts in a row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a"], "runs/a alone cannot be compared"),
        (["runs/a", "runs"], "runs is not the folder of a run"),
        (["runs/a", "runs/b", "--metric", "trian/loss"], "no run has such a metric; there are"),
    ],
)
def test_mistakes_name_the_way_out(runs, capsys, words, message):
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------- report


def test_a_report_is_one_file_with_curves_previews_validation_and_config(runs, capsys):
    video = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    with EventFile(Path(runs[0]) / TENSORBOARD) as writer:
        for step in (2, 4, 6):
            write_preview(writer, Preview("preview/clip", {"x": video}, "A rabbit."), step, 8.0)
    with EventFile(Path(runs[0]) / TENSORBOARD, purge_step=5) as writer:  # after a restart
        write_preview(writer, Preview("preview/clip", {"x": video}, "A second rabbit."), 8, 8.0)
    event = {"step": 4, "time": 1.0, "kind": "skip", "cause": "not finite", "loss": "nan"}
    (Path(runs[0]) / "events.jsonl").write_text(json.dumps(event) + "\n")
    config_file = Path(runs[0]) / CONFIG
    phases = "phases: [{from_step: 6, data: null, optim: {lr: 1.0e-4}}]"
    config_file.write_text(config_file.read_text().replace("phases: []", phases))
    assert main(["report", runs[0]]) == 0
    text = (Path(runs[0]) / "report.html").read_text()
    page = assert_harmless(text)
    captions = re.findall(r"preview/clip, step \d", page.text)
    assert captions == [f"preview/clip, step {step}" for step in (8, 4, 2)]
    assert page.text.count("A rabbit.") == 2 and page.text.count("A second rabbit.") == 1
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 3 and all(src.startswith("data:image/gif;base64,") for src in images)
    for word in ("train/loss", "raw weights", "moving average", "optim.lr", "0.001", "val_ema"):
        assert word in page.text
    assert "cause not finite, loss nan" in page.text and "from_step: 6" in page.text
    assert "step 4: skip" in page.text and "step 6: phase 1 begins" in page.text
    assert sum(values.get("stroke") == "var(--bad)" for _, values in page.elements) == 1
    assert sum(tag == "polyline" for tag, _ in page.elements) >= 4


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "run", 1, 3, **{HOSTILE.replace("\udce9", ""): 1.0})
    (run / CONFIG).write_text(f"loop: {{steps: 3}}\nname: {json.dumps(HOSTILE[:40])}\n")
    (run / "errors").mkdir()
    error = f"time: x\nrank: 0\nstep: 1\n\nValueError: {HOSTILE[:40]}\n"
    (run / "errors" / "rank_0000.txt").write_text(error)
    with EventFile(run / TENSORBOARD) as writer:
        frame = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
        write_preview(writer, Preview("<b>tag</b>", {"x": frame}, HOSTILE[:40]), 1, 8.0)
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = assert_harmless(out.read_text(encoding="utf-8"))
    assert page.text.count("</script><script>alert(1)</script>") >= 3 and "<b>tag</b>" in page.text


def test_text_and_attributes_are_escaped_and_markup_is_not():
    made = html.element("p", HOSTILE, html.element("b", "<"), title=HOSTILE, hidden=True, id=None)
    page = Page(made)
    assert [tag for tag, _ in page.elements] == ["p", "b"]
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}").replace("\udce9", "\\udce9")
    assert page.text == shown + "<"
    assert page.elements[0][1] == {"title": shown, "hidden": None}
    video = Page(html.media(b"abc", "mp4", "a clip"))
    assert video.elements[0][1]["src"] == "data:video/mp4;base64,YWJj"


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0, math.inf, 3.0], [1e-9, 1e9], [-5e300]]
)
def test_a_chart_places_every_finite_value_inside(values):
    layout = lay_out([Series("a", list(enumerate(values)))])
    finite = [value for value in values if math.isfinite(value)]
    points = [point for part in layout.curves[0] for point in part]
    assert len(points) == len(finite)
    assert all(0 <= x <= 420 and 0 <= y <= 230 for x, y in points)
    assert all(0 <= tick.position <= 230 for tick in layout.y_ticks)


def test_a_chart_without_finite_values_says_so_and_a_long_curve_keeps_its_spikes():
    assert "no finite values" in svg([Series("a", [(1.0, math.nan)])], "a")
    points = [(float(step), 0.0) for step in range(10_000)]
    points[1234] = (1234.0, 9.0)
    thin = thin_out(points)
    assert len(thin) <= 305 and (1234.0, 9.0) in thin
    assert thin[0] == points[0] and thin[-1] == points[-1] and list(thin) == sorted(thin)


def test_neither_command_loads_torch(runs):
    code = (
        "import sys; from landiff.launchers.cli import main\n"
        f"assert main(['compare', *{runs!r}]) == 0 and main(['report', {runs[0]!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(IMPORT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert io.StringIO(done.stdout).readline().startswith("config")
