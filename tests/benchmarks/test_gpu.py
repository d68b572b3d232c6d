"""Every row of the GPU benchmark, at toy size on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.support.isolated import run_groups
from benchmarks.support.rows import MeasuredStep, Row, table
from tests.distributed import run_distributed
from tests.quantize_package import add_torchao

ROWS = {
    "attention": ["attention torch"],
    "lm": ["lm step", "lm checkpoint"],
    "diffusion": ["diffusion step", "diffusion checkpoint"],
    "control": ["control step"],
    "tokenizer": ["tokenizer step"],
    "sampling": ["sampled tokens", "sampled latents"],
    "video": ["video"],
}


def dry_run(world: Any, name: str) -> list[Row]:
    options = gpu.parse_arguments(["--dry-run"])
    return gpu.ROWS[name](gpu.make_case(options, world))


def float8_rows(world: Any) -> list[Row]:
    add_torchao()
    return gpu.float8_rows(gpu.make_case(gpu.parse_arguments(["--dry-run"]), world))


def test_steps_with_float8_are_compared_with_steps_without():
    [rows] = run_distributed(float8_rows, 1)
    assert [row.name for row in rows] == ["lm step fp8", "diffusion step fp8"]
    for row in rows:
        assert row.value > 0 and row.limit and row.peer and row.mfu, row
    assert rows[0].value != rows[0].peer


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_value_a_limit_and_a_peer(name):
    [rows] = run_distributed(dry_run, 1, name, timeout_s=300)
    assert [row.name for row in rows] == ROWS[name]
    for row in rows:
        assert row.value > 0 and row.limit is not None, row
        assert row.peer is not None or "checkpoint" in row.name, row
    assert len(table(rows).splitlines()) == 1 + len(rows)


def test_all_groups_are_tested():
    assert set(gpu.ROWS) == {*ROWS, "fp8"}


def test_a_group_that_fails_leaves_the_others():
    reports, failed = run_groups(
        "tests.benchmarks.rows_of_groups", ["--x"], ["good", "bad", "fine"]
    )
    assert [row.name for report in reports for row in report.rows] == ["good", "fine"]
    assert list(failed) == ["bad"] and "exit code 3" in failed["bad"]
    assert "good" in table([row for report in reports for row in report.rows])


def test_a_peer_that_fails_leaves_the_row(caplog):
    def measure() -> float:
        raise ImportError("no Transformer Engine")

    assert gpu.if_possible("the peer", measure) is None
    assert "the peer failed: ImportError: no Transformer Engine" in caplog.text
    step = MeasuredStep(2, "clips/s", 1e9, 0.5, seconds=0.1, peer=None, memory=0)
    assert table([step.row("step", 1e12)]).splitlines()[1].split()[-1] == "-"
