"""A task of an array: number 3 is killed in its first attempt, number 5 fails in each."""

import os
import signal
import sys
import time
from pathlib import Path

run, task = Path(sys.argv[1]), os.environ["SLURM_ARRAY_TASK_ID"]
time.sleep(0.2)
attempt = run / f"attempt_{task}"
if task == "3" and not attempt.exists():
    attempt.touch()
    os.kill(os.getpid(), signal.SIGKILL)
if task == "5":
    raise RuntimeError("broken for good")
