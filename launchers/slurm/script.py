"""Batch script of one job on one cluster, as text.

The text is made from the template `job.sh`, without any look-up. It is plain bash, since it runs on
the node and outside of any container. It controls the job:

* A signal before the time limit, before preemption or from `landiff stop` reaches the script alone.
  The script creates the file `stop` in the run folder. The ranks agree on a step, save a checkpoint
  and exit with code 0, and the script requeues the job.
* A crash requeues the job too, at most `max_restarts` times and only if there is a new checkpoint
  since the last crash.
* A config error ends the job. Ranks report it in a file, since srun returns the exit code of the
  rank that it killed last.
* The script requeues before it exits, and its exit code is not 0 before the run is done.
  Dependent jobs therefore never start early.

The same text runs without sbatch, with `--cluster local` or inside of salloc. It then restarts
itself.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from landiff.launchers.local.children import PARENT
from landiff.launchers.run.job_folder import CODE, JOB_FOLDER, LOGS, SCRIPT
from landiff.launchers.slurm.cluster_config import ClusterConfig, ContainerConfig, Resources
from landiff.launchers.slurm.script_values import (
    check_folder,
    check_job_name,
    check_line,
    file_pattern,
    sbatch_option,
)

TEMPLATE = Path(__file__).with_name("job.sh")
SECTION = re.compile(r"^#: (\S+)\n", flags=re.MULTILINE)
PLACEHOLDER = re.compile(r"@(\w+)@")


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """A Python module with its arguments and run folder. All paths are absolute.

    Raises ConfigError for values that a script cannot hold.
    """

    name: str
    run: Path
    workdir: Path
    module: str
    arguments: tuple[str, ...]
    resources: Resources
    trainer: bool
    """Several ranks that save checkpoints and read the file `stop`. Otherwise one process that
    resumes where it was."""
    array: bool = False
    made_by: str = "landiff submit"
    python: str = "python3"
    here: bool = False
    """Run without sbatch, in this shell or in the allocation around it."""

    def __post_init__(self) -> None:
        check_job_name(self.name, "the name of the job")
        check_folder(self.run, "the run folder")
        check_folder(self.workdir, "the working directory", separators="")
        check_line(self.python, "python")
        check_line(self.module, "the module")

    @property
    def folder(self) -> Path:
        """The job folder, below the run folder."""
        return self.run / JOB_FOLDER

    @property
    def tasks_per_node(self) -> int:
        """Processes that the job runs on one node."""
        if self.trainer:
            return self.resources.tasks
        return 1


def sbatch_text(job: BatchJob, cluster: ClusterConfig) -> str:
    """The batch script of `job` on `cluster`.

    Raises ConfigError for folder names that SLURM or a container would split.
    """
    if cluster.scheduler == "slurm":  # it drops a backslash from the name of a log file
        check_folder(job.run, "the run folder", separators="\\")
    template = read_sections()
    values = section_values(job, cluster)
    parts = [header(job, cluster)]
    for name in section_names(job, cluster):
        parts.append(fill_in(template[name], values))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


# -------------------------------------------------------------------- the template


def read_sections() -> dict[str, str]:
    """Text of each section of the template, by name."""
    _, *parts = SECTION.split(TEMPLATE.read_text(encoding="utf-8"))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def section_names(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The sections of the template that the script of `job` consists of."""
    slurm = cluster.scheduler == "slurm"
    names = ["early-signals"]
    if site_lines(cluster):
        names.append("site")
    names.append("constants")
    names.append("threads" if slurm else "end-with-parent")
    if cluster.restart != "chain":
        names.append("fresh")
    again = f"again/{restart_variant(job, cluster)}"
    if job.trainer:
        names += ["functions", "newest/checkpoint", again, "stop/trainer", "begin", "hangs"]
    else:
        names += ["functions", "newest/none", again, "stop/other", "begin"]
    if job.trainer and slurm:
        names.append("rendezvous")
    if has_preflight(job, cluster):
        names.append("preflight")
    return [*names, "ranks", "ending"]


def has_preflight(job: BatchJob, cluster: ClusterConfig) -> bool:
    """Whether every node is checked before the ranks start."""
    return job.trainer and cluster.scheduler == "slurm" and cluster.preflight


def restart_variant(job: BatchJob, cluster: ClusterConfig) -> str:
    """How the next attempt starts: requeue, chain, here (the script restarts itself) or none."""
    if cluster.restart != "none" and (job.here or cluster.scheduler == "local"):
        return "here"
    return cluster.restart


def section_values(job: BatchJob, cluster: ClusterConfig) -> dict[str, str]:
    """What the placeholders of the template stand for, as bash."""
    # The id of the attempt. Without sbatch, SLURM's variables are those of another job, if any.
    job_id = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
    if job.here or cluster.scheduler == "local":
        job_id = "here"
    errors = "'rank_*.txt'"
    if job.array:
        errors = "$(printf 'rank_%04d.txt' \"$SLURM_ARRAY_TASK_ID\")"
    preflight = ""
    if has_preflight(job, cluster):
        preflight = preflight_command(job, cluster)
    return {
        "site": "\n".join(site_lines(cluster)),
        "workdir": shlex.quote(str(job.workdir)),
        "run": shlex.quote(str(job.run)),
        "job_folder": JOB_FOLDER,
        "id": job_id,
        "errors": errors,
        "logs": LOGS,
        "code": CODE,
        "max_restarts": str(cluster.max_restarts),
        "parent_variable": PARENT,
        "cpus_per_task": str(job.resources.cpus_per_task),
        "preflight": preflight,
        "ranks": ranks_command(job, cluster),
    }


def fill_in(text: str, values: Mapping[str, str]) -> str:
    """`text` with its placeholders replaced. Values are not searched for placeholders."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)


# -------------------------------------------------------------------- header and set-up


def header(job: BatchJob, cluster: ClusterConfig) -> str:
    """First lines of the script: what made it, how to submit it by hand, `#SBATCH` options."""
    script = shlex.quote(str(job.folder / SCRIPT))
    lines = ["#!/bin/bash", f"# Made by: {one_line(job.made_by)}", f"# Run folder: {job.run}"]
    if cluster.scheduler == "local" or job.here:
        return "\n".join([*lines, f"# To run it again by hand: bash {script}"])
    lines += [f"# To submit it again by hand: sbatch {script}", "#"]
    lines += [f"#SBATCH {sbatch_option(option)}" for option in job_options(job, cluster)]
    lines += [f"#SBATCH {option}" for option in cluster.options]  # as the cluster file has them
    return "\n".join(lines)


def options(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The options of sbatch, not yet quoted."""
    return [*job_options(job, cluster), *cluster.options]


def job_options(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The options of sbatch but those that the cluster file lists under `options`."""
    resources = job.resources
    log = "batch_%a.log" if job.array else "batch.log"
    found = [
        f"--job-name={job.name}",
        f"--chdir={job.workdir}",
        f"--output={file_pattern(job.folder / LOGS)}/{log}",
        "--open-mode=append",
        f"--nodes={resources.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        f"--cpus-per-task={resources.cpus_per_task}",
        f"--time={resources.time}",
    ]
    if resources.gpus_per_node:
        found.append(gpu_option(resources.gpus_per_node, cluster))
    if job.array:
        tasks = f"0-{resources.array - 1}"
        if resources.array_limit:
            tasks += f"%{resources.array_limit}"
        found.append(f"--array={tasks}")
    site = {
        "mem": resources.memory,
        "partition": resources.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": cluster.exclude,
    }
    found += [f"--{name}={value}" for name, value in site.items() if value is not None]
    return [
        *found,
        "--requeue" if cluster.restart == "requeue" else "--no-requeue",
        "--kill-on-invalid-dep=yes",
        f"--signal=B:USR1@{cluster.signal_margin_s}",
    ]


def gpu_option(gpus: int, cluster: ClusterConfig) -> str:
    """The option that requests `gpus` GPUs on each node."""
    count = str(gpus)
    if cluster.gpu_type:
        count = f"{cluster.gpu_type}:{gpus}"
    if cluster.gpu_syntax == "gres":
        return f"--gres=gpu:{count}"
    return f"--gpus-per-node={count}"


def one_line(text: str) -> str:
    """`text` on one line: a blank instead of each character that is not printable."""
    return "".join(character if character.isprintable() else " " for character in text)


def site_lines(cluster: ClusterConfig) -> list[str]:
    """Module loads, set-up lines and environment variables of the cluster file."""
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    return lines


# -------------------------------------------------------------------- commands


def python_command(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The interpreter. With Apptainer it runs inside the container; pyxis is an option of srun."""
    container = cluster.container
    if container is None or container.runtime == "pyxis":
        return [job.python]
    words = ["apptainer", "exec"]
    if job.resources.gpus_per_node:
        words.append("--nv")
    for mount in mounts(job, container):
        words += ["--bind", mount]
    return [*words, "--pwd", str(job.workdir), container.image, job.python]


def mounts(job: BatchJob, container: ContainerConfig) -> list[str]:
    """Mounts of the container: working directory, run folder and those of the cluster file."""
    folders = [job.workdir]
    if not job.run.is_relative_to(job.workdir):
        folders.append(job.run)
    for folder in folders:
        check_folder(folder, "a folder that the container mounts", separators=":,")
    return [*(f"{folder}:{folder}" for folder in folders), *container.mounts]


def srun(
    job: BatchJob, cluster: ClusterConfig, *, per_node: int, nodes: int | None = None
) -> list[str]:
    """An srun command that starts `per_node` tasks on each node."""
    nodes = nodes or job.resources.nodes
    # One task that starts all ranks of its node gets the CPUs of all of them.
    cpus = job.resources.cpus_per_task * (job.tasks_per_node // per_node)
    words = [
        "srun",
        "--kill-on-bad-exit=1",
        f"--wait={cluster.kill_wait_s}",
        f"--nodes={nodes}",
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={cpus}",
    ]
    if cluster.container and cluster.container.runtime == "pyxis":
        words += [
            f"--container-image={cluster.container.image}",
            f"--container-mounts={','.join(mounts(job, cluster.container))}",
            f"--container-workdir={job.workdir}",
        ]
    return words


def srun_with_log(words: list[str], log: str) -> str:
    """An srun command, as bash. Its tasks append to `log`, a file name or pattern in LOG."""
    return f'{shlex.join(words)} --output="${{LOG//%/%%}}/{log}" --open-mode=append'


def preflight_command(job: BatchJob, cluster: ClusterConfig) -> str:
    """The command that runs `landiff doctor` on every node before the ranks start, as bash."""
    words = [*srun(job, cluster, per_node=1), *python_command(job, cluster)]
    words += ["-m", "landiff.launchers.cli", "doctor", "--node"]
    if job.resources.gpus_per_node:
        words += ["--gpus", str(job.resources.gpus_per_node)]
    return shlex.join(words)


def ranks_command(job: BatchJob, cluster: ClusterConfig) -> str:
    """The command that starts the ranks, as bash."""
    if cluster.scheduler == "local":
        return ranks_here(job, cluster)
    if not job.trainer:
        return one_process_through_srun(job, cluster)
    if cluster.launcher == "torchrun":
        return ranks_through_torchrun(job, cluster)
    return ranks_through_srun(job, cluster)


def target(job: BatchJob, *rank_options: str) -> list[str]:
    """What python is called with: the module of the job, through launchers/local/rank.py."""
    words = ["-m", "landiff.launchers.local.rank", *rank_options]
    return [*words, str(job.run), job.module, *job.arguments]


def torchrun(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The torchrun command of one node, up to the rendezvous options."""
    words = [*python_command(job, cluster), "-m", "landiff.launchers.local.torchrun"]
    return [*words, f"--nproc-per-node={job.resources.tasks}"]


def ranks_here(job: BatchJob, cluster: ClusterConfig) -> str:
    """Ranks of a trainer through torchrun, or another stage's process, on this machine."""
    if job.trainer:
        words = [*torchrun(job, cluster), "--standalone", *target(job, "--own-log")]
        return f'{shlex.join(words)} >>"$LOG/launch.log" 2>&1'
    words = [*python_command(job, cluster), *target(job)]
    return f'{shlex.join(words)} >>"$LOG/rank_0000.log" 2>&1'


def ranks_through_torchrun(job: BatchJob, cluster: ClusterConfig) -> str:
    """One torchrun on each node, which starts the ranks of that node."""
    per_node = srun_with_log(srun(job, cluster, per_node=1), "node_%4t.log")
    words = [*torchrun(job, cluster), f"--nnodes={job.resources.nodes}", "--rdzv-backend=c10d"]
    rendezvous = '--rdzv-id="$SLURM_JOB_ID-$restart" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
    lines = [per_node, f"{shlex.join(words)} {rendezvous}", shlex.join(target(job, "--own-log"))]
    return " \\\n        ".join(lines)


def ranks_through_srun(job: BatchJob, cluster: ClusterConfig) -> str:
    """One task of srun for each rank, numbered inside of srun."""
    tasks = job.resources.tasks
    start = srun_with_log(srun(job, cluster, per_node=tasks), "rank_%4t.log")
    numbers = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    shell = f"bash -c 'export {numbers} LOCAL_WORLD_SIZE={tasks}; exec \"$@\"' _"
    words = [*python_command(job, cluster), *target(job)]
    return " \\\n        ".join([start, shell, with_srun_log(words)])


def one_process_through_srun(job: BatchJob, cluster: ClusterConfig) -> str:
    """One task of srun on one node, for a stage that is not a trainer."""
    log = "task$T.log" if job.array else "rank_0000.log"
    start = srun_with_log(srun(job, cluster, per_node=1, nodes=1), log)
    words = [*python_command(job, cluster), *target(job)]
    return " \\\n        ".join([start, with_srun_log(words)])


def with_srun_log(words: list[str]) -> str:
    """A command, as bash, with the messages of srun in a file: which rank ended first, and how."""
    return f'{shlex.join(words)} 2>"$LOG/srun$T.log"'
