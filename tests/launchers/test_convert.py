"""`landiff convert` and `landiff zoo` as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from landiff.launchers.cli import main
from landiff.model_zoo import registry
from landiff.model_zoo.convert.known_formats import open_source, write_target
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import Part
from landiff.model_zoo.health import UnhealthyError
from landiff.model_zoo.lora.base import apply_adapter
from landiff.training.checkpoint.files import (
    CheckpointState,
    FileList,
    describe_file,
    versions,
)
from landiff.training.checkpoint.resume import check_no_other_weights
from landiff.training.checkpoint.run_folder import CONFIG, FILES, STATE
from tests.model_zoo.adapters import export_adapter
from tests.model_zoo.convert.tiny import MODELS, part, parts, same, weights, write_models
from tests.model_zoo.zoo_entries import write_entry


@pytest.fixture
def landiff(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def tokenizer_run(folder: Path, step: int) -> Path:
    """A run with one checkpoint, laid out as training/checkpoint/store.py does."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    save_file(weights("tokenizer"), checkpoint / "model.safetensors")
    state = CheckpointState(
        step=step,
        kind="TokenizerTrainConfig",
        loader={},
        manifest="a" * 16,
        columns={"features": "b" * 16},
        world_size=1,
        versions=versions(),
    )
    (checkpoint / STATE).write_text(state.model_dump_json())
    (checkpoint / CONFIG).write_text(
        yaml.safe_dump(
            {"model": MODELS.tokenizer.model_dump(mode="json"), "data": {"manifest": "gone"}}
        )
    )
    entries = [describe_file(checkpoint, name) for name in ("model.safetensors", STATE, CONFIG)]
    (checkpoint / FILES).write_text(FileList(files=entries).model_dump_json())
    return checkpoint


def test_a_run_becomes_a_zoo_entry_with_its_origin(landiff, tmp_path):
    tokenizer_run(tmp_path / "runs" / "tokenizer", 7)
    code, out, err = landiff("convert", "runs/tokenizer", "--name", "semantic")
    assert code == 0 and "step 7" in out, err
    entry = registry.resolve(Path("zoo"), "semantic", "tokenizer")
    assert same(entry.load(), weights("tokenizer"))
    source = entry.provenance["sources"][0]
    assert (entry.provenance["step"], source["manifest"], source["columns"]) == (
        7,
        "a" * 16,
        {"features": "b" * 16},
    )
    assert (
        source["config"]["model"] == MODELS.tokenizer.model_dump(mode="json")
        and "torch" in entry.provenance["versions"]
    )
    code, out, _ = landiff("zoo", "show", "semantic")
    shown = json.loads(out)
    assert (
        code == 0
        and shown["provenance"] == entry.provenance
        and len(shown["provenance"]["weights_sha256"]) == 64
    )


@pytest.mark.parametrize(
    ("kind", "to", "out"),
    [
        ("lm", "megatron", "runs/x"),
        ("diffusion", "deepspeed", "runs/x"),
        ("diffusion", "deepspeed", "runs/x/checkpoints/step_00000000"),
        ("diffusion", "diffusers", "runs/x"),
        ("tokenizer", "release", "runs/x"),
    ],
)
def test_a_start_folder_under_run_is_refused_and_the_way_out_works(
    landiff, tmp_path, kind, to, out
):
    registry.export(Path("zoo"), kind, kind, getattr(MODELS, kind), weights(kind), {})
    assert landiff("convert", kind, "--to", to, "--out", out)[0] == 0
    (problem,) = check_no_other_weights(Path("runs/x"))
    command = re.search(r"run `landiff (convert \S+ --name) NAME` and set init_from", str(problem))
    assert command, problem
    code, _, err = landiff(*command[1].split(), "start", "--model", "tiny.yaml")
    assert code == 0, err
    assert registry.resolve(Path("zoo"), "start", kind).kind == kind


def test_a_damaged_checkpoint_is_passed_over_and_none_is_an_error(landiff, tmp_path):
    tokenizer_run(tmp_path / "run", 1)
    newer = tokenizer_run(tmp_path / "run", 2)
    with open(newer / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"xxxx")
    code, out, _ = landiff("convert", "run", "--name", "a")
    assert code == 0 and "step 1 " in out
    code, _, err = landiff("convert", "nowhere/run", "--name", "a")
    assert code == 2 and "no whole checkpoint" in err and "Traceback" not in err


def test_a_release_goes_to_the_zoo_and_back_by_the_command_line(landiff, tmp_path):
    write_target(tmp_path / "release", "release", parts(torch.float16), {})
    code, out, err = landiff("convert", "release", "--model", "tiny.yaml")
    assert code == 0, err
    assert sorted(entry.kind for entry in registry.entries(Path("zoo"))) == [
        "diffusion",
        "lm",
        "tokenizer",
        "transformer",
    ]
    assert out.splitlines()[-1].startswith("convert: release (release) -> zoo/")
    code, out, err = landiff(
        "convert", "lm", "tokenizer", "diffusion", "--to", "release", "--out", "again"
    )
    assert code == 0, err
    for name in (
        "llm/model.safetensors",
        "diffusion/1/mp_rank_00_model_states.pt",
        "diffusion/latest",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "release" / name
        ).read_bytes(), name
    code, out, err = landiff(
        "convert",
        "release",
        "--model",
        "tiny.yaml",
        "--to",
        "diffusers",
        "--out",
        "folder",
        "--dtype",
        "float32",
    )
    assert code == 0, err
    found = {p.kind: p for p in open_source(tmp_path / "folder").parts}
    assert found.keys() == {"lm", "tokenizer", "diffusion", "vae"}
    half = weights("diffusion", torch.float16)
    assert same(
        dict(found["diffusion"].tensors), {name: tensor.float() for name, tensor in half.items()}
    )
    code, out, err = landiff(
        "convert", "release", "--model", "tiny.yaml", "--name", "old", "--dry-run"
    )
    assert (
        code == 0
        and "would convert release (release)" in out
        and not (tmp_path / "zoo" / "old-lm").exists()
    )


@pytest.mark.parametrize(
    ("format", "kind", "words"),
    [
        (
            "release",
            "diffusion",
            ["LanDiff release, 2 files", "kind         control", "kind         transformer"],
        ),
        ("megatron", "lm", ["format       megatron", "any parallel layout", "float32"]),
        ("deepspeed", "diffusion", ["format       deepspeed", "phase control"]),
        ("diffusers", "transformer", ["format       diffusers", "CogVideoXTransformer3DModel"]),
        ("transformers", "lm", ["format       transformers"]),
    ],
)
def test_inspect_recognises_every_format(landiff, tmp_path, format, kind, words):
    write_target(tmp_path / "it", format, [part(kind)], {})
    code, out, err = landiff("convert", "inspect", "it", "--model", "tiny.yaml")
    assert code == 0, err
    for word in [
        *words,
        f"{sum(t.numel() for t in weights(kind).values()):,}"
        if format != "release"
        else "parameters",
    ]:
        assert word in out, out
    zoo = registry.export(tmp_path / "zoo", "x", kind, part(kind).config, weights(kind), {})
    if format not in ("release",):
        assert f"fingerprint {zoo.fingerprint}" in out


def test_inspect_tells_a_run_and_a_zoo_entry(landiff, tmp_path):
    tokenizer_run(tmp_path / "run", 5)
    code, out, _ = landiff("convert", "inspect", "run")
    assert code == 0 and "step         5" in out and "kind         tokenizer" in out
    landiff("convert", "run", "--name", "t")
    code, out, _ = landiff("convert", "inspect", "t")
    assert (
        code == 0
        and "format       zoo" in out
        and registry.resolve(Path("zoo"), "t").fingerprint in out
    )
    code, _, err = landiff("convert", "inspect")
    assert code == 2 and "needs a path" in err


def test_missing_keys_pass_with_the_option_alone(landiff, tmp_path):
    write_target(tmp_path / "release", "release", [part("lm")], {})
    file = tmp_path / "release" / "llm" / "model.safetensors"
    from safetensors.torch import load_file

    state = load_file(file)
    del state["transformer.layer_norm.bias"]
    save_file(state, file)
    command = ("convert", "release", "--model", "tiny.yaml", "--name", "lm")
    code, _, err = landiff(*command)
    assert (
        code == 2
        and "missing: transformer.layer_norm.bias" in err
        and not (tmp_path / "zoo").exists()
    )
    code, _, err = landiff(*command, "--allow-missing", "*layer_norm*")
    assert code == 0, err
    assert registry.resolve(Path("zoo"), "lm").provenance["filled"] == [
        "transformer.layer_norm.bias"
    ]


def test_adapters_are_merged_into_their_base_at_the_scale_of_the_option(landiff, tmp_path):
    base = registry.export(tmp_path / "zoo", "lm", "lm", MODELS.lm, weights("lm"), {})
    adapter = export_adapter(tmp_path / "zoo", "lm")
    code, _, err = landiff("convert", "lm", adapter.name, "--merge", "0.5", "--name", "half")
    assert code == 0, err
    half = registry.resolve(tmp_path / "zoo", "half")
    expected = registry.load_model(base)
    apply_adapter(expected, adapter, name="a", scale=0.5, merged=True)
    changed = []
    for name, tensor in expected.state_dict().items():
        # one rounding of s B A, which is computed in another order
        torch.testing.assert_close(half.load()[name], tensor, rtol=0, atol=1e-6, msg=name)
        if not torch.equal(tensor, base.load()[name]):
            changed.append(name)
    assert changed and all("wqkv" in name for name in changed)
    assert half.provenance["merged_adapters_scale"] == 0.5
    code, _, err = landiff("convert", adapter.name, "--merge", "--name", "alone")
    assert code == 2 and base.fingerprint in err


def damage(entry: registry.ZooEntry, how: str) -> None:
    weights_file, config = entry.path / registry.WEIGHTS, entry.path / "config.json"
    data = bytearray(weights_file.read_bytes())
    if how == "flipped bit":
        data[-1] ^= 1
        weights_file.write_bytes(data)
    elif how == "cut":
        weights_file.write_bytes(data[:-7])
    elif how == "other header":
        weights_file.write_bytes(data.replace(b'"format":"pt"', b'"format":"np"'))
    elif how == "other config":
        config.write_text(
            config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0')
        )
    elif how == "half a config":
        config.write_text(config.read_text()[:40])
    else:
        (entry.path / how).unlink()


DAMAGES = {
    "flipped bit": "its weights give",
    "cut": "model.safetensors has",
    "other header": "is not the file that was written",
    "other config": "its weights give",
    "half a config": "is not a zoo entry",
    "config.json": "is not a zoo entry",
    "provenance.json": "provenance.json cannot be read",
    registry.WEIGHTS: "model.safetensors is missing",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named_and_keeps_nobody_from_the_other_entries(landiff, tmp_path, how):
    for name in ("a", "b"):
        registry.export(
            tmp_path / "zoo",
            name,
            "lm",
            MODELS.lm,
            weights("lm"),
            {"step": 7, "sources": [{"path": "runs/lm"}]},
        )
    code, out, _ = landiff("zoo", "verify")
    assert code == 0 and out.count("step 7, from runs/lm  verified") == 2
    entry = registry.resolve(tmp_path / "zoo", "a")
    damage(entry, how)
    code, _, err = landiff("zoo", "verify", "a")
    assert code == 2 and DAMAGES[how] in err and str(entry.path.relative_to(tmp_path)) in err, err
    code, out, _ = landiff("zoo", "verify")
    first, second = out.splitlines()
    assert (
        code == 2
        and first.startswith("damaged")
        and f"a@{entry.fingerprint}" in first
        and DAMAGES[how] in first
    )
    assert second.startswith("lm") and second.endswith("verified")


def test_list_says_what_there_is_and_where_it_comes_from(landiff, tmp_path):
    assert landiff("zoo", "list") == (0, "", "")
    for name in ("a", "b"):
        registry.export(
            tmp_path / "zoo",
            name,
            "lm",
            MODELS.lm,
            weights("lm"),
            {"step": 7, "sources": [{"path": "runs/lm"}]},
        )
    code, out, _ = landiff("zoo", "list")
    mark = registry.resolve(tmp_path / "zoo", "a").fingerprint
    assert code == 0 and out.splitlines() == [
        f"lm            {name}@{mark}  step 7, from runs/lm" for name in ("a", "b")
    ]
    damage(registry.resolve(tmp_path / "zoo", "b"), "config.json")
    code, out, _ = landiff("zoo", "list")
    assert (
        code == 2
        and out.splitlines()[0].startswith("lm")
        and out.splitlines()[1].startswith(f"damaged       b@{mark}")
    )
    assert landiff("zoo", "show")[0] == 2


def test_folders_that_transformers_and_diffusers_saved_in_several_files_are_told(landiff, tmp_path):
    from landiff.model_zoo.diffusers.pipeline import LanDiffLM, LanDiffLMConfig

    model = LanDiffLM(LanDiffLMConfig(MODELS.lm.model_dump(mode="json")))
    model.model.load_state_dict(weights("lm"))
    model.save_pretrained(tmp_path / "it", max_shard_size="30KB")
    assert len(list((tmp_path / "it").glob("model-*.safetensors"))) > 2
    code, out, err = landiff("convert", "inspect", "it")
    assert code == 0, err
    mark = registry.export(tmp_path / "zoo", "x", "lm", MODELS.lm, weights("lm"), {}).fingerprint
    assert (
        "format       transformers" in out
        and f"fingerprint {mark}" in out
        and "hidden_size 32, num_layers 2, num_heads 4" in out
    )
    (tmp_path / "other").mkdir()
    save_file({"encoder.block.0.weight": torch.ones(1)}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({"architectures": ["T5EncoderModel"]})
    )
    code, _, err = landiff("convert", "inspect", "other")
    assert (
        code == 2
        and "config.json beside it names T5EncoderModel; known are CogVideoXTransformer3DModel"
        in err
    )


def test_options_that_do_not_go_together_are_refused(landiff, tmp_path):
    registry.export(tmp_path / "zoo", "a", "lm", MODELS.lm, weights("lm"), {})
    assert "needs --out" in landiff("convert", "a", "--to", "megatron")[2]
    assert "--out goes with" in landiff("convert", "a", "--out", "x")[2]
    assert (
        "takes one diffusion or transformer"
        in landiff("convert", "a", "--to", "deepspeed", "--out", "x")[2]
    )
    assert "more than one lm" in landiff("convert", "a", "a", "--to", "release", "--out", "x")[2]
    assert not (tmp_path / "x").exists()


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "source", ["run/checkpoints/step_00000001", "run/checkpoints/step_00000001/model.safetensors"]
)
def test_a_checkpoint_named_by_path_is_held_against_its_list_of_files(landiff, tmp_path, source):
    checkpoint = tokenizer_run(tmp_path / "run", 1)
    assert (
        "is damaged" not in landiff("convert", source, "--model", "tiny.yaml", "--name", "good")[2]
    )
    bit_flipped(checkpoint / "model.safetensors")
    for command in (
        ("--name", "a"),
        ("--name", "a", "--dry-run"),
        ("--to", "release", "--out", "there"),
    ):
        code, _, err = landiff("convert", source, "--model", "tiny.yaml", *command)
        assert (
            code == 2
            and "step_00000001 is damaged: model.safetensors differs from what was written" in err
        ), err
    assert not (tmp_path / "zoo" / "a").exists() and not (tmp_path / "there").exists()
    (checkpoint / FILES).unlink()
    code, _, err = landiff("convert", source, "--name", "a")
    assert code == 2 and "files.json" in err


def test_a_bit_flipped_entry_is_refused_by_convert_and_load(landiff, tmp_path):
    entry = registry.export(tmp_path / "zoo", "a", "lm", MODELS.lm, weights("lm"), {})
    assert same(entry.load(), weights("lm"))  # verified once; the flip is still found
    bit_flipped(entry.path / registry.WEIGHTS)
    for source in ("a", entry.path):
        code, _, err = landiff("convert", source, "--to", "transformers", "--out", "there")
        assert (
            code == 2
            and "is damaged: its weights give" in err
            and not (tmp_path / "there").exists()
        )
    with pytest.raises(registry.ZooError, match="is damaged"):
        entry.load()
    with pytest.raises(registry.ZooError, match="is damaged"):
        registry.load_model(entry)


def test_an_entry_of_a_config_with_fewer_keys_keeps_its_fingerprint(landiff, tmp_path):
    sizes = MODELS.lm.model_dump(mode="json")
    del sizes["rope_theta"]  # a default, as if the key had been added later
    entry = write_entry(tmp_path / "zoo", "old", "lm", MODELS.lm, weights("lm"), sizes)
    assert "rope_theta" not in entry.stored_config and same(entry.load(), weights("lm"))
    assert landiff("zoo", "verify", "old")[0] == 0


POISONED = {
    "lm": ("blocks.0.wo.weight", "transformers"),
    "tokenizer": ("encoder.embed.weight", "release"),
    "transformer": ("blocks.1.qkv.weight", "diffusers"),
    "diffusion": ("control.blocks.0.qkv.weight", "deepspeed"),
}


@pytest.mark.parametrize("kind", POISONED)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_refused_by_name_everywhere(landiff, tmp_path, kind, value):
    name, target = POISONED[kind]
    bad = weights(kind)
    bad[name].view(-1)[2] = value
    config = part(kind).config
    with pytest.raises(UnhealthyError, match=f"holds NaN or infinity in {name}"):
        registry.export(tmp_path / "zoo", "new", kind, config, bad, {})
    assert not list((tmp_path / "zoo" / "new").glob("[!.]*"))
    entry = write_entry(tmp_path / "zoo", "old", kind, config, bad)
    code, _, err = landiff("zoo", "verify", "old")
    assert code == 2 and f"holds NaN or infinity in {name}" in err
    code, _, err = landiff("convert", "old", "--to", target, "--out", "there")
    assert code == 2 and name in err and not (tmp_path / "there").exists()
    with pytest.raises(UnhealthyError, match=name):
        registry.load_model(entry)
    with pytest.raises(UnhealthyError, match=name):
        write_target(tmp_path / "there", target, [Part(kind, config, LazyTensors.of(bad))], {})
    assert not (tmp_path / "there").exists()


def test_a_diverged_checkpoint_is_not_exported_and_an_unhealthy_one_passed_over(landiff, tmp_path):
    checkpoint = tokenizer_run(tmp_path / "run", 1)
    newer = tokenizer_run(tmp_path / "run", 2)
    state = json.loads((newer / STATE).read_text()) | {"healthy": False}
    (newer / STATE).write_text(json.dumps(state))
    relist(newer)
    code, out, _ = landiff("convert", "run", "--name", "a")
    assert code == 0 and "step 1 " in out
    bad = weights("tokenizer")
    bad["encoder.embed.weight"][0, 0] = float("nan")
    save_file(bad, checkpoint / "model.safetensors")
    relist(checkpoint)
    code, _, err = landiff("convert", "run", "--name", "b")
    assert (
        code == 2
        and "NaN or infinity in encoder.embed.weight" in err
        and not list((tmp_path / "zoo" / "b").glob("[!.]*"))
    )


def relist(checkpoint: Path) -> None:
    entries = [describe_file(checkpoint, name) for name in ("model.safetensors", STATE, CONFIG)]
    (checkpoint / FILES).write_text(FileList(files=entries).model_dump_json())


def test_numbers_that_do_not_fit_the_dtype_are_refused(landiff, tmp_path):
    large = weights("lm")
    large["head.weight"][0, 0] = 1e6
    registry.export(tmp_path / "zoo", "large", "lm", MODELS.lm, large, {})
    code, _, err = landiff("convert", "large", "--name", "half", "--dtype", "float16")
    assert code == 2 and "head.weight" in err and "dtype" in err
    assert landiff("convert", "large", "--name", "brain", "--dtype", "bfloat16")[0] == 0
