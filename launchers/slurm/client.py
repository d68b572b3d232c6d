"""A thin client for SLURM's commands: what every version from 22.05 on prints the same way.

`squeue -o` and `sacct -P` instead of --json, whose schema changes with each release.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from landiff.configs.base import ConfigError

Runner = Callable[[Sequence[str]], "Answer"]
AWAY = (
    "Unable to contact",
    "Connection refused",
    "Socket timed out",
    "Connection timed out",
    "Zero Bytes were transmitted",
)
RETRY_WAITS_S = (1.0, 2.0, 5.0, 10.0, 20.0)


class SlurmError(RuntimeError):
    """SLURM said no, or does not answer; the message holds its own words."""


class SlurmAway(SlurmError):
    """There is no SLURM here, or its controller does not answer."""


@dataclass(frozen=True)
class Answer:
    """What a command printed and ended with."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue or sacct. `id` is 12, or 12_3 for a task of an array."""

    id: str
    state: str  # RUNNING, PENDING, COMPLETED, ...
    reason: str = ""
    nodes: str = ""
    time_left: str = ""
    exit_code: str = ""

    @property
    def active(self) -> bool:
        return self.state in (
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "SUSPENDED",
            "REQUEUED",
            "REQUEUE_HOLD",
            "SIGNALING",
            "STOPPED",
        )


def run_slurm_command(words: Sequence[str]) -> Answer:
    """The default runner."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise SlurmAway(
            f"{words[0]} is not installed here; submit from a login node of the cluster, or use --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        return Answer(1, "", f"{words[0]}: Unable to contact slurm controller (no answer in 120 s)")
    return Answer(done.returncode, done.stdout, done.stderr)


class Slurm:
    """SLURM's commands. Raises SlurmError with what they said, SlurmAway when nobody answers."""

    def __init__(
        self, runner: Runner = run_slurm_command, retry_waits_s: Sequence[float] = RETRY_WAITS_S
    ) -> None:
        self.runner = runner
        self.retry_waits_s = tuple(retry_waits_s)

    def ask(self, *words: str) -> str:
        """Standard output. A controller that is away is waited for: running jobs do not mind, and it comes back."""
        for wait_s in (*self.retry_waits_s, None):
            answer = self.runner(words)
            if answer.code == 0:
                return answer.out
            said = answer.err.strip() or answer.out.strip() or f"exit code {answer.code}"
            if not any(text in said for text in AWAY):
                raise SlurmError(f"{words[0]}: {said}")
            if wait_s is None:
                raise SlurmAway(f"{words[0]}: {said}")
            time.sleep(wait_s)
        raise AssertionError("unreachable")

    def check(self, script: Path, options: Sequence[str] = ()) -> None:
        """Would this cluster ever run it? Raises ConfigError with SLURM's reason."""
        try:
            self.ask("sbatch", "--test-only", *options, str(script))
        except SlurmAway:
            raise
        except SlurmError as error:
            raise ConfigError(f"SLURM refuses {script}: {error}; change the cluster file") from None

    def submit(self, script: Path, after: Sequence[str] = (), kind: str = "afterok") -> str:
        """The id of the new job, which waits for the jobs `after`."""
        dependency = [f"--dependency={','.join(f'{kind}:{job}' for job in after)}"] if after else []
        return (
            self.ask("sbatch", "--parsable", *dependency, str(script))
            .strip()
            .splitlines()[-1]
            .split(";")[0]
        )

    def queue(self, jobs: Sequence[str] = ()) -> list[QueuedJob]:
        """What squeue knows of these jobs (none given: of all of this user's). A finished job may be gone."""
        if jobs:
            words = [
                "squeue",
                "-h",
                "-a",
                "-t",
                "all",
                "-o",
                "%i|%T|%r|%N|%L",
            ]  # -j fails as a whole for one forgotten id
        else:
            words = ["squeue", "-h", "-a", "--me", "-o", "%i|%T|%r|%N|%L"]
        found = [
            QueuedJob(*(line.split("|") + [""] * 5)[:5])
            for line in self.ask(*words).splitlines()
            if line
        ]
        return [job for job in found if not jobs or job.id.split("_")[0] in jobs]

    def accounting(self, jobs: Sequence[str]) -> list[QueuedJob]:
        """What sacct knows of these jobs; nothing where there is no accounting."""
        if not jobs:
            return []
        try:
            text = self.ask(
                "sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State,ExitCode"
            )
        except SlurmError:
            return []
        rows = [line.split("|") for line in text.splitlines() if line]
        return [QueuedJob(row[0], row[1].split()[0], exit_code=row[2]) for row in rows]

    def signal(self, job: str, name: str = "USR1") -> None:
        """A signal for the batch script alone."""
        self.ask("scancel", "--batch", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        self.ask("scancel", job)
