"""Device of a job without ranks. Trainers get theirs from training/distributed.py."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Device of a name. `auto` is the first GPU, or the CPU if there is none."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    return torch.device(name)
