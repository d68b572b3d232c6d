"""`loop.profile`: a trace of the chosen steps and ranks, also across a restart."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.configs.loader import validate
from landiff.training.checks import check_profile
from landiff.training.config import LoopConfig
from landiff.training.observe.profiling import Profiler
from tests.training.toy import ToyConfig, alone, train

STEP = "ProfilerStep#"


def config(folder: Path, total: int, **profile: object) -> ToyConfig:
    loop = {"steps": total, "profile": profile}
    return validate(ToyConfig, {"run": str(folder), "loop": loop})


def traces(folder: Path) -> dict[str, list[int]]:
    """Recorded steps of each trace, by name of the file."""
    found = {}
    for path in sorted((folder / "tensorboard").glob("*.pt.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {event["name"] for event in events if event["name"].startswith(STEP)}
        found[path.name] = sorted(int(name.removeprefix(STEP)) for name in names)
    return found


def test_a_run_that_resumes_inside_the_window_records_the_rest_of_it(tmp_path):
    for total in (4, 7):
        train(config(tmp_path, total, start=4, steps=2), alone())
    assert list(traces(tmp_path).values()) == [[4], [5]]


def test_a_run_that_resumes_after_the_window_records_nothing(tmp_path):
    for total in (4, 6):
        train(config(tmp_path, total, start=2, steps=2), alone())
    assert list(traces(tmp_path).values()) == [[2, 3]]


def test_only_the_chosen_ranks_record(tmp_path):
    settings = config(tmp_path, 3, start=2, steps=1, ranks=[1])
    for rank in (0, 1):
        world = alone()
        world.rank = rank
        profiler = Profiler(tmp_path, settings.loop.profile, world)
        for step in (1, 2, 3):
            profiler.begin(step)
    ((name, steps),) = traces(tmp_path).items()
    assert "rank_0001" in name and steps == [2]


def test_a_window_that_is_never_reached_and_a_rank_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"profile.start = 9 is after the last step, steps = 3"):
        config(tmp_path, 3, start=9)
    settings = config(tmp_path, 3, start=1, ranks=[0, 4])
    (problem,) = check_profile(settings, 4)
    assert "loop.profile.ranks = [0, 4]" in problem.text and "0 to 3" in problem.text
    assert check_profile(settings, 5) == []
    assert LoopConfig(steps=1).profile is None
