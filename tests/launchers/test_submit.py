"""`landiff submit`: what it writes, rejects and leaves alone; and the same jobs without SLURM."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from landiff.configs.ownership import OwnedError, take
from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.slurm import snapshot
from landiff.launchers.slurm.client import Answer, Slurm
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.prepare import prepare_run
from landiff.launchers.slurm.queueing import queue
from landiff.launchers.slurm.run_here import run_here
from landiff.launchers.slurm.stage_jobs import SubmitPlan
from tests.launchers.local_jobs import ONE_RESTART, landiff, one_process, write_foreign_lock

STAGES = {
    "shards": ["--config", "nano/shards"],
    "precompute": ["--config", "nano/features"],
    "tokenizer": ["--config", "nano/tokenizer"],
    "lm": ["--config", "nano/lm"],
    "diffusion": ["--config", "nano/diffusion-main"],
    "convert": ["runs/lm", "--name", "lm"],
    "sample": ["--config", "nano/sample", "a rabbit"],
    "evaluate": ["--config", "nano/evaluate"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_of_every_stage_shows_config_plan_and_script_and_touches_nothing(
    capsys, tmp_path, monkeypatch, stage
):
    monkeypatch.chdir(tmp_path)
    code, out, err = landiff(
        capsys, "submit", stage, "--cluster", "sandbox", "--dry-run", *STAGES[stage]
    )
    assert code == (0 if stage == "shards" else 2), (
        err
    )  # in an empty folder, the inputs of all others are missing
    later = landiff(
        capsys, "submit", stage, "--cluster", "sandbox", "--dry-run", "--after", "7", *STAGES[stage]
    )
    assert later[0] == 0, later[2]  # another job makes them
    assert "#SBATCH --job-name=" in out and "# ==== plan" in out
    assert ("resolved config" in out) == (stage != "convert")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_pipeline_shows_the_graph(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_run(
        one_process(tmp_path / "runs" / "lm", "pass"), ONE_RESTART
    )  # what a run left is left alone too
    before = {
        path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
        for path in tmp_path.rglob("*")
    }
    _, out, _ = landiff(
        capsys, "submit", "pipeline", "--cluster", "sandbox", "--dry-run", "lm.loop.steps=3"
    )
    assert {
        path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
        for path in tmp_path.rglob("*")
    } == before
    plan = dict(
        line.removeprefix("# ").split(": ", 1)
        for line in out.split("# ==== plan\n")[1].splitlines()
        if ": " in line
    )
    assert plan["columns-tokens"].endswith("after export-tokenizer") and plan[
        "columns-latents"
    ].endswith("after shards")
    assert plan["enter-tokens"].endswith("after columns-tokens")
    assert plan["lm"].endswith(
        "after enter-tokens, enter-text-minilm"
    )  # side by side, each after what it reads
    assert plan["diffusion-main"].endswith("after enter-latents, enter-text-minilm-padded")
    assert plan["diffusion-control"].endswith(
        "after export-main, enter-latents, enter-text-minilm-padded, enter-tokens"
    )
    assert "array of 2" in plan["columns-tokens"] and plan["sample"].endswith(
        "after export-lm, export-diffusion"
    )
    assert out.count("steps: 3\n") == 1


def test_columns_of_frames_are_one_job_that_decodes_each_clip_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--cluster", "sandbox", "--dry-run", "--after", "7", "--config", "nano/precompute"]
    code, out, err = landiff(capsys, "submit", "precompute", *words, "redo=[latents]")
    assert code == 0, err
    columns = {}
    for part in out.split("# ==== ")[1:]:
        title, _, text = part.partition("\n")
        if "resolved config" in title:
            config = yaml.safe_load(text.split("# ==== ")[0])
            columns[title.split(":")[0]] = sorted(config["columns"]), config["redo"]
    assert columns == {
        "precompute-text-minilm": (["text-minilm"], []),
        "precompute-text-minilm-padded": (["text-minilm-padded"], []),
        "precompute-frames": (["latents", "tokens"], ["latents"]),
        "precompute": (["latents", "text-minilm", "text-minilm-padded", "tokens"], ["latents"]),
    }


def test_text_waits_for_the_captions_that_it_encodes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"key": "a", "caption": "a bird"}')
    text = {"encoder": {"kind": "minilm"}}
    columns = {
        "captions-mine": {"encoder": {"kind": "file", "path": "captions.jsonl"}},
        "text-raw": text,
        "text-mine": text | {"captions": "captions-mine"},
    }
    settings = {"data": "data", "zoo": "zoo", "columns": columns}
    (tmp_path / "columns.yaml").write_text(yaml.safe_dump(settings))
    words = ["--cluster", "sandbox", "--dry-run", "--after", "7", "--config", "columns.yaml"]
    code, out, err = landiff(capsys, "submit", "precompute", *words)
    assert code == 0, err
    plan = {}
    for line in out.split("# ==== plan\n")[1].splitlines():
        name, _, text = line.removeprefix("# ").partition(": ")
        plan[name] = text
    assert plan["precompute-text-mine"].endswith("after precompute-captions-mine")
    assert "captions-mine" not in plan["precompute-text-raw"]


def test_the_pipeline_fits_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, out, err = landiff(capsys, "submit", "pipeline", "--cluster", "local", "--dry-run")
    assert code == 0, err
    (lm,) = (
        line
        for line in out.splitlines()
        if "-m landiff.training.lm" in line or " landiff.training.lm " in line
    )
    assert "--nproc-per-node=2" in lm  # parallel.tensor = 2


def test_of_two_submissions_at_once_the_second_is_refused_and_nothing_is_queued_twice(tmp_path):
    plans = [
        one_process(tmp_path / "first", "pass", "first"),
        one_process(tmp_path / "second", "pass", "second", ("first",)),
    ]
    submitted: list[str] = []
    refused: list[str] = []

    def cluster(words):
        if "--parsable" in words:
            submitted.append(words[-1])
            with pytest.raises(OwnedError) as error:  # while this one is at it
                queue(plans, ClusterConfig(), Slurm(lambda _: pytest.fail("SLURM was asked")))
            refused.append(str(error.value))
        return Answer(0, f"{len(submitted)}\n" if "--parsable" in words else "", "")

    queue(plans, ClusterConfig(), Slurm(cluster))
    assert [Path(script).parent.parent.name for script in submitted] == ["first", "second"]
    assert all(
        f"the submission of {tmp_path / 'first'} is in use by process {os.getpid()} of" in text
        for text in refused
    )


def test_a_run_folder_in_which_a_process_works_is_not_submitted(tmp_path):
    plan = one_process(tmp_path / "task", "pass")
    with take(tmp_path / "task" / ".owner", "it"):
        for start in (
            lambda: run_here([plan], ONE_RESTART),
            lambda: queue([plan], ClusterConfig(), Slurm(lambda words: Answer(0, "", ""))),
        ):
            with pytest.raises(
                OwnedError,
                match=f"run folder {tmp_path / 'task'} is in use by process {os.getpid()} of",
            ):
                start()
        assert not (tmp_path / "task" / "job" / "job.json").exists()


def test_a_run_folder_of_another_machine_is_submitted_with_take_over_only(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    write_foreign_lock(tmp_path / "runs" / "shards" / ".owner")
    words = ["submit", "shards", "--cluster", "sandbox", "source=videos", "--config", "nano/shards"]
    code, _, err = landiff(capsys, *words)
    assert code == 2 and "on elsewhere" in err and "--take-over" in err
    code, _, err = landiff(capsys, *words, "--take-over")
    assert code == 2 and "on elsewhere" not in err and "sbatch" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lm", "--config", "nano/lm", "--cluster", "sandbx"], "did you mean 'cluster/sandbox'"),
        (["lm", "--config", "nano/lm", "--cluster", "sandbox", "optim.rl=1"], "did you mean 'lr'"),
        (
            ["lm", "--config", "nano/lm", "--cluster", "sandbox", "--nodes", "3"],
            "the nearest that are",
        ),
        (
            ["shards", "--config", "nano/shards", "--cluster", "sandbox", "--nodes", "2"],
            "runs on one node",
        ),
        (
            [
                "lm",
                "--config",
                "nano/lm",
                "--cluster",
                "sandbox",
                "--nodes",
                "2",
                "data.micro_batch_size=8",
                "--here",
            ],
            "this one has 1; start with  salloc -N 2",
        ),
        (
            ["pipeline", "--cluster", "sandbox", "lmm.loop.steps=1"],
            "the stages are shards, features",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_queued(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    code, _, err = landiff(capsys, "submit", *words)
    assert code == 2 and says in err and list(tmp_path.iterdir()) == []


def test_all_mistakes_of_a_pipeline_are_refused_at_submission(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [
        "lm.optim.min_lr=1",
        "diffusion-main.data.micro_batch_size=7",
        "sample.steps=1",
        "shards.source=nowhere",
        "columns.columns.latents.encoder={kind: cogvideox-vae, path: gone}",
        "tokenizer.model.codebook_size=64",
    ]
    for words in (["--dry-run"], []):
        code, _, err = landiff(
            capsys, "submit", "pipeline", "--cluster", "sandbox", *words, *overrides
        )
        assert code == 2 and list(tmp_path.iterdir()) == []
        for text in (
            "lm: optim.min_lr = 1 is above",
            "diffusion-main: data.global_batch_size = 16",
            "sample: steps = 1",
            "shards: source = 'nowhere' does not exist",
            "columns.latents.encoder.path = 'gone'",
            "codebook of the language model = 128, of the tokenizer = 64",
        ):
            assert err.count(text) == 1, (text, err)
        assert "does not exist; run `landiff shards`" not in err, "earlier jobs make it"


def test_prompts_reach_the_sample_job_as_text(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "submit",
        "pipeline",
        "--cluster",
        "sandbox",
        "--dry-run",
        "--prompt",
        "seed=3 😀",
        "--prompt",
        "KEY=x",
    ]
    code, out, err = landiff(capsys, *words)
    assert code == 0 and "- seed=3 😀\n- KEY=x\n" in out, err
    words = [
        "submit",
        "sample",
        "--cluster",
        "sandbox",
        "--dry-run",
        "--config",
        "nano/sample",
        "seed=4",
        "--",
        "seed=3 😀",
    ]
    _, out, _ = landiff(capsys, *words)
    assert "- seed=3 😀\n" in out and "seed: 4" in out


def test_a_snapshot_holds_the_code_its_origin_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very secret")
    monkeypatch.setenv("HF_AUTH", "very secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:word@hub.example")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    snapshot.write_snapshot(tmp_path)
    copied = tmp_path / "code" / "landiff" / "training" / "loop.py"
    assert copied.read_text() == (IMPORT_ROOT / "landiff" / "training" / "loop.py").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "code").rglob("*"))
    assert not list(tmp_path.rglob("__pycache__"))
    assert (tmp_path / "code.txt").read_text().startswith(("git ", "installed "))
    environment = (tmp_path / "environment.txt").read_text()
    assert (
        "NCCL_DEBUG=INFO" in environment
        and "pydantic==" in environment
        and "very secret" not in environment
    )
    assert (
        "HF_TOKEN=<redacted>" in environment
        and "HF_AUTH=<redacted>" in environment
        and "user:word" not in environment
    )
    assert "HF_ENDPOINT=https://<redacted>@hub.example" in environment
    assert (tmp_path / "environment.txt").stat().st_mode & 0o777 == 0o600
    snapshot.write_snapshot(tmp_path)  # again: replaced, not added
    assert {path.name for path in tmp_path.iterdir()} == {
        "code",
        "code.txt",
        "code.diff",
        "environment.txt",
    }


SECRETS = {
    "HF_TOKEN": "hunter2",
    "PROXY": "http://me:hunter2@proxy:3128",
    "NAME": "sk-" + "hunter2" * 4,
}


def test_secrets_of_the_cluster_file_reach_the_job_and_nobody_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    site = {"scheduler": "local", "env": SECRETS, "setup": ["export WANDB_API_KEY=hunter2"]}
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    words = ["shards", "--cluster", "site.yaml", "source=videos", "--config", "nano/shards"]
    code, out, _ = landiff(capsys, "submit", *words, "--dry-run")
    assert code == 0 and "hunter2" not in out and "HF_TOKEN=<redacted>" in out
    code, out, err = landiff(capsys, "submit", *words)  # fails: no clip is usable
    assert code != 0 and "hunter2" not in out + err
    told = {
        path.name
        for path in tmp_path.rglob("runs/**/*")
        if path.is_file() and b"hunter2" in path.read_bytes()
    }
    assert told == {"cluster.yaml", "job.sbatch"}
    for path in tmp_path.rglob("runs/shards/job/*"):
        if path.name in (*told, "environment.txt"):
            assert path.stat().st_mode & 0o777 == 0o600, path


def test_a_secret_on_the_command_line_is_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "tokenizer",
        "--config",
        "nano/tokenizer",
        "--cluster",
        "local",
        "data.remote=https://me:hunter2@host/data",
    ]
    _, out, err = landiff(capsys, "submit", *words, "--dry-run")
    assert "hunter2" not in out + err and "https://<redacted>@host/data" in out


def test_the_diff_of_a_changed_working_tree_is_kept(tmp_path):
    repository = tmp_path / "repository"
    for folder in snapshot.FOLDERS:
        (repository / folder).mkdir(parents=True)
        (repository / folder / "__init__.py").write_text("")
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(repository), *words], check=True)
    assert snapshot.describe_code(repository)[1] == ""
    (repository / "training" / "__init__.py").write_text("changed = True\n")
    line, difference = snapshot.describe_code(repository)
    assert "with changes" in line and "+changed = True" in difference


def test_a_job_here_restarts_after_a_crash_and_is_skipped_when_done(tmp_path, capfd):
    tried = tmp_path / "tried"
    plan = one_process(
        tmp_path / "task",
        f"from pathlib import Path; path = Path({str(tried)!r}); old = path.exists(); "
        "path.touch(); assert old, 'the first time'",
    )
    assert run_here([plan], ONE_RESTART) == 0
    assert (tmp_path / "task" / "done").exists()
    assert (tmp_path / "task" / "job" / "log" / "batch.log").read_text().count(" restart ") == 2
    assert run_here([plan], ONE_RESTART) == 0
    assert "task: done already" in capfd.readouterr().out


def test_a_failed_job_here_costs_what_depends_on_it_and_nothing_else(tmp_path, capfd):
    plans = [
        one_process(tmp_path / "bad", "raise RuntimeError('for good')", "bad"),
        one_process(tmp_path / "lost", "pass", "lost", ("bad",)),
        one_process(tmp_path / "other", "pass", "other"),
    ]
    assert run_here(plans, ONE_RESTART) != 0
    assert [(tmp_path / name / "done").exists() for name in ("bad", "lost", "other")] == [
        False,
        False,
        True,
    ]
    assert "lost: not run, bad failed" in capfd.readouterr().err


def test_submitting_again_runs_what_was_edited_and_what_reads_it(tmp_path, capsys):
    asked: list[list[str]] = []

    def cluster(words):
        asked.append(list(words))
        return Answer(0, f"{len(asked)}\n" if "--parsable" in words else "", "")

    def chain(code: str) -> list[SubmitPlan]:
        return [
            one_process(tmp_path / "first", "pass", "first"),
            one_process(tmp_path / "second", code, "second", ("first",)),
            one_process(tmp_path / "third", "pass", "third", ("second",)),
            one_process(tmp_path / "other", "pass", "other"),
        ]

    site = ClusterConfig()
    queue(chain("pass"), site, Slurm(cluster))
    for plan in chain("pass"):
        (plan.job.run / "done").touch()
    capsys.readouterr()
    queue(chain("pass"), site, Slurm(cluster))
    assert capsys.readouterr().out.count("done already") == 4
    asked.clear()
    queue(chain("1"), site, Slurm(cluster))
    out = capsys.readouterr().out
    assert "first: done already" in out and "other: done already" in out and "second: job" in out
    submissions = [words for words in asked if "--parsable" in words]
    assert [Path(words[-1]).parent.parent.name for words in submissions] == ["second", "third"]
    assert submissions[1][2].startswith("--dependency=afterok:")


def test_a_finished_trainer_says_that_its_config_was_edited(tmp_path, capsys):
    def trainer(code: str) -> list[SubmitPlan]:
        return [replace(one_process(tmp_path / "lm", code), steps=3)]

    prepare_run(trainer("pass")[0], ONE_RESTART)
    (tmp_path / "lm" / "done").write_text("3\n")
    assert (
        run_here(trainer("pass"), ONE_RESTART) == 0 and "done already\n" in capsys.readouterr().out
    )
    assert run_here(trainer("1"), ONE_RESTART) == 0 and "another run=" in capsys.readouterr().out


def test_sigterm_ends_a_job_here_and_leaves_no_process(tmp_path):
    plan = one_process(tmp_path / "task", "import time\nprint('up', flush=True)\ntime.sleep(100)\n")
    code = (
        "import pickle, sys\n"
        "from landiff.launchers.slurm.run_here import run_here\n"
        "from tests.launchers.local_jobs import ONE_RESTART\n"
        "raise SystemExit(run_here(pickle.load(sys.stdin.buffer), ONE_RESTART))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT)},
        stdin=subprocess.PIPE,
    )
    with child.stdin as pipe:
        pickle.dump([plan, one_process(tmp_path / "next", "pass", "next")], pipe)
    log = plan.job.folder / "log" / "rank_0000.log"
    end = time.monotonic() + 120
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) != 0
    end = time.monotonic() + 60
    while processes_of(tmp_path):  # those that it has killed end a little later
        assert time.monotonic() < end, processes_of(tmp_path)
        time.sleep(0.1)
    assert not (tmp_path / "next").exists()  # what would have come after it is not started
    assert not (plan.job.run / "done").exists() and not (plan.job.folder / "pid").exists()


def processes_of(folder: Path) -> list[Path]:
    """Files of /proc with the command lines that name a folder."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    return [path for path in files if str(folder).encode() in read(path)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_cluster_file_in_the_run_folder_is_the_one_used(tmp_path):
    plan = one_process(tmp_path / "task", "pass")
    prepare_run(plan, ONE_RESTART)
    assert yaml.safe_load((plan.job.folder / "cluster.yaml").read_text())["scheduler"] == "local"


def test_actions_of_evaluate_are_jobs_with_their_options(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    submit = ("submit", "evaluate", "--cluster", "sandbox", "--dry-run", "--after", "7")
    options = ("--vbench-python", "env/bin/python", "--dimensions", "color,scene")
    options += ("--nproc", "2")
    code, out, err = landiff(
        capsys, *submit, "vbench", "--config", "nano/sample", *options, "out=vbench"
    )
    assert code == 0, err
    python = tmp_path / "env" / "bin" / "python"
    assert f"evaluate vbench --vbench-python {python} --dimensions color,scene --nproc 2" in out
    assert "--job-name=evaluate-vbench" in out and "out: vbench" in out
    code, out, err = landiff(capsys, *submit, "videos", "--config", "nano/videos")
    assert code == 0 and "evaluate videos --config" in out, err
    code, _, err = landiff(capsys, *submit, "videos", "--config", "nano/videos", "--nproc", "2")
    assert code == 2 and "--nproc: only `landiff evaluate vbench` has this option" in err
    wrong = ("--dimensions", "taste", "--augmented", "nowhere.json")
    code, _, err = landiff(capsys, *submit[:-2], "vbench", "--config", "nano/sample", *wrong)
    assert code == 2
    for text in ("--vbench-python PATH", "'taste' is no dimension", "nowhere.json does not exist"):
        assert text in err
