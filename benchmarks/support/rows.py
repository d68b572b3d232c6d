"""Rows of the table of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Row of the table. limit and peer are in the unit of the value; None where there is none.

    mfu: part of the peak. memory: largest allocation in bytes, 0 on the CPU.
    """

    name: str
    value: float
    unit: str
    limit: float | None = None
    peer: float | None = None
    mfu: float | None = None
    memory: int = 0


@dataclass(frozen=True)
class MeasuredStep:
    """A training step. amount: tokens or clips of a step. seconds: of ours.

    peer: seconds of the other, None if it could not be measured. goal: MFU. memory: largest
    allocation in bytes.
    """

    amount: int
    unit: str
    flops: float
    goal: float
    seconds: float
    peer: float | None
    memory: int

    def row(self, name: str, peak: float) -> Row:
        """The row of the table. peak: FLOP/s of the device."""
        return Row(
            name,
            self.amount / self.seconds,
            self.unit,
            self.goal * peak / self.flops * self.amount,
            None if self.peer is None else self.amount / self.peer,
            self.flops / self.seconds / peak,
            self.memory,
        )


def table(rows: Sequence[Row]) -> str:
    """The printed table. Ratios above 1 are good, except in rows of seconds."""
    lines = [
        f"{'row':<22} {'value':>10} {'unit':<9} {'MFU':>6} {'GiB':>6} {'limit':>10} "
        f"{'of limit':>8} {'peer':>10} {'of peer':>8}"
    ]
    for row in rows:
        mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
        memory = f"{row.memory / 2**30:.1f}" if row.memory else "-"
        lines.append(
            f"{row.name:<22} {row.value:>10.4g} {row.unit:<9} {mfu:>6} {memory:>6} "
            f"{_against(row.value, row.limit)} {_against(row.value, row.peer)}"
        )
    return "\n".join(lines)


def _against(value: float, other: float | None) -> str:
    if other is None:
        return f"{'-':>10} {'-':>8}"
    return f"{other:>10.4g} {value / other:>7.2f}x"
