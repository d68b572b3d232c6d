"""A trainer without torch, for what the launcher does around one: 0.1 s a step, a checkpoint every few.

Every step's loss follows from the one before, so a lost or repeated step shows. It reads `stop`, writes
`checkpoints/`, `metrics.jsonl` and `done` as training/run.py does. Rank 0 speaks for all.

    light.py RUN STEPS [FAULT]     FAULT: rank:step:kind, kind one of exit, config, kill, hang, always
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

from configs.base import ConfigError
from training.heartbeat import Heartbeat

HANG_TIMEOUT_S = 3.0


def main() -> None:
    run, steps = Path(sys.argv[1]), int(sys.argv[2])
    fault = sys.argv[3].split(":") if len(sys.argv) > 3 else None
    rank = int(os.environ["RANK"])
    dead = run / f"dead_{os.environ['SLURM_JOB_ID']}_{os.environ.get('SLURM_RESTART_COUNT') or os.environ.get('LANDIFF_RESTART', 0)}"
    saved = sorted((run / "checkpoints").glob("step_????????"))
    step, loss = json.loads((saved[-1] / "state.json").read_text()) if saved else (0, 1)
    signal.signal(signal.SIGTERM, lambda *_: (run / "stop").touch())  # as training.distributed: a wish, not an end
    if rank == 0:
        (run / "stop").unlink(missing_ok=True)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']} on {os.uname().nodename} starts at step {step}, master {os.environ.get('MASTER_ADDR')}, code {__file__}", flush=True)
    with Heartbeat(run, rank, HANG_TIMEOUT_S, grace_s=0.5) as heartbeat:
        while step < steps:
            time.sleep(0.1)
            step += 1
            heartbeat.beat(step)
            loss = zlib.crc32(f"{loss}:{step}".encode())
            if rank == 0:
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, "time": time.time(), "train/loss": loss, "throughput/steps_per_s": 10.0}) + "\n")
            if fault and (rank, step) == (int(fault[0]), int(fault[1])):
                break_down(run / f"broken_{rank}", dead, fault[2])
            if dead.exists():  # a collective would say so
                time.sleep(0.5)
                raise ConnectionError("a peer is gone")
            stopping = (run / "stop").exists()
            if rank == 0 and (step % 10 == 0 or stopping or step == steps):
                save(run, step, loss)
            if stopping:
                print(f"rank {rank} saved step {step} and leaves", flush=True)
                time.sleep(0.3)  # all ranks see the file
                break
    if step == steps and rank == 0:
        (run / "done").write_text(f"{step}\n")


def break_down(marker: Path, dead: Path, kind: str) -> None:
    """Once, or with `always` each time."""
    if marker.exists():
        return
    if kind != "always":
        marker.touch()
    if kind != "hang":
        dead.touch()
    if kind == "config":
        raise ConfigError("data.manifest = gone: there is no such file")
    if kind == "hang":
        time.sleep(1000)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f"{kind}: broken on purpose")


def save(run: Path, step: int, loss: int) -> None:
    folder = run / "checkpoints" / f".step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps([step, loss]))
    final = run / "checkpoints" / f"step_{step:08d}"
    if not final.exists():
        folder.rename(final)


main()
