"""Numbers of a run: a progress line, metrics.jsonl, TensorBoard. Rank 0 writes, the others do nothing.

metrics.jsonl holds one object per logged step, keyed by TensorBoard tag. A resumed run cuts both back to
the step it resumes from, so that a killed run and an undisturbed one leave the same lines.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from landiff.configs.durations import duration
from landiff.configs.files import write_text
from landiff.data_pipeline.loading.loader import Batch
from landiff.training.checkpoint.run_folder import read_metrics
from landiff.training.distributed import World
from landiff.training.engine import StepResult, TrainState
from landiff.training.observe.event_file import EventFile

PRINT_EVERY_S = 10.0  # where the output is a file, not a terminal
GIB = 1 << 30


class Metrics:
    """Counts what the loop does and says it every `log_every` steps."""

    def __init__(
        self, folder: Path, total_steps: int, world: World, stream: TextIO = sys.stdout
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.tensorboard = folder / "tensorboard"
        self.total_steps = total_steps
        self.world = world
        self.progress = StepProgress(stream)
        self._writer: EventFile | None = None
        self._reset()

    def resume(self, state: TrainState) -> None:
        """Forget what was logged beyond `state.step`. Before the first `log`."""
        if self.world.rank == 0:
            cut(self.path, state.step)
            self._writer = EventFile(self.tensorboard, purge_step=state.step + 1)
        self._reset()

    def waiting(self, next_batch: Callable[[], Batch]) -> Batch:
        """`next_batch()`, timed: the share of time that a rank waits for data."""
        start = time.perf_counter()
        batch = next_batch()
        self._waited_s += time.perf_counter() - start
        return batch

    def count(self, batch: Batch, result: StepResult) -> None:
        """Add one step to the throughput."""
        self._steps += 1
        self._samples += batch.global_batch_size
        self._tokens += result.tokens

    def log(self, state: TrainState, result: StepResult) -> None:
        """Write the numbers of this step. Waits for the device, once: all scalars come over in one copy."""
        if self.world.rank != 0:
            return
        scalars = read_scalars(
            {
                "train/loss": result.loss,
                "train/lr": result.lr,
                "train/grad_norm": result.grad_norm,
                **result.metrics,
            }
        )
        elapsed_s = time.perf_counter() - self._start
        scalars["throughput/steps_per_s"] = self._steps / elapsed_s
        scalars["throughput/samples_per_s"] = self._samples / elapsed_s
        if self._tokens:
            scalars["throughput/tokens_per_s"] = self._tokens / elapsed_s
        scalars["data/wait_fraction"] = self._waited_s / elapsed_s
        scalars |= memory(self.world.device)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step, "time": time.time(), **scalars}) + "\n")
        for tag, value in scalars.items():
            self._open_writer.add_scalar(tag, value, state.step)
        self.progress.show(
            format_metrics(state.step, self.total_steps, scalars),
            final=state.step >= self.total_steps,
        )
        self._reset()

    def add_videos(self, state: TrainState, videos: Mapping[str, Tensor], fps: float = 8.0) -> None:
        """Videos uint8 [T, H, W, 3] under their tags."""
        if self.world.rank != 0:
            return
        for tag, video_THWC in videos.items():
            write_video(self._open_writer, tag, video_THWC, state.step, fps)
        self._open_writer.flush()

    def close(self) -> None:
        self.progress.end()
        if self._writer is not None:
            self._writer.close()

    @property
    def _open_writer(self) -> EventFile:
        assert self._writer is not None, "Metrics.resume comes before the first log"
        return self._writer

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._samples, self._tokens = 0, 0, 0
        self._waited_s = 0.0


class StepProgress:
    """One line that rewrites itself on a terminal; elsewhere a line now and then."""

    def __init__(self, stream: TextIO, every_s: float = PRINT_EVERY_S) -> None:
        self.stream = stream
        self.every_s = every_s
        self._live = stream.isatty()
        self._last = -float("inf")
        self._width = 0

    def show(self, text: str, final: bool = False) -> None:
        if self._live:
            self.stream.write(f"\r{text.ljust(self._width)}")
            self._width = len(text)
        elif final or time.monotonic() - self._last >= self.every_s:
            self._last = time.monotonic()
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the live line."""
        if self._live and self._width:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0


def format_metrics(step: int, total_steps: int, scalars: Mapping[str, float]) -> str:
    """The progress line."""
    steps_per_s = scalars["throughput/steps_per_s"]
    speed = f"{scalars['throughput/samples_per_s']:.1f} samples/s"
    if "throughput/tokens_per_s" in scalars:
        speed += f"  {scalars['throughput/tokens_per_s']:.0f} tokens/s"
    gib = scalars.get("memory/device_gib", scalars["memory/host_gib"])
    left = duration((total_steps - step) / steps_per_s) if steps_per_s else "?"
    return (
        f"step {step}/{total_steps}  loss {scalars['train/loss']:.4f}  lr {scalars['train/lr']:.2e}  "
        f"grad {scalars['train/grad_norm']:.2f}  {speed}  data wait {scalars['data/wait_fraction']:.0%}  "
        f"{gib:.1f} GiB  {left} left"
    )


def read_scalars(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as floats, with one copy from the device for however many tensors there are."""
    tensors = [
        value.detach().reshape(()).double()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    copied = iter(
        torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist()
        if tensors
        else []
    )
    return {
        tag: next(copied) if isinstance(value, Tensor) else float(value)
        for tag, value in values.items()
    }


def cut(path: Path, step: int) -> None:
    """Drop torn lines and those beyond `step`."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def memory(device: torch.device) -> dict[str, float]:
    """Peak GiB since the process started: resident on the host, allocated on the device."""
    found = {"memory/host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if device.type == "cuda":
        found["memory/device_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return found


def write_video(writer: EventFile, tag: str, video_THWC: Tensor, step: int, fps: float) -> None:
    """A video uint8 [T, H, W, 3] as an animated GIF in the image tab."""
    _, height, width, _ = video_THWC.shape
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=gif(video_THWC, fps)
    )
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def gif(video_THWC: Tensor, fps: float) -> bytes:
    """An endless animated GIF of a uint8 video [T, H, W, 3]."""
    if video_THWC.dtype != torch.uint8 or video_THWC.ndim != 4 or video_THWC.shape[-1] != 3:
        raise ValueError(
            f"a video is uint8 [T, H, W, 3], not {video_THWC.dtype} {list(video_THWC.shape)}"
        )
    first, *rest = [Image.fromarray(frame) for frame in video_THWC.cpu().numpy()]
    data = io.BytesIO()
    first.save(
        data, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0
    )
    return data.getvalue()
