"""Mistakes in a project: each case must be found by `landiff check`, together with all others."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from landiff.configs import load
from landiff.launchers.budget.meta import (
    count_parameters,
    diffusion_on_meta,
    lm_on_meta,
    tokenizer_on_meta,
)
from landiff.launchers.cli import main
from landiff.launchers.project import space
from landiff.launchers.project.check import check_preset
from landiff.launchers.project.new import write_project
from landiff.launchers.project.weight_counts import (
    diffusion_weights,
    lm_weights,
    tokenizer_weights,
)
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.lm.config import LMTrainConfig
from tests.data_pipeline.data_sets import write_column, write_raw

CHAIN_MISTAKE = "sample.fps = 24, but the models are trained on clips of shards.fps = 8"


@dataclass(frozen=True)
class Case:
    """Lines added to configs by stem, texts that must be found, and texts that must not."""

    lines: dict[str, str]
    found: tuple[str, ...]
    absent: tuple[str, ...] = ()


WRONG_VALUES = {
    "a value of a wrong type": Case(
        {"lm": "loop: {steps: many}"},
        ("loop.steps = 'many': Input should be a valid integer",),
    ),
    "an unknown key": Case(
        {"lm": "loop: {step: 3}"},
        ("unknown config key 'loop.step'; did you mean 'steps'?",),
    ),
    "an unknown key of a section whose kind is known": Case(
        {"precompute": "columns: {text-minilm: {encoder: {max_len: 3}}}"},
        ("'columns.text-minilm.encoder.max_len'; did you mean 'max_length'?",),
    ),
    "an unknown kind": Case(
        {"sample": "codec: {kind: dtc}"},
        ("codec.kind = 'dtc' is unknown; did you mean 'dct'?",),
        ("sample.codec = ",),
    ),
    "columns whose names have no kind": Case(
        {"precompute": "columns: {feature: {}, others: {}}"},
        ("did you mean 'features'?", "columns.others: the name of a column begins with its kind"),
        ("is a column that no precompute makes",),
    ),
    "a list with a wrong item": Case(
        {"sample": "seeds: [1, two]"}, ("seeds.1 = 'two': Input should be a valid integer",)
    ),
    "a section that is a number": Case(
        {"tokenizer": "optim: 3"}, ("optim = 3: Input should be a valid dictionary",)
    ),
    "wrong sizes of a model": Case(
        {"tokenizer": "model: {codebook_size: x}"},
        ("model.codebook_size = 'x': Input should be a valid integer",),
        ("codebook of the language model",),
    ),
    "a value that another stage needs": Case(
        {"diffusion-control": "schedule: {shift_scale: x}"},
        ("schedule.shift_scale = 'x'",),
        ("diffusion-control.schedule and diffusion-main.schedule differ",),
    ),
    "a config that extends nothing": Case(
        {"diffusion-main": "extends: nano/diffusion-mian"},
        ("diffusion-main.yaml: extends = 'nano/diffusion-mian'", "did you mean"),
    ),
    "a config that is no YAML": Case({"features": "columns: {"}, ("features.yaml",)),
    "shards without a size": Case({"shards": "height: null"}, ("num_frames, height and width",)),
}


def write_lines(project: Path, lines: dict[str, str]) -> None:
    """Add lines to configs of a project, in place of lines with the same key."""
    for stem, text in lines.items():
        path = project / f"{stem}.yaml"
        key = text.partition(":")[0]
        kept = []
        for line in path.read_text().splitlines():
            if line.partition(":")[0] != key:
                kept.append(line)
        if key == "model":
            (project / f"{stem}-base.yaml").write_text(path.read_text())
            kept[0] = f"extends: {stem}-base.yaml"
        path.write_text("\n".join([*kept, text, ""]))


def problems_of(project: Path) -> str:
    return "\n".join(str(problem) for problem in check_preset(str(project)).problems)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_hides_no_other_mistake(tmp_path, name):
    """Neither those between other stages nor those of the stage itself."""
    case = WRONG_VALUES[name]
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    write_lines(project, case.lines)
    found = problems_of(project)
    for text in case.found:
        assert text in found
    lines = found.splitlines()
    assert len(lines) == 1, "nothing else follows from it"
    for stem, text in {"sample": "fps: 24", "lm": "run: runs/other"}.items():
        if stem not in case.lines:
            write_lines(project, {stem: text})
    if "sample" in case.lines:
        write_lines(project, {"evaluate": "prefix_frames: 5"})
    found = problems_of(project)
    for text in case.found:
        assert text in found
    for text in case.absent:
        assert text not in found
    if "shards" not in case.lines and "sample" not in case.lines:
        assert CHAIN_MISTAKE in found
    if "lm" not in case.lines:
        assert "lm.run = runs/other, but the pipeline exports runs/lm" in found
    if "sample" in case.lines:
        assert "evaluate.prefix_frames = 5 must be less than" in found


def test_a_wrong_value_is_in_one_list_with_mistakes_of_its_own_stage(tmp_path, capsys):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    write_lines(project, {"lm": "loop: {steps: many, save_every: 0}"})
    write_lines(project, {"lm": "init_from: gone"})
    write_lines(project, {"sample": "fps: 24"})
    words = ["lm.yaml", "loop.steps = 'many'", "loop.save_every = 0", "init_from = gone"]
    commands = [
        ["check", "--preset", str(project)],
        ["quickstart", "--preset", str(project)],
        ["submit", "pipeline", "--preset", str(project), "--cluster", "local"],
    ]
    for command in commands:
        assert main(command) == 2
        err = capsys.readouterr().err
        for text in (*words, CHAIN_MISTAKE):
            assert text in err, command
    for command in (["check"], ["train", "lm"], ["train", "lm", "--dry-run"]):
        assert main([*command, "--config", str(project / "lm.yaml")]) == 2
        captured = capsys.readouterr()
        for text in words[1:3]:
            assert text in captured.err, command
        assert captured.out == "", "no config with other values is shown"
    names = {path.name for path in project.iterdir()}
    assert not names & {"data", "runs", "zoo"}


def test_a_project_is_run_in_its_folder_by_all_commands(tmp_path, monkeypatch, capsys):
    """Relative paths of `source` and `data` are those of the project."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "project", "--source", "packaged"]) == 0
    project = tmp_path / "project"
    write_lines(project, {"shards": "source: videos"})
    preset = ["--preset", "project"]
    commands = [
        ["check", *preset],
        ["quickstart", *preset, "--dry-run"],
        ["submit", "pipeline", *preset, "--cluster", "project/cluster.yaml", "--dry-run"],
    ]
    (tmp_path / "videos").mkdir()
    for command in commands:
        assert main(command) == 2
        assert "source = 'videos' does not exist" in capsys.readouterr().err
    shutil.move(tmp_path / "videos", project / "videos")
    (project / "videos" / "a.mp4").touch()
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "cd project\n" in out and f"{project}/runs/lm" in out
    (project / "data").mkdir()
    shard = {"name": "000000", "samples": 321, "bytes": 1, "sha256": "0"}
    manifest = {"format": 1, "fingerprint": "0", "config": {}, "shards": [shard]}
    (project / "data" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["plan", "all", *preset, "--gpus", "2"]) == 0
    assert "321 clips" in capsys.readouterr().out


# -------------------------------------------------------------------- paths of encoders


ENCODER_PATHS = {
    "models/nowhere": "did you mean 'models/nowhrre'?",
    "./encoders/t5": "codec.path = './encoders/t5' does not exist",
    "../encoders/t5": "codec.path = '../encoders/t5' does not exist",
    "/srv/encoders/t5": "codec.path = '/srv/encoders/t5' does not exist",
    "~/encoders/t5": "codec.path = '~/encoders/t5' does not exist",
    "weights/owner/name": "codec.path = 'weights/owner/name' does not exist",
    "nowhere": "codec.path = 'nowhere' does not exist",
    "models/nowhrre": "models/nowhrre holds no *.safetensors or *.bin",
}


@pytest.mark.parametrize("path", ENCODER_PATHS)
def test_a_mistyped_path_of_an_encoder_is_no_hub_id(tmp_path, monkeypatch, path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    (project / "models" / "nowhrre").mkdir(parents=True)
    write_lines(project, {"sample": f"codec: {{kind: cogvideox-vae, path: {path}}}"})
    found = problems_of(project)
    assert f"sample: codec.path = {path}: " in found or ENCODER_PATHS[path] in found
    assert ENCODER_PATHS[path] in found


def write_cached(cache: Path, files: list[str]) -> None:
    """A repository owner/vae of the hub cache."""
    repository = cache / "models--owner--vae"
    folder = repository / "snapshots" / "abc"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_id_is_downloaded_unless_it_is_cached(tmp_path, monkeypatch, capsys, offline):
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    for stem, key in {
        "precompute": "columns: {latents: {encoder: {kind: cogvideox-vae, path: owner/vae}}}",
        "sample": "codec: {kind: cogvideox-vae, path: owner/vae}",
        "diffusion-main": "preview_codec: {kind: cogvideox-vae, path: owner/vae}",
        "diffusion-control": "preview_codec: {kind: cogvideox-vae, path: owner/vae}",
    }.items():
        write_lines(project, {stem: key})
    (project / "vae").mkdir()
    command = ["check", "--preset", str(project)]
    code = main(command)
    captured = capsys.readouterr()
    if offline:
        assert code == 2
        assert "codec.path = owner/vae is a hub id, the cache" in captured.err
        assert "HF_HUB_OFFLINE is set" in captured.err
    else:
        assert code == 0, captured.err
        assert (
            "precompute.columns.latents.encoder.path and 3 more = owner/vae will be" in captured.out
        )
    write_cached(cache, ["vae/config.json", "vae/model.safetensors"])
    assert main(command) == 0, capsys.readouterr().err
    assert "owner/vae" not in capsys.readouterr().out


# -------------------------------------------------------------------- zoo references


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A working folder with a zoo of one language model, and a run folder."""
    folder = tmp_path_factory.mktemp("work")
    config = load(ModelConfig, "nano/model").lm
    registry.export(folder / "zoo", "lm-base", "lm", config, {"weight": torch.ones(1)}, {})
    (folder / "runs" / "other" / "checkpoints").mkdir(parents=True)
    (folder / "empty").mkdir()
    return folder


REFERENCES = {
    "lm-bse": "the zoo zoo has no 'lm-bse'; it has: lm-base; did you mean 'lm-base'?",
    "zoo/lm-bse/123": "'zoo/lm-bse/123' does not exist; name an entry of the zoo zoo",
    "/nowhere/lm-base": "The zoo has: lm-base; did you mean 'lm-base'?",
    "~/nowhere/x": "'~/nowhere/x' does not exist; name an entry of the zoo zoo",
    "zoo/lm-base": "'zoo/lm-base' holds the entries of one name; write 'lm-base' with the zoo",
    "runs/other": "'runs/other' is a run folder; export its weights with `landiff convert",
    "empty/": "'empty/' is not the folder of a zoo entry; name an entry of the zoo zoo",
    "lm-base@ffff": "'lm-base@ffff' matches 0 entries of zoo/lm-base",
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_wrong_zoo_reference_is_explained_everywhere(zoo, monkeypatch, capsys, reference):
    monkeypatch.chdir(zoo)
    commands = {
        "init_from": ["train", "lm", "--config", "nano/lm", f"init_from={reference}"],
        "lm": ["sample", "--config", "nano/sample", f"lm={reference}", "--", "a rabbit"],
        "tokenizer": ["precompute", "--config", "nano/precompute"],
    }
    commands["tokenizer"].append(f"columns.tokens.tokenizer={reference}")
    for key, command in commands.items():
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"{key} = {reference}: {REFERENCES[reference]}" in err or (
            f"{key} = {reference}: " in err and REFERENCES[reference] in err
        ), err
        assert "Errno" not in err
    if "/" not in reference:
        return
    assert main(["convert", reference, "--to", "release", "--out", "x"]) == 2
    assert "Errno" not in capsys.readouterr().err


# -------------------------------------------------------------------- disk space


def test_the_disk_must_hold_shards_columns_checkpoints_and_models(tmp_path, monkeypatch, capsys):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    write_lines(project, {"lm": "loop: {keep_last: 50, save_every: 1}"})
    preset = ["--preset", str(project)]
    monkeypatch.setattr(space, "free_bytes", lambda folder: 2 << 30)
    assert main(["check", *preset]) == 0
    monkeypatch.setattr(space, "free_bytes", lambda folder: 500 << 20)
    words = [
        "has 524 MB free, but the pipeline needs about",
        "runs/lm ",
        "(50 checkpoints of ",
        " MB, and one more while it is written; lower loop.keep_last)",
        "runs/diffusion-control ",
        "free some space, or use a larger file system",
    ]
    commands = [
        ["check", *preset],
        ["quickstart", *preset],
        ["submit", "pipeline", *preset, "--cluster", "local"],
    ]
    for command in commands:
        assert main(command) == 2
        err = capsys.readouterr().err
        for text in words:
            assert text in err, command
    monkeypatch.setattr(space, "free_bytes", lambda folder: 10 << 20)
    assert main(["train", "lm", "--config", str(project / "lm.yaml")]) == 2
    assert "but this run needs about" in capsys.readouterr().err
    assert not {path.name for path in project.iterdir()} & {"data", "runs", "zoo"}


def test_what_is_there_already_takes_no_more_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(LMTrainConfig, "nano/lm")
    (whole,) = space.training_uses(config, export=False)
    folder = Path("runs/lm/checkpoints/step_00000100")
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(1 << 20))
    (folder / "linked").hardlink_to(folder / "weights")
    (left,) = space.training_uses(config, export=False)
    assert whole.bytes - left.bytes == 1 << 20


@pytest.mark.parametrize("preset", ["nano", "shapes", "landiff"])
def test_weights_are_counted_without_building_models(preset):
    models = load(ModelConfig, f"{preset}/model")
    counted = {
        lm_weights(models.lm): lm_on_meta(models.lm),
        tokenizer_weights(models.tokenizer): tokenizer_on_meta(models.tokenizer),
        diffusion_weights(models.diffusion): diffusion_on_meta(models.diffusion),
    }
    for count, model in counted.items():
        real = count_parameters(model)
        assert 0.98 * real < count <= real, "without biases and norms"


# -------------------------------------------------------------------- outputs


def output_commands(place: str) -> dict[str, list[str]]:
    """Text of the error -> command that would write to `place`, a file or a path below one."""
    shapes = ["--config", "shapes/sample", "zoo=packaged"]
    return {
        f"FOLDER = {place} ": ["new", place],
        f"-C {place} ": ["-C", place, "train", "lm", "--config", "nano/lm"],
        f"data = {place} ": ["shards", "--config", "nano/shards", f"data={place}"],
        f"data = {place}  ": ["precompute", "--config", "nano/precompute", f"data={place}"],
        f"run = {place} ": ["train", "lm", "--config", "nano/lm", f"run={place}"],
        f"out = {place} ": ["sample", *shapes, f"out={place}", "--", "a red square"],
        f"out = {place}  ": ["demo", *shapes, f"out={place}", "--dry-run"],
        f"--out = {place} ": ["quickstart", "--preset", "nano", "--out", place],
        f"--out = {place}  ": ["learn", "--out", place],
        f"--out = {place}   ": ["shapes", "make", "--out", place],
        f"--report = {place} ": ["doctor", "--report", place],
        f"--zoo = {place} ": ["convert", "zoo/lm-base", "--name", "x", "--zoo", place],
        f"--out = {place}    ": ["zoo", "pack", "zoo", "--out", place],
    }


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_file_in_place_of_an_output_folder_is_refused_first(zoo, monkeypatch, capsys, place):
    monkeypatch.chdir(zoo)
    Path("taken").touch()
    before = sorted(zoo.rglob("*"))
    for text, command in output_commands(place).items():
        assert main(command) == 2, command
        err = capsys.readouterr().err
        assert text.strip() in err and ("taken is a file" in err or "-C" in text), (command, err)
    assert sorted(zoo.rglob("*")) == before


def test_a_folder_in_place_of_an_output_file_is_refused_first(zoo, monkeypatch, capsys):
    monkeypatch.chdir(zoo)
    commands = [
        ["data", "report", "data", "--out", "empty"],
        ["report", "runs/other", "--out", "empty"],
        ["fit-codec", "--clips", "videos", "--out", "empty"],
        ["shapes", "score", "--videos", "x", "--labels", "y", "--out", "empty"],
        ["attribute", "--config", "shapes/sample", "--videos", "x", "--labels", "y"],
    ]
    commands[-1] += ["--out", "empty"]
    for command in commands:
        assert main(command) == 2, command
        assert "--out = empty is a folder; name a file" in capsys.readouterr().err, command


def test_folders_of_a_preset_that_cannot_be_written_are_refused(tmp_path, capsys):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    (project / "zoo").touch()
    (project / "runs").touch()
    preset = ["--preset", str(project)]
    for command in (["check", *preset], ["quickstart", *preset]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"zoo = {project}/zoo cannot be a folder" in err
        assert "lm: run = runs/lm cannot be a folder: runs is a file" in err
    assert main(["quickstart", *preset, "--out", str(project / "zoo")]) == 2
    assert "is a file; name another folder" in capsys.readouterr().err


# -------------------------------------------------------------------- damaged results


DAMAGES = {
    "raw/000001.tar": "raw is in the manifest, but data/raw/000001.tar does not exist",
    "raw/000000.json": "raw is in the manifest, but data/raw/000000.json does not exist",
    "features/000001.tar": "column 'features' is in the manifest, but data/features/000001.tar",
    "features/000001.json": "but data/features/000001.json does not exist; restore the files",
}


@pytest.mark.parametrize("name", [*DAMAGES, "size", "zoo", "weights"])
def test_a_result_that_is_damaged_is_found_before_a_stage_takes_it_for_finished(
    tmp_path, monkeypatch, name
):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    monkeypatch.chdir(project)
    write_raw(Path("data"), [2, 2])
    write_column(Path("data"), "features")
    entry = registry.export(
        Path("zoo"), "lm", "lm", load(ModelConfig, "nano/model").lm, {"a": torch.ones(9)}, {}
    )
    assert problems_of(project) == ""
    if name == "zoo":
        (entry.path / "config.json").unlink()
        text = "delete zoo/lm, so that the pipeline exports it again"
    elif name == "weights":
        entry.weights_path.write_bytes(entry.weights_path.read_bytes()[:-4])
        text = "delete zoo/lm, so that the pipeline exports it again"
    elif name == "size":
        path = Path("data/features/000000.tar")
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:100])
        text = f"data/features/000000.tar has 100 bytes instead of {size}; restore the files"
    else:
        (Path("data") / name).unlink()
        text = DAMAGES[name]
    assert text in problems_of(project)


# -------------------------------------------------------------------- new projects


NEW_PROJECTS = {
    "--frames 0": "num_frames = 0 must be at least 1",
    "--frames -3": "num_frames = -3 must be at least 1",
    "--size 64X96": "--size 64X96 must be HEIGHTxWIDTH",
    "--size 0x64": "height = 0 must be at least 1",
}


@pytest.mark.parametrize("options", NEW_PROJECTS)
def test_sizes_of_a_new_project_are_explained(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "project", *options.split()]) == 2
    assert NEW_PROJECTS[options] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nano", "two\nlines", "."])
def test_a_folder_that_no_command_can_name_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 2
    assert "name a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "ü", "below/a/new/folder", "slash/", "a#b", "below/nano"])
def test_a_project_in_an_odd_place_can_be_checked(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["new", name]) == 0
    capsys.readouterr()
    assert main(["check", "--preset", name]) == 0
    assert f"next  landiff quickstart --preset {shlex.quote(name)}" in capsys.readouterr().out
