"""Columns of scores: measures, heads on embeddings, near duplicates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.data_pipeline.format.columns import FolderReader
from landiff.data_pipeline.ingest.filters import brightness
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.precompute import commands as precompute
from landiff.data_pipeline.precompute.config import NetworkScore, PrecomputeConfig
from landiff.data_pipeline.precompute.scores import Head
from landiff.launchers.cli import main
from tests.data_pipeline.precompute_data import key_of, pan, write_clips

SIZES = [2, 3]
LITE = {"kind": "efficientnet-lite0"}
NEAR = np.maximum(pan(1), 3) - 3  # clip 1 again, a little darker


def values(data, manifest, name) -> list[torch.Tensor]:
    part = f"{name.partition('-')[0]}.safetensors"
    shards = manifest.columns[name].shards
    reader = FolderReader(data, name, part, shards)
    found = []
    for shard, entry in enumerate(shards):
        found += [reader.read_tensor(shard, slot).float() for slot in range(entry.samples)]
    reader.close()
    return found


def test_thresholds_are_chosen_after_the_scores_were_computed(tmp_path, capsys):
    data = tmp_path / "data"
    write_clips(data, SIZES, odd={4: NEAR})
    torch.manual_seed(0)
    layers = {"layers.0.weight": torch.randn(8, 112), "layers.0.bias": torch.randn(8)}
    layers |= {"layers.3.weight": torch.randn(2, 8)}
    save_file(layers, tmp_path / "head.safetensors")
    head = {"kind": "network", "path": str(tmp_path / "head.safetensors"), "encoder": LITE}
    head |= {"activation": "relu", "output": "softmax", "index": 1}
    plain = {"data": str(data), "zoo": str(tmp_path / "zoo"), "device": "cpu"}
    first = {
        "embedding-lite0": {"encoder": LITE},
        "score-bright": {"head": {"kind": "measure", "measure": "brightness"}},
        "score-nsfw": {"head": head},
    }
    duplicate = {"head": {"kind": "duplicate", "embedding": "embedding-lite0"}}
    second = load(PrecomputeConfig, plain | {"columns": {"score-duplicate": duplicate}})
    with pytest.raises(ConfigError, match="embedding-lite0 is not in the manifest"):
        precompute.run(second)
    settings = load(PrecomputeConfig, plain | {"columns": first})
    precompute.run(settings)
    precompute.finalize(settings)
    precompute.run(second, task=(1, 2))  # tasks in any order
    precompute.run(second, task=(0, 2))
    manifest = precompute.finalize(second)

    embeddings = torch.stack(values(data, manifest, "embedding-lite0"))
    assert (embeddings.norm(dim=1) - 1).abs().max() < 2e-3  # rounding to float16
    rows = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=1)
    expected = (rows @ rows.T).tril(-1).max(1).values
    found = torch.cat(values(data, manifest, "score-duplicate"))
    assert (found - expected).abs().max() < 2e-3 and found[0] == 0  # rounded to float16
    hidden = torch.relu(embeddings @ layers["layers.0.weight"].T + layers["layers.0.bias"])
    expected = (hidden @ layers["layers.3.weight"].T).softmax(1)[:, 1]
    assert (torch.cat(values(data, manifest, "score-nsfw")) - expected).abs().max() < 1e-5
    bright = torch.cat(values(data, manifest, "score-bright"))
    assert abs(float(bright[0]) - brightness(pan(0))) < 0.02  # the clips are compressed
    assert found.argmax() == 4 and found[4] > 0.9

    threshold = (float(found[4]) + float(found[:4].max())) / 2
    where = f"duplicate < {threshold}"
    reading = load(DataConfig, {"manifest": data, "global_batch_size": 4, "where": where})
    with Loader(reading, ["embedding-lite0"], dp_rank=0, dp_size=1) as loader:
        keys = {sample.key for sample in loader.next_batch().samples}
    assert keys == {key_of(number) for number in range(4)}
    (tmp_path / "scores.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    command = ["precompute", "verify", "--sample", "1", "--config", str(tmp_path / "scores.yaml")]
    assert main(command) == 0 and "score-nsfw: 5 clips" in capsys.readouterr().out
    assert main(["data", "report", str(data), "--clips", "1"]) == 0
    assert "score bright" in (data / "report.html").read_text()


@pytest.mark.parametrize(
    ("layers", "index", "message"),
    [
        ({"0.weight": (3, 4), "1.weight": (1, 2)}, 0, "layer 1 does not fit"),
        ({"weight": (2, 4), "bias": (2,)}, 2, "head.index = 2, but .* has 2 outputs"),
        ({"conv.weight": (2, 4)}, 0, "layer 0 does not fit; it has conv.weight"),
    ],
)
def test_a_file_of_other_layers_is_refused(tmp_path, layers, index, message):
    path = tmp_path / "head.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in layers.items()}, path)
    config = NetworkScore(path=path, encoder=LITE, index=index)
    with pytest.raises(ConfigError, match=message):
        Head(config)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        Head(config)
