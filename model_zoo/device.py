"""Which device a job without ranks runs on; trainers get theirs from training/distributed.py."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
