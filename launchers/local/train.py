"""The command `landiff train`: checks the config and starts the ranks of a trainer on this machine.

Each rank runs `python -m landiff.training.<trainer> CONFIG_FILE`, which builds the engine and calls
`fit` of training/loop.py. Two wrappers record how it ends: local/torchrun.py runs torchrun, which
starts a local/rank.py for each rank, which runs the trainer in the same process.

Ctrl-C, SIGTERM, SIGHUP and `landiff stop` ask the run to stop: they create the file `stop` in the
run folder. The ranks agree on it at the end of a step, save a checkpoint and exit. A second signal
kills them at once. After Ctrl-C the exit code is 130, so that `train && convert` does not export
a half-trained model; after the others it is 0. If this process is killed, the kernel ends torchrun
and its ranks. Ranks write logs to `job/log`, like those of a submitted run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from landiff.configs import ConfigError, ownership
from landiff.configs.files import write_text
from landiff.configs.loader import write_config
from landiff.configs.ownership import OWNER, Ownership
from landiff.configs.problems import require_none
from landiff.configs.wrong_values import without_consequences
from landiff.launchers.checks import load_with_problems
from landiff.launchers.commands import JobFailed, print_dry_run
from landiff.launchers.local.children import environment, share_cores, stop_signals
from landiff.launchers.local.gpus import check_processes, default_processes, visible_gpus
from landiff.launchers.project.space import check_job_space
from landiff.launchers.run.job_folder import JOB_FOLDER, LAST_ERROR, STOPPED
from landiff.launchers.run.records import remove_markers, write_record
from landiff.launchers.slurm.stage_jobs import command_line
from landiff.launchers.stages import TRAINERS
from landiff.training.checkpoint.errors import error_paths, first_error, read_message
from landiff.training.checkpoint.resume import is_complete
from landiff.training.checkpoint.run_folder import DONE, HANGS, RESOLVED, STOP
from landiff.training.checks import Launch
from landiff.training.config import TrainConfig

REPEAT_REQUEST_S = 1.0


def train_command(args: argparse.Namespace) -> int:
    """Trains one of the three models. Returns the exit code.

    Raises ConfigError for problems found before or by the ranks, and JobFailed if the ranks end
    with another error.
    """
    trainer = TRAINERS[args.stage]
    overrides = list(args.overrides)
    if args.adopt:
        overrides.append("data.adopt=true")
    config, problems = load_with_problems(trainer.config_class, args.config, overrides)
    processes = default_processes(config) if args.nproc is None else args.nproc
    problems += check_processes(processes, visible_gpus())
    problems += trainer.check(config, Launch(max(1, processes)))
    problems = without_consequences([*problems, *check_job_space(config)])
    if args.dry_run:
        print_dry_run(config, f"would train in {config.run} on {processes} process(es)", problems)
    require_none(problems)
    if args.dry_run:
        return 0
    if is_complete(config):
        print(
            f"{config.run} is already trained to step {config.loop.steps} (loop.steps); raise "
            "loop.steps to train on"
        )
        return 0
    command = command_line(args.argv)
    with own_run(config, args.stage, processes, command, take_over=args.take_over) as owned:
        config_file = config.run / RESOLVED
        write_config(config_file, config)
        code = run_trainer(trainer.module, config_file, config.run, processes, owned)
    if code == 0:
        return 0
    message = f"{config.run} failed: {explain_exit(config.run, code)}"
    if code == 2:
        raise ConfigError(message)
    raise JobFailed(message)


def own_run(
    config: TrainConfig, stage: str, processes: int, command: str, *, take_over: bool = False
) -> Ownership:
    """Own the run folder of a config and record what is started there.

    Errors and stack traces of earlier attempts are removed or renamed. Raises OwnedError.
    """
    run = config.run
    owned = ownership.take(run / OWNER, f"run folder {run}", take_over=take_over)
    remove_markers(run)
    for path in error_paths(run):
        path.unlink()
    if (run / HANGS).is_dir():
        (run / HANGS).rename(run / f"{HANGS}.{datetime.now(UTC):%Y%m%dT%H%M%S}")
    write_record(
        run,
        name=run.name,
        stage=stage,
        launcher="train",
        command=command,
        trainer=True,
        steps=config.loop.steps,
        array=None,
        ranks=processes,
        workdir=str(Path.cwd()),
    )
    return owned


def run_trainer(module: str, config_file: Path, run: Path, processes: int, owned: Ownership) -> int:
    """Start the ranks, wait for them and forward requests to stop.

    Returns the exit code of the rank that failed first, or 0. Raises KeyboardInterrupt if Ctrl-C
    ended the run before its last step, with a checkpoint or without.
    """
    child = start_ranks(module, config_file, run, processes, owned)
    request = StopRequest(run)
    signals: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        signals.append(number)
        if len(signals) == 1:
            print(
                f"landiff: signal {signal.Signals(number).name}: stopping after this step; "
                "once more to end at once",
                file=sys.stderr,
            )
            request.start()
        elif number != signal.SIGUSR1:  # `landiff stop` may be repeated
            os.killpg(child.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, on_signal) for number in stop_signals()}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        request.end()
    killed = len(signals) > 1
    finished = (run / DONE).exists()
    if signal.SIGINT in signals and (code == 0 or killed) and not finished:
        raise KeyboardInterrupt
    if code >= 0:
        return code
    if not killed:
        name = signal.Signals(-code).name
        write_text(
            run / JOB_FOLDER / LAST_ERROR,
            f"torchrun, which starts the ranks, was ended by {name}\n",
        )
    return 128 - code


def start_ranks(
    module: str, config_file: Path, run: Path, processes: int, owned: Ownership
) -> subprocess.Popen[bytes]:
    """Start torchrun with the ranks in a process group of its own."""
    env = environment() | {ownership.TOKEN: owned.token}
    share_cores(env, processes)
    torchrun = [sys.executable, "-m", "landiff.launchers.local.torchrun", "--standalone"]
    rank = ["-m", "landiff.launchers.local.rank", "--shared-log", str(run)]
    return subprocess.Popen(
        [*torchrun, f"--nproc-per-node={processes}", *rank, module, str(config_file)],
        env=env,
        start_new_session=True,
    )


class StopRequest:
    """Asks the ranks of a run to stop until they have ended.

    The request is repeated, since ranks that are just starting remove an old one.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="stop", daemon=True)

    def start(self) -> None:
        """Ask the ranks to stop."""
        self._thread.start()

    def end(self) -> None:
        """The ranks have ended: remove the request, if there is one."""
        self._ended.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _repeat(self) -> None:
        write_text(self._run / JOB_FOLDER / STOPPED, "here\n")
        stop = self._run / STOP
        while not self._ended.is_set():
            stop.touch()
            self._ended.wait(REPEAT_REQUEST_S)
        stop.unlink(missing_ok=True)


def explain_exit(run: Path, code: int) -> str:
    """Why the ranks ended: the error of the rank that failed first, or the exit code."""
    error = first_error(run)
    if error is not None:
        return f"{read_message(error)}\n(full error of the rank that failed first: {error})"
    path = run / JOB_FOLDER / LAST_ERROR
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    return f"its ranks ended with exit code {code}"
