"""Start a trainer's ranks on this machine, through torchrun, and end with their true exit code.

Ctrl-C or SIGTERM asks the run to stop: a `stop` file in the run folder, which the ranks agree on at the end
of a step; they checkpoint and leave. A second signal ends them at once. After Ctrl-C the command ends
with exit code 130, so that `train && convert` does not export a half-trained model; after SIGTERM with 0.
If this process is killed, torchrun is told by the kernel and ends its workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
STOP_EVERY_S = 1.0


def default_processes() -> int:
    """One per GPU of this machine, or 1."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([v for v in visible.split(",") if v.strip()]))
    return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def environment() -> dict[str, str]:
    """This environment, so that a child finds this very project."""
    env = dict(os.environ)
    env.setdefault("PYTHONUNBUFFERED", "1")
    roots = [str(Path(__file__).resolve().parent.parent), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(roots)
    return env


def run_trainer(module: str, config_file: Path, run: Path, processes: int) -> int:
    """Start the ranks and forward a request to stop; returns the exit code of the first failed rank, or 0.

    Raises KeyboardInterrupt when Ctrl-C ended a run before its last step, with a checkpoint or without.
    """
    stop = run / "stop"
    stop.unlink(missing_ok=True)
    env = environment()
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))  # shared out, unless the user chose
    libc = ctypes.CDLL(None, use_errno=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "launchers.torchrun", "--standalone", f"--nproc-per-node={processes}",
         "-m", "launchers.rank", "--shared-log", str(run), module, str(config_file)], env=env, start_new_session=True,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # torchrun passes SIGTERM on to its workers
    )
    asked = 0
    interrupted = False

    def on_signal(number: int, _frame: object) -> None:
        nonlocal asked, interrupted
        asked += 1
        interrupted = interrupted or number == signal.SIGINT
        if asked == 1:
            print(f"landiff: signal {signal.Signals(number).name}: stopping after this step; once more to end at once", file=sys.stderr)
            stop.touch()
        else:
            os.killpg(child.pid, signal.SIGKILL)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = None
        while code is None:
            try:
                code = child.wait(timeout=STOP_EVERY_S)
            except subprocess.TimeoutExpired:
                if asked:  # starting ranks remove it as the file of an earlier attempt
                    stop.touch()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop.unlink(missing_ok=True)
    if interrupted and (code == 0 or asked > 1) and not (run / "done").exists():
        raise KeyboardInterrupt
    return code
