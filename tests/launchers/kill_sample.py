"""Kill `landiff sample` inside writes, fsyncs, renames and deletions, and at random moments.

    python -m tests.launchers.kill_sample WORK KILLS SEED CASE...

Runs in forks of this process, so that a kill costs a fraction of a second. Every killed run must
leave whole videos only, and the last one the bytes of an undisturbed run. Prints the kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from landiff.data_pipeline.format.locks import LOCK
from landiff.launchers.config import SampleConfig
from landiff.launchers.results import sample
from landiff.launchers.results.sample_folder import UNFINISHED
from tests.data_pipeline.ingest_helpers import contents, digest
from tests.data_pipeline.kills import Killer, forked, killed
from tests.launchers.random_zoo import sample_config, write_random_zoo

# One video of 6 chunks, with its tokens drawn by segment; 200 prompts or 6 of one frame each.
CASES = {
    "long": {
        "prompts": ("a fox",),
        "num_latent_frames": 20,
        "tokens": {"guidance": 2.0, "context_segments": 1},
    },
    "prompts": {
        "prompts": tuple(f"prompt {number}" for number in range(200)),
        "num_latent_frames": 1,
        "batch_size": 2,
    },
    "few": {
        "prompts": tuple(f"prompt {number}" for number in range(6)),
        "num_latent_frames": 1,
        "batch_size": 2,
    },
}


def watch(killer: Killer) -> None:
    """Count the operations of the child on files."""
    killer.watch(os, "fsync", "replace", "rename", "unlink", "rmdir")
    killer.watch_writes()


def attempt(config: SampleConfig, plan: int, delay_s: float | None) -> bool:
    """Runs `landiff sample` in a fork. Whether it was killed: at an operation or after a time."""
    pid = forked(lambda: sample.sample_videos(config), Killer(plan), watch)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)  # the child is not waited for yet, so the id is its own
    return killed(pid)


def files(folder: Path) -> dict[str, str]:
    """Name -> digest of everything in a folder but its lock."""
    return {name: found for name, found in contents(folder).items() if name != LOCK}


def check_case(case: str, work: Path, zoo: Path, kills: int, draw: random.Random) -> int:
    """Compares a killed run with an undisturbed one. Returns the number of kills."""
    straight = sample_config(zoo, work / case / "straight", **CASES[case])
    record = work / "operations"
    start = time.monotonic()
    assert not killed(forked(lambda: sample.sample_videos(straight), Killer(0), watch, record))
    seconds = time.monotonic() - start
    operations = int(record.read_text())
    wanted = files(straight.out)
    assert not any(UNFINISHED in name for name in wanted)

    disturbed = straight.model_copy(update={"out": work / case / "killed"})
    share = 2 / kills  # of a run, so that most kills come before the end
    done = 0
    while done < kills:
        if draw.random() < 0.7:
            was_killed = attempt(disturbed, draw.randint(1, max(8, int(operations * share))), None)
        else:
            was_killed = attempt(disturbed, 0, draw.uniform(0, seconds * share))
        done += was_killed
        finished = list(disturbed.out.glob("*.mp4"))
        for path in finished:
            assert digest(path) == wanted[path.name], f"{path} is not whole"
        if not was_killed and done < kills:
            draw.choice(finished).unlink()  # all are finished: one of them again
    assert not killed(forked(lambda: sample.sample_videos(disturbed), Killer(0), watch))
    assert files(disturbed.out) == wanted, case
    return done


def main() -> None:
    """Run the cases of the command line."""
    work, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    zoo = write_random_zoo(work / "zoo")
    models = sample.load_models(sample_config(zoo, work), torch.device("cpu"))
    sample.load_models = lambda *_: models  # loaded once for all forks
    done = 0
    for case in sys.argv[4:]:
        done += check_case(case, work, zoo, kills, random.Random(seed))
    print(done)


if __name__ == "__main__":
    main()
