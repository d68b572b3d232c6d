"""The `landiff` command: arguments, error messages, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from landiff.configs.loader import dump
from landiff.configs.ownership import OWNER, take
from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers import help_texts
from landiff.launchers.arguments import build_parser
from landiff.launchers.cli import find_handler, main
from landiff.launchers.local.children import PARENT, environment
from landiff.launchers.pipeline import local_stages, pipeline_stages
from tests.launchers.local_jobs import write_foreign_lock
from tests.training.tokenizer.tiny import config, write_data


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = main(list(argv))
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


def command_names() -> list[str]:
    """Names of all commands of the parser."""
    for action in build_parser()._actions:
        if action.dest == "command":
            return list(action.choices)
    raise AssertionError("the parser has no commands")


@pytest.mark.parametrize("command", command_names())
def test_every_command_has_a_help_text_and_a_handler(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"usage: landiff {command}" in out
    assert callable(find_handler(command))


def test_help_texts_fit_on_a_line_of_100_columns():
    for name, text in vars(help_texts).items():
        if name.isupper() and isinstance(text, str) and name != "TAKE_OVER":
            assert all(len(line) <= 100 for line in text.splitlines()), name


def test_a_typo_names_the_nearest_key(capsys):
    code, _, err = run(capsys, "train", "lm", "--config", "nano/lm", "--dry-run", "optim.rl=1")
    assert code == 2 and "'optim.rl'" in err and "did you mean 'lr'" in err


def test_a_mistyped_command_names_the_nearest(capsys):
    code, _, err = run(capsys, "trane")
    assert code == 2 and "did you mean 'train'?" in err
    code, _, err = run(capsys, "train", "difusion", "--config", "x")
    assert code == 2 and "did you mean 'diffusion'?" in err


def test_an_override_may_follow_a_flag(capsys):
    _, out, err = run(
        capsys, "train", "lm", "--config", "nano/lm", "--dry-run", "--adopt", "loop.steps=7"
    )
    assert "steps: 7" in out and "adopt: true" in out, err


def test_an_argument_that_is_no_override_is_refused(capsys):
    code, _, err = run(capsys, "train", "lm", "--config", "nano/lm", "steps")
    assert code == 2 and "key=value" in err


def test_dry_run_prints_the_resolved_config_names_what_is_missing_and_makes_nothing(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for stage in pipeline_stages("nano", 2):
        if "--config" in stage.command:
            code, out, err = run(capsys, *stage.command, "--dry-run")
            assert "# would" in out, err
            assert code == (0 if stage.name == "shards" else 2), err
            assert stage.name in ("shards", "sample") or "data/manifest.json does not exist" in err
    code, out, _ = run(capsys, "quickstart", "--dry-run", "--out", "here")
    assert code == 0 and out.count("\nlandiff ") == len(local_stages("quickstart"))
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_say_what_to_run(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "precompute", "--config", "nano/features")
    assert code == 2 and "landiff shards" in err and "Traceback" not in err


def test_an_empty_prompt_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "sample", "--config", "nano/sample", " ")
    assert code == 2 and "prompt 0 is empty" in err


def test_a_run_without_a_checkpoint_cannot_be_exported(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "convert", "runs/lm", "--name", "lm")
    assert code == 2 and "runs/lm does not exist" in err


def test_the_zoo_says_what_it_has(capsys, tmp_path):
    code, _, err = run(capsys, "-C", str(tmp_path), "zoo", "show", "lm")
    assert code == 2 and "nothing yet" in err


def test_config_explains_a_key_with_the_configs_that_have_it(capsys):
    code, out, _ = run(capsys, "config", "explain", "loop.keep_every")
    assert code == 0 and "loop.keep_every" in out
    assert "configs: tokenizer, lm, diffusion" in out
    code, out, _ = run(capsys, "config", "explain", "parallel.tensor", "--config", "nano/lm")
    assert code == 0 and "configs: lm" in out
    code, out, _ = run(capsys, "config", "explain", "seed", "--config", "nano/sample")
    assert code == 0 and "42" in out


def test_config_explains_nothing_for_an_unknown_key(capsys):
    code, _, err = run(capsys, "config", "explain", "loop.keep_evry", "--config", "nano/lm")
    assert code == 2 and "did you mean 'keep_every'?" in err
    code, _, err = run(capsys, "config", "explain", "loop.keep_evry")
    assert code == 2 and "did you mean 'keep_every'?" in err
    code, _, err = run(capsys, "config", "explain")
    assert code == 2 and "needs a key" in err
    code, _, err = run(capsys, "config", "nano/lm", "loop.keep_every")
    assert code == 2 and "landiff config explain KEY" in err


def test_config_lists_and_prints(capsys):
    code, out, _ = run(capsys, "config")
    assert code == 0 and "nano/lm" in out.splitlines()
    code, out, _ = run(capsys, "config", "nano/sample")
    assert code == 0 and "prompts:" in out


def test_stages_come_after_what_they_wait_for():
    seen: set[str] = set()
    for stage in pipeline_stages("nano", 2, ["a prompt"]):
        assert set(stage.after) <= seen, stage
        seen.add(stage.name)


@pytest.mark.parametrize("command", ["shards", "precompute"])
def test_overrides_stand_beside_an_action_that_is_left_out(capsys, tmp_path, command):
    key = {"shards": "max_spans=7", "precompute": "batch_size=7"}[command]
    code, out, err = run(
        capsys, "-C", str(tmp_path), command, "--config", f"nano/{command}", "--dry-run", key
    )
    assert key.replace("=", ": ") in out and (code == 0) == (command == "shards"), err


def test_all_mistakes_are_told_at_once_and_no_rank_starts(capfd, tmp_path):
    words = [
        "train",
        "lm",
        "--config",
        "nano/lm",
        "--nproc",
        "3",
        "optim.min_lr=1",
        "optim.rl=3",
        "parallel.pipeline=3",
    ]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "lm").touch()
    code, out, err = run(capfd, "-C", str(tmp_path), *words)
    assert code == 2 and out == "" and "Traceback" not in err
    for text in (
        "unknown config key 'optim.rl'; did you mean 'lr'?",
        "model.num_layers = 4 is not a multiple of parallel.pipeline = 3",
        "parallel.tensor * parallel.pipeline = 2 * 3 does not divide the 3 launched ranks",
        "optim.min_lr = 1 is above optim.lr = 0.002",
        "run = runs/lm cannot be a folder: runs/lm is a file",
        "data/manifest.json does not exist; run `landiff shards` first",
        "tokenizer = tokenizer: the zoo zoo has no 'tokenizer'",
    ):
        assert err.count(text) == 1, (text, err)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lm", "runs"]


@pytest.mark.parametrize(
    ("action", "config"), [("conditions", "nano/evaluate"), ("videos", "nano/videos")]
)
def test_options_of_vbench_are_refused_elsewhere(capsys, action, config):
    words = ["evaluate", action, "--config", config, "--nproc", "2", "--task", "0/2"]
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "--nproc, --task: only `landiff evaluate vbench` has" in err


def test_checks_need_no_torch(tmp_path):
    commands = [
        ["train", "lm", "--config", "nano/lm"],
        ["train", "diffusion", "--config", "nano/diffusion-control"],
        ["train", "tokenizer", "--config", "nano/tokenizer"],
        ["precompute", "--config", "nano/precompute"],
        ["sample", "--config", "nano/sample"],
        ["evaluate", "--config", "nano/evaluate"],
        ["convert", "runs/lm", "--name", "lm"],
    ]
    code = (
        "import sys; from landiff.launchers.cli import main\n"
        f"for words in {commands!r}:\n"
        "    assert main(words) == 2, words\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["A rabbit", "seed=7", "E=mc2 on a wall"], ["A rabbit", "E=mc2 on a wall"]),
        (
            ["seed=7", "--", "seed=8 in red", "KEY=value", "--dry-run"],
            ["seed=8 in red", "KEY=value", "--dry-run"],
        ),
        (["seed=7", "a smiling 😀 robot", "一只兔子"], ["a smiling 😀 robot", "一只兔子"]),
        (["seed=7", "prompts=[x]"], ["x"]),
    ],
)
def test_prompts_are_text(capsys, tmp_path, words, prompts):
    _, out, _ = run(
        capsys, "-C", str(tmp_path), "sample", "--config", "nano/sample", "--dry-run", *words
    )
    shown = yaml.safe_load(out)
    assert shown["prompts"] == prompts and shown["seed"] == 7


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sead=7", "did you mean 'seed'?"),
        ("KEY=value", "with KEY= after --"),
        ("seed=7 rabbits", "with KEY= after --"),
        ("caf\udce9", "prompt 0, 'caf\\udce9', is not valid UTF-8 text"),
    ],
)
def test_a_word_that_may_be_a_mistyped_override_is_no_prompt(capsys, tmp_path, word, message):
    code, _, err = run(capsys, "-C", str(tmp_path), "sample", "--config", "nano/sample", word)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_closed_pipe_and_a_closed_output_are_no_failure(tmp_path):
    landiff = f"{sys.executable} -m landiff.launchers.cli"
    env = environment()
    del env[PARENT]  # bash is the parent
    for script, codes in (
        (
            f"set -o pipefail; {landiff} config nano/model | true; echo ${{PIPESTATUS[0]}}",
            ("0", "141"),
        ),
        (f"{landiff} config nano/model >&-; echo $? >&2", ("0",)),
    ):
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
        lines = [*done.stdout.split(), *done.stderr.split()]
        assert len(lines) == 1 and lines[0] in codes, (script, done)


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_paths_are_utf8_in_a_legacy_locale(tmp_path, locale):
    folder = tmp_path / "räume-兔"
    env = {**environment(), "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["-C", str(folder), "shards", "--config", "nano/shards", "--dry-run", "data=dätä"]
    done = subprocess.run(
        [sys.executable, "-m", "landiff.launchers.cli", *words], env=env, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "data: dätä" in done.stdout.decode() and folder.is_dir()


def write_tokenizer_run(folder: Path) -> Path:
    """Data and job.yaml of a small tokenizer training in `folder`. Returns its run folder."""
    write_data(folder / "data")
    data = {"manifest": folder / "data", "global_batch_size": 4, "micro_batch_size": 2}
    settings = config(Path("runs/tokenizer"), data=data)
    (folder / "job.yaml").write_text(dump(settings))
    return folder / settings.run


def test_a_mistake_that_only_the_ranks_can_find_is_told_once(capfd, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()  # a package of the user's
    (tmp_path / "configs" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    run_folder = write_tokenizer_run(tmp_path)
    for path in (tmp_path / "data" / "features").glob("*.tar"):
        whole = path.read_bytes()
        path.write_bytes(whole[:700] + bytes(len(whole) - 700))  # checks look at the size only
    words = ["-C", str(tmp_path), "train", "tokenizer", "--config", "job.yaml", "--nproc", "2"]
    write_foreign_lock(run_folder / OWNER)
    code, _, err = run(capfd, *words)
    assert code == 2 and "on elsewhere" in err and "--take-over" in err
    code, _, err = run(capfd, *words, "--take-over")  # the ranks start
    assert code == 2 and len([line for line in err.splitlines() if ".tar" in line]) == 1, err
    assert "Traceback" not in err
    assert "Traceback" in (run_folder / "errors/rank_0001.txt").read_text()
    assert list((tmp_path / "tmp").glob("torchelastic*")) == []
    code, out, _ = run(capfd, "-C", str(tmp_path), "status")
    assert code == 0 and [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["runs/tokenizer", "tokenizer", "failed"]
    ]


@pytest.mark.parametrize(
    "way, code, words",
    [("os.kill(os.getpid(), 9)", 137, "rank 0 was ended by SIGKILL"), ("sys.exit(7)", 7, "")],
)
def test_torchrun_ends_as_its_rank_did(tmp_path, way, code, words):
    (tmp_path / "dying.py").write_text(f"import os, sys; {way}")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "landiff.launchers.local.torchrun",
            "--standalone",
            "--nproc-per-node=1",
            "-m",
            "dying",
        ],
        env=environment() | {"PYTHONPATH": f"{IMPORT_ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (code, words)


def test_a_command_ends_without_collecting_garbage():
    """A collection goes through all objects of torch, which takes a second."""
    code = """
import os, sys
from landiff.launchers.cli import main
class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self, write=os.write):
        write(1, b"collected")
code = main()
Cycle()
sys.exit(code)
"""
    words = [sys.executable, "-c", code, "completion", "bash"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "landiff" in done.stdout and "collected" not in done.stdout


def test_stop_says_what_is_no_run_and_what_does_not_run(capsys, tmp_path):
    code, _, err = run(capsys, "stop", str(tmp_path / "lm"))
    assert code == 2 and "is not a run folder" in err
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.yaml").touch()
    code, out, _ = run(capsys, "stop", str(tmp_path / "lm"))
    assert code == 0 and "nothing of it is running" in out
    assert not (tmp_path / "lm" / "stop").exists()
    code, _, err = run(capsys, "stop", "--restart", str(tmp_path / "lm"))
    assert code == 2 and "was not submitted" in err


def test_a_second_training_of_a_run_folder_is_refused_before_any_rank_starts(capsys, tmp_path):
    write_tokenizer_run(tmp_path)
    with take(tmp_path / "runs" / "tokenizer" / ".owner", "the first"):
        code, _, err = run(
            capsys, "-C", str(tmp_path), "train", "tokenizer", "--config", "job.yaml"
        )
    assert code == 2 and f"run folder runs/tokenizer is in use by process {os.getpid()} of" in err
    assert [path.name for path in (tmp_path / "runs" / "tokenizer").iterdir()] == []
