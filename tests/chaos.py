"""Check that a trainer survives SIGKILL at any moment.

A run that is killed again and again must end bit-equal to one that never is.

A nursery forks the ranks (tests/distributed.py). Each child counts its file operations on the run
folder: open for writing, write, fsync, rename, mkdir, unlink, rmdir, and files written in one call
by native code (safetensors, torch.save). A first, undisturbed run records them. Then the run is
started repeatedly, each time with one planned kill:

    save   a rank dies before, within or after the n-th operation of a save (within a write: half
           of it is done)
    start  a rank dies at the n-th operation before its first save: cleaning up, cutting metrics,
           logging
    clock  the parent kills at a random moment

In half of the cases the other ranks die at once too, in the other half they have to notice. The
operations of a save are visited in a random order without repetition, so that enough kills visit
them all. After every kill all committed checkpoints must be intact, and the newest must not be
older than before.

The code under test is unchanged.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import io
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from landiff.training.checkpoint.files import FileList, difference
from landiff.training.checkpoint.run_folder import (
    CONFIG,
    EVENTS,
    FILES,
    STATE,
    committed_steps,
    finished_step,
    read_metrics,
    step_folder,
)
from landiff.training.observe.events import read_events
from tests.distributed import Nursery, RankError, nursery

TIMING = ("time", "start/", "throughput/", "data/", "memory/")  # what differs between equal runs
# After one operation is before the next, but for renames of one rank that others may see.
MOMENTS = {
    "write": ("within",),
    "rename": ("before", "after"),
    "replace": ("before", "after"),
} | dict.fromkeys(("open", "fsync", "mkdir", "unlink", "remove", "rmdir"), ("before",))


@dataclass(frozen=True)
class Trainer:
    """The trainer under test.

    main: function that is called with the path of a config, for example
        "landiff.training.tokenizer.__main__:main".
    write_config: writes the config of a run folder and returns its path. Configs differ in the run
        folder only.
    loader: class whose `next_batch` shows the order of samples.
    read: returns what must be equal in two checkpoints, by default hashes of the files.
    """

    main: str
    write_config: Callable[[Path], Path]
    world_size: int
    loader: str = "landiff.data_pipeline.loading.loader:Loader"
    read: Callable[[Path], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Plan:
    """One kill."""

    kind: str  # "save", "start", "clock", or "none"
    rank: int = 0
    step: int = 0  # save: of which step
    index: int = 0  # save, start: of which operation
    moment: str = "before"
    delay_s: float = 0.0  # clock
    everybody: bool = False  # the other ranks die at once too


@dataclass
class Report:
    """Summary of a test."""

    plans: list[Plan] = field(default_factory=list)
    points: int = 0  # different places of a save where a rank can be killed
    runs: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        kinds = [plan.kind for plan in self.plans]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("save", "start", "clock"))
        return (
            f"{len(kinds)} kills ({counts}), {self.points} places in a save, {self.runs} runs, "
            f"{self.seconds:.0f} s"
        )


def prove_kill_safety(
    trainer: Trainer,
    folder: Path,
    module: str,
    *,
    kills: int,
    seed: int = 0,
    timeout_s: float = 300.0,
) -> Report:
    """Run `trainer` undisturbed and with `kills` kills, and compare the results.

    `module`: the test module, which imports the trainer. If a run ends before all kills were
    delivered, it is compared, and another run is started. Raises AssertionError if a run differs
    from the undisturbed one, or if a committed checkpoint is not intact.
    """
    ranks = nursery(module)
    begin = time.monotonic()
    straight = folder / "straight"
    _attempt(trainer, ranks, straight, Plan("none"), timeout_s)
    plans = Planner(
        straight, trainer.world_size, time.monotonic() - begin, kills, random.Random(seed)
    )
    report = Report(points=len(plans.points))
    while len(report.plans) < kills:
        report.runs += 1
        killed = folder / f"killed_{report.runs}"
        committed = 0
        while finished_step(killed) is None:
            plan = plans.next(committed) if len(report.plans) < kills else Plan("none")
            if _attempt(trainer, ranks, killed, plan, timeout_s):
                report.plans.append(plan)
            elif plan.kind != "none":
                plans.missed(plan)
            committed = check_checkpoints(killed, committed)
        compare_runs(trainer, straight, killed)
    report.seconds = time.monotonic() - begin
    return report


class Planner:
    """Seeded choice of the next kill."""

    def __init__(
        self, straight: Path, world_size: int, duration_s: float, kills: int, random_: random.Random
    ) -> None:
        self.world_size = world_size
        self.duration_s = duration_s
        self.random = random_
        operations = []
        for path in sorted(notes_of(straight).glob("operations_*")):
            for line in path.read_text().splitlines():
                operations.append(json.loads(line))
        steps = sorted({operation["step"] for operation in operations if operation["step"]})
        assert len(steps) >= 4, f"only {len(steps)} saves; the run is too short to be killed"
        self.steps = steps
        full = steps[-2]  # with an old checkpoint to delete
        self.points = []
        for operation in operations:
            if operation["step"] == full:
                for moment in MOMENTS[operation["kind"]]:
                    self.points.append((operation["rank"], operation["index"], moment))
        self.starts = [(o["rank"], o["index"]) for o in operations if not o["step"]]
        self.random.shuffle(self.points)
        self._queue = list(self.points)
        others = max(2, kills // 5)
        self._kinds = ["save"] * (kills - others) + ["clock", "start"] * others
        self._kinds = self._kinds[:kills]
        self.random.shuffle(self._kinds)

    def missed(self, plan: Plan) -> None:
        """Plan a kill again that came after the end of its run."""
        self._kinds.append(plan.kind)

    def next(self, committed: int) -> Plan:
        """The next kill, given the newest committed step."""
        kind = self._kinds.pop() if self._kinds else "save"
        everybody = self.random.random() < 0.5
        if kind == "clock":
            return Plan(
                "clock",
                self.random.randrange(self.world_size),
                delay_s=self.random.uniform(0, self.duration_s),
                everybody=everybody,
            )
        if kind == "start":
            rank, index = self.random.choice(self.starts)
            return Plan(
                "start",
                rank,
                index=index,
                moment=self.random.choice(("before", "after")),
                everybody=everybody,
            )
        if not self._queue:
            self._queue = list(self.points)
            self.random.shuffle(self._queue)
        rank, index, moment = self._queue.pop()
        step = next((step for step in self.steps if step > committed), self.steps[-1])
        return Plan("save", rank, step, index, moment, everybody=everybody)


def _attempt(trainer: Trainer, ranks: Nursery, run: Path, plan: Plan, timeout_s: float) -> bool:
    """Start the trainer with one kill planned. Whether a rank was killed.

    Raises RankError when ranks failed for another reason.
    """
    config = trainer.write_config(run)
    folder = notes_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    children = ranks.start(
        tormented,
        trainer.world_size,
        (trainer.main, str(config), trainer.loader, str(run.resolve()), plan),
        folder=folder,
        environment={"PYTHONHASHSEED": "0"},
    )
    if plan.kind == "clock":
        first = ranks.wait(plan.delay_s)
        early = [] if first is None else [first]
        if first is None and plan.everybody:
            children.kill()
        elif first is None:
            os.kill(children.pids[plan.rank], signal.SIGKILL)
    else:
        first = ranks.wait(timeout_s)
        early = [] if first is None else [first]
        if early and early[0][1] == -signal.SIGKILL and plan.everybody:
            children.kill({early[0][0]: 0})
    codes = children.wait(timeout_s, ended=early, grace_s=5.0)
    killed = -signal.SIGKILL in codes
    if any(codes) and not killed:
        raise RankError(f"{plan}: exit codes {codes}\n{children.output()}")
    if plan.kind == "none" and (killed or finished_step(run) is None):
        raise RankError(
            f"the undisturbed run did not finish: exit codes {codes}\n{children.output()}"
        )
    return killed


def check_checkpoints(run: Path, before: int) -> int:
    """Assert that checkpoints are intact and the newest is not older than `before`. Returns it."""
    folder = run / "checkpoints"
    steps = committed_steps(folder)
    for step in steps:
        path = step_folder(folder, step)
        listed = FileList.model_validate_json((path / FILES).read_bytes())
        for entry in listed.files:
            problem = difference(path, entry)
            assert not problem, f"{path} is committed, but {problem}"
    newest = steps[-1] if steps else 0
    assert newest >= before, f"the checkpoint of step {before} was lost; left: {steps}"
    assert not list(folder.glob("*.damaged")), (
        f"a checkpoint was found damaged: {list(folder.iterdir())}"
    )
    return newest


def compare_runs(trainer: Trainer, straight: Path, killed: Path) -> None:
    """Assert that a run ended as the undisturbed one: checkpoints, metrics, events, samples."""
    read = trainer.read or file_hashes
    steps = [committed_steps(run / "checkpoints") for run in (straight, killed)]
    assert steps[0] == steps[1], f"checkpoints {steps[1]} instead of {steps[0]}"
    final = [read(step_folder(run / "checkpoints", steps[0][-1])) for run in (straight, killed)]
    assert final[0].keys() == final[1].keys()
    different = [name for name in final[0] if not _equal(final[0][name], final[1][name])]
    assert not different, f"after the kills, these differ in the last checkpoint: {different}"
    expected_lines = read_metrics(straight / "metrics.jsonl")
    found_lines = read_metrics(killed / "metrics.jsonl")
    for expected_line, found_line in zip(expected_lines, found_lines, strict=True):
        expected = _timeless(expected_line)
        found = _timeless(found_line)
        assert found == expected, f"metrics differ: {found} instead of {expected}"
    events = []
    for run in (straight, killed):
        events.append([_timeless(event) for event in read_events(run / EVENTS)])
    assert events[0] == events[1], f"events differ: {events[1]} instead of {events[0]}"
    expected_order, found_order = (_read_order(run) for run in (straight, killed))
    assert found_order == expected_order, "the order of samples differs"


def file_hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of the engine's files."""
    names = [
        path
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name not in (STATE, CONFIG, FILES)
    ]
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in names
    }


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _timeless(line: Mapping[str, Any]) -> dict[str, str]:
    """A line of metrics or an event without times, as text: NaN equals NaN."""
    return {key: repr(value) for key, value in line.items() if not key.startswith(TIMING)}


def _read_order(run: Path) -> dict[str, str]:
    """ "rank/step" -> indices of its samples; a step that was done again must have had the same."""
    order: dict[str, str] = {}
    for path in sorted(notes_of(run).glob("order_*")):
        for line in path.read_text().splitlines():
            step, indices = line.split(":")
            key = f"{path.name}/{step}"
            assert order.setdefault(key, indices) == indices, (
                f"{key} saw {indices}, before {order[key]}"
            )
    return order


def notes_of(run: Path) -> Path:
    """Where the harness keeps its own notes about `run`."""
    return run.with_name(f"{run.name}-notes")


# -------------------------------------------------------------------- inside a rank


def tormented(main: str, config: str, loader: str, run: str, plan: Plan) -> None:
    """What a forked rank runs: `main(config)` with the hooks in place."""
    rank = int(os.environ["RANK"])
    notes = notes_of(Path(run))
    watch_order(_named(loader), notes / f"order_{rank}")
    Hooks(rank, Path(run), plan, notes / f"operations_{rank}").install()
    _named(main)(config)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def watch_order(loader: Any, path: Path) -> None:
    """Note which samples each batch holds."""
    original = loader.next_batch

    def next_batch(self: Any) -> Any:
        batch = original(self)
        with open(path, "a") as file:
            file.write(f"{batch.step}:{','.join(str(sample.index) for sample in batch.samples)}\n")
        return batch

    loader.next_batch = next_batch


class Hooks:
    """Counts the file operations on the run folder, and dies at the planned one."""

    def __init__(self, rank: int, run: Path, plan: Plan, record: Path) -> None:
        self.rank = rank
        self.run = f"{run}/"
        self.plan = plan
        self.pid = os.getpid()
        self.step = 0  # of the save that is going on or was last
        self.index = 0  # of the next operation of that save (or of the start, while step is 0)
        self.record = (
            os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if plan.kind == "none" else None
        )

    def install(self) -> None:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._wrapped(getattr(os, name), name))
        builtins.open = io.open = self._open(io.open)
        safetensors.torch.serialize_file = self._whole_file(safetensors.torch.serialize_file)
        torch.save = torch.serialization.save = self._whole_file(torch.save)

    def _enter(self, kind: str, path: str) -> bool:
        """Count an operation. Returns whether the rank must die within it or after it."""
        found = re.search(r"/checkpoints/\.?step_(\d+)", path)
        if found and kind in ("mkdir", "open") and int(found[1]) > self.step:
            self.step = int(found[1])
            self.index = 0
        elif self.step and not found:
            return False  # logs between two saves
        if self.record is not None:
            document = {
                "rank": self.rank,
                "step": self.step,
                "index": self.index,
                "kind": kind,
                "path": path.removeprefix(self.run),
            }
            os.write(self.record, (json.dumps(document) + "\n").encode())
        plan = self.plan
        now = (plan.kind, plan.rank, plan.step, plan.index) == (
            "save" if self.step else "start",
            self.rank,
            self.step,
            self.index,
        )
        self.index += 1
        if now and plan.moment == "before":
            self._die()
        return now

    def _die(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # a helper process of the rank may be the one that writes
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # SIGKILL takes effect here

    def _mine(self, target: Any, dir_fd: int | None = None) -> str | None:
        """The path of an operation's target when it lies in the run folder."""
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        else:
            base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            path = os.path.join(base, os.fspath(target))
        return path if isinstance(path, str) and path.startswith(self.run) else None

    def _wrapped(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def operation(target: Any, *args: Any, dir_fd: int | None = None, **named: Any) -> Any:
            path = self._mine(target, dir_fd)
            if dir_fd is not None:
                named["dir_fd"] = dir_fd
            if path is None:
                return function(target, *args, **named)
            dying = self._enter(kind, path)
            result = function(target, *args, **named)
            if dying:
                self._die()
            return result

        return operation

    def _whole_file(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Native code that writes a file in one call: "within" leaves half of it."""

        def write(data: Any, target: Any, *args: Any, **named: Any) -> Any:
            path = self._mine(target) if isinstance(target, str | os.PathLike) else None
            if path is None:
                return function(data, target, *args, **named)
            self._enter("open", path)
            dying = self._enter("write", path)
            result = function(data, target, *args, **named)
            if dying and self.plan.moment == "within":
                os.truncate(path, os.path.getsize(path) // 2)
            if dying:
                self._die()
            return result

        return write

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        hooks = self

        class CountedWriter(io.BufferedWriter):
            """Unbuffered, so that every write is one operation."""

            def write(self, data: Any) -> int:
                dying = hooks._enter("write", str(self.raw.name))
                view = memoryview(data).cast("B")
                if dying and hooks.plan.moment == "within":
                    view = view[: len(view) // 2]
                super().write(view)
                self.flush()
                if dying:
                    hooks._die()
                return len(view)

        def open_(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: Any = None,
            errors: Any = None,
            newline: Any = None,
            **named: Any,
        ) -> Any:
            path = hooks._mine(file) if isinstance(file, str | os.PathLike) else None
            if path is None or not set(mode) & set("wax") or "+" in mode:
                return original(file, mode, buffering, encoding, errors, newline, **named)
            dying = hooks._enter("open", path)
            writer = CountedWriter(io.FileIO(path, mode.replace("b", "").replace("t", ""), **named))
            if dying:
                hooks._die()
            if "b" in mode:
                return writer
            return io.TextIOWrapper(writer, encoding, errors, newline, write_through=True)

        return open_
