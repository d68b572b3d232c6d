"""The queue of `landiff demo`: videos wait in order, and one at a time is generated.

Jobs live in the server, not in a connection: a page that is loaded again finds its job by its id.
Torch-free.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from typing import Literal

from landiff.configs.base import ConfigError
from landiff.configs.durations import duration
from landiff.launchers.demo.requests import DemoRequest

MAX_WAITING = 32  # jobs
MAX_KEPT = 1000  # jobs in memory, ended ones included

JobState = Literal["waiting", "running", "finished", "cancelled", "failed"]
ENDED = ("finished", "cancelled", "failed")


class Cancelled(Exception):
    """Ends the generation of a video that nobody wants any more."""


class Job:
    """One video of the queue: what was asked for, and how far it is.

    id: cannot be guessed; who knows it may cancel the job.
    preview: coarse frames of the video in work as JPEG; None before the first.
    error: of a failed job.
    """

    def __init__(self, request: DemoRequest) -> None:
        self.id = secrets.token_hex(16)
        self.request = request
        self.state: JobState = "waiting"
        self.preview: bytes | None = None
        self.error = ""
        self._cancel = threading.Event()
        self._what = ""
        self._done = 0
        self._total = 0
        self._first = 0
        self._started = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether nothing about the job will change any more."""
        return self.state in ENDED

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for the end of the job."""
        return self._cancel.is_set()

    def report(self, what: str, done: int, total: int) -> None:
        """Records progress, as a `SampleProgress`. Raises Cancelled after `cancel`."""
        if what != self._what:
            self._first = done
            self._started = time.monotonic()
        self._what, self._done, self._total = what, done, total
        if self._cancel.is_set():
            raise Cancelled

    @property
    def fraction(self) -> float:
        """Part of the current count that is done."""
        return self._done / self._total if self._total else 0.0

    @property
    def progress(self) -> str:
        """What is being done, with the time left: `sampling step 12 of 20, 0:05 left`."""
        names = {"tokens": "token", "latents": "sampling step", "models": "loading model"}
        if not self._what:
            return "starting"
        text = f"{names.get(self._what, self._what)} {self._done} of {self._total}"
        work = self._done - self._first
        if work > 0:
            left = (self._total - self._done) * (time.monotonic() - self._started) / work
            text += f", {duration(left)} left"
        return text

    def cancel(self) -> None:
        """Asks for the end of the job. A video in work ends with the current step."""
        self._cancel.set()


class JobQueue:
    """Jobs in the order in which they came. Thread-safe."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False

    def add(self, request: DemoRequest) -> Job:
        """A new job at the end of the queue. Raises ConfigError if the queue is full."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                raise ConfigError(f"{MAX_WAITING} videos are waiting already; try again later")
            job = Job(request)
            self._jobs[job.id] = job
            self._waiting.append(job)
            while len(self._jobs) > MAX_KEPT:
                self._jobs.popitem(last=False)
            self._changed.notify()
            return job

    def find(self, job_id: object) -> Job | None:
        """The job with this id."""
        with self._changed:
            return self._jobs.get(job_id) if isinstance(job_id, str) else None

    def cancel(self, job_id: object) -> None:
        """Ends a job: at once if it waits, else with its current step."""
        with self._changed:
            job = self._jobs.get(job_id) if isinstance(job_id, str) else None
            if job is None:
                return
            job.cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "cancelled"

    def jobs_before(self, job: Job) -> int:
        """Jobs that are generated before this one, that in work included."""
        with self._changed:
            running = sum(other.state == "running" for other in self._jobs.values())
            return running + self._waiting.index(job) if job in self._waiting else 0

    def take(self) -> Job | None:
        """The next job, which is running from now on. Waits for one; None after `close`."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            job = self._waiting.pop(0)
            job.state = "running"
            return job

    def close(self) -> None:
        """Ends the queue: the job in work is cancelled, and `take` returns None."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.cancel()
            self._changed.notify_all()
