"""Parts that the benchmarks of the models share: presets, devices and timing."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from landiff.configs import load
from landiff.data_pipeline.format.schema import RawSample
from landiff.model_zoo.config import ModelConfig

PRESETS = "nano or 10m (benchmarks/sizes), a packaged preset such as landiff, or a YAML file"
SIZES = Path(__file__).parents[1] / "sizes"


def load_preset(name: str) -> ModelConfig:
    """Model sizes: `nano` or `10m` of benchmarks/sizes, a packaged preset, or a YAML file.

    The sizes in benchmarks/sizes never change, whatever becomes of the presets.
    """
    frozen = SIZES / f"{name}.yaml"
    if frozen.is_file():
        return load(ModelConfig, frozen)
    if name.endswith((".yaml", ".yml")):
        return load(ModelConfig, name)
    return load(ModelConfig, f"{name}/model")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the number of CPU threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def default_precision(device: torch.device) -> str:
    """bf16 on CUDA, else fp32."""
    if device.type == "cuda":
        return "bf16"
    return "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Dtype of the matrix products at a precision."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 for bf16, nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    """Waits until all work on the device is finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of a few square matmuls."""
    sizes = (512, 1024, 2048)
    if device.type == "cuda":
        sizes = (2048, 4096, 8192)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(6):
            seconds = timed(functools.partial(torch.matmul, a, b), device)
            best = max(best, 2 * size**3 / seconds)
    return best


def sample_meta(key: str) -> RawSample:
    """Metadata of a sample whose clip does not exist."""
    return RawSample(
        key=key,
        caption="-",
        source="-",
        source_sha256="",
        start_s=0,
        fps=8,
        num_frames=17,
        height=64,
        width=64,
        motion_score=0.1,
        video_sha256="",
    )
