"""The batch size with which a video takes the least time, measured on the device."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.given import Given
from landiff.model_zoo.sample.stream import Request, VideoStream

log = logging.getLogger(__name__)

LARGEST = 64
GAIN = 0.95  # a larger batch must take less than this share of the time of the best one
STEPS = 2  # of the sampler, from which the time of all is computed
MEMORY_SHARE = 0.8  # of the free memory of a CPU that the next batch may take


def measure_batch_sizes(models: Models, request: Request, largest: int) -> dict[int, float]:
    """Seconds per video of batches of 1, 2, 4, ... up to `largest` videos, at most 64.

    Generates the first chunk of a request of one video with few sampling steps. Ends before a batch
    that does not fit into memory, and after one that saves less than a twentieth of the time.
    """
    window = models.diffusion.config.transformer.latent_frames
    steps = request.sampler.num_steps
    short = replace(
        request,
        num_latent_frames=min(window, request.num_latent_frames),
        prompts=request.texts[:1],
        given=Given(),
        sampler=replace(request.sampler, num_steps=min(STEPS, steps)),
    )
    found: dict[int, float] = {}
    size = 1
    while size <= min(largest, LARGEST):
        free = _free_memory()
        before = _resident_memory()
        try:
            seconds = _seconds(models, _repeated(short, size), steps) / size
        except torch.OutOfMemoryError:
            log.info("a batch of %d videos does not fit into memory", size)
            torch.cuda.empty_cache()
            break
        gains = not found or seconds < GAIN * min(found.values())
        found[size] = seconds
        if not gains or 2 * (_resident_memory() - before) > MEMORY_SHARE * free:
            break
        size *= 2
    return found


def fastest(seconds: dict[int, float]) -> int:
    """The batch size with the least time per video; 1 without a measurement."""
    return min(seconds, key=lambda size: seconds[size], default=1)


def _repeated(request: Request, count: int) -> Request:
    """A request of one video as one of several."""
    motion = request.motion_score
    if isinstance(motion, Sequence):
        motion = motion[0]
    negatives = None
    if request.negatives is not None:
        negatives = list(request.negatives[:1]) * count
    return replace(
        request,
        prompts=list(request.prompts[:1]) * count,
        seeds=list(request.seeds[:1]) * count,
        motion_score=motion,
        negatives=negatives,
    )


def _seconds(models: Models, request: Request, steps: int) -> float:
    """Time of a batch with `steps` sampling steps, computed from that with fewer."""
    start = time.perf_counter()
    latents_start = start

    def progress(what: str, done: int, _total: int) -> None:
        nonlocal latents_start
        if what == "latents" and done == 0:
            latents_start = time.perf_counter()

    for chunk in VideoStream(models, request, progress=progress):
        chunk.frames_BTHWC.cpu()  # waits for the device
    latents_s = time.perf_counter() - latents_start
    return latents_start - start + latents_s * steps / request.sampler.num_steps


def _free_memory() -> int:
    """Bytes of memory of this machine that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _resident_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
