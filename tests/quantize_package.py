"""torchao for tests. It is not in the environment, where it would change every other import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def add_torchao() -> str:
    """torchao can be imported in this process from now on. Returns the new entry of sys.path.

    Where it is installed, diffusers, transformers and peft import it, which takes more than a
    second and prints warnings. So `make quantize` installs it in a folder of its own.
    """
    folder = Path(sys.prefix) / "quantize"
    assert (folder / "torchao").is_dir(), f"{folder} has no torchao; run `make quantize`"
    sys.path.append(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def torchao() -> Iterator[None]:
    """torchao can be imported by the tests of the module."""
    folder = add_torchao()
    yield
    sys.path.remove(folder)
