"""`pytest tests/golden --golden-root DIR`: cases by the beginning of their names, sizes from their configs, nothing unserved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_zoo.config import SemanticConditionConfig
from model_zoo.convert.release_diffusion import semantic_rules
from model_zoo.convert.release_lm import RULES
from model_zoo.convert.rules import convert
from model_zoo.lm import MicroConditions, sinusoid
from model_zoo.semantic_condition import SemanticCondition
from model_zoo.tokenizer import decoder_mask, encoder_mask

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "golden" / "data"


def golden(root: Path, *select: str) -> tuple[int, str]:
    """Exit code and output of the runner on the cases in `root`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *(select or ("tests/golden",)), "--golden-root", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


def write_case(folder: Path, config: dict, **files: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")


def other_micro_condition(folder: Path) -> None:
    """Sizes that no case at hand has; the numbers are our own, since it is the runner that is on trial."""
    model = MicroConditions(out_size := 20, 12, 8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    given = {"frames": torch.tensor([1.0, 4.0, 9.0, 2.0]), "motion_score": torch.tensor([0.0, 0.5, 1.5, 0.2])}
    rules = [rule for rule in RULES if "micro" in rule.ours]
    weights = convert({f"micro.{name}": t for name, t in model.state_dict().items()}, rules, "to_theirs")
    with torch.no_grad():
        outputs = {
            "sinusoid_frames": sinusoid(given["frames"], 8), "sinusoid_motion": sinusoid(given["motion_score"], 8),
            "micro_condition": model(given["frames"], given["motion_score"]),
            "micro_condition_defaults": model(torch.ones(4), torch.zeros(4)),
        }
    write_case(folder, {"freq_dim": 8, "hidden": 12, "out_dim": out_size}, weights=weights, inputs=given, outputs=outputs)


def other_upsampler(folder: Path) -> None:
    config = SemanticConditionConfig(feature_channels=5, base_channels=32, channel_multipliers=(2, 1, 1), num_res_blocks=2, out_channels=3)
    model = SemanticCondition(config, 6).eval()
    torch.nn.init.normal_(model.projection.weight)
    features = torch.randn(3, 5, 2, 4)
    sizes = {"z_channels": 5, "ch": 32, "ch_mult": [2, 1, 1], "num_res_blocks": 2, "out_ch": 3, "target_dim": 6}
    with torch.no_grad():
        outputs = {"upsampled": model.upsample(features), "latent": model(features[:, None])[:, 0]}
    weights = convert(model.state_dict(), semantic_rules("", ""), "to_theirs")
    write_case(folder, sizes, weights=weights, inputs={"features": features}, outputs=outputs)


def other_masks(folder: Path) -> None:
    combo = {"T": 7, "tokens_per_frame": 10, "iframe_tokens": 2, "pframe_tokens": 5}
    sizes, name = tuple(combo.values()), "T7_n10_I2_P5"
    masks = {f"enc_{name}": encoder_mask(*sizes), f"dec_{name}": decoder_mask(*sizes)}
    write_case(folder, {"combos": [combo]}, outputs=masks)


def test_cases_of_other_names_and_sizes_are_run_and_wrong_numbers_fail(tmp_path):
    copied = {"lm_micro_condition": "lm_micro_condition_again", "noise_schedule": "noise_schedule-2", "lm_teacher_forced": "lm_teacher_forced.b",
              "tokenizer_masks": "tokenizer_masks_small"}
    for name, other in copied.items():
        shutil.copytree(DATA / name, tmp_path / other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other_micro_condition(tmp_path / "lm_micro_condition_narrow")
        other_upsampler(tmp_path / "semantic_upsampler_deep")
        other_masks(tmp_path / "tokenizer_masks_long")
    shutil.copytree(DATA / "lm_micro_condition", tmp_path / "lm_micro_condition_wrong")
    shutil.copy(tmp_path / "lm_micro_condition_narrow" / "outputs.safetensors", tmp_path / "lm_micro_condition_wrong")
    files = [f"tests/golden/test_{name}.py" for name in ("cases", "lm", "tokenizer", "diffusion")]
    code, text = golden(tmp_path, *files)
    assert code == 1, text
    for name in (*copied.values(), "lm_micro_condition_narrow", "semantic_upsampler_deep", "tokenizer_masks_long"):
        assert any(line.startswith("PASSED") and name in line for line in text.splitlines()), (name, text)
    failed = [line for line in text.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and "lm_micro_condition_wrong" in failed[0], text


def test_an_unknown_case_or_none_fails_the_run(tmp_path):
    select = "tests/golden/test_cases.py"
    code, text = golden(tmp_path, select)
    assert code == 1 and "no golden case in" in text
    shutil.copytree(DATA / "tokenizer_masks", tmp_path / "tokenizer_masks")
    assert golden(tmp_path, select)[0] == 0
    shutil.copytree(DATA / "tokenizer_masks", tmp_path / "audio_masks")
    code, text = golden(tmp_path, select)
    assert code == 1 and "no test serves the cases ['audio_masks']" in text
    code, text = golden(tmp_path / "nowhere", select)
    assert code == 1 and "no golden case in" in text
