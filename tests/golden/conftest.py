"""Runs every golden case of a folder through the test that its name calls for.

A test takes the fixture `case` and says which names it serves: `@pytest.mark.golden("lm_teacher_forced")`.
Cases are found by the beginning of their names, the longest wins. `test_every_case_is_known` fails on a
case that no test serves, and on an empty folder.
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
    path: Path

    @property
    def config(self) -> dict[str, Any]:
        config = json.loads((self.path / "config.json").read_text())
        # half precision would need other tolerances
        assert config.get("dtype", "float32") == "float32", (
            f"{self.path}: the cases are in float32, not {config['dtype']}"
        )
        return config

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    @property
    def weights(self) -> dict[str, Tensor]:
        """float32, under the reference's own key names."""
        return {
            k: v.float() if v.is_floating_point() else v
            for k, v in self._tensors("weights").items()
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")


def case_folders(config: pytest.Config) -> list[Path]:
    root: Path = config.getoption("--golden-root")
    return sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def served_by(name: str, prefixes: set[str]) -> str | None:
    return max((p for p in prefixes if name.startswith(p)), key=len, default=None)


# Every name that some test under tests/golden serves. A test may serve several; several may serve one.
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
