"""A trainer without torch, for tests of the launcher: 0.1 s a step, a checkpoint every few steps.

Every step's loss follows from the one before, so a lost or repeated step shows. It reads `stop` and
writes `checkpoints/`, `metrics.jsonl` and `done` as training/run.py does. Ranks go step by step
together.

    light.py RUN STEPS [FAULT]

FAULT is rank:step:kind; the kinds are exit, config, kill, hang and always.
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

from landiff.configs.base import ConfigError
from landiff.training.observe.heartbeat import Heartbeat

HANG_TIMEOUT_S = 8.0


def main() -> None:
    run, steps = Path(sys.argv[1]), int(sys.argv[2])
    fault = sys.argv[3].split(":") if len(sys.argv) > 3 else None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restart = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("LANDIFF_RESTART", "0")
    meeting = run / f"meeting_{os.environ['SLURM_JOB_ID']}_{restart}"
    meeting.mkdir(parents=True, exist_ok=True)
    saved = sorted((run / "checkpoints").glob("step_????????"))
    step, loss = json.loads((saved[-1] / "state.json").read_text()) if saved else (0, 1)
    # As in landiff.training.distributed, SIGTERM asks for a stop.
    signal.signal(signal.SIGTERM, lambda *_: (run / "stop").touch())
    if rank == 0:
        (run / "stop").unlink(missing_ok=True)
        cut_torn_line(run / "metrics.jsonl")
    image = Path("/image.txt").read_text() if Path("/image.txt").exists() else "none"
    print(
        f"rank {rank} of {size} on {os.uname().nodename} starts at step {step}, "
        f"master {os.environ.get('MASTER_ADDR')}, code {__file__}, "
        f"image {image}, note {os.environ.get('NOTE')}",
        flush=True,
    )
    meet(meeting, rank, size, step)
    with Heartbeat(run, rank, HANG_TIMEOUT_S, grace_s=2) as heartbeat:
        while step < steps:
            time.sleep(0.1)
            step += 1
            if fault and (rank, step) == (int(fault[0]), int(fault[1])):
                break_down(run / f"broken_{rank}", meeting, fault[2])
            if rank == 0 and (run / "stop").exists():
                # Before the others can be through with this step
                (meeting / "stop_at").write_text(str(step))
            meet(meeting, rank, size, step)
            loss = zlib.crc32(f"{loss}:{step}".encode())
            heartbeat.beat(step)
            stopping = (meeting / "stop_at").exists() and int(
                (meeting / "stop_at").read_text()
            ) == step
            if rank == 0:
                with open(run / "metrics.jsonl", "a") as file:
                    file.write(
                        json.dumps(
                            {
                                "step": step,
                                "time": time.time(),
                                "train/loss": loss,
                                "throughput/steps_per_s": 10.0,
                            }
                        )
                        + "\n"
                    )
                if step % 10 == 0 or stopping or step == steps:
                    save(run, step, loss)
            if stopping:
                print(f"rank {rank} saved step {step} and leaves", flush=True)
                break
    if step == steps and rank == 0:
        (run / "done").write_text(f"{step}\n")


def cut_torn_line(path: Path) -> None:
    """A full disk takes half a line."""
    if path.exists():
        whole = path.read_text()
        path.write_text(whole[: whole.rfind("\n") + 1])


def meet(meeting: Path, rank: int, size: int, step: int) -> None:
    """A collective: wait until all ranks are at this step. Raises when one is gone."""
    mine = meeting / f".{rank}"
    mine.write_text(str(step))
    mine.rename(meeting / str(rank))
    for other in range(size):
        while not (meeting / str(other)).exists() or int((meeting / str(other)).read_text()) < step:
            if (meeting / "dead").exists():
                time.sleep(0.5)  # the one that died is the first to say why
                raise ConnectionError("a peer is gone")
            time.sleep(0.02)


def break_down(marker: Path, meeting: Path, kind: str) -> None:
    """Once, or with `always` each time."""
    if marker.exists():
        return
    if kind != "always":
        marker.touch()
    if kind != "hang":
        (meeting / "dead").touch()
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
