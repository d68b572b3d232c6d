"""torchao for tests. It is not in the environment, where it would change every other import."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from landiff.configs.problems import Problem
from landiff.training.checks import Launch


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


def assert_missing_torchao_is_named(
    check: Callable[[Any, Launch], list[Problem]], with_fp8: Any, without: Any
) -> None:
    """The checks of a trainer name the package and the way out, for the config with `fp8` only."""
    launch = Launch(1, inputs_exist=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchao", None)  # another test may have imported it
        assert importlib.util.find_spec("torchao") is None
        texts = [problem.text for problem in check(with_fp8, launch)]
        plain = check(without, launch)
    (text,) = [text for text in texts if "torchao" in text]
    assert text.startswith("fp8 = true needs the package torchao, which is not installed; install")
    assert "pip install 'landiff-pretrain[fp8]', or set fp8 = false" in text
    assert [problem.text for problem in plain] == [each for each in texts if each != text]
