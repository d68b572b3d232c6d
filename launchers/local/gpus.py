"""GPUs of this machine, counted without torch, and the number of processes that use them."""

from __future__ import annotations

import os
from pathlib import Path

from landiff.configs import Config
from landiff.configs.problems import Problem
from landiff.training.layout import copy_size


def count_gpus(devices: Path, visible: str | None) -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES = `visible` leaves, counted without torch.

    `devices` is the folder of device files, /dev.
    """
    present = len(list(devices.glob("nvidia[0-9]*")))
    if visible is None:
        return present
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if "-1" in names:
        names = names[: names.index("-1")]  # CUDA ignores what follows -1
    return min(present, len(names))


def visible_gpus() -> int:
    """Number of GPUs of this machine that CUDA_VISIBLE_DEVICES selects. Does not need torch."""
    return count_gpus(Path("/dev"), os.environ.get("CUDA_VISIBLE_DEVICES"))


def one_gpu(number: int) -> dict[str, str]:
    """Environment variable that selects visible GPU `number`; none on a machine without GPUs."""
    if not visible_gpus():
        return {}
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(number) if names is None else names.split(",")[number].strip()
    return {"CUDA_VISIBLE_DEVICES": name}


def default_processes(config: Config) -> int:
    """One process per GPU; on a machine without GPUs, those that one copy of the model needs."""
    return visible_gpus() or copy_size(config)


def check_processes(processes: int, gpus: int) -> list[Problem]:
    """Checks `--nproc`: at least one process, and no more than GPUs if there are any."""
    if processes < 1:
        return [Problem(f"--nproc {processes}: at least one process is needed")]
    if gpus and processes > gpus:
        text = f"--nproc {processes}: this machine has {gpus} GPUs, one for each process; lower it"
        return [Problem(text)]
    return []
