"""Thin client for SLURM's commands. It uses only output that all versions from 22.05 on share.

It reads `squeue -o` and `sacct -P`, since the schema of `--json` changes with each release.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from landiff.configs.base import ConfigError

Runner = Callable[[Sequence[str]], "Answer"]
# Messages of a controller that does not answer
AWAY = (
    "Unable to contact",
    "Connection refused",
    "Socket timed out",
    "Connection timed out",
    "Zero Bytes were transmitted",
)
RETRY_WAITS_S = (1.0, 2.0, 5.0, 10.0, 20.0)
COMMAND_TIMEOUT_S = 120
QUEUE_FORMAT = "%i|%T|%r|%N|%L"  # the fields of QueuedJob but the exit code
ACTIVE_STATES = (
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


class SlurmError(RuntimeError):
    """A SLURM command failed. The text holds SLURM's own message."""


class SlurmAway(SlurmError):
    """SLURM is not installed here, or its controller does not answer."""


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue or sacct reports it. `id` is 12, or 12_3 for a task of an array."""

    id: str
    state: str  # RUNNING, PENDING, COMPLETED, ...
    reason: str = ""
    nodes: str = ""
    time_left: str = ""
    exit_code: str = ""

    @property
    def array_id(self) -> str:
        """The id without the number of the task."""
        return self.id.split("_")[0]

    @property
    def active(self) -> bool:
        """Whether the job runs, or is going to."""
        return self.state in ACTIVE_STATES


def run_slurm_command(words: Sequence[str]) -> Answer:
    """Run a command. Raises SlurmAway if it is not installed."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        raise SlurmAway(
            f"{words[0]} is not installed here; submit from a login node of the cluster, "
            "or use --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        problem = f"Unable to contact slurm controller (no answer in {COMMAND_TIMEOUT_S} s)"
        return Answer(1, "", f"{words[0]}: {problem}")
    return Answer(done.returncode, done.stdout, done.stderr)


class Slurm:
    """SLURM's commands.

    Methods raise SlurmError with SLURM's message, and SlurmAway if SLURM does not answer.
    """

    def __init__(
        self, runner: Runner = run_slurm_command, retry_waits_s: Sequence[float] = RETRY_WAITS_S
    ) -> None:
        self.runner = runner
        self.retry_waits_s = tuple(retry_waits_s)

    def ask(self, *words: str) -> str:
        """Run a command. Returns its standard output.

        If the controller does not answer, the command is repeated after each of `retry_waits_s`:
        jobs run on while the controller restarts.
        """
        for wait_s in (*self.retry_waits_s, None):
            answer = self.runner(words)
            if answer.code == 0:
                return answer.out
            message = answer.err.strip() or answer.out.strip() or f"exit code {answer.code}"
            if not any(text in message for text in AWAY):
                raise SlurmError(f"{words[0]}: {message}")
            if wait_s is None:
                raise SlurmAway(f"{words[0]}: {message}")
            time.sleep(wait_s)
        raise AssertionError("unreachable")

    def check(self, script: Path, options: Sequence[str] = ()) -> None:
        """Check that the cluster could run `script`. Raises ConfigError with SLURM's reason."""
        try:
            self.ask("sbatch", "--test-only", *options, str(script))
        except SlurmAway:
            raise
        except SlurmError as error:
            raise ConfigError(f"SLURM rejects {script}: {error}; change the cluster file") from None

    def submit(self, script: Path, after: Sequence[str] = (), kind: str = "afterok") -> str:
        """Submit `script`, to start after the jobs `after`. Returns the id of the new job."""
        words = ["sbatch", "--parsable"]
        if after:
            words.append(f"--dependency={','.join(f'{kind}:{job}' for job in after)}")
        lines = self.ask(*words, str(script)).strip().splitlines()
        return lines[-1].split(";")[0]  # ID;CLUSTER in a federation

    def queue(self, jobs: Sequence[str] = ()) -> list[QueuedJob]:
        """What squeue reports of `jobs`, or without `jobs` of all jobs of this user.

        Finished jobs leave the queue after some minutes.
        """
        # With `-j`, squeue fails as a whole if it does not know one of the ids.
        selection = ["-t", "all"] if jobs else ["--me"]
        text = self.ask("squeue", "-h", "-a", *selection, "-o", QUEUE_FORMAT)
        found = []
        for line in filter(None, text.splitlines()):
            fields = line.split("|")
            fields += [""] * (5 - len(fields))
            job = QueuedJob(*fields[:5])
            if not jobs or job.array_id in jobs:
                found.append(job)
        return found

    def accounting(self, jobs: Sequence[str]) -> list[QueuedJob]:
        """What sacct reports of `jobs`. Empty without accounting."""
        if not jobs:
            return []
        fields = "JobID,State,ExitCode"
        try:
            text = self.ask("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", fields)
        except SlurmError:
            return []
        found = []
        for line in filter(None, text.splitlines()):
            job, state, exit_code = line.split("|")[:3]
            # State is for example "CANCELLED by 1000".
            found.append(QueuedJob(job, state.split()[0], exit_code=exit_code))
        return found

    def signal(self, job: str, name: str = "USR1") -> None:
        """Send a signal to the batch script, not to its ranks."""
        self.ask("scancel", "--batch", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        """Cancel a job."""
        self.ask("scancel", job)
