"""All conversions at tiny sizes: round trips are bit-equal in every dtype, outputs unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from landiff.configs import ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.known_formats import (
    Options,
    export_to_zoo,
    open_source,
    write_target,
)
from landiff.model_zoo.convert.parts import VAE, Part, assembled
from landiff.model_zoo.convert.rules import ConversionError
from tests.model_zoo.convert.tiny import DTYPES, MODELS, outputs, part, parts, same, weights

OPTIONS = Options(MODELS)
# format -> the kinds that it can hold
CELLS = {
    "release": ("lm", "tokenizer", "transformer", "diffusion", VAE),
    "diffusers": ("lm", "tokenizer", "transformer", "diffusion", VAE),
    "transformers": ("lm",),
    "megatron": ("lm",),
    "deepspeed": ("transformer", "diffusion"),
}


def reopened(path: Path, kind: str) -> Part:
    found = {part.kind: part for part in assembled(open_source(path, OPTIONS).parts, "zoo")}
    return found[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "kind"), [(format, kind) for format, kinds in CELLS.items() for kind in kinds]
)
def test_our_export_goes_there_and_comes_back_bit_equal(tmp_path, format, kind, dtype):
    original = weights(kind, DTYPES[dtype])
    write_target(tmp_path / "out", format, [part(kind, DTYPES[dtype])], {})
    back = reopened(tmp_path / "out", kind)
    assert same(dict(back.tensors), original)
    if kind != VAE:
        assert back.config == part(kind).config
        assert torch.equal(outputs(kind, dict(back.tensors)), outputs(kind, original))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_release_goes_through_our_export_and_comes_back_bit_equal(tmp_path, dtype):
    write_target(tmp_path / "release", "release", parts(DTYPES[dtype]), {})
    source = open_source(tmp_path / "release", OPTIONS)
    entries = export_to_zoo(tmp_path / "zoo", {k: k for k in registry.KINDS}, source.parts, {})
    assert sorted(entry.kind for entry in entries) == [
        "diffusion",
        "lm",
        "tokenizer",
        "transformer",
    ]
    again = [open_source(entry.path).parts[0] for entry in entries]
    vae = [part for part in source.parts if part.kind == VAE]
    write_target(tmp_path / "again", "release", again + vae, {})
    names = sorted(
        str(p.relative_to(tmp_path / "release"))
        for p in (tmp_path / "release").rglob("*")
        if p.is_file()
    )
    assert len(names) == 8
    for name in names:
        first, second = tmp_path / "release" / name, tmp_path / "again" / name
        if name.endswith(".pt"):
            one, two = torch.load(first, weights_only=True), torch.load(second, weights_only=True)
            one, two = (
                one.get("module", one.get("state_dict")),
                two.get("module", two.get("state_dict")),
            )
            assert same(two, one) and all(t.dtype == DTYPES[dtype] for t in one.values()), name
        elif name.endswith(".safetensors"):
            assert same(load_file(second), load_file(first)), name


# every cell of the matrix that is not our export's: first -> second -> first
PAIRS = [
    ("release", "megatron", "lm"),
    ("release", "deepspeed", "diffusion"),
    ("release", "deepspeed", "transformer"),
    ("release", "diffusers", "diffusion"),
    ("release", "diffusers", "tokenizer"),
    ("release", "diffusers", "lm"),
    ("release", "diffusers", VAE),
    ("megatron", "transformers", "lm"),
    ("megatron", "release", "lm"),
    ("megatron", "megatron", "lm"),
    ("deepspeed", "diffusers", "diffusion"),
    ("deepspeed", "diffusers", "transformer"),
    ("deepspeed", "release", "diffusion"),
    ("diffusers", "release", "transformer"),
    ("diffusers", "release", "diffusion"),
    ("diffusers", "deepspeed", "transformer"),
]


def content(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files of a folder, under the names it has there."""
    found: dict[str, torch.Tensor] = {}
    if (folder / ".metadata").is_file():
        reader = DistReader(folder)
        found |= {key: reader.read(key) for key in reader.entries}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            found |= {
                f"{path.relative_to(folder)} {key}": tensor
                for key, tensor in load_file(path).items()
            }
        elif path.suffix == ".pt" and path.name != "common.pt":
            state = torch.load(path, weights_only=True)
            found |= {
                f"{path.relative_to(folder)} {key}": tensor
                for key, tensor in state.get("module", state.get("state_dict")).items()
            }
    assert found
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second", "kind"), PAIRS)
def test_one_format_goes_to_another_and_comes_back_bit_equal(tmp_path, first, second, kind, dtype):
    write_target(tmp_path / "there", first, [part(kind, DTYPES[dtype])], {})
    write_target(tmp_path / "other", second, [reopened(tmp_path / "there", kind)], {})
    assert same(dict(reopened(tmp_path / "other", kind).tensors), weights(kind, DTYPES[dtype]))
    write_target(tmp_path / "back", first, [reopened(tmp_path / "other", kind)], {})
    assert same(content(tmp_path / "back"), content(tmp_path / "there"))


def test_diffusers_classes_load_what_is_written_and_agree(tmp_path):
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    write_target(tmp_path / "out", "diffusers", parts(), {})
    theirs, report = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "out" / "transformer", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs.norm_out.norm.eps = 1e-6
    main = {
        name.removeprefix("transformer."): t
        for name, t in weights("diffusion").items()
        if name.startswith("transformer.")
    }
    generator = torch.Generator().manual_seed(1)
    latents, text = (
        torch.randn(2, 3, 4, 4, 6, generator=generator),
        torch.randn(2, 5, 12, generator=generator),
    )
    with torch.no_grad():
        found = theirs(latents, text, torch.tensor([10, 700]), return_dict=False)[0]
    # float32 sums in another order
    torch.testing.assert_close(found, outputs("transformer", main), atol=2e-5, rtol=1e-5)
    _, report = AutoencoderKLCogVideoX.from_pretrained(
        tmp_path / "out" / "vae", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_folder_saved_by_diffusers_comes_in(tmp_path):
    from diffusers import CogVideoXTransformer3DModel

    from landiff.model_zoo.convert.formats.diffusers_transformer import diffusers_config

    model = CogVideoXTransformer3DModel(**diffusers_config(MODELS.diffusion.transformer))
    model.save_pretrained(tmp_path / "one" / "transformer")
    model.save_pretrained(tmp_path / "many" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "many" / "transformer").glob("*.safetensors"))) > 2
    one, many = (reopened(tmp_path / name, "transformer") for name in ("one", "many"))
    assert one.config == MODELS.diffusion.transformer
    assert same(dict(many.tensors), dict(one.tensors))


def test_a_control_branch_alone_takes_its_main_transformer_from_another_source(tmp_path):
    write_target(tmp_path / "release", "release", parts(), {})
    write_target(tmp_path / "main", "diffusers", [part("transformer")], {})
    control = open_source(tmp_path / "release" / "diffusion", OPTIONS)
    assert [p.kind for p in control.parts] == ["control", "tokenizer"]
    with pytest.raises(ConversionError, match="no main transformer"):
        export_to_zoo(tmp_path / "zoo", {}, control.parts, {})
    both = [*control.parts, *open_source(tmp_path / "main").parts]
    whole = {p.kind: p for p in assembled(both, "zoo")}["diffusion"]
    expected = weights("diffusion") | {
        f"transformer.{name}": t for name, t in weights("transformer").items()
    }
    assert same(dict(whole.tensors), expected)


def test_targets_say_what_they_take(tmp_path):
    with pytest.raises(ConfigError, match="--to megatron takes one lm; the source holds tokenizer"):
        write_target(tmp_path / "out", "megatron", [part("tokenizer")], {})
    assert not list(tmp_path.iterdir())
    write_target(tmp_path / "out", "transformers", [part("lm")], {})
    with pytest.raises(ConfigError, match="exists already"):
        write_target(tmp_path / "out", "transformers", [part("lm")], {})


def test_no_engine_and_no_process_group_is_needed(tmp_path):
    write_target(tmp_path / "release", "release", parts(), {})
    code = f"""
import sys, torch
from pathlib import Path
from benchmarks.convert import convert
from landiff.model_zoo.convert.known_formats import Options, open_source, write_target
from tests.model_zoo.convert.tiny import MODELS
root = Path({str(tmp_path)!r})
parts = open_source(root / "release", Options(MODELS)).parts
for format, kinds in {{"megatron": ["lm"], "deepspeed": ["transformer"]}}.items():
    write_target(root / format, format, [p for p in parts if p.kind in kinds], {{}})
    assert open_source(root / format).parts[0].tensors.num_elements
for kind, engine in (("lm", "megatron"), ("transformer", "deepspeed")):
    format = f"{{engine}} with optimizer"
    first = convert(kind, "numbers", format, root / f"{{kind}} 1", 1)
    assert convert(kind, str(first), format, root / f"{{kind}} 2", 1).is_dir()
assert not {{"megatron", "deepspeed"}} & set(sys.modules), "an engine was imported"
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3]
    )
