"""Metrics of a run: progress line, file and TensorBoard, also after a restart."""

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from landiff.configs.durations import duration
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.loader import Batch
from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.engine import StepResult, TrainState
from landiff.training.observe.metrics import (
    Metrics,
    StepProgress,
    drop_later_lines,
    read_scalars,
)
from landiff.training.observe.previews import Preview, gif, with_legend
from landiff.training.observe.step_times import RankTimes, StepTimes, StragglerWatch
from tests.distributed import run_distributed
from tests.training.toy import alone

BLACK = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def log(folder, first, last, total=10, stream=None):
    metrics = Metrics(folder, total, alone(), stream or io.StringIO())
    metrics.resume(TrainState(first - 1))
    for step in range(first, last + 1):
        with metrics.timing("data"):
            batch = Batch(step - 1, 4, ())
        result = StepResult(
            torch.tensor(1.0 / step),
            torch.tensor(2.0),
            0.1,
            {"codebook/perplexity": 5.0},
            tokens=100,
            flops=3e9,
            times=StepTimes(0.0, 0.1, 0.3, 0.6, 1.0),
        )
        metrics.count(batch, result)
        metrics.log(TrainState(step), result)
    metrics.close()
    return metrics


def test_a_logged_step_reaches_the_file_and_tensorboard_under_the_same_tags(tmp_path):
    log(tmp_path, 1, 3)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["train/loss"] == 0.5
    rates = lines[0]["throughput/tokens_per_s"] / lines[0]["throughput/samples_per_s"]
    assert rates == pytest.approx(25)
    assert 0 <= lines[0]["data/wait_fraction"] <= 1
    assert lines[0]["memory/host_gib"] > 0.01
    line = lines[1]
    assert line["time/forward_backward_s"] == pytest.approx(0.6)
    assert line["time/optimizer_s"] == pytest.approx(0.4)
    flops_per_s = line["throughput/tflops_per_device"] * 1e12
    assert flops_per_s * line["time/step_s"] == pytest.approx(3e9)
    assert line["time/data_s"] / line["time/step_s"] == pytest.approx(line["data/wait_fraction"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step", "time"}
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [1.0, 0.5, 1 / 3]
    )


def test_a_resumed_run_drops_what_was_logged_beyond_its_step(tmp_path):
    log(tmp_path, 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # torn by a kill
    log(tmp_path, 4, 6)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_told_to_whoever_writes(tmp_path):
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from landiff.training.observe.event_file import EventFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "file = EventFile(Path(sys.argv[1]))\n"
        "try:\n  for step in range(1000): file.add_scalar('loss', 1.0, step)\n"
        "except OSError as error: print(error.strerror)\n"
        "import os; os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("File too large\n", "")


def test_a_missing_file_stays_missing(tmp_path):
    drop_later_lines(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_line_says_step_loss_rate_speed_and_time_left(tmp_path):
    stream = io.StringIO()
    log(tmp_path, 1, 10, stream=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # the first, and the last; the others came within ten seconds
    for part in (
        "step 10/10",
        "loss 0.1000",
        "lr 1.00e-01",
        "grad 2.00",
        "samples/s",
        "tokens/s",
        "data wait",
        "GiB",
        "0:00 left",
    ):
        assert part in lines[-1]


def test_a_terminal_gets_one_live_line():
    stream = Terminal()
    progress = StepProgress(stream)
    progress.show("a long line")
    progress.show("short")
    progress.end()
    assert stream.getvalue() == "\ra long line\rshort      \n"


def logged_on(world, folder):
    metrics = Metrics(folder / str(world.rank), 1, world, io.StringIO())
    metrics.resume(TrainState())
    result = StepResult(1.0, 1.0, 0.1, times=StepTimes(0.0, 0.0, 2.0 + world.rank, 9.0, 9.0))
    metrics.count(Batch(0, 4, ()), result)
    metrics.log(TrainState(1), result)
    metrics.add_previews(TrainState(1), [Preview("v", {"a": BLACK}, "a prompt")], HeldOutClips())
    metrics.close()


def test_only_rank_0_writes_and_names_the_slowest_rank(tmp_path):
    run_distributed(logged_on, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    (line,) = read_metrics(tmp_path / "0" / "metrics.jsonl")
    assert (line["time/straggler_rank"], line["time/straggler_lag_s"]) == (1, pytest.approx(1.0))


def test_a_rank_that_stays_behind_is_reported_once_by_name(caplog):
    watch = StragglerWatch()
    ranks = [RankTimes(f"node{rank}", own_s=0.1, data_s=0.0) for rank in range(4)]
    even = watch.find(ranks, step_s=1.0)
    assert even["time/straggler_lag_s"] == 0 and watch.find(ranks[:1], step_s=1.0) == {}
    ranks[2] = RankTimes("node2", own_s=0.5, data_s=0.4)
    for _ in range(4):
        found = watch.find(ranks, step_s=1.0)
        assert found == {"time/straggler_rank": 2, "time/straggler_lag_s": pytest.approx(0.4)}
    (record,) = caplog.records
    assert record.getMessage().startswith("rank 2 on node2 is slow: 0.500 s a step")


def test_a_slow_node_is_reported_by_name_whichever_of_its_ranks_is_slowest(caplog):
    watch = StragglerWatch()
    for window in range(4):
        ranks = [RankTimes(f"node{rank // 4}", own_s=0.1, data_s=0.0) for rank in range(12)]
        for rank in range(4, 8):
            own_s = 0.5 if rank == 4 + window else 0.4
            ranks[rank] = RankTimes("node1", own_s=own_s, data_s=0.0)
        found = watch.find(ranks, step_s=1.0)
        assert found["time/straggler_rank"] == 4 + window
        assert found["time/slow_node_lag_s"] == pytest.approx(0.3)
    (record,) = caplog.records
    assert record.getMessage().startswith("node node1 is slow: 0.400 s a step")
    ranks = [RankTimes(f"node{rank // 4}", own_s=0.1, data_s=0.0) for rank in range(12)]
    ranks[5] = RankTimes("node1", own_s=0.5, data_s=0.0)
    for _ in range(2):
        assert watch.find(ranks, step_s=1.0)["time/slow_node_lag_s"] == 0
    assert caplog.records[-1].getMessage().startswith("rank 5 on node1 is slow")


def test_a_preview_has_titles_above_its_panels_and_its_prompt_as_text(tmp_path):
    metrics = Metrics(tmp_path, 1, alone(), io.StringIO())
    metrics.resume(TrainState())
    white = torch.full_like(BLACK, 255)
    preview = Preview("preview/clip", {"source": BLACK, "prediction": white}, "A rabbit.")
    metrics.add_previews(TrainState(3), [preview], HeldOutClips())
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("preview/clip/text")
    assert text.step == 3 and text.tensor_proto.string_val == [b"A rabbit."]
    (image,) = events.Images("preview/clip")
    assert (image.width, image.height) == (2 * 160, 22 + 160)  # enlarged, below the titles
    video = with_legend(preview.panels)
    left, right = video[:, :22, :160], video[:, :22, 160:]
    assert (left > 0).any() and (right > 0).any() and not torch.equal(left, right)
    assert not video[:, 22:, :160].any() and bool((video[:, 22:, 160:] == 255).all())


def test_a_gif_holds_the_frames_in_order():
    video = torch.arange(4, dtype=torch.uint8)[:, None, None, None].mul(60).expand(4, 6, 8, 3)
    image = Image.open(io.BytesIO(gif(video, fps=8)))
    assert (image.n_frames, image.size) == (4, (8, 6))
    shades = []
    for frame in range(4):
        image.seek(frame)
        shades.append(image.convert("RGB").getpixel((0, 0))[0])
    assert shades == [0, 60, 120, 180]
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], not torch.float32 \[4, 6, 8, 3\]"):
        gif(video.float(), fps=8)


def test_scalars_of_any_kind_come_over_exactly():
    values = {
        "a": torch.tensor(0.1),
        "b": 0.2,
        "c": torch.tensor(3),
        "d": torch.tensor([0.4], dtype=torch.bfloat16),
    }
    found = read_scalars(values)
    assert found == {
        "a": float(torch.tensor(0.1)),
        "b": 0.2,
        "c": 3.0,
        "d": float(torch.tensor(0.4, dtype=torch.bfloat16)),
    }
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3700, "1:01:40")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text
