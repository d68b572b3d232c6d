"""A trainer without torch: 0.05 s a step, ranks that go step by step together, each with a helper.

    light_trainer CONFIG      a JSON file with "run" and "steps"

It reads `stop`, writes `checkpoints/`, `metrics.jsonl` and `done` as training/run.py does.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from landiff.training.checkpoint.run_folder import committed_steps, step_folder
from landiff.training.observe.heartbeat import Heartbeat

SAVE_EVERY = 5


def helper(run: str) -> None:
    """As a process that writes a checkpoint: it holds no pipe that would end it with its parent."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Path(run, f"helper_{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(1000)


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    run, steps = Path(config["run"]), config["steps"]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # As in training, SIGTERM does not end a rank.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(run, f"rank_{rank}").write_text(str(os.getpid()))
    process = multiprocessing.get_context("fork").Process(
        target=helper, args=(str(run),), daemon=True
    )
    process.start()
    step = (committed_steps(run / "checkpoints") or [0])[-1]
    metrics = run / "metrics.jsonl"
    if rank == 0 and metrics.exists():
        lines = [
            line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step
        ]
        metrics.write_text("".join(f"{line}\n" for line in lines))
    print(f"rank {rank} starts at step {step}", flush=True)
    place = run / f"meeting_{os.environ['TORCHELASTIC_RUN_ID']}_{os.environ['MASTER_PORT']}"
    place.mkdir(exist_ok=True)
    with Heartbeat(run, rank, timeout_s=60.0) as heartbeat:
        while step < steps:
            time.sleep(0.05)
            stopping = rank == 0 and (run / "stop").exists()
            step += 1
            meet(place, rank, size, step, stopping)
            heartbeat.beat(step)
            if rank == 0:
                with open(metrics, "a") as file:
                    file.write(
                        json.dumps({"step": step, "time": time.time(), "train/loss": 1 / step})
                        + "\n"
                    )
                if step % SAVE_EVERY == 0 or stopping or step == steps:
                    step_folder(run / "checkpoints", step).mkdir(parents=True, exist_ok=True)
            if (place / f"stop_{step}").exists():
                break
    process.kill()
    process.join()
    if step == steps and rank == 0:
        (run / "done").write_text(f"{step}\n")


def meet(place: Path, rank: int, size: int, step: int, stopping: bool) -> None:
    """A collective. Raises ConnectionError when a peer has ended."""
    if stopping:
        (place / f"stop_{step}").touch()
    (place / f".{rank}").write_text(f"{step} {os.getpid()}")
    (place / f".{rank}").rename(place / str(rank))
    for other in range(size):
        while True:
            path = place / str(other)
            there, pid = map(int, path.read_text().split()) if path.exists() else (-1, 0)
            if there >= step:
                break
            if pid and not alive(pid):
                raise ConnectionError("connection closed by peer")
            time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


main()
