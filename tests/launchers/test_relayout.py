"""`landiff convert RUN --to megatron|deepspeed`: real trainers go on from what it makes, as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all forked ranks
import pytest
import torch
import yaml

import landiff.training.lm.engine
from landiff.configs.files import write_text
from landiff.configs.loader import dump
from landiff.launchers.cli import main
from landiff.launchers.weights.relayout import Wish, relayout
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.deepspeed import read_deepspeed
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.training.diffusion.__main__ import main as train_diffusion
from landiff.training.lm.__main__ import main as train_lm
from landiff.training.observe.metrics import read_metrics
from tests.distributed import nursery
from tests.model_zoo.convert.test_deepspeed import write_stage_2
from tests.model_zoo.convert.tiny import same
from tests.training.diffusion import tiny as diffusion
from tests.training.lm.data_set import write_data_set
from tests.training.lm.samples import tiny_config

STEPS, SAVED = 6, 3
STEP = f"checkpoints/step_{SAVED:08d}"
LOOP = {"steps": STEPS, "log_every": 1, "save_every": SAVED, "keep_last": 9}


def lm(path: str) -> None:
    train_lm(path)


def dit(path: str) -> None:
    train_diffusion(path)


def train(trainer: Any, config: Path, ranks: int) -> dict[int, float]:
    """Losses by step."""
    assert nursery(__name__).start(trainer, ranks, [str(config)]).wait(240) == [0] * ranks
    return {row["step"]: row["train/loss"] for row in read_metrics(config.parent / "metrics.jsonl")}


def landiff(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def close(found: dict[int, float], straight: dict[int, float], tolerance: float) -> None:
    """The converted run makes the steps behind its checkpoint, and they are those of the run that was never converted."""
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    # float32 sums in another order; bfloat16 has 8 bits
    assert list(found.values()) == pytest.approx([straight[step] for step in found], rel=tolerance)


# ---------------------------------------------------------------- language model


def lm_run(folder: Path, name: str, parallel: dict[str, Any], **changes: Any) -> Path:
    if not (folder / "data").exists():
        write_data_set(folder / "data", tiny_config(folder).model, [7, 6], 3)
    config = tiny_config(folder, parallel, loop={"seed": 7, **LOOP}, **changes).model_copy(
        update={"run": folder / name}
    )
    write_text(folder / name / "start.yaml", dump(config))
    return folder / name / "start.yaml"


def megatron_content(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    reader = DistReader(folder)
    return {key: reader.read(key) for key in reader.entries}, torch.load(
        folder / "common.pt", weights_only=True
    )


# (of the run, ranks) -> (as it goes on, ranks)
LM_MOVES = {
    "to a distributed optimizer, and another padding": (
        ({}, {}, 1),
        ("parallel.distributed_optimizer=true", "vocab_multiple=64"),
        2,
    ),
    "to a plain optimizer, and heads of zeros for tensor ranks": (
        ({"distributed_optimizer": True}, {}, 2),
        ("parallel.distributed_optimizer=false", "parallel.tensor=2", "head_multiple=6"),
        2,
    ),
    "bfloat16": (
        ({"distributed_optimizer": True, "tensor": 2}, {"precision": "bf16"}, 2),
        ("parallel.distributed_optimizer=false", "parallel.tensor=1", "vocab_multiple=128"),
        1,
    ),
}


@pytest.mark.parametrize(
    "move",
    [pytest.param(move, marks=[pytest.mark.long] * (move == "bfloat16")) for move in LM_MOVES],
)
def test_the_language_model_goes_on(tmp_path, monkeypatch, move):
    monkeypatch.chdir(tmp_path)
    (parallel, changes, ranks), overrides, later_ranks = LM_MOVES[move]
    straight = train(lm, lm_run(tmp_path, "run", parallel, **changes), ranks)
    landiff(
        "convert", f"run/{STEP}", "--to", "megatron", "--out", "runs/next", *overrides, "--dry-run"
    )
    assert not Path("runs").exists()
    landiff("convert", f"run/{STEP}", "--to", "megatron", "--out", "runs/next", *overrides)
    landiff(
        "convert",
        f"runs/next/{STEP}",
        "--to",
        "megatron",
        "--out",
        "back",
        *(
            f"{word.partition('=')[0]}={old}"
            for word in overrides
            for old in [stored(Path("run") / STEP, word.partition("=")[0])]
        ),
    )
    close(
        train(lm, Path("runs/next/config.yaml"), later_ranks), straight, 1e-2 if changes else 1e-5
    )
    before, after = (megatron_content(Path(name) / STEP) for name in ("run", "back"))
    assert same(after[0], before[0]) and after[1] == before[1]
    landiff("convert", "runs/next", "--name", "lm")  # and it is a run like any other
    assert (
        main(["convert", "run", "--to", "megatron", "--out", "x", "model.num_layers=3"]) == 2
        and not Path("x").exists()
    )
    landiff(
        "convert",
        "run",
        "--to",
        "megatron",
        "--out",
        "weights",
        "--weights-only",
        "vocab_multiple=32",
    )
    assert {key.split(".")[0] for key in DistReader(Path("weights")).entries} == {
        "decoder",
        "embedding",
        "micro",
        "output_layer",
        "text",
    }
    made = json.loads((tmp_path / "runs" / "next" / "provenance.json").read_text())
    assert made["sources"][0]["step"] == SAVED and made["sources"][0]["config"]["run"] == str(
        tmp_path / "run"
    )


def stored(checkpoint: Path, key: str) -> Any:
    node = yaml.safe_load((checkpoint / "config.yaml").read_text())
    for part in key.split("."):
        node = node[part]
    return str(node).lower()


# ---------------------------------------------------------------- diffusion


def diffusion_run(folder: Path, name: str, phase: str, stage: int, **changes: Any) -> Path:
    if not (folder / "zoo").exists():
        diffusion.make_zoo(folder)
        diffusion.write_data(folder / "data")
    config = diffusion.config(
        folder,
        phase,
        run=folder / name,
        data__manifest=folder / "data",
        data__adopt="true",
        zero__stage=stage,
        **{f"loop__{key}": value for key, value in LOOP.items()},
        **changes,
    )
    write_text(folder / name / "start.yaml", dump(config))
    return folder / name / "start.yaml"


@pytest.mark.parametrize(
    ("phase", "stage", "ranks", "next_stage", "next_ranks", "precision"),
    [
        ("control", 2, 1, 3, 2, "fp32"),
        ("main", 3, 2, 1, 1, "fp32"),
        pytest.param("main", 1, 2, 3, 1, "bf16", marks=pytest.mark.long),
    ],
)
def test_the_diffusion_model_goes_on(
    tmp_path, monkeypatch, phase, stage, ranks, next_stage, next_ranks, precision
):
    monkeypatch.chdir(tmp_path)
    straight = train(dit, diffusion_run(tmp_path, "run", phase, stage, precision=precision), ranks)
    landiff(
        "convert",
        f"run/{STEP}",
        "--to",
        "deepspeed",
        "--out",
        "next",
        "--world-size",
        next_ranks,
        f"zero.stage={next_stage}",
    )
    landiff(
        "convert",
        f"next/{STEP}",
        "--to",
        "deepspeed",
        "--out",
        "back",
        "--world-size",
        ranks,
        f"zero.stage={stage}",
    )
    close(
        train(dit, Path("next/config.yaml"), next_ranks),
        straight,
        1e-2 if precision == "bf16" else 1e-5,
    )
    before, after = (read_deepspeed(Path(name) / STEP / "zero") for name in ("run", "back"))
    assert (after.zero_stage, after.world_size, after.optimizer_steps, after.groups) == (
        stage,
        ranks,
        SAVED,
        before.groups,
    )
    assert same(dict(after.weights), dict(before.weights)) and after.working == before.working
    for key, tensors in before.moments.items():
        assert same(dict(after.moments[key]), dict(tensors))
    for name in ("layout.json", "state.json"):
        assert (tmp_path / "back" / STEP / name).read_bytes() == (
            tmp_path / "run" / STEP / name
        ).read_bytes()


# ---------------------------------------------------------------- not of our trainers


def test_a_deepspeed_folder_of_another_model_is_told_and_cut_anew_but_goes_nowhere_else(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("theirs").mkdir()
    write_stage_2(Path("theirs/global_step5"))
    Path("theirs/latest").write_text("global_step5")
    for place in ("theirs", "theirs/global_step5"):
        landiff("convert", "inspect", place)
        text = capsys.readouterr().out
        for words in (
            "format       deepspeed",
            "ZeRO 2, 3 ranks, optimizer at its step 5",
            "kind         foreign",
            "parameters 52 in 5 tensors",
        ):
            assert words in text, text
    landiff(
        "convert", "theirs", "--to", "deepspeed", "--out", "ours", "--world-size", 2, "zero.stage=3"
    )
    assert Path("ours/latest").read_text() == "global_step5"
    before, after = (
        read_deepspeed(Path("theirs/global_step5")),
        read_deepspeed(Path("ours/global_step5")),
    )
    assert (after.zero_stage, after.world_size, after.optimizer_steps) == (3, 2, 5)
    assert same(dict(after.weights), dict(before.weights)) and all(
        same(dict(after.moments[key]), dict(before.moments[key])) for key in before.moments
    )
    assert main(["convert", "theirs", "--name", "x"]) == 2
    assert (
        "a model that is none of ours (its keys start with a, b, frozen, mask)"
        in capsys.readouterr().err
        and not Path("zoo").exists()
    )


def test_shards_of_our_model_without_our_documents_are_that_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diffusion.make_zoo(tmp_path)
    landiff(
        "convert", "main", "--to", "deepspeed", "--out", "start", "--world-size", 2, "zero.stage=3"
    )
    Path("start/layout.json").unlink()
    Path("sizes.yaml").write_text(json.dumps({"diffusion": diffusion.MODEL}))
    landiff("convert", "start", "--model", "sizes.yaml", "--name", "again")
    assert (
        registry.resolve(Path("zoo"), "again").fingerprint
        == registry.resolve(Path("zoo"), "main").fingerprint
    )
    assert main(["convert", "start", "--name", "x"]) == 2
    assert "does not fit a transformer of this config" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diffusion.make_zoo(tmp_path)
    write_stage_2(Path("theirs"))
    for words, message in (
        (
            ["main", "--name", "x", "zero.stage=3"],
            "zero.stage=3 is for a run that continues from the result, so for --to megatron or deepspeed",
        ),
        (
            ["main", "--to", "diffusers", "--out", "x", "--world-size", "2"],
            "--world-size 2: the ranks of a --to deepspeed",
        ),
        (["main", "--to", "deepspeed", "--out", "x", "--world-size", "0"], "at least 1"),
        (["main", "--to", "deepspeed", "--out", "x", "zero.stag=3"], "zero.stag"),
        (["theirs", "--to", "deepspeed", "--out", "x", "zero.stage=4"], "zero.stage"),
        (
            ["theirs", "--to", "deepspeed", "--out", "x", "--dtype", "float16"],
            "the trainers compute in float32 or bfloat16",
        ),
        (
            ["theirs", "main", "--to", "deepspeed", "--out", "x"],
            "name it alone, or take --weights-only",
        ),
        (
            ["theirs", "--to", "deepspeed", "--out", "x", "--allow-missing", "*"],
            "must be whole: --allow-missing goes with --weights-only",
        ),
        (["main", "--to", "diffusers", "--out", "x", "--name", "y"], "--name goes with --to zoo"),
        (
            ["theirs", "--to", "deepspeed", "--out", "x", "zero.stages=3", "--dry-run"],
            "zero.stages",
        ),
    ):
        assert main(["convert", *words]) == 2, words
        assert message in capsys.readouterr().err, words
    landiff(
        "convert",
        "theirs",
        "--to",
        "deepspeed",
        "--out",
        "x",
        "--world-size",
        8,
        "zero.stage=1",
        "--dry-run",
    )
    assert (
        "with its optimizer, to x: a bare checkpoint, Cut(stage=1, world_size=8"
        in capsys.readouterr().out
    )
    assert not Path("x").exists()


class Stop(BaseException):
    pass


def test_an_interrupted_one_leaves_nothing(tmp_path):
    write_stage_2(tmp_path / "theirs")

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        relayout(tmp_path / "theirs", Wish("deepspeed", tmp_path / "x", world_size=2), {}, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
