"""Hostile values in batch scripts: refused by name, or passed on unchanged when the script runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from landiff.configs import ConfigError, load
from landiff.launchers.cli import main
from landiff.launchers.slurm.cluster_config import ClusterConfig, ContainerConfig, Resources
from landiff.launchers.slurm.script import BatchJob, options, sbatch_text
from landiff.launchers.slurm.script_values import sbatch_option

BASH = shutil.which("bash") or "bash"
HOSTILE = 'it\'s "q" $(touch PWN) `touch PWN` ; touch PWN # 50% %j !x é漢 &|<>*?[a] ~'
CONTROL = [
    "x\ntouch PWN\n#",
    "x\rtouch PWN",
    "x\x00y",
    "x\x1b[2J",
    "x\x85y",
    "x\u2028y",
    "x\udcff",
    "x\x0by",
]
LINES = ["account", "qos", "constraint", "reservation", "exclude", "python"]

# A stand-in for python and srun: writes its arguments and a variable where the test finds them.
RECORDER = """#!/bin/bash
printf '%s\\0' "$@" >>"$RECORD/$(basename "$0").args"
printf '%s' "${VALUE-}" >"$RECORD/value"
pwd >"$RECORD/pwd"
"""


def site(**values) -> ClusterConfig:
    return ClusterConfig.model_validate({"preflight": False, "restart": "none", **values})


def job(folder: Path, cluster: ClusterConfig, **values) -> BatchJob:
    defaults = {
        "name": "hostile",
        "run": folder / "runs" / "hostile",
        "workdir": folder,
        "module": "landiff.launchers.cli",
        "arguments": ("sample",),
        "resources": cluster.resources("sample"),
        "trainer": False,
    }
    return BatchJob(**defaults | values)


def run(script: str, folder: Path) -> dict[str, list[str]]:
    """Run a script beside a recording python, srun and scontrol. Returns what each was given."""
    record = folder / "record"
    record.mkdir(parents=True, exist_ok=True)
    for name in ("python3", "srun", "scontrol"):
        (record / name).write_text(RECORDER)
        (record / name).chmod(0o755)
    path = folder / "job.sbatch"
    path.write_text(script, encoding="utf-8")
    subprocess.run([BASH, "-n", str(path)], check=True)
    environment = {**os.environ, "RECORD": str(record), "PATH": f"{record}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "1"}
    subprocess.run([BASH, str(path)], env=environment, cwd=folder, timeout=60, capture_output=True)
    assert not list(folder.parent.rglob("PWN")), "a value was run"
    found = {}
    for args in record.glob("*.args"):
        found[args.stem] = args.read_text(encoding="utf-8").split("\0")[:-1]
    return found


@pytest.mark.parametrize("scheduler", ["local", "slurm"])
def test_a_hostile_folder_value_and_argument_reach_the_process_unchanged(tmp_path, scheduler):
    folder = tmp_path / HOSTILE
    value = HOSTILE + "\nsecond line\ttab\\n"
    cluster = site(scheduler=scheduler, env={"VALUE": value}, modules=["x; touch PWN"])
    arguments = ("convert", "a\ntouch PWN", "--out", HOSTILE, "", "-n")
    made = job(folder, cluster, name=HOSTILE, arguments=arguments, made_by="landiff x\ntouch PWN")
    called = run(sbatch_text(made, cluster), folder)
    words = called["srun" if scheduler == "slurm" else "python3"]
    target = [
        "-m",
        "landiff.launchers.local.rank",
        str(made.run),
        "landiff.launchers.cli",
        *arguments,
    ]
    assert words[-len(target) :] == target
    assert (folder / "record" / "value").read_text(encoding="utf-8") == value
    assert (folder / "record" / "pwd").read_text(encoding="utf-8") == f"{folder}\n"
    assert (made.run / "done").exists()
    if scheduler == "slurm":
        log = str(made.folder / "log").replace("%", "%%")
        assert f"--output={log}/rank_0000.log" in words


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("restart", ["requeue", "chain", "none"])
@pytest.mark.parametrize("scheduler", ["local", "slurm"])
def test_bash_accepts_every_kind_of_trainer_in_a_hostile_folder(
    tmp_path, launcher, restart, scheduler
):
    cluster = site(
        scheduler=scheduler, launcher=launcher, restart=restart, preflight=True, python=HOSTILE
    )
    made = job(tmp_path / HOSTILE, cluster, trainer=True, python=HOSTILE)
    script = sbatch_text(made, cluster)
    subprocess.run([BASH, "-n"], input=script, text=True, encoding="utf-8", check=True)


def test_a_backslash_is_kept_here_and_refused_where_slurm_would_drop_it(tmp_path):
    folder = tmp_path / "back\\slash"
    local = site(scheduler="local")
    made = job(folder, local)
    assert str(made.run) in run(sbatch_text(made, local), folder)["python3"]
    with pytest.raises(ConfigError, match="the run folder"):
        sbatch_text(made, site())


@pytest.mark.parametrize("text", CONTROL)
def test_control_characters_are_refused_in_names_and_folders(tmp_path, text):
    cluster = site()
    for values in (
        {"name": text},
        {"run": tmp_path / text},
        {"workdir": tmp_path / text},
        {"python": text},
    ):
        with pytest.raises(ConfigError, match="holds"):
            job(tmp_path, cluster, **values)


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "..", "", " ", " x"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="the name of the job"):
        job(tmp_path, site(), name=name)


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("field", LINES)
def test_control_characters_in_the_cluster_file_are_refused_by_key(field, text):
    with pytest.raises(ConfigError, match=f"{field}.*holds"):
        load(ClusterConfig, {field: text})


@pytest.mark.parametrize("text", CONTROL)
def test_control_characters_are_refused_in_lists_and_sections(text):
    for source in (
        {"default": {"partition": text}},
        {"stages": {"lm": {"partition": text}}},
        {"default": {"memory": text}},
        {"modules": [text]},
        {"options": [f"--comment={text}"]},
        {"gpu_type": text},
        {"container": {"image": text}},
        {"container": {"image": "i", "mounts": [text]}},
        {"env": {text: "1"}},
    ):
        with pytest.raises(ConfigError):
            load(ClusterConfig, source)


@pytest.mark.parametrize(
    "setup", [["echo 'open"], ["if true; then"], ["cat <<END", "x"], ["x=$(echo"], ["}"], ["a\0b"]]
)
def test_set_up_lines_that_would_take_in_the_script_are_refused(setup):
    with pytest.raises(ConfigError, match="setup"):
        load(ClusterConfig, {"setup": setup})
    assert load(ClusterConfig, {"setup": ["if true; then", "  ulimit -n 10", "fi"]})


@pytest.mark.parametrize(
    "text", [HOSTILE, "a'b", 'a"b', "a\\b", "a\\'b\\", "#a", "a #b", "plain", "n[1-2]"]
)
def test_options_are_read_by_sbatch_as_they_were_meant(tmp_path, text):
    cluster = site(account=text, exclude=text, default={"partition": text})
    read = [
        read_by_sbatch(sbatch_option(option)) for option in options(job(tmp_path, cluster), cluster)
    ]
    assert {f"--account={text}", f"--exclude={text}", f"--partition={text}"} <= set(read)
    assert len(read) == len(options(job(tmp_path, cluster), cluster))


def read_by_sbatch(line: str) -> str:
    """The one argument that sbatch reads from an #SBATCH line (_get_argument in its source)."""
    argument = quote = ""
    escaped = False
    position = 0
    while position < len(line):
        character = line[position]
        position += 1
        if escaped:
            argument += character
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == quote:
            quote = ""
        elif quote:
            argument += character
        elif character in "'\"":
            quote = character
        elif character.isspace() or character == "#":
            break
        else:
            argument += character
    assert position == len(line), line[position:]
    return argument


def test_a_colon_or_a_comma_that_separates_folders_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds ':'"):
        job(tmp_path, site(), run=tmp_path / "a:b")
    cluster = site(container=ContainerConfig(image="img"))
    with pytest.raises(ConfigError, match="holds ','"):
        sbatch_text(job(tmp_path / "a,b", cluster), cluster)


@pytest.mark.parametrize("memory", ["64G", "0", "1500M", "2T"])
def test_amounts_of_memory_are_accepted_as_slurm_writes_them(memory):
    assert Resources(memory=memory).memory == memory


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "x", "--name", "x\ntouch PWN\n#"],
        ["convert", "x", "--name", "../../x"],
        ["lm", "--config", "nano/lm", 'run="runs/a\\ntouch PWN"'],
        ["lm", "--config", "nano/lm", "--after", "1,afterany:2"],
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_submit_refuses_hostile_words_before_it_writes(tmp_path, monkeypatch, capsys, words, dry):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *words, "--cluster", "local", *dry]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
