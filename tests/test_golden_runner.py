"""The runner behind `pytest tests/golden --golden-root DIR`.

Cases are found by the beginning of their names, take their sizes from their configs, and all of
them are checked. The cases of other sizes come from tests/golden/formulas, a second implementation
of the specification that shares no line with the models; it is compared with the released cases.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.conftest import PREFIXES, Case, served_by
from tests.golden.formulas import diffusion, frozen, lm, tokenizer
from tests.golden.formulas.cases import CASES, write_cases
from tests.golden.formulas.weights import Weights

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "golden" / "data"
RELEASED = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def golden(root: Path, *select: str) -> tuple[int, str]:
    """Exit code and output of the runner on the cases in `root`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rA",
        *(select or ("tests/golden",)),
        "--golden-root",
        str(root),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


# ------------------------------------------------------- the formulas against the reference


def gradients_in(outputs: dict[str, Tensor], prefix: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in outputs if name.startswith(prefix))


def sampled(
    w: Weights, sizes: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    found = {}
    for run in sizes["runs"]:
        parts, _ = lm.sample(
            w, sizes, inputs["text_embeddings"], run, outputs[f"{run['name']}.drawn"]
        )
        found |= {f"{run['name']}.{name}": tensor for name, tensor in parts.items()}
    return found


FORMULAS: dict[
    str, Callable[..., dict[str, Tensor]]
] = {  # (weights, sizes, inputs, the case's outputs)
    "tokenizer_masks": lambda w, s, i, o: tokenizer.masks(s),
    "tokenizer_forward": lambda w, s, i, o: tokenizer.forward(w, s, i)[0],
    "tokenizer_train_step": lambda w, s, i, o: tokenizer.train_step(
        w, s, i["features"], gradients_in(o, "grad.")
    )[0],
    "lm_teacher_forced": lambda w, s, i, o: lm.teacher_forced(w, s, i),
    "lm_micro_condition": lambda w, s, i, o: lm.micro_conditions(w, s, i),
    "lm_sampling": sampled,
    "diffusion_control_forward": lambda w, s, i, o: diffusion.control_forward(w, s, i),
    "diffusion_loss": lambda w, s, i, o: diffusion.loss(w, s, i, gradients_in(o, "fixed0.grad.")),
    "diffusion_sampling": lambda w, s, i, o: diffusion.sampling(w, s, i),
    "semantic_upsampler": lambda w, s, i, o: diffusion.upsampler(w, s, i),
    "noise_schedule": lambda w, s, i, o: diffusion.noise_schedule(s),
    "vae": lambda w, s, i, o: frozen.vae(w, s, i),
    "feature_extractor": lambda w, s, i, o: frozen.feature_extractor(w, s, i),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_formulas_say_what_the_reference_says(name):
    case = Case(DATA / name)
    outputs, kind = case.outputs, served_by(name, PREFIXES)
    with torch.set_grad_enabled(kind in ("tokenizer_train_step", "diffusion_loss")):
        found = FORMULAS[kind](Weights(case.weights), case.config, case.inputs, outputs)
    assert found.keys() == outputs.keys()
    for key, expected in outputs.items():
        # a factor of five below what the reference's README allows; measured: below 2e-5
        torch.testing.assert_close(
            found[key], expected, atol=2e-5, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


# ---------------------------------------------------------------- the runner


def spoil(folder: Path) -> None:
    """Move every number of a case's outputs by a little more than its tolerance."""
    outputs = load_file(folder / "outputs.safetensors")
    save_file(
        {k: t + 5e-4 if t.is_floating_point() else t for k, t in outputs.items()},
        folder / "outputs.safetensors",
    )


def test_cases_of_other_names_and_sizes_are_run_and_wrong_numbers_fail(tmp_path):
    write_cases(tmp_path)
    assert {served_by(name, PREFIXES) for name in CASES} == PREFIXES
    copied = {
        "lm_micro_condition": "lm_micro_condition_again",
        "noise_schedule": "noise_schedule-2",
        "lm_teacher_forced_two_segments": "lm_teacher_forced.b",
        "diffusion_sampling_prefix": "diffusion_samplingXL",
    }
    wrong = (
        "tokenizer_forward",
        "lm_sampling",
        "lm_micro_condition",
        "semantic_upsampler",
        "feature_extractor",
    )
    for name, other in copied.items():
        shutil.copytree(DATA / name, tmp_path / other)
    for name in wrong:
        shutil.copytree(DATA / name, tmp_path / f"{name}_wrong")
        spoil(tmp_path / f"{name}_wrong")
    files = [
        f"tests/golden/test_{name}.py"
        for name in ("cases", "lm", "tokenizer", "diffusion", "frozen")
    ]
    code, text = golden(tmp_path, *files)
    assert code == 1, text
    lines = text.splitlines()
    for name in (*CASES, *copied.values()):
        assert any(line.startswith("PASSED") and f"[{name}]" in line for line in lines), (
            name,
            text,
        )
    failed = {
        line.partition("[")[2].partition("]")[0] for line in lines if line.startswith("FAILED")
    }
    assert failed == {f"{name}_wrong" for name in wrong}, text


@pytest.mark.long
def test_the_whole_runner_passes_on_released_cases_elsewhere_and_on_others_of_another_seed(
    tmp_path,
):
    write_cases(tmp_path, seed=7)
    for name in RELEASED:
        shutil.copytree(DATA / name, tmp_path / f"{name}_elsewhere")
    code, text = golden(tmp_path)
    assert code == 0, text


def test_an_unknown_case_or_none_fails_the_run(tmp_path):
    select = "tests/golden/test_cases.py"
    code, text = golden(tmp_path / "nowhere", select)
    assert code == 1 and "no golden case in" in text
    for name in ("tokenizer_masks", "audio_masks"):
        shutil.copytree(DATA / "tokenizer_masks", tmp_path / name)
    code, text = golden(tmp_path, select)
    assert code == 1 and "no test serves the cases ['audio_masks']" in text
