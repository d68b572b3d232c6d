"""Metrics of a run: progress line, metrics.jsonl and TensorBoard. Only rank 0 writes.

metrics.jsonl holds one object per logged step, keyed by TensorBoard tag. A resumed run truncates
both to the step it resumes from, so that an interrupted run and an uninterrupted one have the same
lines.

Rates and times are means over the steps since the last logged one. `time/…` are seconds per step of
rank 0, by part; previews and checkpoints of a step happen after it is logged, so they are included
in the next logged step.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from landiff.configs.durations import duration
from landiff.configs.files import write_text
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.loader import Batch
from landiff.training.checkpoint.run_folder import METRICS, TENSORBOARD, read_metrics
from landiff.training.config import TrainConfig
from landiff.training.distributed import World
from landiff.training.engine import StepResult, TrainState
from landiff.training.observe.charts import STEP_CHARTS, Charts, layout_summary
from landiff.training.observe.event_file import EventFile
from landiff.training.observe.flops import peak_flops
from landiff.training.observe.previews import Preview, SourcePanels, write_preview
from landiff.training.observe.scalars import read_scalars
from landiff.training.observe.step_times import (
    RankTimes,
    StepTimes,
    StragglerWatch,
    slowest_starts,
)
from landiff.training.observe.trackers import Trackers

PRINT_EVERY_S = 10.0  # if the output is a file and not a terminal
GIB = 1 << 30
Part = Literal["data", "preview", "checkpoint", "validation"]
"""A part of the loop beside training steps."""


class Metrics:
    """Measures the training loop and writes the numbers of logged steps."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        world: World,
        stream: TextIO = sys.stdout,
        trackers: Trackers | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        """`folder`: the run folder. `stream`: output of the progress line.

        config: with phases or a growing batch, for their metrics and for the time left.
        """
        self.path = folder / METRICS
        self.tensorboard = folder / TENSORBOARD
        self.total_steps = total_steps
        self.world = world
        self.trackers = trackers
        self.config = config
        self.progress = StepProgress(stream)
        self.sources = SourcePanels()
        self.peak_flops: float | None = None
        if world.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(world.device))
        self._stragglers = StragglerWatch()
        self._start_is_logged = False
        self._writer: EventFile | None = None
        self._validation: dict[str, float] = {}  # of the next line
        self._state = TrainState()  # of the loop, from `resume` on
        self._validation_loss: float | None = None  # of the last validation, for the terminal
        self._reset()

    def resume(self, state: TrainState, charts: Charts | None = None) -> None:
        """Drop what was logged after `state.step`. Must precede the first `log`.

        `charts`: layout of TensorBoard's custom scalars.
        """
        self._state = state
        if self.world.rank == 0:
            drop_later_lines(self.path, state.step)
            self._writer = EventFile(self.tensorboard, purge_step=state.step + 1)
            if charts:
                self._writer.add_summary(layout_summary({**charts, **STEP_CHARTS}), step=0)
        self._reset()

    @contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        """Measure how long this rank takes for a part of the loop: the body of the context."""
        start = time.perf_counter()
        yield
        self._parts_s[part] = self._parts_s.get(part, 0.0) + time.perf_counter() - start
        if part == "data":
            self.world.start_times.end("first_batch")

    def add_validation(self, scalars: Mapping[str, float]) -> None:
        """Keep the numbers of a validation for the next `log`, which must be of the same step."""
        self._validation = dict(scalars)
        self._validation_loss = self._validation.get("val/loss", self._validation_loss)

    def count(self, batch: Batch, result: StepResult) -> None:
        """Add one step to the throughput, and to the loss of its bucket if it has a name."""
        self.world.start_times.end("first_step")
        self._steps += 1
        self._samples += batch.global_batch_size
        self._tokens += result.tokens
        self._flops += result.flops
        if batch.bucket and not result.skipped:
            self._state.add_loss(batch.bucket, float(result.loss))
        if result.times is not None:
            self._times.append(result.times)

    def log(self, state: TrainState, result: StepResult) -> dict[str, float]:
        """Write the numbers of a step. Returns them on rank 0, nothing elsewhere. Collective.

        Waits for the device once, to copy all scalars together. The ranks exchange their times and
        memory over the control group.
        """
        ranks = self._gather_ranks()
        bucket_losses = state.bucket_losses
        state.bucket_losses = {}
        if self.world.rank != 0:
            self._reset()
            return {}
        scalars = read_scalars(
            {
                "train/loss": result.loss,
                "train/lr": result.lr,
                "train/grad_norm": result.grad_norm,
                **result.metrics,
            }
        )
        for bucket, (total, steps) in sorted(bucket_losses.items()):
            scalars[f"train/loss_{bucket}"] = total / steps
        for tag in result.metrics:
            if math.isnan(scalars[tag]):
                del scalars[tag]
        elapsed_s = time.perf_counter() - self._start
        scalars["throughput/steps_per_s"] = self._steps / elapsed_s
        scalars["throughput/samples_per_s"] = self._samples / elapsed_s
        if self._tokens:
            scalars["throughput/tokens_per_s"] = self._tokens / elapsed_s
        scalars |= self._utilization(elapsed_s)
        scalars["data/wait_fraction"] = self._parts_s.get("data", 0.0) / elapsed_s
        scalars |= self._times_by_part(elapsed_s)
        times = [RankTimes(**rank["times"]) for rank in ranks]
        scalars |= self._stragglers.find(times, elapsed_s / self._steps)
        if "start" in ranks[0]:
            scalars |= slowest_starts([rank["start"] for rank in ranks])
        scalars |= largest([rank["memory"] for rank in ranks])
        scalars |= self._validation
        scalars |= self._course(state, self._samples / elapsed_s)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step, "time": time.time(), **scalars}) + "\n")
        for tag, value in scalars.items():
            self._open_writer.add_scalar(tag, value, state.step)
        if self.trackers is not None:
            self.trackers.log(state.step, scalars)
        text = format_metrics(state.step, self.total_steps, scalars, self._validation_loss)
        self.progress.show(text, final=state.step >= self.total_steps)
        self._reset()
        return scalars

    def add_previews(
        self, state: TrainState, previews: Sequence[Preview], clips: HeldOutClips, fps: float = 8.0
    ) -> None:
        """Write previews with their legends, texts and original videos.

        `clips`: those that the previews number.
        """
        if self.world.rank != 0:
            return
        for preview in self.sources.added(previews, clips):
            write_preview(self._open_writer, preview, state.step, fps)
        self._open_writer.flush()

    def close(self) -> None:
        """End the progress line, the trackers and the event file."""
        self.progress.end()
        if self.trackers is not None:
            self.trackers.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def _open_writer(self) -> EventFile:
        assert self._writer is not None, "Metrics.resume must precede the first log"
        return self._writer

    def _gather_ranks(self) -> list[dict[str, Any]]:
        """Times and memory of all ranks, the first time also those of their start. Collective."""
        data_s = self._parts_s.get("data", 0.0) / self._steps
        forward_s = mean([times.first_forward_s for times in self._times])
        times = RankTimes(os.uname().nodename, own_s=data_s + forward_s, data_s=data_s)
        found = {"times": asdict(times), "memory": memory(self.world.device)}
        if not self._start_is_logged:
            found["start"] = self.world.start_times.seconds
            self._start_is_logged = True
        return self.world.gather(found)

    def _utilization(self, elapsed_s: float) -> dict[str, float]:
        """Model FLOP/s of a device, and their fraction of the peak if that is known."""
        if not self._flops:
            return {}
        flops_per_s = self._flops / elapsed_s / self.world.size
        found = {"throughput/tflops_per_device": flops_per_s / 1e12}
        if self.peak_flops is not None:
            found["throughput/mfu"] = flops_per_s / self.peak_flops
        return found

    def _times_by_part(self, elapsed_s: float) -> dict[str, float]:
        """Seconds a step by part, and of what is left in `time/other_s`."""
        parts = {f"time/{part}_s": total / self._steps for part, total in self._parts_s.items()}
        if self._times:
            parts["time/forward_backward_s"] = mean([t.forward_backward_s for t in self._times])
            parts["time/optimizer_s"] = mean([t.optimizer_s for t in self._times])
        step_s = elapsed_s / self._steps
        # On CUDA the host prepares the next step while the device updates weights.
        parts["time/other_s"] = max(0.0, step_s - sum(parts.values()))
        return {"time/step_s": step_s, **parts}

    def _course(self, state: TrainState, samples_per_s: float) -> dict[str, float]:
        """Phase, batch size and time left of a run in which they change. Empty for other runs."""
        if self.config is None:
            return {}
        found = self.config.step_metrics(state.step - 1)
        if found:
            samples = self.config.samples_after(state.step)
            if samples is not None:  # else the time left is that of the steps left
                found["throughput/seconds_left"] = samples / samples_per_s
        return found

    def _reset(self) -> None:
        """Start a new measurement."""
        self._start = time.perf_counter()
        self._steps = 0
        self._samples = 0
        self._tokens = 0
        self._flops = 0.0
        self._parts_s: dict[str, float] = {}
        self._times: list[StepTimes] = []
        self._validation = {}


class StepProgress:
    """Progress line. On a terminal it is updated in place, elsewhere printed every few seconds."""

    def __init__(self, stream: TextIO, every_s: float = PRINT_EVERY_S) -> None:
        """`every_s`: seconds between two lines if `stream` is not a terminal."""
        self.stream = stream
        self.every_s = every_s
        self._live = stream.isatty()
        self._last = -float("inf")
        self._width = 0

    def show(self, text: str, final: bool = False) -> None:
        """Show `text`. A `final` line is always printed."""
        if self._live:
            self.stream.write(f"\r{text.ljust(self._width)}")
            self._width = len(text)
        elif final or time.monotonic() - self._last >= self.every_s:
            self._last = time.monotonic()
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def end(self) -> None:
        """Move the terminal's cursor to the next line."""
        if self._live and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0


def format_metrics(
    step: int,
    total_steps: int,
    scalars: Mapping[str, float],
    validation_loss: float | None = None,
) -> str:
    """The progress line. `validation_loss`: of the last validation."""
    steps_per_s = scalars["throughput/steps_per_s"]
    parts = [
        f"step {step}/{total_steps}",
        f"loss {scalars['train/loss']:.4f}",
        f"lr {scalars['train/lr']:.2e}",
        f"grad {scalars['train/grad_norm']:.2f}",
        f"{scalars['throughput/samples_per_s']:.1f} samples/s",
    ]
    if validation_loss is not None:
        parts.insert(2, f"val {validation_loss:.4f}")
    if "throughput/tokens_per_s" in scalars:
        parts.append(f"{scalars['throughput/tokens_per_s']:.0f} tokens/s")
    if "throughput/mfu" in scalars:
        parts.append(f"MFU {scalars['throughput/mfu']:.1%}")
    elif "throughput/tflops_per_device" in scalars:
        parts.append(f"{scalars['throughput/tflops_per_device']:.3g} TFLOP/s")
    gib = scalars.get("memory/device_gib", scalars["memory/host_gib"])
    left = "?"
    if "throughput/seconds_left" in scalars:
        left = duration(scalars["throughput/seconds_left"])
    elif steps_per_s:
        left = duration((total_steps - step) / steps_per_s)
    parts.append(f"data wait {scalars['data/wait_fraction']:.0%}")
    parts.append(f"{gib:.1f} GiB")
    parts.append(f"{left} left")
    return "  ".join(parts)


def drop_later_lines(path: Path, step: int) -> None:
    """Remove the lines after `step` from a metrics.jsonl, and truncated ones."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def memory(device: torch.device) -> dict[str, float]:
    """Peak GiB of this process: resident on the host; allocated and reserved on the device."""
    resident_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory/host_gib": resident_kib * 1024 / GIB}
    if device.type == "cuda":
        found["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/device_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def largest(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest value of all ranks by tag."""
    found: dict[str, float] = {}
    for values in ranks:
        for tag, value in values.items():
            found[tag] = max(value, found.get(tag, value))
    return found


def mean(values: Sequence[float]) -> float:
    """The mean, or 0 of no values."""
    return sum(values) / len(values) if values else 0.0
