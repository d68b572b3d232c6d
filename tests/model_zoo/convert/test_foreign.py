"""Weights as other tools leave them: what is read as it was meant, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from landiff.configs import ConfigError
from landiff.model_zoo.convert.formats.diffusers_folder import FILE
from landiff.model_zoo.convert.known_formats import Options, open_source, write_target
from tests.model_zoo.convert.tiny import MODELS, part, same, weights

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


def ddp(name: str) -> str:
    return f"module.{name}"


def compiled(name: str) -> str:
    return f"_orig_mod.{name}"


def compiled_inside(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"module.{first}._orig_mod.{rest}"


def both(name: str) -> str:
    return f"_orig_mod.module.{name}"


def fsdp(name: str) -> str:
    return f"module._fsdp_wrapped_module.{name}".replace(
        ".weight", "._checkpoint_wrapped_module.weight"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A main transformer as diffusers saves it."""
    write_target(tmp_path / "out", "diffusers", [part("transformer")], {})
    return tmp_path / "out" / "transformer"


@pytest.fixture
def release(tmp_path) -> Path:
    """A language model as the release stores it."""
    write_target(tmp_path / "release", "release", [part("lm")], {})
    return tmp_path / "release" / "llm" / "model.safetensors"


def opened(path: Path) -> dict[str, torch.Tensor]:
    (found,) = open_source(path, Options(MODELS)).parts
    return dict(found.tensors)


@pytest.mark.parametrize("wrap", [ddp, compiled, compiled_inside, both, fsdp])
def test_prefixes_of_wrappers_are_removed(folder, release, tmp_path, wrap):
    for path in (folder / FILE, release):
        save_file({wrap(name): tensor for name, tensor in load_file(path).items()}, path)
    assert same(opened(folder), weights("transformer"))
    assert same(opened(release), weights("lm"))
    torch.save({"state_dict": load_file(release)}, tmp_path / "lm.pt")
    assert same(opened(tmp_path / "lm.pt"), weights("lm"))


def test_a_model_saved_twice_in_one_file_is_refused(folder):
    state = load_file(folder / FILE)
    save_file(
        {**state, **{f"_orig_mod.{name}": tensor.clone() for name, tensor in state.items()}},
        folder / FILE,
    )
    with pytest.raises(
        ConfigError, match="with and without the prefix of a wrapper, such as _orig_mod"
    ):
        open_source(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_refused_by_name(folder, release, tmp_path, dtype):
    for path in (folder / FILE, release):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    torch.save(
        {name: tensor.to(dtype) for name, tensor in weights("transformer").items()},
        tmp_path / "a.pt",
    )
    for path in (folder, release, tmp_path / "a.pt"):
        with pytest.raises(
            ConfigError,
            match="holds quantised weights, such as .*(?i:(f8|float8)_e[45]m).*original in float32",
        ) as error:
            open_source(path, Options(MODELS))
        assert "damaged" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qweight", "blocks.0.weight.absmax", "a.weight_scale", "scaled_fp8"]
)
def test_other_quantised_weights_are_refused_by_name(release, name):
    save_file({**load_file(release), name: torch.zeros(2)}, release)
    with pytest.raises(ConfigError, match=f"quantised weights, such as {name}"):
        open_source(release, Options(MODELS))


def test_a_variant_is_read_and_several_are_refused(folder):
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    save_file(
        {name: tensor.half() for name, tensor in state.items()},
        folder / "diffusion_pytorch_model.fp16.safetensors",
    )
    assert same(
        opened(folder), {name: tensor.half() for name, tensor in weights("transformer").items()}
    )
    save_file(state, folder / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"variants .*\.ema\.safetensors, .*\.fp16\.safetensors .*keep only the variant",
    ):
        open_source(folder)


def test_a_variant_in_several_files_is_read(folder):
    state = {name: tensor.half() for name, tensor in load_file(folder / FILE).items()}
    (folder / FILE).unlink()
    files = {
        name: f"diffusion_pytorch_model.fp16-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(state)
    }
    for file in set(files.values()):
        save_file(
            {name: tensor for name, tensor in state.items() if files[name] == file}, folder / file
        )
    (folder / f"{FILE}.index.fp16.json").write_text(json.dumps({"weight_map": files}))
    assert same(
        opened(folder), {name: tensor.half() for name, tensor in weights("transformer").items()}
    )


def test_git_lfs_pointers_are_refused_by_name(folder, release, tmp_path):
    for path in (folder / FILE, release, tmp_path / "weights.pt"):
        path.write_bytes(LFS)
    for path in (folder, release, tmp_path / "weights.pt"):
        with pytest.raises(
            ConfigError, match="is a git-lfs pointer, not weights: run `git lfs pull`"
        ):
            open_source(path, Options(MODELS))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.blocks.0.attn.to_q.lora_A.weight",
        "transformer.blocks.0.to_k.lora_B.weight",
        "to_v.lora.down.weight",
        "unet.attn1.processor.to_q_lora.up.weight",
        "lora_unet_blocks_0.lora_down.weight",
        "blocks.0.hada_w1_a",
    ],
)
def test_adapters_are_refused_by_name(release, name):
    save_file({name: torch.zeros(2)}, release)
    with pytest.raises(
        ConfigError, match=f"is an adapter .*its key {name}.* Merge it into its base model"
    ):
        open_source(release, Options(MODELS))


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_config.json"]
)
def test_a_folder_of_an_adapter_is_refused_by_name(tmp_path, file):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"is an adapter .*its file {file}"):
        open_source(tmp_path)
