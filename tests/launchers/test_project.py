"""Projects: sizes said once, and a check of all stages before the first one starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from landiff.configs import ConfigError, load
from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.cli import main
from landiff.launchers.config import SampleConfig, ShardsJobConfig, WorldConfig
from landiff.launchers.project.check import check_preset
from landiff.launchers.project.new import write_project
from landiff.launchers.project.presets import (
    FURTHER_CONFIGS,
    PRESET_CONFIGS,
    packaged_presets,
    preset_config,
)
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

pytestmark = pytest.mark.usefixtures("network")


def problems_of(preset: str | Path) -> str:
    return "\n".join(str(problem) for problem in check_preset(str(preset)).problems)


def extend(folder: Path, stem: str, text: str) -> None:
    """Add lines to a config of a project."""
    path = folder / f"{stem}.yaml"
    path.write_text(f"{path.read_text()}{text}\n")


@pytest.mark.parametrize("preset", packaged_presets())
def test_packaged_presets_fit(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("videos", "world/train"):
        (tmp_path / source).mkdir(parents=True)
        (tmp_path / source / "a.mp4").touch()
    assert problems_of(preset) == ""


def test_a_project_of_the_released_size_has_the_released_models(tmp_path):
    project = tmp_path / "project"
    write_project(project, "landiff", 49, "480x720", "packaged")
    assert load(ModelConfig, project / "model.yaml") == load(ModelConfig, "landiff/model")
    for stem, cls in PRESET_CONFIGS.items():
        if stem != "shards":
            assert load(cls, preset_config(str(project), stem)) == load(cls, f"landiff/{stem}"), (
                stem
            )
    assert problems_of(project) == ""
    assert load(ClusterConfig, project / "cluster.yaml").stages["lm"].nodes == 4


@pytest.mark.parametrize(
    ("base", "frames", "size"),
    [
        ("nano", 5, "16x16"),
        ("nano", 25, "64x96"),
        ("quickstart", 9, "48x48"),
        ("shapes", 97, "96x64"),
        ("landiff", 25, None),
    ],
)
def test_all_sizes_follow_from_the_clips(tmp_path, base, frames, size):
    project = tmp_path / "project"
    write_project(project, base, frames, size, "packaged")
    assert problems_of(project) == ""
    sample = load(SampleConfig, project / "sample.yaml")
    assert sample.num_latent_frames == min(13, (frames - 1) // 4 + 1)
    lm = load(LMTrainConfig, project / "lm.yaml")
    assert lm.optim == load(LMTrainConfig, f"{base}/lm").optim, "the rest is the preset's"


@pytest.mark.parametrize(
    ("frames", "size", "words"),
    [
        (26, "64x100", ["num_frames = 26", "25 and 29", "width = 100", "96 and 112"]),
        (1, "64x64", ["num_frames = 1 is a single latent frame", "5"]),
        (17, "8x64", ["height = 8", "are: 16"]),
        (17, "64", ["--size 64 must be HEIGHTxWIDTH"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, frames, size, words):
    with pytest.raises(ConfigError) as error:
        write_project(tmp_path / "project", "nano", frames, size)
    for word in words:
        assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_decord_cannot_read_takes_another_decoder(tmp_path):
    project = tmp_path / "project"
    write_project(project, "nano", 9, "32x48")
    assert problems_of(project) == ""
    (project / "features.yaml").write_text("extends: nano/features\n")
    text = "shards.width = 48, but features.decoder = decord cannot read clips of this width"
    assert text in problems_of(project)


def test_sizes_and_preset_are_options(tmp_path, capsys):
    project = tmp_path / "project"
    words = ["new", str(project), "--from", "shapes", "--frames", "9", "--size", "32x48"]
    assert main(words) == 0
    assert f"wrote {project}" in capsys.readouterr().out
    (shape,) = load(ShardsJobConfig, project / "shards.yaml").shapes
    assert (shape.num_frames, shape.height, shape.width) == (9, 32, 48)
    assert load(LMTrainConfig, project / "lm.yaml").optim == load(LMTrainConfig, "shapes/lm").optim


def test_a_project_with_the_models_of_the_quickstart_trains_on_all_its_own_clips(tmp_path):
    project = tmp_path / "project"
    write_project(project, "quickstart", source=str(tmp_path / "videos"), captions="file_name")
    assert (project / "latents.yaml").is_file(), "computed beside the features"
    assert not (project / "world.yaml").exists()
    assert load(ShardsJobConfig, project / "shards.yaml").sources == (str(tmp_path / "videos"),)
    for cls, stem in (
        (TokenizerTrainConfig, "tokenizer"),
        (LMTrainConfig, "lm"),
        (DiffusionTrainConfig, "diffusion-main"),
        (DiffusionTrainConfig, "diffusion-control"),
    ):
        config, preset = load(cls, project / f"{stem}.yaml"), load(cls, f"quickstart/{stem}")
        assert preset.data.where is not None and preset.data.blend
        assert (config.data.where, config.data.blend) == (None, ())
        assert config.loop.steps == preset.loop.steps
    prompts = load(SampleConfig, project / "sample.yaml").prompts
    assert not set(prompts) & set(load(SampleConfig, "quickstart/sample").prompts)


def test_a_project_is_never_overwritten(tmp_path):
    write_project(tmp_path / "project", "nano")
    with pytest.raises(ConfigError, match="exists already"):
        write_project(tmp_path / "project", "nano")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    project = tmp_path_factory.mktemp("projects") / "tiny"
    write_project(project, "nano", 9, "32x48")
    return project


def test_a_project_is_a_preset_of_every_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    preset = str(tiny)
    assert main(["check", "--preset", preset]) == 0
    assert "9x32x48" in capsys.readouterr().out
    assert main(["quickstart", "--preset", preset, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"cd {tiny}" in out and f"landiff train lm --config {tiny}/lm.yaml\n" in out
    words = ["submit", "pipeline", "--preset", preset, "--cluster", f"{tiny}/cluster.yaml"]
    assert main([*words, "--dry-run"]) == 0
    assert "latent_height: 4" in capsys.readouterr().out
    assert main(["plan", "lm", "--preset", preset, "--gpus", "2"]) == 0
    assert main(["plan", "lm", "--preset", preset, "--gpus", "2", "loop.steps=3"]) == 0
    assert main(["check", "--preset", "nani"]) == 2
    assert "did you mean 'nano'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_readme_has_commands_that_parse(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    lines = [line.strip() for line in (tiny / "README.md").read_text().splitlines()]
    commands = [line.split()[1:] for line in lines if line.startswith("landiff ")]
    assert len(commands) > 15
    assert main(["shards", "--config", "shards.yaml", "--dry-run"]) == 0
    assert ["train", "lm", "--config", "lm.yaml"] in commands


def test_short_clips_are_refused_before_the_first_stage(tmp_path, capsys):
    """25 frames are 7 latent frames; the released diffusion model, the seventh stage, takes 13."""
    project = tmp_path / "project"
    write_project(project, "landiff", source="packaged")
    shape = "{num_frames: 25, height: 480, width: 720}"
    (project / "shards.yaml").write_text(
        f"extends: landiff/shards\nsource: packaged\nbuckets: [{shape}]\n"
    )
    for words in (["check"], ["quickstart", "--dry-run"], ["quickstart"]):
        assert main([*words, "--preset", str(project)]) == 2
        err = capsys.readouterr().err
        assert "shards.num_frames = 25 gives 7 latent frames" in err
        assert "set num_frames = 49, or latent_frames = 7" in err
    words = ["submit", "pipeline", "--preset", str(project), "--cluster", "sandbox", "--dry-run"]
    assert main(words) == 2
    assert "shards.num_frames = 25 gives 7 latent frames" in capsys.readouterr().err
    assert not (project / "data").exists() and not (project / "runs").exists()


def test_a_project_with_images_and_several_sizes_fits_if_the_trainers_name_them(tmp_path, capsys):
    project = tmp_path / "project"
    write_project(project, "nano", source="packaged")
    sizes = [(1, 64, 64), (17, 64, 64), (17, 96, 64)]
    shapes = [f"{{num_frames: {n}, height: {h}, width: {w}}}" for n, h, w in sizes]
    (project / "shards.yaml").write_text(
        "extends: nano/shards\nnum_frames: null\nheight: null\nwidth: null\n"
        f"buckets: [{', '.join(shapes)}]\n"
    )
    assert main(["check", "--preset", str(project)]) == 2
    assert "but clips of 96 x 64 (shards) have features of 6 x 4" in capsys.readouterr().err
    for stage in ("tokenizer", "lm", "diffusion-main", "diffusion-control"):
        path = project / f"{stage}.yaml"
        buckets = "data: {buckets: [1x64x64, 17x64x64, 17x96x64], balance_tokens: true}\n"
        path.write_text(path.read_text() + buckets)
    assert main(["check", "--preset", str(project)]) == 0
    path.write_text(path.read_text().replace("17x96x64", "17x64x96"))
    assert main(["check", "--preset", str(project)]) == 2
    err = capsys.readouterr().err
    assert "diffusion-control.data.buckets names 17x64x96, but shards makes clips of" in err


MISTAKES = {
    "shards": ("width: 64\nsource: nowhere", ["source = 'nowhere' does not exist"]),
    "features": (
        "columns: {features: {encoder: {blocks: 5}}}",
        ["tokenizer.model.feature_channels = 112", "makes 40", "columns.tokens.encoder = {kind: "],
    ),
    "precompute": (
        "columns:\n  text-minilm: {encoder: {max_length: 65}}\n"
        "  text-minilm-padded: {encoder: {max_length: 16, padded: false}}\n"
        "  latents: {encoder: {kind: pca, path: shapes}}",
        [
            "grid_height, grid_width = 2, 3, but clips of 32 x 64 (shards) have features of 2 x 4",
            "latent_width = 4, 6, but clips of 32 x 64 (shards) have latents of 4 x 8",
            "text-minilm.encoder.max_length = 65 is more than lm.model.max_text_tokens = 64",
            "text_length = 32, but precompute.columns.text-minilm-padded.encoder.max_length = 16",
            "whose text states are not padded",
            "latent_channels = 48, but the codec pca of the column latents makes 16",
            "sample.codec = {kind: dct}, but the models are trained on the column latents of "
            "{kind: pca, path: shapes}",
            "diffusion-main.preview_codec = {kind: dct}",
        ],
    ),
    "tokenizer": ("run: runs/other", ["tokenizer.run = runs/other, but the pipeline exports"]),
    "lm": (
        "model: {codebook_size: 64, max_positions: 20}\n"
        "data: {manifest: elsewhere}\ninit_from: gone",
        [
            "codebook of the language model = 64, of the tokenizer = 128",
            "lm.model.max_positions = 20, but shards.num_frames = 9 takes",
            "lm.data.manifest = elsewhere, but shards.data = data",
            "lm: init_from = gone",
        ],
    ),
    "diffusion-main": (
        "schedule: {shift_scale: 2.0}\ndata: {micro_batch_size: 7}",
        ["sample.schedule and diffusion-main.schedule differ", "data.global_batch_size = 16"],
    ),
    "diffusion-control": (
        "model: {transformer: {num_layers: 3}}",
        ["diffusion-main.model.transformer and diffusion-control.model.transformer differ"],
    ),
    "evaluate": (
        "prefix_frames: 3\nlm_text_column: text-minlm",
        [
            "evaluate.lm_text_column = text-minlm is a column that no",
            "evaluate.prefix_frames = 3 must be less",
            "largest is 2",
        ],
    ),
    "sample": (
        "zoo: weights\nnum_latent_frames: 4",
        ["sample.zoo = weights, but the pipeline", "the nearest that are: 3 and 5"],
    ),
}


def test_all_mistakes_are_listed_at_once(tmp_path):
    project = tmp_path / "project"
    write_project(project, "nano", 9, "32x48")
    for stem, (text, _words) in MISTAKES.items():
        path = project / f"{stem}.yaml"
        lines = path.read_text().splitlines()
        replaced = {line.partition(":")[0] for line in text.splitlines()}
        kept = [line for line in lines if line.partition(":")[0] not in replaced]
        path.write_text("\n".join([*kept, text, ""]))
    # Sections that were replaced above start from the project's model again.
    for stem, section in (("lm", "lm"), ("diffusion-control", "diffusion")):
        path = project / f"{stem}.yaml"
        base = path.read_text().splitlines()[0]
        (project / f"{stem}-base.yaml").write_text(f"{base}\nmodel: model.yaml#{section}\n")
        path.write_text(path.read_text().replace(base, f"extends: {stem}-base.yaml"))
    found = problems_of(project)
    for stem, (_text, words) in MISTAKES.items():
        for word in words:
            assert word in found, f"{stem}: {word!r} is not in\n{found}"


def test_wrong_values_and_chain_mistakes_are_in_one_list(tiny, tmp_path):
    project = tmp_path / "project"
    write_project(project, "nano", 9, "32x48")
    extend(project, "evaluate", "seed: 1")
    extend(project, "sample", "prompt: x")
    (project / "lm.yaml").write_text("extends: nano/ln\n")
    found = problems_of(project)
    assert "unknown config key 'seed'; did you mean 'seeds'" in found
    assert "unknown config key 'prompt'; did you mean 'prompts'" in found
    assert "lm.yaml: extends = 'nano/ln'" in found and "did you mean" in found


FURTHER_MISTAKES = {
    "clips: 7\ntrue_clip: 9": (
        "world",
        "unknown config key 'true_clip'; did you mean 'true_clips'",
    ),
    "clips: none": ("world", "world.yaml: clips = 'none': Input should be"),
    "source: [world/trian, packaged]": (
        "shards",
        "does not read world/train, the clips that world.yaml makes; did you mean 'world/train'",
    ),
    "source: [world/train, world/true-seen]": ("shards", "must not be trained on"),
    "source: [world/train, videos]": ("shards", "source = 'videos' does not exist"),
    "num_frames: 25": ("shards", "those of world.yaml last 2.125 s, so that all are rejected; set"),
    "clips: 77": ("world", "clips = 77, but out/world was made with"),
    "data: elsewhere": ("latents", "latents.data = elsewhere, but shards.data = data"),
    "columns: {text-minilm: {encoder: {max_length: 60}}}": (
        "latents",
        "latents.columns.text-minilm and precompute.columns.text-minilm differ in encoder",
    ),
    "columns: {tokens: {tokenizer: tokenizer, encoder: {kind: efficientnet-lite0}}}": (
        "latents",
        "latents.columns.tokens needs the tokenizer, which is trained while",
    ),
    "columns: {latents: {encoder: {kind: pca, path: nowhere}}}": ("latents", "latents: columns."),
}


@pytest.mark.parametrize("text", FURTHER_MISTAKES)
def test_mistakes_in_configs_that_only_some_presets_have_are_found(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = tmp_path / "project"
    project.mkdir()
    for stem in (*PRESET_CONFIGS, *FURTHER_CONFIGS):
        (project / f"{stem}.yaml").write_text(f"extends: quickstart/{stem}\n")
    clips = load(WorldConfig, "quickstart/world").clips
    numbers = {"clips": clips, "true_clips": 0, "size": 64, "seed": 0}
    Path("out/world").mkdir(parents=True)
    Path("out/world/world.json").write_text(json.dumps(numbers))
    assert check_preset(str(project), Path("out")).problems == []
    stem, words = FURTHER_MISTAKES[text]
    extend(project, stem, text)
    found = "\n".join(map(str, check_preset(str(project), Path("out")).problems))
    assert words in found
    assert main(["quickstart", "--preset", str(project), "--out", "out"]) == 2
    assert not Path("out/data").exists()


def test_stages_that_wait_for_latents_only_read_its_columns(tmp_path):
    for stem in (*PRESET_CONFIGS, "latents"):
        (tmp_path / f"{stem}.yaml").write_text(f"extends: shapes/{stem}\n")
    text = "text-minilm: {encoder: {kind: minilm, max_length: 64}}"
    latents = "latents-pca: {encoder: {kind: pca, path: shapes-balanced}}"
    columns = f"columns:\n  {text}\n  {latents}\n"
    (tmp_path / "latents.yaml").write_text(f"data: data\nzoo: zoo\n{columns}")
    (tmp_path / "shards.yaml").write_text("extends: shapes/shards\nsource: packaged\n")
    found = problems_of(tmp_path)
    assert "diffusion-main reads the column latents, but starts after latents" in found
    assert "did you mean 'latents-pca'" in found
    assert "diffusion-main reads the column text-minilm-padded, but starts after" in found
    assert "lm reads" not in found
    extend(tmp_path, "lm", "text_column: latents-pca")
    assert "lm reads the column latents-pca, but does not wait for latents" in problems_of(tmp_path)


def test_the_check_imports_no_torch(tiny):
    code = (
        "import sys\nfrom landiff.launchers.cli import main\n"
        f"assert main(['check', '--preset', {str(tiny)!r}]) == 0\n"
        "assert not {'torch', 'cv2'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=IMPORT_ROOT)


# -------------------------------------------------------------------- stages that need not run


def stages_of(words: list[str], capsys) -> tuple[str, list[str]]:
    """Output of a dry run of the quickstart, and the first two words of its commands."""
    code = main(["quickstart", "--dry-run", *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    lines = [line.split() for line in captured.out.splitlines() if line.startswith("landiff ")]
    return captured.out, [" ".join(line[1:3]) for line in lines]


@pytest.fixture
def zoo(tiny, tmp_path) -> Path:
    """A working folder whose zoo has the models of the project `tiny`."""
    models = load(ModelConfig, tiny / "model.yaml")
    entries = {
        "tokenizer": ("tokenizer", models.tokenizer),
        "lm": ("lm", models.lm),
        "main": ("transformer", models.diffusion.transformer),
        "diffusion": ("diffusion", models.diffusion),
    }
    for name, (kind, config) in entries.items():
        registry.export(tmp_path / "zoo", name, kind, config, {"weight": torch.ones(1)}, {})
    return tmp_path


def test_models_in_the_zoo_are_not_trained_again(tiny, zoo, capsys):
    words = ["--preset", str(tiny), "--out", str(zoo)]
    out, stages = stages_of(words, capsys)
    assert stages == [
        "shards --config",
        "precompute --config",
        "precompute --config",
        "evaluate --config",
        "sample --config",
    ]
    assert "# tokenizer is skipped: the zoo has tokenizer@" in out
    (zoo / "runs" / "lm").mkdir(parents=True)
    _out, stages = stages_of(words, capsys)
    assert "train lm" in stages and "convert runs/lm" in stages, "its own export"
    shutil.rmtree(zoo / "zoo" / "tokenizer")
    _out, stages = stages_of(words, capsys)
    assert "train tokenizer" in stages


def test_models_of_the_zoo_are_trained_further(zoo, tmp_path, capsys):
    """The main transformer that a control branch does not start from is not trained for it."""
    project = tmp_path / "project"
    write_project(project, "nano", 9, "32x48")
    extend(project, "lm", "init_from: lm")
    extend(project, "diffusion-control", "init_from: diffusion")
    shutil.rmtree(zoo / "zoo" / "main")
    out, stages = stages_of(["--preset", str(project), "--out", str(zoo)], capsys)
    assert [stage for stage in stages if "train" in stage] == ["train lm", "train diffusion"]
    assert "diffusion-main is skipped: diffusion-control starts from diffusion instead" in out


def test_stages_can_be_named(tiny, zoo, capsys):
    words = ["--preset", str(tiny), "--out", str(zoo)]
    _out, stages = stages_of([*words, "--skip", "sample", "--skip", "evaluate"], capsys)
    assert "sample --config" not in stages and "evaluate --config" not in stages
    assert main(["quickstart", *words, "--from", "lm"]) == 2
    assert "shards is skipped, and data = " in capsys.readouterr().err
    assert main(["quickstart", *words, "--skip", "tokeniser"]) == 2
    assert "--skip tokeniser is no stage" in capsys.readouterr().err
    shutil.copytree(tiny, zoo, dirs_exist_ok=True)
    shutil.rmtree(zoo / "zoo" / "tokenizer")
    submit = ["submit", "pipeline", "--preset", str(zoo), "--cluster", "sandbox", "--dry-run"]
    assert main([*submit, "--skip", "tokenizer"]) == 2
    assert "tokenizer is skipped, and its model = tokenizer" in capsys.readouterr().err
    assert main(submit) == 0
    out = capsys.readouterr().out
    assert "# lm is skipped: the zoo has lm@" in out and "# sample: sample, 1 node" in out
