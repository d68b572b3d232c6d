"""Commands that wait for each other, run as processes."""

from __future__ import annotations

from pathlib import Path

from landiff.launchers.local.stage_processes import Command, run_commands


def show(name: str, after: tuple[str, ...] = (), key: str = "loop.steps") -> Command:
    return Command(name, f"explains {key}", ("config", "explain", key), after)


def test_commands_run_side_by_side_and_in_order(tmp_path: Path, capfd):
    commands = [show("a"), show("b"), show("c", ("a", "b", "left out"))]
    finished = list(run_commands(commands, tmp_path, at_once=2))
    assert [each.exit_code for each in finished] == [0, 0, 0]
    assert {finished[0].name, finished[1].name} == {"a", "b"} and finished[2].name == "c"
    assert all(each.cpu_seconds > 0 for each in finished)
    out = capfd.readouterr().out
    assert "== 3/3 c: explains loop.steps" in out
    assert "\na | " in out and "\nb | " in out and "\nc | " in out


def test_nothing_starts_after_a_failure(tmp_path: Path, capfd):
    commands = [show("bad", key="no.such"), show("next", ("bad",))]
    finished = list(run_commands(commands, tmp_path, at_once=1))
    assert [each.name for each in finished] == ["bad"] and finished[0].exit_code != 0
    assert "no.such" in capfd.readouterr().err
