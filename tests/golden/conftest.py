"""Runs every golden case of a folder in the tests for its name.

A test takes the fixture `case` and names the cases that it is for:
`@pytest.mark.golden("lm_teacher_forced")`. These are prefixes of names of cases, and the longest
one counts. `test_every_case_is_known` fails for a case that no test is for, and for an empty
folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Folder of one case."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Sizes and options of the case."""
        config = json.loads((self.path / "config.json").read_text())
        # Half precision would need other tolerances.
        assert config.get("dtype", "float32") == "float32", (
            f"{self.path}: the cases are in float32, not {config['dtype']}"
        )
        return config

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return {}
        return load_file(path)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights in float32, with the key names of the reference."""
        weights = self._tensors("weights")
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                weights[name] = tensor.float()
        return weights

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Recorded inputs."""
        return self._tensors("inputs")

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Recorded outputs."""
        return self._tensors("outputs")


def case_folders(config: pytest.Config) -> list[Path]:
    """Folders of all cases."""
    root: Path = config.getoption("--golden-root")
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir())


def served_by(name: str, prefixes: set[str]) -> str | None:
    """The longest prefix of a case's name."""
    return max((p for p in prefixes if name.startswith(p)), key=len, default=None)


# All prefixes in the marks of tests under tests/golden. A test may have several, and several tests
# the same.
PREFIXES = {
    "tokenizer_masks",
    "tokenizer_forward",
    "tokenizer_train_step",
    "lm_teacher_forced",
    "lm_micro_condition",
    "lm_sampling",
    "diffusion_control_forward",
    "diffusion_loss",
    "diffusion_sampling",
    "semantic_upsampler",
    "noise_schedule",
    "vae",
    "feature_extractor",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes tests with their cases."""
    if "case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("golden")
    assert marker and set(marker.args) <= PREFIXES, (
        f"{metafunc.definition.nodeid}: say which cases it serves"
    )
    folders = [
        p for p in case_folders(metafunc.config) if served_by(p.name, PREFIXES) in marker.args
    ]
    metafunc.parametrize("case", [Case(p) for p in folders], ids=[p.name for p in folders])
