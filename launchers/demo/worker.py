"""Generates the videos of `landiff demo` with the code of `landiff sample`, one at a time.

Shape letters: T latent frames, C channels, H, W height and width of frames or latents.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.disk_errors import explain
from landiff.launchers.demo.jobs import Cancelled, Job, JobQueue
from landiff.launchers.demo.requests import MODELS, DemoRequest
from landiff.launchers.results.sample import Sampler, UnitProgress, has_codes
from landiff.launchers.results.sample_folder import SampleFolder
from landiff.launchers.results.sampling.loading import load_models
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.frozen.base import LatentCodec
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.latents import SamplerStep

PREVIEW_S = 0.5  # at least, between two previews


class Worker:
    """Takes jobs from a queue and generates their videos. Keeps the models that it used last."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self._loaded: tuple[str, ...] = ()
        self._models: Models | None = None

    def work(self) -> None:
        """Generates videos until the queue is closed.

        A mistake of the user, a full disk or too little memory of the device ends a job. Any other
        error is raised.
        """
        while True:
            job = self.queue.take()
            if job is None:
                return
            try:
                self.generate(job)
            except Cancelled:
                job.state = "cancelled"
            except (ConfigError, OSError, torch.OutOfMemoryError) as error:
                job.error = explain(error) if isinstance(error, OSError) else str(error)
                job.state = "failed"
            except BaseException:
                job.error = "an error in the program; see the terminal of landiff demo"
                job.state = "failed"
                raise
            print(f"demo: {job.state}: {job.request.path}", flush=True)

    def generate(self, job: Job) -> None:
        """Generates the video of a job, unless it is there from earlier."""
        request = job.request
        folder = SampleFolder(request.config.out, request.settings, [request.unit])
        if not folder.is_finished(request.unit):
            models = self._models_of(request, job)
            preview = StepPreview(models.codec, job)
            sampler = Sampler(request.config, folder, models, JobProgress(job), preview)
            if request.unit.given is None and not has_codes(folder, request.unit):
                sampler.write_codes([request.unit])  # so that they can be rendered again
            sampler.write_videos([request.unit])
        job.state = "finished"

    def _models_of(self, request: DemoRequest, job: Job) -> Models:
        """The models of a request. Those of an earlier one are released before."""
        needed = tuple(getattr(request.config, kind) for kind in MODELS)
        if self._models is None or needed != self._loaded:
            job.report("models", 0, 1)
            self._models = None
            self._models = load_models(request.config, pick_device(request.config.device))
            self._loaded = needed
        return self._models


class JobProgress(UnitProgress):
    """Hands the progress of a unit to its job."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, what: str, done: int, total: int) -> None:
        """Reports tokens or sampling steps. Raises Cancelled."""
        self.job.report(what, done, total)

    def finish(self, path: Path) -> None:
        """Nothing: the worker reports the end of a job."""


class StepPreview:
    """Shows coarse frames of the video in work in its job, after each sampling step.

    They are decoded from the clean latents that the step estimates.
    """

    def __init__(self, codec: LatentCodec, job: Job) -> None:
        self.codec = codec
        self.job = job
        self._last = 0.0

    def __call__(self, step: SamplerStep) -> None:
        """Decodes the first, middle and last frame, unless it was done a moment ago."""
        now = time.monotonic()
        if now - self._last < PREVIEW_S:
            return
        self._last = now
        latents_TCHW = step.denoised[-1]
        last = len(latents_TCHW) - 1
        frames = []
        for number in sorted({0, last // 2, last}):
            frames.append(self.codec.decode(latents_TCHW[None, number : number + 1])[0, 0])
        self.job.preview = jpeg(torch.cat(frames, dim=1))


def jpeg(frame_HWC: Tensor) -> bytes:
    """A uint8 frame [H, W, 3] as JPEG."""
    data = io.BytesIO()
    Image.fromarray(frame_HWC.cpu().numpy()).save(data, format="JPEG", quality=85)
    return data.getvalue()
