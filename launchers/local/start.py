"""Start a trainer's ranks on this machine, through torchrun, and end with their true exit code.

Ctrl-C, SIGTERM, SIGHUP or `landiff stop` asks the run to stop: a `stop` file in the run folder,
which the ranks agree on at the end of a step; they checkpoint and leave. A second signal ends them
at once. After Ctrl-C the command ends with exit code 130, so that `train && convert` does not export
a half-trained model; after the others with 0. If this process is killed, the kernel ends torchrun and
its ranks with it. Ranks write their logs to `job/log`, as those of a submitted run do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from landiff.configs import Config, ownership
from landiff.configs.files import write_text
from landiff.configs.ownership import OWNER, Ownership
from landiff.launchers.checks import count_gpus
from landiff.launchers.local.children import environment, stop_signals
from landiff.launchers.run.records import LAST_ERROR, STOPPED, remove_markers, write_record
from landiff.launchers.slurm.script import JOB_FOLDER
from landiff.training.checkpoint.errors import first_error, read_message
from landiff.training.layout import copy_size

ASK_AGAIN_S = 1.0  # ranks that are just starting take an old request away


def visible_gpus() -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves; known without torch."""
    return count_gpus(Path("/dev"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def default_processes(config: Config) -> int:
    """One per GPU of this machine; without GPUs, as many as one copy of the model needs."""
    return visible_gpus() or copy_size(config)


def own_run(
    config: Config, stage: str, processes: int, command: str, *, take_over: bool = False
) -> Ownership:
    """Own the config's run folder and record there what is started. Raises OwnedError."""
    run = config.run
    owned = ownership.take(run / OWNER, f"run folder {run}", take_over=take_over)
    remove_markers(run)
    for path in (run / "errors").glob("rank_*.txt"):
        path.unlink()
    if (run / "hangs").is_dir():
        (run / "hangs").rename(run / f"hangs.{datetime.now(UTC):%Y%m%dT%H%M%S}")
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
    """Start the ranks and forward a request to stop; returns the exit code of the first failed rank, or 0.

    Raises KeyboardInterrupt when Ctrl-C ended a run before its last step, with a checkpoint or without.
    """
    stop = run / "stop"
    env = environment() | {ownership.TOKEN: owned.token}
    threads = max(1, (os.cpu_count() or 1) // processes)
    env.setdefault("OMP_NUM_THREADS", str(threads))  # unless the user chose
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "landiff.launchers.local.torchrun",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "landiff.launchers.local.rank",
            "--shared-log",
            str(run),
            module,
            str(config_file),
        ],
        env=env,
        start_new_session=True,
    )
    asked = 0
    ended = threading.Event()

    def ask_to_stop() -> None:
        write_text(run / JOB_FOLDER / STOPPED, "here\n")
        while not ended.is_set():
            stop.touch()
            ended.wait(ASK_AGAIN_S)
        stop.unlink(missing_ok=True)

    asking = threading.Thread(target=ask_to_stop, name="stop", daemon=True)
    interrupted = False

    def on_signal(number: int, _frame: object) -> None:
        nonlocal asked, interrupted
        asked += 1
        interrupted = interrupted or number == signal.SIGINT
        if asked == 1:
            print(
                f"landiff: signal {signal.Signals(number).name}: stopping after this step; "
                "once more to end at once",
                file=sys.stderr,
            )
            asking.start()
        elif number != signal.SIGUSR1:  # landiff stop, once more
            os.killpg(child.pid, signal.SIGKILL)

    previous = {s: signal.signal(s, on_signal) for s in stop_signals()}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        ended.set()
        if asked:
            asking.join()
    if interrupted and (code == 0 or asked > 1) and not (run / "done").exists():
        raise KeyboardInterrupt
    if code >= 0:
        return code
    if asked < 2:
        write_text(
            run / JOB_FOLDER / LAST_ERROR,
            f"torchrun, which starts the ranks, was ended by {signal.Signals(-code).name}\n",
        )
    return 128 - code


def explain_exit(run: Path, code: int) -> str:
    """Why the ranks ended with this exit code: the error of the rank that failed first, if known."""
    error = first_error(run)
    if error is not None:
        return f"{read_message(error)}\n(the rank that failed first, in full: {error})"
    path = run / JOB_FOLDER / LAST_ERROR
    return (
        path.read_text(encoding="utf-8").strip()
        if path.exists()
        else f"its ranks ended with exit code {code}"
    )
