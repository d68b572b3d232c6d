"""Options of the whole suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-root", type=Path, default=Path(__file__).parent / "golden" / "data",
                     help="folder of golden cases to run tests/golden against")
