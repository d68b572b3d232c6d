"""What a conversion promises: safe pickles, one report, nothing half-written, little memory."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import landiff.launchers.weights.convert
from landiff.configs import ConfigError
from landiff.configs.ownership import OwnedError, take
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats import release_diffusion
from landiff.model_zoo.convert.known_formats import (
    Options,
    export_to_zoo,
    open_source,
    write_target,
)
from landiff.model_zoo.convert.lazy import LazyTensors, read_safetensors, write_safetensors
from landiff.model_zoo.convert.parts import VAE
from landiff.model_zoo.convert.pickles import read_pickle, tensors_of, write_pickle
from landiff.model_zoo.convert.rules import ConversionError
from tests.model_zoo.convert.tiny import MODELS, part, parts, same, weights, write_models

OPTIONS = Options(MODELS)


def reading_is_an_error(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} was read")


# ---------------------------------------------------------------- pickles


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_with_the_type_and_does_not_run(
    tmp_path, monkeypatch, zipped
):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"module": {"a": torch.ones(2)}, "args": Evil()},
        tmp_path / "evil.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ConversionError, match=r"evil.pt is refused.*(posix|nt)[. ]*system"):
        open_source(tmp_path / "evil.pt", OPTIONS)
    assert not (tmp_path / "hacked").exists()


def test_a_foreign_class_is_named(tmp_path):
    torch.save({"module": {}, "args": pytest.Item}, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=r"_pytest\.nodes\.Item"):
        read_pickle(tmp_path / "x.pt")


def test_what_sat_and_deepspeed_add_to_a_release_file_is_passed_over(tmp_path):
    write_target(tmp_path / "release", "release", parts(), {})
    shard = tmp_path / "release" / "diffusion" / "1" / "mp_rank_00_model_states.pt"
    content = torch.load(shard, weights_only=True)
    main = {
        name.replace(release_diffusion.CONTROL, release_diffusion.MAIN): None
        for name in content["module"]
    }
    others = {
        "conditioner.embedders.0.transformer.weight": torch.ones(2),
        "first_stage_model.encoder.x": torch.ones(3),
    }
    content["module"] = main | content["module"] | others
    content |= {
        "args": argparse.Namespace(layers=3),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "iteration": 1,
        "lr": np.float64(1e-4),
    }
    torch.save(content, shard)
    with torch.serialization.safe_globals(
        [np._core.multiarray._reconstruct]
    ):  # as other libraries do for a whole process
        found = open_source(tmp_path / "release", OPTIONS)
    assert sorted(p.kind for p in found.parts) == [
        "control",
        "lm",
        "tokenizer",
        "transformer",
        "vae",
    ]
    control = next(p for p in found.parts if p.kind == "control")
    assert same(
        dict(control.tensors),
        {n: t for n, t in weights("diffusion").items() if not n.startswith("transformer.")},
    )


@pytest.mark.parametrize(
    "file",
    [
        "diffusion/1/mp_rank_00_model_states.pt",
        "CogVideoX-2b-sat/transformer/1000/mp_rank_00_model_states.pt",
    ],
)
def test_the_position_table_may_be_missing(tmp_path, file):
    write_target(tmp_path / "release", "release", parts(), {})
    content = torch.load(tmp_path / "release" / file, weights_only=True)
    tables = [name for name in content["module"] if name.endswith(release_diffusion.POSITION_TABLE)]
    assert len(tables) == 1
    before = dict(open_source(tmp_path / "release" / file, OPTIONS).parts[0].tensors)
    del content["module"][tables[0]]
    torch.save(content, tmp_path / "release" / file)
    assert same(dict(open_source(tmp_path / "release" / file, OPTIONS).parts[0].tensors), before)


def test_megatrons_metadata_is_a_pickle_too_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_target(tmp_path / "out", "megatron", [part("lm")], {})
    metadata = tmp_path / "out" / ".metadata"
    found = pickle.loads(metadata.read_bytes())
    for smuggled, word in (
        (Evil(), "(posix|nt).system"),
        (argparse.Namespace(a=1), "argparse.Namespace"),
    ):
        found.planner_data = smuggled
        metadata.write_bytes(pickle.dumps(found))
        with pytest.raises(ConversionError, match=rf"\.metadata is refused: it holds {word}"):
            open_source(tmp_path / "out", OPTIONS)
    assert not (tmp_path / "hacked").exists()
    metadata.write_bytes(metadata.read_bytes()[:-20])
    with pytest.raises(ConversionError, match=r"\.metadata is (damaged|refused)"):
        open_source(tmp_path / "out", OPTIONS)


def test_a_megatron_folder_with_a_lost_or_cut_file_says_so(tmp_path):
    write_target(tmp_path / "out", "megatron", [part("lm")], {})
    files = sorted((tmp_path / "out").glob("*.distcp"), key=lambda path: -path.stat().st_size)
    files[0].write_bytes(files[0].read_bytes()[:-50])
    with pytest.raises(ConversionError, match=rf"{files[0].name} is damaged at [a-z]"):
        dict(open_source(tmp_path / "out", OPTIONS).parts[0].tensors)
    files[0].unlink()
    with pytest.raises(ConversionError, match=rf"{files[0].name} is missing"):
        dict(open_source(tmp_path / "out", OPTIONS).parts[0].tensors)


def test_files_of_before_torch_1_6_are_read(tmp_path):
    original = weights("lm")
    torch.save(
        {"a": original["head.weight"]}, tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    assert torch.equal(tensors_of(read_pickle(tmp_path / "old.pt"))["a"], original["head.weight"])


def test_a_pickle_is_read_and_written_with_views_strides_and_all_dtypes(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "view": base[1:3],
        "transposed": base.t(),
        "column": base[:, 2],
        "bf16": base.bfloat16(),
        "half": base.half(),
        "flag": torch.tensor(True),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
    }
    torch.save({"module": tensors, "n": [1, (2, None)]}, tmp_path / "a.pt")
    content = read_pickle(tmp_path / "a.pt")
    assert content["n"] == [1, (2, None)]
    found = tensors_of(content["module"])
    assert same(dict(found), {name: t.contiguous() for name, t in tensors.items()})
    write_pickle(tmp_path / "b.pt", found, lambda fakes: {"deep": {"module": dict(fakes)}, "n": 1})
    assert same(torch.load(tmp_path / "b.pt", weights_only=True)["deep"]["module"], dict(found))
    assert same(
        torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)["deep"]["module"], dict(found)
    )


def test_a_damaged_pickle_says_so(tmp_path):
    torch.save({"module": {"a": torch.ones(1000)}}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[:2000])
    with pytest.raises(ConversionError, match="a.pt"):
        open_source(tmp_path / "a.pt", OPTIONS)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(3)[:3])
    with pytest.raises(ConversionError, match="b.pt"):
        open_source(tmp_path / "b.pt", OPTIONS)


# ---------------------------------------------------------------- keys


def test_all_wrong_keys_come_in_one_report_grouped_with_counts(tmp_path):
    write_target(tmp_path / "out", "release", [part("lm")], {})
    file = tmp_path / "out" / "llm" / "model.safetensors"
    state = load_file(file)
    for i in (0, 1):
        del state[f"transformer.blocks.{i}.wo.weight"]
        state[f"transformer.blocks.{i}.extra"] = torch.ones(1)
    state["transformer.head.weight"] = torch.ones(5, 32)
    save_file(state, file)
    with pytest.raises(ConversionError) as error:
        open_source(tmp_path / "out", OPTIONS)
    text = str(error.value)
    assert "2 missing, 2 unexpected, 1 wrong shape" in text
    for line in (
        "missing: transformer.blocks.*.wo.weight  (x2)",
        "unexpected: transformer.blocks.*.extra  (x2)",
        "wrong shape: transformer.head.weight (5, 32) instead of (23, 32)",
    ):
        assert line in text, text


def test_the_report_is_of_all_files_and_parts_of_a_set(tmp_path):
    write_target(tmp_path / "out", "release", parts(), {})
    for file, name in (("llm", "transformer.head.weight"), ("tokenizer", "decoder.pos_embed")):
        path = tmp_path / "out" / file / "model.safetensors"
        state = load_file(path)
        state["odd.one"] = state.pop(name, torch.ones(1))
        save_file(state, path)
    shard = tmp_path / "out" / "diffusion" / "1" / "mp_rank_00_model_states.pt"
    content = torch.load(shard, weights_only=True)
    gone = next(
        name
        for name in content["module"]
        if name.endswith("final_layernorm.weight") or "norm" in name
    )
    del content["module"][gone]
    torch.save(content, shard)
    with pytest.raises(ConversionError) as error:
        open_source(tmp_path / "out", OPTIONS)
    text = str(error.value)
    assert (
        text.count("does not fit a") == 3
        and text.count("unexpected: odd.one") == 2
        and f"missing: {gone[:12]}" in text
    ), text
    with pytest.raises(ConversionError) as error:
        paths = [tmp_path / "out" / "llm", tmp_path / "out" / "tokenizer"]
        words = tuple(str(path) for path in paths)
        request = landiff.launchers.weights.request.ConvertRequest(
            words, model=str(write_models(tmp_path))
        )
        landiff.launchers.weights.convert.open_all(request, paths)
    assert str(error.value).count("unexpected: odd.one") == 2


@pytest.mark.parametrize(
    ("format", "kind", "gone"),
    [
        ("megatron", "lm", "decoder.layers.1.self_attention.linear_proj.weight"),
        ("transformers", "lm", "model.final_norm.bias"),
        ("diffusers", "transformer", "transformer_blocks.0.attn1.norm_q.weight"),
        ("deepspeed", "transformer", "output.linear.bias"),
        ("release", VAE, "encoder.conv_in.conv.bias"),
    ],
)
def test_missing_keys_of_every_format_are_named_as_there_and_pass_by_pattern(
    tmp_path, format, kind, gone
):
    write_target(tmp_path / "out", format, [part(kind)], {})
    without(tmp_path / "out", gone)
    reported = re.escape(re.sub(r"\.[0-9]+\.", ".*.", gone))
    with pytest.raises(ConversionError, match=rf"\(1 missing\)(.|\n)*missing: {reported}\n"):
        open_source(tmp_path / "out", OPTIONS)
    (found,) = open_source(tmp_path / "out", Options(MODELS, (gone,))).parts
    assert found.filled == (gone,)
    assert (
        sum(
            not torch.equal(tensor, weights(kind)[name])
            for name, tensor in dict(found.tensors).items()
        )
        == 1
    )


def without(folder: Path, gone: str) -> None:
    """Take one tensor out of the files of a folder."""
    if (folder / ".metadata").is_file():
        found = pickle.loads((folder / ".metadata").read_bytes())
        del found.state_dict_metadata[gone]
        (folder / ".metadata").write_bytes(pickle.dumps(found))
        return
    path = next(
        path
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or (path.suffix == ".pt" and path.name != "common.pt")
    )
    if path.suffix == ".safetensors":
        save_file({name: tensor for name, tensor in load_file(path).items() if name != gone}, path)
        return
    content = torch.load(path, weights_only=True)
    for holder in (
        content.get("module", {}),
        content.get("state_dict", {}),
        *(content.get("param_shapes") or ()),
    ):
        holder.pop(gone, None)
    torch.save(content, path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    write_target(tmp_path / "out", "transformers", [part("lm")], {})
    state = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    names = sorted(state)
    shards = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, tmp_path / "out" / file)
    index = tmp_path / "out" / "model.safetensors.index.json"
    good = {name: file for file, held in shards.items() for name in held}

    def opened(weight_map: object) -> dict[str, torch.Tensor]:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return dict(open_source(tmp_path / "out", OPTIONS).parts[0].tensors)

    assert same(opened(good), weights("lm"))
    for bad, words in (
        (
            good | {names[0]: "../elsewhere.safetensors"},
            "names the file '../elsewhere.safetensors', which is not in its folder",
        ),
        (good | {names[0]: "model-00003-of-00003.safetensors"}, "is not in its folder"),
        (
            good | {names[0]: "model-00002-of-00002.safetensors"},
            r"missing: model\.blocks\.\*\.norm0\.weight in model-00002",
        ),
        (good | {"more": "model-00002-of-00002.safetensors"}, r"missing: more in model-00002"),
        (
            {name: file for name, file in good.items() if name != names[0]},
            r"unexpected: model\.blocks\.\*\.norm0\.weight in model-00001",
        ),
        (None, "not an index of .safetensors files"),
    ):
        with pytest.raises(ConversionError, match=words):
            opened(bad)


def test_missing_keys_pass_by_pattern_alone_and_start_afresh(tmp_path):
    write_target(tmp_path / "out", "release", [part("lm")], {})
    file = tmp_path / "out" / "llm" / "model.safetensors"
    state = load_file(file)
    gone = [
        "transformer.blocks.0.norm0.weight",
        "transformer.layer_norm.bias",
        "cond_model.null_text_embedding",
    ]
    for name in gone:
        del state[name]
    save_file(state, file)
    with pytest.raises(ConversionError, match="--allow-missing"):
        open_source(
            tmp_path / "out", Options(MODELS, ("transformer.blocks.*", "transformer.layer_norm.*"))
        )
    found = open_source(
        tmp_path / "out",
        Options(MODELS, ("transformer.blocks.*.norm0.weight", "*layer_norm.*", "*null*")),
    ).parts[0]
    assert sorted(found.filled) == sorted(gone)
    tensors = dict(found.tensors)
    assert (
        torch.equal(tensors["blocks.0.norm0.weight"], torch.ones(32))
        and not tensors["final_norm.bias"].any()
    )
    expected = weights("lm")
    assert all(
        torch.equal(t, expected[n])
        for n, t in tensors.items()
        if n not in ("blocks.0.norm0.weight", "final_norm.bias", "text.null")
    )
    (entry,) = export_to_zoo(tmp_path / "zoo", {"lm": "lm"}, [found], {})
    assert entry.provenance["filled"] == list(found.filled)
    registry.load_model(entry)


def test_wrong_sizes_are_seen_before_anything_is_read_or_written(tmp_path):
    other = Options(
        MODELS.model_copy(update={"lm": MODELS.lm.model_copy(update={"num_layers": 3})})
    )
    write_target(tmp_path / "out", "release", [part("lm")], {})
    with pytest.raises(ConversionError, match=r"missing: transformer\.blocks\.\*"):
        open_source(tmp_path / "out", other)


def test_something_else_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ConfigError, match=r"none of the formats(.|\n)*Megatron(.|\n)*LanDiff release"
    ):
        open_source(tmp_path)
    save_file({"a.b.c": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"its keys start with a\.b"):
        open_source(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(tmp_path / "nowhere")


# ---------------------------------------------------------------- files


def test_the_file_is_the_one_that_safetensors_writes(tmp_path):
    tensors = weights("tokenizer", torch.bfloat16) | {
        "double": torch.ones(3, dtype=torch.float64),
        "empty": torch.zeros(0),
    }
    write_safetensors(tmp_path / "a.safetensors", LazyTensors.of(tensors), {"format": "pt"})
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    assert same(dict(read_safetensors(tmp_path / "a.safetensors")), tensors)
    save_file(tensors, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert same(dict(read_safetensors(tmp_path / "b.safetensors")), tensors)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_damaged_safetensors_file_is_refused(tmp_path, cut):
    save_file(weights("lm"), tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:cut])
    with pytest.raises(ConversionError, match="damaged"):
        open_source(tmp_path / "model.safetensors", OPTIONS)


def test_opening_reads_no_tensor(tmp_path):
    tensors = LazyTensors(LazyTensors.of(weights("lm")).meta, reading_is_an_error)
    lazy = (
        tensors.with_prefix("x.")
        .without_prefix("x.")
        .cast(torch.bfloat16)
        .only(lambda name: "norm" not in name)
    )
    assert (
        "head.weight" in lazy and "final_norm.bias" not in lazy and lazy.dtype() == torch.bfloat16
    )
    write_target(tmp_path / "out", "release", parts(), {})
    for file in (tmp_path / "out").rglob("*.safetensors"):  # holes where the numbers were
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        size = file.stat().st_size
        with open(file, "r+b") as handle:
            handle.truncate(header)
            handle.truncate(size)
    assert len(open_source(tmp_path / "out", OPTIONS).parts) == 5


class Stop(BaseException):
    pass


def stop_in_the_middle(done: int, total: int) -> None:
    raise Stop


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ("release", "diffusion"),
        ("diffusers", "vae"),
        ("transformers", "lm"),
        ("deepspeed", "transformer"),
        ("megatron", "lm"),
    ],
)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, format, kind):
    with pytest.raises(Stop):
        write_target(tmp_path / "out", format, [part(kind)], {}, stop_in_the_middle)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing_in_the_zoo(tmp_path):
    with pytest.raises(Stop):
        export_to_zoo(tmp_path / "zoo", {"lm": "lm"}, [part("lm")], {}, stop_in_the_middle)
    assert not list((tmp_path / "zoo" / "lm").iterdir()) and not registry.entries(tmp_path / "zoo")


@pytest.mark.parametrize("format", ["megatron", "release", "zoo"])
def test_a_killed_conversion_leaves_nothing_under_the_final_name_and_can_run_again(
    tmp_path, format
):
    code = f"""
import os, signal, time, torch
from pathlib import Path
from landiff.model_zoo.convert.known_formats import export_to_zoo, write_target
from tests.model_zoo.convert.tiny import part
def hang(done, total):
    print("writing", flush=True)
    time.sleep(60)
if {format!r} == "zoo":
    export_to_zoo(Path("out"), {{"lm": "lm"}}, [part("lm")], {{}}, hang)
write_target(Path("out"), {format!r}, [part("lm")], {{}}, hang)
"""
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    if format == "zoo":
        assert not registry.entries(tmp_path / "out")
        export_to_zoo(tmp_path / "out", {"lm": "lm"}, [part("lm")], {})
        registry.load_model(registry.resolve(tmp_path / "out", "lm"))
    else:
        assert not (tmp_path / "out").exists()
        write_target(tmp_path / "out", format, [part("lm")], {})
        assert open_source(tmp_path / "out", OPTIONS).parts[0].kind == "lm"


@pytest.mark.parametrize("lock", ["lm/.owner", ".out.owner"])
def test_what_is_being_written_has_one_owner(tmp_path, lock):
    def write():
        if lock == ".out.owner":
            write_target(tmp_path / "out", "transformers", [part("lm")], {})
        else:
            export_to_zoo(tmp_path, {"lm": "lm"}, [part("lm")], {})

    with (
        take(tmp_path / lock, "the other"),
        pytest.raises(OwnedError, match=f"is in use by process {os.getpid()} of"),
    ):
        write()
    write()
    assert not list(tmp_path.rglob("*.owner"))


def test_what_a_killed_conversion_left_goes_with_the_next_one(tmp_path):
    """On this node, and of a dead process only."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = os.uname().nodename
    left = {
        f".out.{node}.{dead.pid}.tmp": False,
        f".out.{node}.{os.getppid()}.tmp": True,
        f".out.elsewhere.{dead.pid}.tmp": True,
    }
    for name in left:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    write_target(tmp_path / "out", "transformers", [part("lm")], {})
    assert {name: (tmp_path / name).exists() for name in left} == left


def test_progress_counts_up_to_all_of_it(tmp_path):
    heard: list[tuple[int, int]] = []
    big = LazyTensors.of({f"t{i}": torch.zeros(300_000) for i in range(10)})
    write_safetensors(
        tmp_path / "a.safetensors", big, progress=lambda *counts: heard.append(counts)
    )
    assert len(heard) == 11 and heard == sorted(heard)
    assert heard[-1] == (12, 12) and heard[0] == (0, 12)


def test_verify_sees_a_flipped_bit_and_a_changed_header(tmp_path):
    (entry,) = export_to_zoo(tmp_path, {"lm": "lm"}, [part("lm")], {"source": "here"})
    registry.verify_entry(entry)
    assert entry.provenance["source"] == "here" and len(entry.provenance["weights_sha256"]) == 64
    file = entry.path / registry.WEIGHTS
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(registry.ZooError, match="damaged"):
        registry.verify_entry(entry)
    data[-5] ^= 1
    file.write_bytes(data.replace(b'"format":"pt"', b'"format":"np"'))
    with pytest.raises(registry.ZooError, match="not the file that was written"):
        registry.verify_entry(entry)


def test_memory_stays_near_the_largest_tensor():
    """The benchmark measures the peak of conversions of 128 MB with tensors of 4 MB."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "convert.py"), "--megabytes", "128", "--quick"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("the peak grew by") == 2, (
        done.stdout + done.stderr
    )
