"""The progress line of a command."""

import io

from landiff.launchers.progress import ProgressLine, duration, rate_text


def test_duration_is_readable():
    assert [duration(s) for s in (0, 59.6, 75, 3600 + 61)] == ["0:00", "1:00", "1:15", "1:01:01"]


def test_a_log_gets_few_lines_and_the_last_one():
    stream = io.StringIO()
    progress = ProgressLine("shards", "clips", stream, every_s=1000)
    for done in range(101):
        progress(done, 100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("shards: 0/100 clips")
    assert lines[1].startswith("shards: 100/100 clips")


def test_a_new_count_has_its_own_rate_and_the_note_stands_behind():
    stream = io.StringIO()
    progress = ProgressLine("shards", "clips", stream, every_s=0)
    progress(40, 40, "probing")
    progress(3, 10, "cutting")
    assert stream.getvalue().splitlines()[1] == "shards: 3/10 clips, 0:00  (cutting)"


def test_slow_work_has_a_rate_and_a_time_left():
    assert [rate_text(rate) for rate in (1200.0, 3.21, 0.5, 0.08, 0.005)] == [
        "1200.0/s",
        "3.2/s",
        "0.5/s",
        "12.5 s each",
        "3:20 each",
    ]
    stream = io.StringIO()
    progress = ProgressLine("evaluate", "passes", stream, every_s=0)
    progress(0, 10)
    progress.started -= 40
    progress(2, 10)
    progress.started -= 160
    progress(10, 10)
    lines = [line.removesuffix(" ") for line in stream.getvalue().splitlines()]
    assert lines == [
        "evaluate: 0/10 passes, 0:00",
        "evaluate: 2/10 passes, 20.0 s each, 0:40, 2:40 left",
        "evaluate: 10/10 passes, 20.0 s each, 3:20",
    ]
