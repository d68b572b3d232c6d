"""One job as text: (what runs, which cluster) -> a batch script. Pure; nothing is looked up.

The script is plain bash, so that it runs on a node outside any container, and it looks after its job:

* a signal ahead of the time limit, before preemption or from `landiff stop` reaches the script alone. It puts
  a `stop` file into the run folder; the ranks agree on the step, save and exit 0; the job is put back in the queue;
* a crash puts it back too, `max_restarts` times and only with a new checkpoint since the last restart;
* a config error never does. The ranks say so in a file, since srun's code is that of the rank it killed last;
* it requeues before it exits and ends non-zero until the run is done, so that no dependent job starts early.

The same text runs without sbatch (`--cluster local`, or inside salloc): then it starts itself again.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from launchers.cluster_config import ClusterConfig, Resources

JOB_FOLDER = "job"  # below the run folder: what launched it
SCRIPT, CODE, LOGS = "job.sbatch", "code", "log"
USER_STOPPED = 75  # exit code of an attempt that saved and ended (EX_TEMPFAIL)


@dataclass(frozen=True)
class Job:
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

    @property
    def folder(self) -> Path:
        return self.run / JOB_FOLDER


def sbatch_text(job: Job, cluster: ClusterConfig) -> str:
    """The batch script of `job` on `cluster`."""
    slurm = cluster.scheduler == "slurm"
    blocks = [
        header(job, cluster), site(cluster), names(job, cluster), "" if cluster.restart == "chain" else FRESH, BOOKKEEPING,
        NEWEST_CHECKPOINT if job.trainer else NO_CHECKPOINTS, requeue(job, cluster),
        STOP_TRAINER if job.trainer else STOP_OTHER, BEGIN,
        RENDEZVOUS if job.trainer and slurm else "",
        preflight(job, cluster) if job.trainer and slurm and cluster.preflight else "",
        f"{ranks(job, cluster)} &\n{WAIT}", ENDING,
    ]
    return "\n".join(block.strip("\n") + "\n" for block in blocks if block)


def options(job: Job, cluster: ClusterConfig) -> list[str]:
    """The #SBATCH options."""
    want = job.resources
    found = [
        f"--job-name={job.name}", f"--chdir={job.workdir}",
        f"--output={str(job.folder / LOGS).replace('%', '%%')}/{'batch_%a.log' if job.array else 'batch.log'}", "--open-mode=append",
        f"--nodes={want.nodes}", f"--ntasks-per-node={want.tasks if job.trainer else 1}",
        f"--cpus-per-task={want.cpus_per_task}", f"--time={want.time}",
    ]
    if want.gpus_per_node:
        count = f"{cluster.gpu_type}:{want.gpus_per_node}" if cluster.gpu_type else str(want.gpus_per_node)
        found.append(f"--gres=gpu:{count}" if cluster.gpu_syntax == "gres" else f"--gpus-per-node={count}")
    if job.array:
        limit = f"%{want.array_limit}" if want.array_limit else ""
        found.append(f"--array=0-{want.array - 1}{limit}")
    for name, value in (
        ("mem", want.memory), ("partition", want.partition), ("account", cluster.account), ("qos", cluster.qos),
        ("constraint", cluster.constraint), ("reservation", cluster.reservation), ("exclude", cluster.exclude),
    ):
        if value is not None:
            found.append(f"--{name}={value}")
    found += ["--requeue" if cluster.restart == "requeue" else "--no-requeue", "--kill-on-invalid-dep=yes",
              f"--signal=B:USR1@{cluster.signal_margin_s}"]
    return [*found, *cluster.options]


def header(job: Job, cluster: ClusterConfig) -> str:
    lines = ["#!/bin/bash", f"# Made by: {' '.join(job.made_by.splitlines())}", f"# Run folder: {job.run}"]
    if cluster.scheduler == "slurm" and not job.here:
        lines += [f"# Once more, by hand: sbatch {shlex.quote(str(job.folder / SCRIPT))}", "#"]
        lines += [f"#SBATCH {option if option in cluster.options else shlex.quote(option)}" for option in options(job, cluster)]
    else:
        lines += [f"# Once more, by hand: bash {shlex.quote(str(job.folder / SCRIPT))}"]
    return "\n".join(lines)


def site(cluster: ClusterConfig) -> str:
    """Module loads, set-up lines and variables of the cluster file."""
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    return "\n".join(["", "# The site", *lines]) if lines else ""


def names(job: Job, cluster: ClusterConfig) -> str:
    """Constants of this job; `T` tells the tasks of an array apart."""
    quoted = shlex.quote
    return f"""
set -uo pipefail
cd {quoted(str(job.workdir))} || exit 1
RUN={quoted(str(job.run))}
JOB=$RUN/{JOB_FOLDER}
T=${{SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}}
LOG=$JOB/{LOGS}
DONE=$RUN/done$T
MAX_RESTARTS={cluster.max_restarts}
restart=${{SLURM_RESTART_COUNT:-${{LANDIFF_RESTART:-0}}}}
# The code of the day it was submitted, not today's working tree
export PYTHONPATH=$JOB/{CODE} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{job.resources.cpus_per_task}}}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${{TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$RUN/hangs/nccl_rank_
mkdir -p "$LOG" "$RUN/hangs"
"""


FRESH = r"""
[ "$restart" != 0 ] || rm -f "$JOB/state$T" "$JOB/stopped"   # submitted anew: old crashes do not count
"""

BOOKKEEPING = r"""
# What has to outlive an attempt: crashes so far, restarts in a row without a new checkpoint, the newest
# checkpoint at the last restart (- before the first), and whether an attempt is running.
crashes=0 stalls=0 from=- phase=new
[ ! -e "$JOB/state$T" ] || . "$JOB/state$T"
remember() {
    printf 'crashes=%s stalls=%s from=%s phase=%s\n' "$crashes" "$stalls" "$from" "$phase" >"$JOB/.state$T" &&
        mv "$JOB/.state$T" "$JOB/state$T"
}
say() { echo "$(date -Is) $*"; }
give_up() { # CODE WHY
    say "giving up: $2"
    echo "$2" >"$JOB/given_up$T"; phase=ended; remember
    leave_chain   # those queued behind would find the same
    exit "$1"
}
leave_chain() { [ ! -e "$JOB/chain" ] || grep -vx "${SLURM_JOB_ID:-}" "$JOB/chain" | xargs -r scancel; }
count_restart() { # crash: ranks failed. outside: a node died, or a stop was asked for
    local now progress=yes; now=$(newest)
    [ "$from" = - ] || [ "$now" != "$from" ] || progress=no
    [ $progress = yes ] && stalls=0 || stalls=$((stalls + 1))
    if [ "$1" = crash ]; then
        crashes=$((crashes + 1))
        [ $crashes -le $MAX_RESTARTS ] || give_up 1 "crashed $crashes times, max_restarts = $MAX_RESTARTS"
        [ $progress = yes ] || [ "$now" = any ] || give_up 1 "crashed again without a new checkpoint since the last restart (${now:-none yet})"
    elif [ "$now" != any ] && [ $stalls -gt $MAX_RESTARTS ]; then
        give_up 1 "restarted $stalls times without a new checkpoint (${now:-none yet}), max_restarts = $MAX_RESTARTS"
    fi
    from=$now
}
show_failure() { # the rank that failed first, first
    local first; first=$(grep -H '^time:' "$RUN"/errors/*.txt 2>/dev/null | sort -t: -k3 | head -n 1 | cut -d: -f1)
    [ -z "$first" ] || { echo "---- $first"; tail -n 30 "$first"; echo "----"; }
    for first in "$RUN"/hangs/rank_*.txt; do [ ! -s "$first" ] || { echo "---- hang: $first"; head -n 30 "$first"; break; }; done
}
"""

NEWEST_CHECKPOINT = r"""
newest() { ls -1 "$RUN/checkpoints" 2>/dev/null | grep -xE 'step_[0-9]+' | sort -V | tail -n 1; }
"""

NO_CHECKPOINTS = r"""
newest() { echo any; }   # goes on where it was, unit by unit
"""

BEGIN = r"""
say "job ${SLURM_JOB_ID:-here} restart $restart on ${SLURM_JOB_NODELIST:-$(hostname)}"
[ ! -e "$DONE" ] || { say "already done"; exit 0; }
rm -f "$JOB/given_up$T" "$JOB/config_error$T" "$RUN/stop" "$RUN"/hangs/rank_*.txt
[ "$phase" != running ] || count_restart outside   # the last attempt never ended: its node died
phase=running; remember
asked= ranks=
on_signal() { [ -n "$asked" ] || say "signal $1: asking for a stop"; asked=$1; stop_ranks; }
for name in USR1 TERM INT; do trap "on_signal $name" $name; done
"""

RENDEZVOUS = r"""
# The first node's name resolves on all nodes; the port differs between jobs on a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
"""

ENDING = r"""
rm -f "$RUN/stop"
say "ended with $rc${asked:+ after signal $asked}"
if finished; then phase=ended; remember; say "done"; exit 0; fi
[ $rc = 0 ] || [ -n "$asked" ] || show_failure
[ ! -e "$JOB/config_error$T" ] || give_up 2 "a config error, which the next attempt would meet again: $(cat "$JOB/config_error$T")"
phase=ended
if [ -e "$JOB/stopped" ]; then remember; leave_chain; say "stopped by landiff stop; submit again to go on"; exit 75; fi
if [ -n "$asked" ] || [ $rc = 0 ]; then count_restart outside; else count_restart crash; fi
remember
again
exit $((rc ? rc : 75))
"""

REQUEUE = r"""
again() { # before this script ends, or dependent jobs would see it fail
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} try state
    id=${id:-$SLURM_JOB_ID}
    for try in $(seq 60); do
        state=$(scontrol show job -o "$id" 2>/dev/null | grep -o ' JobState=[A-Z_]*')
        [ -n "$state" ] || { sleep 5; continue; }            # the controller is away
        [ "$state" = " JobState=RUNNING" ] || { say "no requeue:$state"; return; }   # cancelled, or requeued already
        say "requeueing"
        if scontrol requeue "$id"; then sleep 60; return; fi
        sleep 5
    done
    say "could not requeue"
}
"""

LEAVE_TO_CHAIN = r"""
again() { say "the next job of the chain goes on"; }
"""

NEVER_AGAIN = r"""
again() { say "not restarted (restart = none); submit again to go on"; }
"""

LOOP = r"""
again() {
    [ "$asked" != INT ] && [ "$asked" != TERM ] || return   # a person, or the end of the allocation
    say "starting again"; LANDIFF_RESTART=$((restart + 1)) exec bash "$0"
}
"""

def requeue(job: Job, cluster: ClusterConfig) -> str:
    """How the next attempt comes about."""
    if cluster.restart == "none":
        return NEVER_AGAIN
    if job.here or cluster.scheduler == "local":
        return LOOP
    return {"requeue": REQUEUE, "chain": LEAVE_TO_CHAIN}[cluster.restart]


def python_command(job: Job, cluster: ClusterConfig) -> list[str]:
    """The interpreter, inside the container where there is one that srun does not know of."""
    container = cluster.container
    if container is None or container.runtime == "pyxis":
        return [job.python]
    mounts = [part for mount in (f"{job.workdir}:{job.workdir}", *container.mounts) for part in ("--bind", mount)]
    gpu = ["--nv"] if job.resources.gpus_per_node else []
    return ["apptainer", "exec", *gpu, *mounts, "--pwd", str(job.workdir), container.image, job.python]


def srun(job: Job, cluster: ClusterConfig, per_node: int, nodes: int | None = None) -> list[str]:
    nodes = nodes or job.resources.nodes
    processes = job.resources.tasks if job.trainer else 1
    cpus = job.resources.cpus_per_task * (processes // per_node)  # a single process of a node gets what all its ranks would
    words = ["srun", "--kill-on-bad-exit=1", f"--wait={cluster.kill_wait_s}", f"--nodes={nodes}", f"--ntasks={nodes * per_node}",
             f"--ntasks-per-node={per_node}", f"--cpus-per-task={cpus}"]
    if cluster.container and cluster.container.runtime == "pyxis":
        mounts = ",".join([f"{job.workdir}:{job.workdir}", *cluster.container.mounts])
        words += [f"--container-image={cluster.container.image}", f"--container-mounts={mounts}", f"--container-workdir={job.workdir}"]
    return words


def preflight(job: Job, cluster: ClusterConfig) -> str:
    """A look at every node before the ranks start; the bad one is named."""
    command = [*srun(job, cluster, per_node=1), *python_command(job, cluster), "-m", "launchers.cli", "doctor", "--node"]
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


def ranks(job: Job, cluster: ClusterConfig) -> str:
    """The command that starts the ranks, as bash."""
    target = ["launchers.rank", str(job.run), job.module, *job.arguments]
    python, tasks = python_command(job, cluster), job.resources.tasks
    through_torchrun = job.trainer and (cluster.launcher == "torchrun" or cluster.scheduler == "local")
    if through_torchrun:
        torchrun = [*python, "-m", "torch.distributed.run", f"--nproc-per-node={tasks}"]
        target.insert(1, "--own-log")
        if cluster.scheduler == "local":
            command = shlex.join([*torchrun, "--standalone", "-m", *target]) + ' >>"$LOG/launch.log" 2>&1'
        else:
            torchrun += [f"--nnodes={job.resources.nodes}", "--rdzv-backend=c10d"]
            command = (f'{shlex.join(srun(job, cluster, per_node=1))} --output="$LOG/node_%4t.log" --open-mode=append \\\n'
                       f'    {shlex.join(torchrun)} --rdzv-id="$SLURM_JOB_ID-$restart" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \\\n'
                       f'    -m {shlex.join(target)}')
    elif cluster.scheduler == "local":
        command = f'{shlex.join([*python, "-m", *target])} >>"$LOG/rank_0000.log" 2>&1'
    elif job.trainer:
        command = (f'{shlex.join(srun(job, cluster, per_node=tasks))} --output="$LOG/rank_%4t.log" --open-mode=append \\\n'
                   f"    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={tasks}; exec \"$@\"' _ \\\n"
                   f'    {shlex.join([*python, "-m", *target])}')
    else:
        log = "task$T.log" if job.array else "rank_0000.log"
        command = (f'{shlex.join(srun(job, cluster, per_node=1, nodes=1))} --output="$LOG/{log}" --open-mode=append \\\n'
                   f'    {shlex.join([*python, "-m", *target])}')
    return command


STOP_TRAINER = r"""
# Never a signal to the ranks: it would end torchrun and the data loaders' helpers. They look at this file.
stop_ranks() { touch "$RUN/stop"; }
finished() { [ -e "$DONE" ]; }
"""

STOP_OTHER = r"""
stop_ranks() { kill -TERM "$ranks" 2>/dev/null; }   # commits unit by unit; the next attempt goes on
finished() { [ $rc = 0 ] && touch "$DONE"; }
"""

WAIT = r"""
ranks=$!
rc=0
while :; do
    # Asked again and again: ranks that are just starting take an old request away.
    if [ -n "$asked" ]; then stop_ranks; sleep 1; else wait $ranks; rc=$?; fi
    kill -0 $ranks 2>/dev/null || break
done
[ -z "$asked" ] || { wait $ranks; rc=$?; }
"""
