"""Runs planned jobs without sbatch, in this terminal: `--cluster local` and `--here`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from landiff.configs import ownership
from landiff.configs.files import write_text
from landiff.launchers.local.children import environment, stop_signals
from landiff.launchers.run.job_folder import LAST_ERROR, LOGS
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.launchers.slurm.prepare import (
    can_be_skipped,
    done_message,
    own_run_folder,
    prepare_run,
)
from landiff.launchers.slurm.stage_jobs import SubmitPlan

# bash of a child process: the script $2, with its output in the terminal and in the log $1
SCRIPT_WITH_LOG = 'exec > >(exec tee -a "$1") 2>&1; exec bash "$2"'


def run_here(
    plans: Sequence[SubmitPlan],
    cluster: ClusterConfig,
    *,
    skip_done: bool = True,
    take_over: bool = False,
) -> int:
    """Run the jobs one after the other. Returns the exit code of the first that fails, or 0.

    Jobs that depend on a failed one are not run; the others are. Without `skip_done`, only finished
    trainers are skipped.
    """
    failed: dict[str, int] = {}
    skipped: set[str] = set()
    for plan in plans:
        failed_before = [name for name in plan.after if name in failed]
        if failed_before:
            failed[plan.name] = 1
            print(f"{plan.name}: not run, {failed_before[0]} failed", file=sys.stderr)
            continue
        if can_be_skipped(plan, skipped, skip_done):
            skipped.add(plan.name)
            print(done_message(plan))
            continue
        with own_run_folder(plan, take_over=take_over) as owned:
            script = prepare_run(plan, cluster)
            print(f"{plan.name}: {plan.job.folder / LOGS}", flush=True)
            if cluster.scheduler == "slurm":
                # Ranks on other nodes outlive this process, so rank 0 becomes the owner.
                owned.release()
            code, interrupted = run_script(script, owned.token)
        if interrupted:
            print(f"{plan.name}: interrupted; the same command resumes it", file=sys.stderr)
            return code
        if code:
            failed[plan.name] = code
            print(
                f"{plan.name}: ended with {code}; see landiff logs {plan.job.run}", file=sys.stderr
            )
    return next(iter(failed.values()), 0)


def run_script(script: Path, token: str) -> tuple[int, bool]:
    """Run a batch script in a process of its own. Signals to this process are forwarded.

    Its output goes to the terminal and to batch.log. `token`: of the owner of its run folder.
    Returns the exit code, and whether Ctrl-C, SIGTERM or SIGHUP ended it.
    """
    log = script.parent / LOGS / "batch.log"
    shell = ["bash", "-c", SCRIPT_WITH_LOG, "_", str(log), str(script)]
    child = subprocess.Popen(
        [sys.executable, "-m", "landiff.launchers.local.children", *shell],
        env={**environment(), ownership.TOKEN: token},
        start_new_session=True,
    )
    received: set[int] = set()

    def forward(number: int, _frame: object) -> None:
        received.add(number)
        # The script has no handler of SIGHUP.
        child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    previous = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code < 0:  # the shell was killed and could not report it
        name = signal.Signals(-code).name
        write_text(
            script.parent / LAST_ERROR, f"the shell that runs {script} was ended by {name}\n"
        )
        code = 128 - code
    return code, code != 0 and bool(received - {signal.SIGUSR1})
