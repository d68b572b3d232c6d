"""Two processes that generate one video together, for `split_guidance` of `landiff sample`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from landiff.configs.base import ConfigError
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.sample import Load, sample_videos
from landiff.launchers.results.sampling.loading import load_models
from landiff.launchers.results.sampling.processes import PARTNER_LOST
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.placement.split import (
    FIRST,
    PartnerLost,
    SplitDiffusion,
    partner_needed,
    serve_rows,
)

JOIN_TIMEOUT = timedelta(minutes=10)
# The second process waits while the first one samples tokens, decodes and writes.
WAIT_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Pair:
    """The place of a process in its pair: rank 0 or 1, and the port at which the two meet."""

    rank: int
    port: int

    @classmethod
    def parse(cls, text: str) -> Pair:
        """From `RANK:PORT`. Raises ConfigError."""
        rank, _, port = text.partition(":")
        if rank not in ("0", "1") or not port.isdigit():
            raise ConfigError(f"--pair {text!r} is not RANK:PORT")
        return cls(int(rank), int(port))

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Joins the other process. Raises PartnerLost if that does not come."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        with partner_needed():
            store = dist.TCPStore(
                "127.0.0.1", self.port, 2, is_master=self.rank == FIRST, timeout=JOIN_TIMEOUT
            )
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=2, timeout=WAIT_TIMEOUT
            )
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def leading(config: SampleConfig, pair: Pair) -> Iterator[Load]:
    """Joins the second process of the pair. What it yields loads models that use it.

    Raises PartnerLost, also while the models run.
    """
    device = pick_device(config.device)

    def load(config: SampleConfig, device: torch.device, needed: Collection[str]) -> Models:
        models = load_models(config, device, needed)
        diffusion: Any = SplitDiffusion(models.diffusion, device)
        return replace(models, diffusion=diffusion)

    with pair.joined(device):
        yield load
        SplitDiffusion.close(device)


def lead(config: SampleConfig, pair: Pair, task: tuple[int, int]) -> int:
    """Samples the videos of a task together with the second process. Returns the exit code."""
    try:
        with leading(config, pair) as load:
            sample_videos(config, task, load=load)
    except PartnerLost as error:
        print(f"sample: the second process of the pair has ended: {error}", file=sys.stderr)
        return PARTNER_LOST
    return 0


def serve(config: SampleConfig, pair: Pair) -> int:
    """Computes rows for the first process of the pair until that ends. Returns the exit code."""
    device = pick_device(config.device)
    config = config.model_copy(update={"offload": "none"})
    try:
        with pair.joined(device):
            diffusion = load_models(config, device, ("diffusion",)).diffusion
            rows = serve_rows(diffusion, device)
    except PartnerLost as error:
        print(f"sample: the first process of the pair has ended: {error}", file=sys.stderr)
        return PARTNER_LOST
    print(f"sample: the second process has computed {rows} rows of the diffusion model")
    return 0
