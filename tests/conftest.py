"""Options of the whole suite."""

import os
from pathlib import Path

# One thread everywhere: sums come in one order in a forked child and in its parent alike, and tests of several
# processes don't fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-root",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        help="folder of golden cases to run tests/golden against",
    )
