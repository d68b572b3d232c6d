"""Precompute of tokens and text states: precision, collapsed codebooks, truncated captions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors

from landiff.configs.loader import find
from landiff.data_pipeline.format.shards import ShardError, read_manifest, read_part, read_sidecar
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.job import CollapsedTokens
from landiff.data_pipeline.precompute.status import format_table
from landiff.data_pipeline.precompute.units import ColumnCard, task_of_shard
from landiff.launchers.cli import main
from landiff.model_zoo import registry
from landiff.model_zoo.health import UnhealthyError
from tests.data_pipeline.precompute_data import config, export_tokenizer, key_of, write_clips
from tests.model_zoo.zoo_entries import write_entry

EMBED = "quantizer._codebook.embed"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    export_tokenizer(folder, 0)
    return folder


def changed_zoo(zoo: Path, folder: Path, change) -> Path:
    """A zoo whose tokenizer has other weights; written without the checks of an export."""
    entry = registry.resolve(zoo, "tokenizer")
    weights = entry.load()
    change(weights)
    write_entry(folder / "zoo", "tokenizer", "tokenizer", entry.config, weights)
    return folder / "zoo"


def collapsed(weights: dict[str, torch.Tensor]) -> None:
    """Move all codes but the first far away, so that no vector is near them."""
    weights[EMBED][:, 1:] += 1000.0


def poisoned(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.embed.weight"][3, 5] = math.nan


def test_a_collapsed_codebook_is_refused_and_no_unit_is_written(zoo, tmp_path):
    write_clips(tmp_path / "data", [3, 2])
    settings = config(tmp_path / "data", changed_zoo(zoo, tmp_path, collapsed), ["tokens"])
    with pytest.raises(
        CollapsedTokens, match=r"column 'tokens', .* clips: all of \d+ tokens are code 0"
    ):
        precompute.run(settings)
    # shards before the last may be too small for a decision
    assert len(list((tmp_path / "data" / "tokens").glob("*.tar"))) <= 1
    with pytest.raises(ShardError):
        precompute.finalize(settings)


def test_tasks_too_small_to_notice_are_refused_by_finalize_and_verify(zoo, tmp_path):
    data = tmp_path / "data"
    manifest = write_clips(data, [1, 1])
    settings = config(data, changed_zoo(zoo, tmp_path, collapsed), ["tokens"])
    first, second = manifest.shards
    tasks = next(n for n in range(2, 99) if task_of_shard(first, n) != task_of_shard(second, n))
    for entry in manifest.shards:
        precompute.run(settings, task=(task_of_shard(entry, tasks), tasks))
    sidecar = read_sidecar(data / "tokens" / "000000.tar")
    assert sidecar.value_range is not None and len(set(sidecar.value_range)) == 1
    with pytest.raises(ShardError, match="column 'tokens': all tokens of 2 clips are code"):
        precompute.finalize(settings)
    [check] = precompute.verify(settings)
    assert any(
        "column 'tokens': all tokens of 2 clips are code" in problem for problem in check.problems
    )


def test_a_tokenizer_with_nan_is_refused_by_name(zoo, tmp_path, capsys):
    write_clips(tmp_path / "data", [2])
    settings = config(tmp_path / "data", changed_zoo(zoo, tmp_path, poisoned), ["tokens"])
    with pytest.raises(UnhealthyError, match="holds NaN or infinity in encoder.embed.weight"):
        precompute.run(settings)
    text = settings.model_dump(mode="json")
    (tmp_path / "job.yaml").write_text(json.dumps(text))
    assert main(["precompute", "--config", str(tmp_path / "job.yaml")]) == 2
    assert "encoder.embed.weight" in capsys.readouterr().err


def tokens_config(data: Path, zoo: Path, precision: str | None):
    column = {"tokenizer": "tokenizer", "encoder": {"kind": "efficientnet-lite0"}}
    if precision is not None:
        column["precision"] = precision
    return config(data, zoo, {"features": {"encoder": column["encoder"]}, "tokens": column})


def column_tensors(data: Path, column: str, clips: int) -> torch.Tensor:
    """The tensors of the first clips, stacked."""
    manifest = read_manifest(data)
    found = []
    for number in range(clips):
        part = read_part(data, manifest, key_of(number), f"{column}.safetensors", column)
        found.append(load_safetensors(part)[column])
    return torch.stack(found)


def test_tokens_follow_the_precision_and_float32_columns_keep_their_fingerprint(zoo, tmp_path):
    found = {}
    for precision in (None, "fp32", "bf16"):
        data = tmp_path / str(precision)
        write_clips(data, [4])
        precompute.run(tokens_config(data, zoo, precision))
        card = ColumnCard.model_validate_json((data / "tokens" / "column.json").read_text())
        found[precision] = card, column_tensors(data, "tokens", 4)
    entry = registry.resolve(zoo, "tokenizer")
    parts = {
        key: found[None][0].parts[key] for key in ("encoders", "decoder", "frame_stride", "dtype")
    }
    assert found[None][0].fingerprint == ColumnCard.of(entry.reference, parts, {}).fingerprint
    assert found["fp32"][0].fingerprint == found[None][0].fingerprint
    assert "precision" not in found["fp32"][0].parts
    assert found["bf16"][0].parts["precision"] == "bf16"
    assert found["bf16"][0].fingerprint != found[None][0].fingerprint
    assert torch.equal(found["fp32"][1], found[None][1])

    features = column_tensors(tmp_path / "bf16", "features", 4).float()
    tokenizer = registry.load_model(entry)
    with torch.autocast("cpu", torch.bfloat16):
        expected = tokenizer.encode(features)
    assert torch.equal(found["bf16"][1].int(), expected.int())


def test_a_column_of_before_the_precision_was_configurable_is_current(zoo, tmp_path):
    write_clips(tmp_path, [2])
    settings = tokens_config(tmp_path, zoo, None)
    precompute.run(settings)
    path = tmp_path / "tokens" / "column.json"
    card = json.loads(path.read_text())
    del card["column"]["precision"]
    path.write_text(json.dumps(card))
    assert [row.changed for row in precompute.status(settings)] == ["", ""]
    assert all(column.made == 0 for column in precompute.run(settings).columns.values())
    changed = precompute.status(tokens_config(tmp_path, zoo, "bf16"))
    assert changed[1].changed == "precision was fp32, is bf16"


def test_the_packaged_configs_compute_tokens_as_the_release_and_as_before():
    assert "precision: bf16" in find("landiff/precompute").read_text()
    assert "precision" not in find("nano/precompute").read_text()


def test_captions_that_are_cut_are_counted_in_sidecar_manifest_summary_and_status(zoo, tmp_path):
    write_clips(tmp_path, [3, 2])  # "a picture that moves, number N": 9 tokens with [CLS] and [SEP]
    columns = {
        "text-short": {"encoder": {"kind": "minilm", "max_length": 6}},
        "text-minilm": {"encoder": {"kind": "minilm"}},
    }
    settings = config(tmp_path, zoo, columns)
    summary = precompute.run(settings)
    assert [
        read_sidecar(tmp_path / "text-short" / f"00000{i}.tar").truncated for i in range(2)
    ] == [3, 2]
    assert (
        summary.columns["text-short"].truncated == 5
        and summary.columns["text-minilm"].truncated == 0
    )
    assert (
        "5 captions truncated to the encoder's length" in str(summary)
        and str(summary).count("truncated to") == 1
    )
    again = precompute.run(settings)
    assert again.columns["text-short"].truncated == 5
    rows = precompute.status(settings)
    assert [row.truncated for row in rows] == [5, 0]
    assert "truncated: 5 captions are longer than the encoder accepts" in format_table(rows)
    precompute.finalize(settings)
    found = read_manifest(tmp_path).columns
    assert (found["text-short"].truncated, found["text-minilm"].truncated) == (5, 0)
