"""Preset `landiff` at real size: all released keys and shapes convert in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from landiff.configs import load
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.convert.formats.megatron import Padded, megatron_rules
from landiff.model_zoo.convert.formats.release_diffusion import (
    MAIN,
    OTHER_MODELS,
    POSITION_TABLE,
    TOKENIZER,
)
from landiff.model_zoo.convert.formats.release_set import split_by_kind
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import (
    CONTROL,
    TABLES,
    VAE,
    Part,
    build_meta,
    joined,
    match_model,
    under_names_of,
)
from landiff.model_zoo.convert.pickles import tensors_of
from landiff.model_zoo.convert.rules import apply_rules
from tests.model_zoo.convert.tiny import DTYPES

KEYS = Path(__file__).parents[2] / "golden" / "keys"
MODELS = load(ModelConfig, "landiff/model")
CONFIGS = {
    "lm": MODELS.lm,
    "tokenizer": MODELS.tokenizer,
    "transformer": MODELS.diffusion.transformer,
    CONTROL: MODELS.diffusion,
    "diffusion": MODELS.diffusion,
}


def entries(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((KEYS / f"{name}.json").read_text())


def metas(shapes: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(entry["shape"], dtype=dtype, device="meta")
        for name, entry in shapes.items()
    }


def lazily(state: dict[str, torch.Tensor | None]) -> LazyTensors:
    """As a file that was opened: shapes and dtypes are known, reading is not possible."""
    return tensors_of(state)


def described(tensors: LazyTensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (meta.shape, meta.dtype) for name, meta in tensors.meta.items()}


def there_and_back(kind: str, state: LazyTensors) -> None:
    part = match_model(state, kind, CONFIGS[kind], TABLES["release", kind], "the release")
    assert described(under_names_of("release", part)) == described(state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("file", "kind", "count"), [("llm", "lm", 185), ("tokenizer", "tokenizer", 319)]
)
def test_language_model_and_tokenizer(file, kind, count, dtype):
    state = lazily(metas(entries(file), DTYPES[dtype]))
    assert len(state) == count
    known = split_by_kind(state)
    assert list(known) == [kind]
    there_and_back(kind, known[kind])


@pytest.mark.parametrize(
    ("frozen", "table", "dtype"),
    [("whole", True, "fp32"), ("None", False, "fp16"), ("absent", True, "bf16")],
)
def test_diffusion(frozen, table, dtype):
    """Main transformer present, None or absent, with or without position tables."""
    state: dict[str, torch.Tensor | None] = dict(metas(entries("diffusion"), DTYPES[dtype]))
    others = [name for name in state if name.startswith(OTHER_MODELS)]
    assert len(others) == 220 + 436
    if not table:
        state = {name: t for name, t in state.items() if not name.endswith(POSITION_TABLE)}
    if frozen != "whole":
        state = {
            name: None if name.startswith(MAIN) else t
            for name, t in state.items()
            if frozen == "None" or not name.startswith(MAIN)
        }
    known = split_by_kind(lazily(state))
    whole = "diffusion" if frozen == "whole" else CONTROL
    assert set(known) == {whole, "tokenizer"} and len(known["tokenizer"]) == 319
    there_and_back(whole, known[whole])
    assert sum(t.numel() for t in known["tokenizer"].meta.values()) == 174_511_120 + 69_121
    assert len(known[whole].only(lambda name: not name.startswith((MAIN, TOKENIZER)))) == 403


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_cogvideox_and_its_vae(dtype):
    found = entries("cogvideox2b")
    main = metas({n: e for n, e in found.items() if e["container"] == "module"}, DTYPES[dtype])
    known = split_by_kind(lazily(main))
    assert list(known) == ["transformer"] and len(known["transformer"]) == 556
    there_and_back("transformer", known["transformer"])
    vae = metas({n: e for n, e in found.items() if e["file"] == "vae/3d-vae.pt"}, DTYPES[dtype])
    assert (
        list(split_by_kind(lazily(vae))) == [VAE]
        and sum(t.numel() for t in vae.values()) == 215_583_907
    )


def real(kind: str) -> Part:
    return Part(kind, CONFIGS[kind], LazyTensors.of(build_meta(kind, CONFIGS[kind])))


def elements(part: Part, *prefixes: str) -> int:
    return part.tensors.only(lambda name: name.startswith(prefixes)).num_elements


def test_parameter_counts_of_the_specification():
    lm, tokenizer, main = real("lm"), real("tokenizer"), real("transformer")
    assert elements(lm, "") == 2_049_321_984
    assert (
        elements(lm, "blocks.", "final_norm.", "head.") == 2_030_159_872
        and elements(lm, "text.") == 12_589_056
    )
    assert elements(lm, "micro.") == 2_364_416 and elements(lm, "token_embedding.") == 4_208_640
    parameters = LazyTensors.of(dict(registry_parameters("tokenizer")))
    assert (
        parameters.num_elements == 174_511_120
        and elements(tokenizer, "") - parameters.num_elements == 69_121
    )
    for prefix, count in (
        ("encoder.", 86_512_128),
        ("decoder.", 87_973_632),
        ("quantizer.", 25_360),
    ):
        assert (
            parameters.only(lambda name, prefix=prefix: name.startswith(prefix)).num_elements
            == count
        ), prefix
    table = (226 + 13 * 30 * 45) * 1920
    assert table == 34_129_920
    assert elements(main, "") + table == 1_727_913_792
    control = Part(CONTROL, MODELS.diffusion, LazyTensors.of(build_meta(CONTROL, MODELS.diffusion)))
    whole = joined(control, main)
    assert elements(whole, "") - elements(main, "") + table == 979_141_968
    assert elements(control, "") == 945_012_048
    assert (
        elements(control, "semantic.projection.") == 9_232
        and elements(control, "semantic.") - 9_232 == 39_242_688
    )


def registry_parameters(kind: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return dict(registry.build_module(kind, CONFIGS[kind]).named_parameters())


def test_the_other_formats_take_the_real_sizes():
    with torch.device("meta"):
        stock = {name: t.shape for name, t in CogVideoXTransformer3DModel().state_dict().items()}
        vae = {name: t.shape for name, t in AutoencoderKLCogVideoX().state_dict().items()}
    assert {
        n: m.shape for n, m in under_names_of("diffusers", real("transformer")).meta.items()
    } == stock
    assert {n: m.shape for n, m in build_meta(VAE, {}).items()} == vae
    lm = build_meta("lm", MODELS.lm)
    table = megatron_rules(MODELS.lm, Padded(2176, 16))
    theirs = apply_rules(lm, table, "to_theirs")
    assert theirs["decoder.layers.23.mlp.linear_fc1.weight"].shape == (2 * 11008, 2048) and theirs[
        "output_layer.weight"
    ].shape == (2176, 2048)
    assert {n: m.shape for n, m in apply_rules(theirs, table, "to_ours").items()} == {
        n: m.shape for n, m in lm.items()
    }
