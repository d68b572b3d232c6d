"""`landiff evaluate` on the smallest models that fit each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from landiff.configs import load as load_config
from landiff.data_pipeline.format.schema import RAW, Manifest
from landiff.data_pipeline.format.shards import ShardWriter, read_manifest, write_manifest
from landiff.launchers.cli import main
from landiff.launchers.config import EvaluateConfig
from landiff.launchers.results.evaluate import draw_samples
from landiff.launchers.results.swaps import find_swaps
from landiff.model_zoo import registry
from tests.data_pipeline.data_sets import keys_of, raw_sample, write_column
from tests.model_zoo.adapters import export_adapter
from tests.model_zoo.convert.tiny import CONFIGS, weights

SHAPES = {"tokens": [5], "latents": [3, 4, 4, 6], "text-a": [4, 20], "text-b": [5, 12]}
CONFIG = """\
zoo: zoo
data: data
out: found.json
lm_text_column: text-a
diffusion_text_column: text-b
prefix_frames: 1
samples: 4
seeds: 2
"""


def write_data(
    data: Path,
    *,
    one_video: bool,
    captions: Sequence[str] = (),
    buckets: Mapping[str, Sequence[int]] = {"": (4, 3)},
) -> None:
    """Clips of one video, or of one each, with captions of their own or the given ones.

    buckets: name, number of clips and of latent frames of each shard.
    """
    entries = []
    frames_of = {}
    for shard, (bucket, (clips, frames)) in enumerate(buckets.items()):
        name = f"{shard:06d}"
        with ShardWriter(data / RAW, name, fingerprint="raw", bucket=bucket) as writer:
            for number, key in enumerate(keys_of(shard, clips)):
                frames_of[key] = frames
                video = "0" * 64 if one_video else hashlib.sha256(key.encode()).hexdigest()
                changes = {"source_sha256": video, "motion_score": 0.1 * number}
                if captions:
                    changes["caption"] = captions[number]
                writer.add(key, {"json": raw_sample(key, **changes).model_dump_json().encode()})
        entries.append(writer.sidecar.entry)
    write_manifest(data, Manifest(fingerprint="raw", config={}, shards=entries))

    def value(name: str, key: str) -> Tensor:
        draw = torch.Generator().manual_seed(int(key, 16) % 1000)
        frames = frames_of[key]
        if name == "tokens":
            return torch.randint(0, 16, (2 + frames,), generator=draw).to(torch.uint16)
        shape = SHAPES[name] if name != "latents" else [frames, *SHAPES[name][1:]]
        return torch.randn(shape, generator=draw).to(torch.bfloat16)

    for name, shape in SHAPES.items():
        write_column(data, name, value=lambda key, name=name: value(name, key))
        manifest = read_manifest(data)
        column = manifest.columns[name].model_copy(update={"shape": shape})
        columns = {**manifest.columns, name: column}
        write_manifest(data, manifest.model_copy(update={"columns": columns}))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a zoo and the config; the working folder."""
    monkeypatch.chdir(tmp_path)
    for kind in ("lm", "tokenizer", "diffusion"):
        registry.export(Path("zoo"), kind, kind, CONFIGS[kind], weights(kind), {})
    Path("evaluate.yaml").write_text(CONFIG)
    return tmp_path


def test_losses_are_compared_and_progress_is_shown_from_the_start(folder, capsys):
    write_data(Path("data"), one_video=False)
    assert main(["evaluate", "--config", "evaluate.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("evaluate")] == [
        "evaluate loads: 0/3 models",
        "evaluate loads: 1/3 models",
        "evaluate loads: 2/3 models",
        "evaluate loads: 3/3 models",
        "evaluate: 0/36 passes",
        "evaluate: 44/44 passes",
    ]
    assert not any(" 0.0/s" in line for line in lines)
    rows = json.loads(Path("found.json").read_text())["rows"]
    assert len(rows) == 2 and rows[0]["lm"] > 0 and rows[0]["diffusion"] > 0


def test_every_clip_shape_of_the_data_is_evaluated_by_itself(folder, capsys):
    buckets = {"9x32x48": (4, 3), "1x32x48": (3, 1)}
    write_data(Path("data"), one_video=False, buckets=buckets)
    assert main(["evaluate", "--config", "evaluate.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.index("== clips of 9x32x48") < out.index("== clips of 1x32x48")
    videos, images = json.loads(Path("found.json").read_text())["buckets"].values()
    assert (videos["samples"], images["samples"]) == (4, 3)
    later = "diffusion, later frames"
    assert later in videos["rows"][0] and later not in images["rows"][0]
    assert all(len(found["rows"]) == 2 and found["instruments"] for found in (videos, images))
    last = [line for line in out.splitlines() if line.startswith("evaluate: ")][-1]
    done, _, total = last.split()[1].partition("/")
    assert done == total

    assert main(["evaluate", "--config", "evaluate.yaml", "buckets=[9x32x48]"]) == 0
    assert json.loads(Path("found.json").read_text()) == videos, "as without the images"
    assert main(["evaluate", "--config", "evaluate.yaml", "buckets=[5x32x48]"]) == 2
    assert "have 9x32x48, 1x32x48" in capsys.readouterr().err


def test_a_clip_shape_with_one_clip_is_refused_with_the_way_out(folder, capsys):
    write_data(Path("data"), one_video=False, buckets={"9x32x48": (4, 3), "1x32x48": (1, 1)})
    assert main(["evaluate", "--config", "evaluate.yaml", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "holds 1 clip(s) of the shape 1x32x48" in err and "Set `buckets` to others" in err


SHAPES_CAPTIONS = [
    "A red circle moves up quickly over a white ground.",
    "A blue circle moves up quickly over a white ground.",
    "A green circle moves up quickly over a white ground.",
    "A red circle moves up slowly over a white ground.",
]


def test_swaps_are_clips_whose_captions_differ_in_one_attribute():
    others = ["A rabbit.", SHAPES_CAPTIONS[0], *SHAPES_CAPTIONS]
    (color,) = find_swaps(others)
    assert (color.attribute, color.clips) == ("color", [1, 2, 3, 4])
    for clip, partner in zip(color.clips, color.partners, strict=True):
        words = others[clip].split()
        assert [i for i, word in enumerate(others[partner].split()) if word != words[i]] == [1]
    assert find_swaps(["A rabbit."] * 5) == [], "no captions of the shapes world"


def test_instruments_change_one_attribute_of_captions_of_the_shapes_world(folder):
    captions = [text.replace("slowly", "quickly") for text in SHAPES_CAPTIONS]
    write_data(Path("data"), one_video=False, captions=captions)
    assert main(["evaluate", "--config", "evaluate.yaml", "seeds=1"]) == 0
    readings = json.loads(Path("found.json").read_text())["instruments"]
    swapped = [one for one in readings if "another color in the caption" in one["name"]]
    assert [one["timestep"] for one in swapped] == [300, 600, 900, None]
    assert all(one["right"] != one["wrong"] for one in swapped)
    (motion,) = [one for one in readings if one["name"] == "lm: another motion score"]
    assert motion["right"] != motion["wrong"]


def test_adapters_change_the_losses_of_their_models(folder):
    write_data(Path("data"), one_video=False)
    rows = []
    for kind in ("lm", "diffusion"):
        export_adapter(Path("zoo"), kind)
    for kinds in ([], ["lm"], ["lm", "diffusion"]):
        uses = [{"adapter": f"lora-{kind}"} for kind in kinds]
        command = ["evaluate", "--config", "evaluate.yaml", f"adapters={json.dumps(uses)}"]
        assert main([*command, "seeds=1"]) == 0
        rows.append(json.loads(Path("found.json").read_text())["rows"][0])
    plain, lm, both = rows
    assert lm["lm"] != plain["lm"] and lm["diffusion"] == plain["diffusion"]
    assert both["lm"] == lm["lm"] and both["diffusion"] != plain["diffusion"]


def test_clips_of_one_video_have_no_wrong_condition(folder, capsys):
    write_data(Path("data"), one_video=True)
    assert main(["evaluate", "--config", "evaluate.yaml"]) == 2
    err = capsys.readouterr().err
    assert "has no wrong condition to compare with: none of the 4 clips is of another" in err
    assert "clips of at least two videos" in err
    assert not Path("found.json").exists()


def test_held_out_clips_are_the_same_for_every_seed(tmp_path):
    write_data(tmp_path / "data", one_video=False)
    held_out = sorted(keys_of(0, 4))[:2]
    config = load_config(
        EvaluateConfig,
        {
            **yaml.safe_load(CONFIG),
            "data": str(tmp_path / "data"),
            "validation": {"clips": held_out},
        },
    )
    for seed in range(2):
        samples = draw_samples(config, seed)
        assert sorted(sample.key for sample in samples) == held_out
