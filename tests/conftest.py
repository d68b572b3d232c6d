"""Options of the whole suite."""

import os
from pathlib import Path

# One thread everywhere: a forked child sums in the same order as its parent, and tests with several
# processes do not compete for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-root",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        help="folder of golden cases to run tests/golden against",
    )
