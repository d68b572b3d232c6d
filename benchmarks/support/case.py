"""What the rows of `benchmarks.gpu` are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.support.models import timed
from landiff.model_zoo.config import ModelConfig
from landiff.training import distributed


@dataclass(frozen=True)
class Case:
    """What is measured. peak: FLOP/s of the device. samples: clips of a step."""

    sizes: ModelConfig
    world: distributed.World
    precision: str
    peak: float
    samples: int
    text_length: int
    sampling_steps: int
    repeats: int

    @property
    def device(self) -> torch.device:
        """Device of all rows."""
        return self.world.device


def fastest(work: Callable[[], object], case: Case) -> float:
    """Seconds of the fastest of `case.repeats` calls after one that warms up."""
    work()
    return min(timed(work, case.device) for _ in range(case.repeats))
