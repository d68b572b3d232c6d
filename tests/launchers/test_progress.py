"""The line a person sees while something runs."""

import io

from launchers.progress import Progress, duration


def test_duration_is_readable():
    assert [duration(s) for s in (0, 59.6, 75, 3600 + 61)] == ["0:00", "1:00", "1:15", "1:01:01"]


def test_a_log_gets_few_lines_and_the_last_one():
    stream = io.StringIO()
    progress = Progress("shards", "clips", stream, every_s=1000)
    for done in range(101):
        progress(done, 100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("shards: 0/100 clips") and lines[1].startswith("shards: 100/100 clips")


def test_a_new_count_has_its_own_rate_and_the_note_stands_behind():
    stream = io.StringIO()
    progress = Progress("shards", "clips", stream, every_s=0)
    progress(40, 40, "looking")
    progress(3, 10, "cutting")
    assert stream.getvalue().splitlines()[1] == "shards: 3/10 clips, 0.0/s, 0:00  (cutting)"
