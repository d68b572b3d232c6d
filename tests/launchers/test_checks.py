"""Checks before a job starts, on real data folders and zoo entries with the nano sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from landiff.configs import ConfigError, dump, load
from landiff.configs.files import write_text
from landiff.configs.problems import check_writable
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.checks import check
from landiff.launchers.cli import main
from landiff.launchers.local.gpus import check_processes, count_gpus
from landiff.launchers.stages import STAGE_CONFIGS
from landiff.launchers.weights.request import ConvertRequest, check_request
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.frozen.config import (
    CogVideoXVaeConfig,
    FlanT5Config,
    T5V11Config,
    TheiaConfig,
)
from landiff.training.checks import Launch
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from tests.data_pipeline.data_sets import write_column, write_raw

pytestmark = pytest.mark.usefixtures("network")

MODELS = load(ModelConfig, "nano/model")
SHAPES = {
    "features": [5, 112, 4, 4],
    "tokens": [28],
    "latents": [5, 48, 8, 8],
    "text-minilm": [0, 384],
    "text-minilm-padded": [32, 384],
}
STAGES = {
    "tokenizer": "tokenizer",
    "lm": "lm",
    "diffusion": "diffusion-control",
    "precompute": "precompute",
    "sample": "sample",
    "evaluate": "evaluate",
}


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A folder with data and a zoo that fit the nano configs; the working directory."""
    monkeypatch.chdir(tmp_path)
    configs = {
        "lm": MODELS.lm,
        "tokenizer": MODELS.tokenizer,
        "main": MODELS.diffusion.transformer,
        "diffusion": MODELS.diffusion,
    }
    entries = {}
    for name, config in configs.items():
        kind = "transformer" if name == "main" else name
        entries[name] = registry.export(Path("zoo"), name, kind, config, {"a": torch.zeros(1)}, {})
    write_raw(Path("data"), [2, 2])
    for name, shape in SHAPES.items():
        write_column(Path("data"), name, encoder=entries["tokenizer"].fingerprint)
        manifest = read_manifest(Path("data"))
        change_column(manifest, name, shape=shape)
    return tmp_path


def change_column(manifest: Manifest, name: str, **changes: object) -> None:
    column = manifest.columns[name].model_copy(update=changes)
    write_manifest(
        Path("data"), manifest.model_copy(update={"columns": {**manifest.columns, name: column}})
    )


def problems(stage: str, *overrides: str, launch: Launch | None = None) -> list[str]:
    config = load(STAGE_CONFIGS[stage], f"nano/{STAGES[stage]}", overrides)
    return [str(problem) for problem in check(stage, config, launch or Launch(2))]


@pytest.mark.parametrize("stage", STAGES)
def test_what_fits_has_no_problems(world, stage):
    assert problems(stage) == []


@pytest.mark.parametrize(
    ("stage", "overrides", "texts"),
    [
        (
            "tokenizer",
            ["data.manifest=gone"],
            ["data.manifest = gone: gone/manifest.json does not exist"],
        ),
        (
            "tokenizer",
            ["model.feature_channels=64"],
            ["[64, 4, 4], but the features column of data (test) holds [112, 4, 4]"],
        ),
        ("tokenizer", ["optim.lr=1e-9"], ["optim.min_lr = 0.0001 is above optim.lr = 1e-09"]),
        (
            "tokenizer",
            ["optim.betas=[0.9, 1]"],
            ["optim.betas.1 = 1 must be at least 0 and below 1"],
        ),
        ("lm", ["optim.decay=wsd"], ["optim.decay = wsd needs optim.decay_steps"]),
        (
            "lm",
            ["optim.decay=wsd", "optim.decay_steps=9999"],
            ["optim.warmup_steps + decay_steps = 30 + 9999 is more than loop.steps ="],
        ),
        (
            "lm",
            ["optim.decay=constant", "optim.decay_steps=5"],
            ["optim.decay_steps = 5 has no effect with optim.decay = constant"],
        ),
        ("lm", ["text_column=text-t5"], ["no column 'text-t5'; it has: features, latents"]),
        (
            "lm",
            ["tokenizer=other"],
            [
                "tokenizer = other: the zoo zoo has no 'other'; it has: diffusion, lm, main, "
                "tokenizer"
            ],
        ),
        ("lm", ["tokenizer=lm"], ["is a lm, where a tokenizer is needed"]),
        ("lm", ["init_from=lm", "model.num_layers=2"], ["model.num_layers = 2 (there 4)"]),
        ("lm", ["model.codebook_size=64"], ["makes tokens of TokenLayout(codebook_size=128"]),
        (
            "lm",
            ["model.text_dim=32", "model.max_positions=30"],
            ["text_dim = 32", "more than model.max_positions = 30"],
        ),
        (
            "lm",
            ["text_column=text-minilm-padded", "model.max_text_tokens=8"],
            ["with 32 rows for every clip"],
        ),
        (
            "diffusion",
            ["init_from=gone", "model.transformer.text_length=16"],
            ["init_from = gone: the zoo", "needs [16, 384]"],
        ),
        (
            "diffusion",
            ["preview_steps=1", "preview_codec={kind: cogvideox-vae, path: gone}"],
            [
                "preview_steps = 1: a sampler takes at least 2",
                "preview_codec.path = 'gone' does not exist",
            ],
        ),
        (
            "diffusion",
            ["model.transformer.latent_channels=16"],
            [
                "decodes 48 channels, but model.transformer.latent_channels = 16",
                "model.transformer.latent_channels = 16 (there 48)",
                "needs [5, 16, 8, 8]",
            ],
        ),
        ("diffusion", ["model.semantic.channel_multipliers=[1]"], ["upsamples to 4 x 4"]),
        (
            "precompute",
            ["columns.tokens={tokenizer: gone, encoder: {kind: theia, path: nowhere}}"],
            [
                "columns.tokens.encoder.path = 'nowhere' does not exist",
                "columns.tokens.tokenizer = gone: the zoo",
            ],
        ),
        (
            "sample",
            ["steps=1", "prompts=[]"],
            ["prompts is empty", "steps = 1: a sampler takes at least 2 steps"],
        ),
        ("sample", ["steps=1001"], ["steps = 1001"]),
        ("sample", ["num_latent_frames=500"], ["num_latent_frames = 500 takes at least"]),
        ("sample", ["num_latent_frames=200"], ["max_positions = 256 of lm@"]),
        ("sample", ["clean_frames=5"], ["clean = 5 must be at least 0 and less than window = 5"]),
        ("sample", ["diffusion_text.max_length=16"], ["diffusion_text.max_length = 16"]),
        ("sample", ["diffusion_text.padded=false"], ["takes padded ones"]),
        ("sample", ["lm_text.max_length=65"], ["more than max_text_tokens = 64"]),
        (
            "sample",
            ["lm=main", "diffusion=tokenizer"],
            ["is a transformer, where a lm", "is a tokenizer, where a diffusion"],
        ),
        ("sample", ["out=data/manifest.json/x"], ["data/manifest.json is a file"]),
        (
            "evaluate",
            ["samples=1", "prefix_frames=5", "out=data"],
            ["samples = 1", "prefix_frames = 5 leaves nothing", "out = data is a folder"],
        ),
        ("evaluate", ["lm_text_column=nope"], ["no column 'nope'"]),
    ],
)
def test_mistakes_are_found_together(world, stage, overrides, texts):
    found = problems(stage, *overrides)
    text = "\n".join(found)
    assert all(each in text for each in texts), text
    assert len(found) == len(texts), text


@pytest.mark.parametrize(
    ("ranks", "overrides", "text"),
    [
        (3, [], "parallel.tensor = 2 does not divide the 3 launched ranks"),
        (
            6,
            [],
            "data.global_batch_size = 16 is not a multiple of data-parallel ranks * "
            "data.micro_batch_size = 3 * 16",
        ),
        (4, ["data.micro_batch_size=5"], "= 2 * 5; the nearest that are: 10 or 20"),
    ],
)
def test_ranks_batch_and_layout_are_checked(world, ranks, overrides, text):
    (problem,) = problems("lm", *overrides, launch=Launch(ranks))
    assert text in problem


def test_inputs_that_earlier_jobs_make_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in STAGES:
        assert problems(stage, launch=Launch(2, inputs_exist=False)) == [], stage
        assert problems(stage), stage


def test_stale_and_lost_columns_are_found(world):
    manifest = read_manifest(Path("data"))
    change_column(manifest, "tokens", raw_fingerprint="0000")
    assert (
        "was made from raw shards 0000" in problems("lm")[0]
        and problems("lm", "data.adopt=true") == []
    )
    write_manifest(Path("data"), manifest)
    tar = Path("data/tokens/000000.tar").read_bytes()
    Path("data/tokens/000000.tar").unlink()
    assert "data/tokens/000000.tar does not exist" in problems("lm")[0]
    change_column(manifest, "tokens", config={"encoders": {"tokenizer": "ffff"}})
    Path("data/tokens/000000.tar").write_bytes(tar)
    assert "was made by tokenizer ffff, but tokenizer = tokenizer@" in problems("lm")[0]


def test_one_clip_is_too_few_to_evaluate(world):
    write_raw(Path("one"), [1])
    for name, shape in SHAPES.items():
        write_column(Path("one"), name)
        manifest = read_manifest(Path("one"))
        column = manifest.columns[name].model_copy(update={"shape": shape})
        write_manifest(
            Path("one"), manifest.model_copy(update={"columns": {**manifest.columns, name: column}})
        )
    (problem,) = problems("evaluate", "data=one")
    assert "holds 1 clip" in problem


def checkpoint(config: LMTrainConfig | DiffusionTrainConfig, step: int = 100) -> None:
    """The documents of a checkpoint as a trainer leaves them."""
    folder = config.run / "checkpoints" / f"step_{step:08d}"
    loader = {
        "data": read_manifest(Path("data")).fingerprint,
        "seed": config.data.seed,
        "shuffle_window": config.data.shuffle_window,
        "global_batch_size": config.data.global_batch_size,
    }
    write_text(
        folder / "state.json",
        json.dumps({"step": step, "kind": type(config).__name__, "loader": loader}),
    )
    write_text(folder / "config.yaml", dump(config))


def test_a_run_that_cannot_resume_is_refused(world):
    checkpoint(load(LMTrainConfig, "nano/lm"))
    assert problems("lm") == [] and problems("lm", "loop.steps=7", "optim.lr=0.1") == []
    text = "\n".join(
        problems(
            "lm",
            "precision=bf16",
            "data.seed=3",
            "data.global_batch_size=32",
            "parallel.distributed_optimizer=true",
        )
    )
    for each in (
        "precision = 'bf16' (checkpoint: 'fp32')",
        "has seed = 0, this run has 3",
        "written with parallel.distributed_optimizer = False",
    ):
        assert each in text, text
    (problem,) = problems("tokenizer", "run=runs/lm")
    assert "was written by LMTrainConfig, this run is a TokenizerTrainConfig" in problem


def test_what_an_interrupted_save_left_does_not_stop_a_run(world):
    write_text(Path("runs/lm/checkpoints/.step_00000002.host.1-1.tmp/model.safetensors"), "")
    assert problems("lm") == []


def lm_phases(*phases: dict[str, object]) -> str:
    return f"phases={json.dumps(phases)}"


def test_phases_of_a_run_are_checked_before_its_ranks_start(world):
    second = {"from_step": 200, "data": {"global_batch_size": 40}}
    (problem,) = problems("lm", lm_phases({"from_step": 50}, second))
    assert "from step 200 on, data.global_batch_size = 40 is not a multiple" in problem
    gone = {"from_step": 50, "data": {"manifest": "gone"}, "optim": {"decay": "wsd"}}
    first, second = problems("lm", lm_phases(gone))
    assert "phases.0: optim.decay = wsd needs optim.decay_steps" in first
    assert "phases.0: data.manifest = gone: gone/manifest.json does not exist" in second
    for phases, text in (
        ([{"from_step": 50}, {"from_step": 50}], "phases.1.from_step = 50 must be above"),
        ([{"from_step": 50, "text_dropout": 2}], "less than or equal to 1"),
        (
            [{"from_step": 50, "dropout": 0.1}],
            "unknown config key 'phases.0.dropout'; did you mean",
        ),
        (
            [{"from_step": 50, "data": {"ramp": {"start": 3, "increment": 8, "steps": 9}}}],
            "phases.0 is not valid: data: ramp.start = 3 does not reach global_batch_size = 16",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            problems("lm", lm_phases(*phases))


def test_phases_that_a_run_has_completed_cannot_change(world):
    phase = {"from_step": 50, "text_dropout": 0.2}
    later = {"from_step": 90, "text_dropout": 0.3}
    checkpoint(load(LMTrainConfig, "nano/lm", [lm_phases(phase, later)]))
    appended = {"from_step": 100, "data": {"global_batch_size": 32}}
    assert problems("lm", lm_phases(phase, later, appended)) == []
    assert problems("lm", lm_phases(phase, later | {"text_dropout": 0.5})) == []
    for changed, overrides, text in (
        (
            [phase | {"text_dropout": 0.1}, later],
            [],
            "phases.0.text_dropout = 0.1 (checkpoint: 0.2)",
        ),
        (
            [phase, later | {"from_step": 80}],
            [],
            "phases with from_step 50, 80 begin before step 100",
        ),
        ([phase], [], "those of the run are 50, 90; restore them"),
        ([phase, later], ["optim.lr=1"], "optim.lr = 1.0 (checkpoint: 0.002)"),
    ):
        (problem,) = problems("lm", lm_phases(*changed), *overrides)
        assert text in problem


def test_data_that_changed_in_a_run_are_refused_with_the_phase_that_allows_it(world):
    checkpoint(load(LMTrainConfig, "nano/lm"))
    manifest = read_manifest(Path("data"))
    write_manifest(Path("data"), manifest.model_copy(update={"fingerprint": "grown"}))
    (problem,) = problems("lm", "data.adopt=true")
    phase = {"from_step": 100, "data": {"manifest": "data"}}
    assert "this run has 'grown'" in problem
    assert yaml.safe_load(problem.split("`")[-2]) == {"phases": [phase]}
    assert problems("lm", "data.adopt=true", lm_phases(phase)) == []


def test_a_parent_that_does_not_fit_is_refused(world):
    (problem,) = problems("lm", "parent=runs/gone")
    assert "parent = runs/gone does not exist; name a run folder (runs/lm)" in problem
    checkpoint(load(LMTrainConfig, "nano/lm", ["run=runs/old"]))
    (problem,) = problems("lm", "parent=runs/old", "data.seed=3")
    assert "runs/old/checkpoints/step_00000100 is damaged (FileNotFoundError: " in problem


@pytest.mark.parametrize(
    "name",
    [
        ".metadata",
        "layout.json",
        "model.safetensors",
        "global_step5/mp_rank_00_model_states.pt",
        "checkpoints/step_00000000/pytorch_model.bin",
    ],
)
def test_converted_weights_in_a_run_folder_are_never_ignored(world, capsys, name):
    write_text(Path("runs/x") / name, "")
    code = main(["train", "lm", "--config", "nano/lm", "--nproc", "2", "run=runs/x"])
    found = name.replace("/", ": ") if name.count("/") == 1 else ": ".join(name.rsplit("/", 1))
    text = capsys.readouterr().err
    assert code == 2 and f"run = runs/x holds converted weights ({found}) and no" in text, text


@pytest.mark.parametrize(
    ("stage", "overrides", "text"),
    [
        ("diffusion", ["init_from=diffusion"], []),
        ("diffusion", ["phase=main", "init_from=diffusion"], []),
        (
            "diffusion",
            ["phase=main", "init_from=diffusion", "model.transformer.num_layers=3"],
            ["model.transformer.num_layers = 3 (there 4)"],
        ),
        (
            "diffusion",
            ["init_from=diffusion", "model.control_layers=1"],
            ["model.control_layers = 1 (there 2)"],
        ),
        ("diffusion", ["init_from=lm"], ["is a lm, where a transformer or diffusion is needed"]),
        ("tokenizer", ["init_from=tokenizer"], []),
        ("tokenizer", ["init_from=lm"], ["is a lm, where a tokenizer is needed"]),
        (
            "tokenizer",
            ["init_from=tokenizer", "model.codebook_size=64"],
            ["model.codebook_size = 64 (there 128)"],
        ),
    ],
)
def test_a_start_from_the_zoo_must_fit(world, stage, overrides, text):
    found = problems(stage, *overrides)
    assert len(found) == len(text), found
    for problem, wanted in zip(found, text, strict=True):
        assert wanted in problem


def test_encoder_files_are_checked(tmp_path):
    missing = check_encoder("lm_text", FlanT5Config(path=str(tmp_path)))
    for text, problem in zip(
        ("no *.safetensors or *.bin", "no config.json", "no tokenizer"), missing, strict=True
    ):
        assert text in str(problem)
    for name, text in (
        ("config.json", '{"d_model": 4096, "hidden_size": 768}'),
        ("model.safetensors", "x"),
        ("tokenizer.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    assert (
        check_encoder("lm_text", FlanT5Config(path=str(tmp_path)))
        == check_encoder("x", TheiaConfig(path=str(tmp_path)))
        == []
    )
    assert (
        width_of(T5V11Config(path=str(tmp_path))),
        width_of(TheiaConfig(path=str(tmp_path))),
    ) == (4096, 768)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors is a git-lfs pointer" in str(
        check_encoder("x", TheiaConfig(path=str(tmp_path)))[0]
    )
    assert "is a file" in str(
        check_encoder("x", TheiaConfig(path=str(tmp_path / "config.json")))[0]
    )
    assert check_encoder("codec", CogVideoXVaeConfig(path=str(tmp_path / "config.json"))) == []
    assert check_encoder("codec", CogVideoXVaeConfig(path="THUDM/CogVideoX-2b")) == []


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").touch()
    assert check_writable("out", tmp_path / "new" / "deep") == []
    assert "is a file" in str(check_writable("out", tmp_path / "file" / "deep")[0])
    assert "more than 255 bytes" in str(check_writable("out", tmp_path / ("x" * 300))[0])


def test_processes_fit_the_machine(tmp_path):
    assert check_processes(1, 0) == check_processes(8, 8) == check_processes(4, 0) == []
    assert "at least one" in str(check_processes(0, 0)[0])
    assert "this machine has 2 GPUs" in str(check_processes(3, 2)[0])
    assert count_gpus(tmp_path, None) == count_gpus(tmp_path, "0,1") == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    found = [
        count_gpus(tmp_path, chosen) for chosen in (None, "", "0", "0,1", "0,-1,1", "-1", "0,1,2")
    ]
    assert found == [2, 0, 1, 2, 1, 0, 2]


def test_all_options_of_convert_are_checked_together(world):
    Path("out").mkdir()
    request = ConvertRequest(
        ("lm", "gone", "runs/gone"),
        to="diffusers",
        out=Path("out"),
        name="x",
        world_size=2,
        overrides=("zero.stage=2",),
    )
    text = "\n".join(map(str, check_request(request, Launch())))
    for each in (
        "--name goes with --to zoo",
        "zero.stage=2 is for a run",
        "--world-size 2",
        "out exists already",
        "the zoo zoo has no 'gone'",
        "runs/gone does not exist",
    ):
        assert each in text, text
    assert len(text.splitlines()) == 6
    assert "'a/b' must be non-empty" in str(
        check_request(ConvertRequest(("lm",), name="a/b"), Launch())[0]
    )


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (
            "speech",
            "columns.speech: the name of a column begins with its kind, features, tokens, "
            "latents, text",
        ),
        ("latnts", "did you mean 'latents'?"),
        ("feature-theia", "did you mean 'features-theia'?"),
    ],
)
def test_a_column_of_an_unknown_kind_is_explained(column, text):
    with pytest.raises(ConfigError) as error:
        load(
            PrecomputeConfig,
            {"data": "data", "zoo": "zoo", "columns": {column: {"encoder": {"kind": "dct"}}}},
        )
    assert text in str(error.value) and "tag" not in str(error.value)


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        (
            {"kind": "dtc"},
            "latents.encoder.kind = 'dtc' is unknown; did you mean 'dct'? known here: dct, "
            "pca, cogvideox-vae",
        ),
        ({}, "latents.encoder.kind is required and not set"),
    ],
)
def test_an_unknown_encoder_is_explained(encoder, text):
    with pytest.raises(ConfigError) as error:
        load(
            PrecomputeConfig,
            {"data": "data", "zoo": "zoo", "columns": {"latents": {"encoder": encoder}}},
        )
    assert text in str(error.value) and "tag" not in str(error.value)
