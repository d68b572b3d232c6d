"""One job as text: (what runs, which cluster) -> a batch script. Pure; nothing is looked up.

The script is plain bash, so that it runs on a node outside any container, and it looks after its job:

* a signal ahead of the time limit, before preemption or from `landiff stop` reaches the script alone. It puts
  a `stop` file into the run folder; the ranks agree on the step, save and exit 0; the job is put back in the queue;
* a crash puts it back too, `max_restarts` times and only with a new checkpoint since the last crash;
* a config error never does. The ranks say so in a file, since srun's code is that of the rank it killed last;
* it requeues before it exits and ends non-zero until the run is done, so that no dependent job starts early.

The same text runs without sbatch (`--cluster local`, or inside salloc): then it starts itself again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from landiff.launchers.local.children import PARENT
from landiff.launchers.slurm import blocks
from landiff.launchers.slurm.cluster_config import ClusterConfig, ContainerConfig, Resources
from landiff.launchers.slurm.script_values import (
    check_folder,
    check_job_name,
    check_line,
    file_pattern,
    sbatch_option,
)

JOB_FOLDER = "job"  # below the run folder: what launched it
SCRIPT, CODE, LOGS = "job.sbatch", "code", "log"


@dataclass(frozen=True)
class BatchJob:
    """What runs: a Python module with arguments, in a run folder. All paths are absolute."""

    name: str
    run: Path
    workdir: Path
    module: str
    arguments: tuple[str, ...]
    resources: Resources
    trainer: bool  # ranks that save checkpoints and look at `stop`; else one process that goes on where it was
    array: bool = False
    made_by: str = "landiff submit"
    python: str = "python3"
    here: bool = False  # without sbatch: in this shell, or in this allocation

    def __post_init__(self) -> None:
        """Raise ConfigError for values that a script cannot hold."""
        check_job_name(self.name, "the name of the job")
        check_folder(self.run, "the run folder")
        check_folder(self.workdir, "the working directory", separators="")
        check_line(self.python, "python")
        check_line(self.module, "the module")

    @property
    def folder(self) -> Path:
        return self.run / JOB_FOLDER


def sbatch_text(job: BatchJob, cluster: ClusterConfig) -> str:
    """The batch script of `job` on `cluster`. Raises ConfigError for names that SLURM takes apart."""
    slurm = cluster.scheduler == "slurm"
    if slurm:  # which drops a backslash from the name of a log file
        check_folder(job.run, "the run folder", separators="\\")
    parts = [
        header(job, cluster),
        blocks.EARLY,
        site(cluster),
        names(job, cluster),
        "" if cluster.restart == "chain" else blocks.FRESH,
        blocks.BOOKKEEPING,
        blocks.NEWEST_CHECKPOINT if job.trainer else blocks.NO_CHECKPOINTS,
        requeue(job, cluster),
        blocks.STOP_TRAINER if job.trainer else blocks.STOP_OTHER,
        blocks.BEGIN,
        blocks.HANGS if job.trainer else "",
        blocks.RENDEZVOUS if job.trainer and slurm else "",
        preflight(job, cluster) if job.trainer and slurm and cluster.preflight else "",
        blocks.RANKS % ranks(job, cluster),
        blocks.ENDING,
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def options(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The #SBATCH options."""
    want = job.resources
    found = [
        f"--job-name={job.name}",
        f"--chdir={job.workdir}",
        f"--output={file_pattern(job.folder / LOGS)}/{'batch_%a.log' if job.array else 'batch.log'}",
        "--open-mode=append",
        f"--nodes={want.nodes}",
        f"--ntasks-per-node={want.tasks if job.trainer else 1}",
        f"--cpus-per-task={want.cpus_per_task}",
        f"--time={want.time}",
    ]
    if want.gpus_per_node:
        count = (
            f"{cluster.gpu_type}:{want.gpus_per_node}"
            if cluster.gpu_type
            else str(want.gpus_per_node)
        )
        found.append(
            f"--gres=gpu:{count}" if cluster.gpu_syntax == "gres" else f"--gpus-per-node={count}"
        )
    if job.array:
        limit = f"%{want.array_limit}" if want.array_limit else ""
        found.append(f"--array=0-{want.array - 1}{limit}")
    for name, value in (
        ("mem", want.memory),
        ("partition", want.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("constraint", cluster.constraint),
        ("reservation", cluster.reservation),
        ("exclude", cluster.exclude),
    ):
        if value is not None:
            found.append(f"--{name}={value}")
    found += [
        "--requeue" if cluster.restart == "requeue" else "--no-requeue",
        "--kill-on-invalid-dep=yes",
        f"--signal=B:USR1@{cluster.signal_margin_s}",
    ]
    return [*found, *cluster.options]


def header(job: BatchJob, cluster: ClusterConfig) -> str:
    lines = ["#!/bin/bash", f"# Made by: {_comment(job.made_by)}", f"# Run folder: {job.run}"]
    if cluster.scheduler == "slurm" and not job.here:
        lines += [f"# Once more, by hand: sbatch {shlex.quote(str(job.folder / SCRIPT))}", "#"]
        lines += [
            f"#SBATCH {option if option in cluster.options else sbatch_option(option)}"
            for option in options(job, cluster)
        ]
    else:
        lines += [f"# Once more, by hand: bash {shlex.quote(str(job.folder / SCRIPT))}"]
    return "\n".join(lines)


def _comment(text: str) -> str:
    """`text` on one line, whatever characters it holds."""
    return "".join(character if character.isprintable() else " " for character in text)


def site(cluster: ClusterConfig) -> str:
    """Module loads, set-up lines and variables of the cluster file."""
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    return "\n".join(["", "# The site", *lines]) if lines else ""


def names(job: BatchJob, cluster: ClusterConfig) -> str:
    """Constants of this job; `T` tells the tasks of an array apart."""
    quoted = shlex.quote
    # Here, without SLURM's word on it, the ranks share the cores out among themselves.
    own = (
        "here"
        if job.here or cluster.scheduler == "local"
        else "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
    )
    errors = "$(printf 'rank_%04d.txt' \"$SLURM_ARRAY_TASK_ID\")" if job.array else "'rank_*.txt'"
    # What this script starts ends with it; under SLURM that is SLURM's task
    parent = f"export {PARENT}=$$\n" if cluster.scheduler == "local" else ""
    threads = (
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{job.resources.cpus_per_task}}}\n"
        if cluster.scheduler == "slurm"
        else ""
    )
    return f"""
set -uo pipefail
cd {quoted(str(job.workdir))} || exit 1
RUN={quoted(str(job.run))}
JOB=$RUN/{JOB_FOLDER}
T=${{SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}}
ID={own}
ERRORS={errors}
LOG=$JOB/{LOGS}
DONE=$RUN/done$T
MAX_RESTARTS={cluster.max_restarts}
restart=${{SLURM_RESTART_COUNT:-${{LANDIFF_RESTART:-0}}}}
# The code of the day it was submitted, not today's working tree
export PYTHONPATH=$JOB/{CODE} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
{parent}{threads}mkdir -p "$LOG"
"""


def requeue(job: BatchJob, cluster: ClusterConfig) -> str:
    """How the next attempt comes about."""
    if cluster.restart == "none":
        return blocks.NEVER_AGAIN
    if job.here or cluster.scheduler == "local":
        return blocks.LOOP
    return {"requeue": blocks.REQUEUE, "chain": blocks.LEAVE_TO_CHAIN}[cluster.restart]


def python_command(job: BatchJob, cluster: ClusterConfig) -> list[str]:
    """The interpreter, inside the container where there is one that srun does not know of."""
    container = cluster.container
    if container is None or container.runtime == "pyxis":
        return [job.python]
    binds = [part for mount in mounts(job, container) for part in ("--bind", mount)]
    gpu = ["--nv"] if job.resources.gpus_per_node else []
    return [
        "apptainer",
        "exec",
        *gpu,
        *binds,
        "--pwd",
        str(job.workdir),
        container.image,
        job.python,
    ]


def mounts(job: BatchJob, container: ContainerConfig) -> list[str]:
    """What the ranks must see: where they work and where they write; and what the cluster file adds."""
    own = [job.workdir, *([] if job.run.is_relative_to(job.workdir) else [job.run])]
    for folder in own:
        check_folder(folder, "a folder that the container mounts", separators=":,")
    return [*(f"{folder}:{folder}" for folder in own), *container.mounts]


def srun(
    job: BatchJob, cluster: ClusterConfig, per_node: int, nodes: int | None = None
) -> list[str]:
    nodes = nodes or job.resources.nodes
    processes = job.resources.tasks if job.trainer else 1
    cpus = job.resources.cpus_per_task * (
        processes // per_node
    )  # a single process of a node gets what all its ranks would
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


def preflight(job: BatchJob, cluster: ClusterConfig) -> str:
    """A look at every node before the ranks start; the bad one is named."""
    command = [
        *srun(job, cluster, per_node=1),
        *python_command(job, cluster),
        "-m",
        "landiff.launchers.cli",
        "doctor",
        "--node",
    ]
    if job.resources.gpus_per_node:
        command += ["--gpus", str(job.resources.gpus_per_node)]
    return f"""
say "pre-flight on every node"
rm -rf "$JOB/preflight"; mkdir -p "$JOB/preflight"
{shlex.join(command)} --report "$JOB/preflight" >>"$LOG/preflight.log" 2>&1
code=$?
if [ $code != 0 ] && [ -z "$asked" ]; then
    cat "$JOB"/preflight/*.bad 2>/dev/null || tail -n 20 "$LOG/preflight.log"
    bad=$(cd "$JOB/preflight" && ls -1 ./*.bad 2>/dev/null | sed 's,./,,; s,.bad$,,' | paste -sd ,)
    give_up 1 "pre-flight failed (exit code $code) on ${{bad:-a node that could not say so}}; leave it out with  exclude: ${{bad:-NODE}}  in the cluster file"
fi
"""


def ranks(job: BatchJob, cluster: ClusterConfig) -> str:
    """The command that starts the ranks, as bash."""
    target = ["landiff.launchers.local.rank", str(job.run), job.module, *job.arguments]
    python, tasks = python_command(job, cluster), job.resources.tasks
    own_words = ' 2>"$LOG/srun$T.log"'  # of srun: which rank ended first, and how
    through_torchrun = job.trainer and (
        cluster.launcher == "torchrun" or cluster.scheduler == "local"
    )
    if through_torchrun:
        torchrun = [*python, "-m", "landiff.launchers.local.torchrun", f"--nproc-per-node={tasks}"]
        target.insert(1, "--own-log")
        if cluster.scheduler == "local":
            command = (
                shlex.join([*torchrun, "--standalone", "-m", *target]) + ' >>"$LOG/launch.log" 2>&1'
            )
        else:
            torchrun += [f"--nnodes={job.resources.nodes}", "--rdzv-backend=c10d"]
            command = (
                f'{shlex.join(srun(job, cluster, per_node=1))} --output="${{LOG//%/%%}}/node_%4t.log" --open-mode=append \\\n'
                f'    {shlex.join(torchrun)} --rdzv-id="$SLURM_JOB_ID-$restart" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \\\n'
                f"    -m {shlex.join(target)}"
            )
    elif cluster.scheduler == "local":
        command = f'{shlex.join([*python, "-m", *target])} >>"$LOG/rank_0000.log" 2>&1'
    elif job.trainer:
        command = (
            f'{shlex.join(srun(job, cluster, per_node=tasks))} --output="${{LOG//%/%%}}/rank_%4t.log" --open-mode=append \\\n'
            f"    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={tasks}; exec \"$@\"' _ \\\n"
            f"    {shlex.join([*python, '-m', *target])}{own_words}"
        )
    else:
        log = "task$T.log" if job.array else "rank_0000.log"
        command = (
            f'{shlex.join(srun(job, cluster, per_node=1, nodes=1))} --output="${{LOG//%/%%}}/{log}" --open-mode=append \\\n'
            f"    {shlex.join([*python, '-m', *target])}{own_words}"
        )
    return command
