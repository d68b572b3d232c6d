"""Check that a trainer survives SIGKILL while other processes write its checkpoints.

Each rank has a process that writes its files (`loop.async_save`). A first, undisturbed run counts
the file operations of these processes. Then the run is started repeatedly. Each time, before one of
the operations, that process or its rank is killed. The run must end bit-equal to the undisturbed
one, and after every kill all committed checkpoints must be intact.

The trainer's config needs `loop.async_save` and `loop.on_save_failure` = fatal, so that the death
of a writer ends the run.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

from landiff.training.checkpoint.run_folder import finished_step
from tests.chaos import Plan, Trainer, check_checkpoints, compare_runs, notes_of, tormented
from tests.distributed import ROOT, Nursery, RankError, nursery

HOOKS = Path(__file__).parent / "training" / "writer_kills"
VICTIMS = ("trainer", "writer")
KILLS_BEFORE_GIVING_UP = 3  # attempts for each kill that is asked for


def prove_writer_kill_safety(
    trainer: Trainer,
    folder: Path,
    module: str,
    *,
    kills: int,
    seed: int = 0,
    timeout_s: float = 300.0,
) -> int:
    """Run `trainer` undisturbed and with `kills` kills, and compare the results.

    `module`: the test module, which imports the trainer. Returns the number of places where a
    process can be killed. Raises AssertionError if a run differs from the undisturbed one, or if a
    committed checkpoint is not intact.
    """
    ranks = nursery(module)
    straight = folder / "straight"
    counts = folder / "operations"
    _run(trainer, ranks, straight, timeout_s, {"COUNT_IN": str(counts)})
    places = []
    for rank in range(trainer.world_size):
        operations = len(counts.with_name(f"{counts.name}_{rank}").read_text())
        for number in range(operations):
            places += [f"{rank}:{number}:{victim}" for victim in VICTIMS]
    draw = random.Random(seed)
    delivered = 0
    attempts = 0
    while delivered < kills:
        killed = folder / f"killed_{attempts}"
        committed = 0
        while finished_step(killed) is None:
            environment = {"KILL_AT": draw.choice(places)} if delivered < kills else {}
            attempts += 1
            # A run that resumed has fewer operations left, so that some kills come after its end.
            assert attempts <= KILLS_BEFORE_GIVING_UP * kills + 10, (delivered, attempts)
            delivered += _run(trainer, ranks, killed, timeout_s, environment)
            committed = check_checkpoints(killed, committed)
        compare_runs(trainer, straight, killed)
    return len(places)


def _run(
    trainer: Trainer, ranks: Nursery, run: Path, timeout_s: float, environment: dict[str, str]
) -> bool:
    """Start the trainer with the hooks in its writers. Whether a process was killed.

    Raises RankError when ranks failed for another reason.
    """
    config = trainer.write_config(run)
    notes = notes_of(run)
    notes.mkdir(parents=True, exist_ok=True)
    paths = {"PYTHONPATH": f"{HOOKS}:{ROOT}", "PYTHONHASHSEED": "0"}
    children = ranks.start(
        tormented,
        trainer.world_size,
        (trainer.main, str(config), trainer.loader, str(run.resolve()), Plan("none")),
        folder=notes,
        environment=paths | environment,
    )
    codes = children.wait(timeout_s, grace_s=10.0)
    wanted = "KILL_AT" in environment
    if any(codes) and not wanted:
        raise RankError(f"exit codes {codes}\n{children.output()}")
    victim = environment.get("KILL_AT", "").rpartition(":")[2]
    if any(codes) and victim == "trainer" and -signal.SIGKILL not in codes:
        raise RankError(f"{environment}: exit codes {codes}\n{children.output()}")
    return any(codes)
