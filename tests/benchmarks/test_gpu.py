"""Every row of the GPU benchmark, at toy size on the CPU."""

from __future__ import annotations

from typing import Any

from benchmarks import gpu
from tests.distributed import run_distributed


def dry_run(world: Any) -> list[tuple[gpu.Row, ...]]:
    options = gpu.parse_arguments(["--dry-run"])
    case = gpu.make_case(options, world)
    return [tuple(gpu.ROWS[name](case)) for name in options.only]


def test_every_row_has_a_value_a_limit_and_a_peer():
    [groups] = run_distributed(dry_run, 1)
    rows = [row for group in groups for row in group]
    assert [row.name for row in rows] == [
        "attention torch",
        "lm step",
        "lm checkpoint",
        "diffusion step",
        "diffusion checkpoint",
        "sampled tokens",
        "sampled latents",
    ]
    for row in rows:
        assert row.value > 0 and row.limit is not None, row
        assert row.peer is not None or row.unit == "s", row
    text = gpu.table(rows)
    assert len(text.splitlines()) == 1 + len(rows)
