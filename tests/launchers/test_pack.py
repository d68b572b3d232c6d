"""`landiff zoo pack` and the zoo `packaged`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.synthetic.judge import judge, rates
from landiff.launchers.cli import main
from landiff.launchers.data.shapes import pair_files, rates_document, read_videos
from landiff.launchers.results.sample import load_models
from landiff.model_zoo import registry
from tests.launchers.random_zoo import sample_config, write_random_shapes_zoo


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `landiff zoo pack` reads of a folder of `landiff learn`, with untrained models."""
    folder = tmp_path_factory.mktemp("pack") / "learn"
    write_random_shapes_zoo(folder / "zoo")
    world.write_world(folder / "world", clips=0, true_clips=0, seed=3)
    labels = world.labels(held_out=True)
    (folder / "rates.json").write_text(json.dumps(rates_document(rates(labels, labels))))
    (folder / "summary.json").write_text(json.dumps({"code": "git 0123abc"}))
    return folder


@pytest.fixture(scope="module")
def packed(run) -> Path:
    folder = run.parent / "packed"
    assert main(["zoo", "pack", str(run), "--out", str(folder)]) == 0
    return folder


def test_a_packed_zoo_holds_the_models_rounded_to_bfloat16(run, packed):
    for kind in ("tokenizer", "lm", "diffusion"):
        entry = registry.resolve(packed, kind, kind)
        registry.verify_entry(entry)
        original = registry.resolve(run / "zoo", kind, kind).load()
        for name, tensor in entry.load().items():
            if name.startswith("quantizer."):
                assert torch.equal(tensor, original[name]), name
            else:
                assert torch.equal(tensor, original[name].to(tensor.dtype)), name
                assert tensor.dtype == torch.bfloat16, name
    assert main(["zoo", "verify", "--zoo", str(packed)]) == 0


def test_a_packed_zoo_says_where_it_comes_from(packed):
    text = (packed / "PROVENANCE.md").read_text()
    parts = ("landiff learn --seed 3", "git 0123abc", "| lm | not recorded | 950,016 |")
    for part in (*parts, "all         1.000"):
        assert part in text


def test_weights_in_bfloat16_are_sampled_in_float32(packed, tmp_path):
    """With `precision: fp32`, as the packaged config has it."""
    text = {"lm_text": {"kind": "minilm"}, "diffusion_text": {"kind": "minilm", "padded": True}}
    config = sample_config(packed, tmp_path, **text, precision="fp32", device="cpu")
    models = load_models(config, torch.device("cpu"))
    for model in (models.lm, models.tokenizer, models.diffusion):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_is_packed_once_and_when_it_is_finished(run, packed, tmp_path, capsys):
    assert main(["zoo", "pack", str(run), "--out", str(packed)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["zoo", "pack", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "has no rates.json, world/world.json, summary.json" in capsys.readouterr().err
    assert main(["zoo", "pack", str(run)]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_packaged_zoo_is_found_by_name_and_is_read_only(packed, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "PACKAGED_FOLDER", packed)
    assert main(["zoo", "list", "--zoo", "packaged"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["sample", "--dry-run"]) == 0
    assert "zoo: packaged" in capsys.readouterr().out
    assert main(["convert", "lm", "--zoo", "packaged", "--name", "mine"]) == 2
    assert "read-only" in capsys.readouterr().err


def test_the_packaged_weights_make_what_captions_say(monkeypatch, tmp_path):
    """Captions that training never showed. By chance, 8 of the 24 values would be right."""
    monkeypatch.chdir(tmp_path)
    assert main(["zoo", "verify", "--zoo", "packaged"]) == 0
    labels = world.labels(held_out=True)[::10]
    prompts = [world.caption(label) for label in labels]
    assert main(["sample", "batch_size=6", "--", *prompts]) == 0
    files = pair_files(Path("packaged-samples"), labels)
    right = 0
    for label, frames in zip(labels, read_videos(files), strict=True):
        found = judge(frames).found
        right += sum(
            found[name] == label[name] for name in ("color", "direction", "speed", "ground")
        )
    assert right >= 20
