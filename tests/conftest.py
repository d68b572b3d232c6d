"""Options of the whole suite."""

import gc
import os
from collections.abc import Generator
from pathlib import Path

# One thread everywhere: a forked child sums in the same order as its parent, and tests with several
# processes do not compete for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# No test downloads anything. Without this, each attempt ends after 23 s of repeats.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-root",
        type=Path,
        default=Path(__file__).parent / "golden" / "data",
        help="folder of golden cases to run tests/golden against",
    )


@pytest.fixture(autouse=True)
def same_folder() -> Generator[None]:
    """Restores the working directory, which `landiff -C` changes, after each test."""
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the objects of all imports out of garbage collections.

    They are more than half a million. Collections would go through them again and again during
    the imports, at each `gc.collect` of a test or of what it tests, and twice at exit.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


# Long files start first, so that no worker is left alone with one of them. The files of the other
# folders are short and fill the end.
LONGEST = (
    "tests/test_quickstart.py",
    "tests/test_documented_runs.py",
    "tests/benchmarks/",
    "tests/test_",
    "tests/training/",
    "tests/launchers/",
    "tests/model_zoo/",
    "tests/data_pipeline/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by `LONGEST`."""
    items.sort(key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    """Position of a test among `LONGEST`; later for all others."""
    for position, start in enumerate(LONGEST):
        if nodeid.startswith(start):
            return position
    return len(LONGEST)
