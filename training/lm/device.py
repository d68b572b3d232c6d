"""Megatron-core on a machine without CUDA. With CUDA nothing here changes anything.

Core passes `torch.cuda.current_device()` and the literal "cuda" on as devices. Inside `megatron_device()`, on
a machine without CUDA, both mean the CPU. Everything is put back on exit, and nothing is patched on import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as core_random
from torch.overrides import TorchFunctionMode

from landiff.training.replace import replaced


class _CudaMeansCpu(TorchFunctionMode):
    """Reads `device="cuda"` as "cpu" in every torch call (core's optimizers, gradient norms and schedules)."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.type and len(args) == 1:
            # the optimizers sort parameters by comparing this string with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        elif func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def megatron_device() -> Iterator[torch.device]:
    """Build and run Megatron inside of it; yields the device that data goes to."""
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
        return
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        # without CUDA the originals can only raise
        stack.enter_context(replaced(torch.cuda, "current_device", lambda: cpu))
        stack.enter_context(replaced(torch.cuda, "synchronize", lambda device=None: None))
        # recomputation saves the CPU's random state beside CUDA's
        stack.enter_context(replaced(core_random, "_get_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(replaced(core_random, "_set_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(_CudaMeansCpu())
        yield cpu


def seed_tensor_parallel(seed: int) -> None:
    """Register core's random states per tensor rank. No model of ours draws from them (there is no dropout), but
    core forks them wherever it allocates a weight. On the CPU that is core's own tracker that does nothing."""
    core_random.model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=not torch.cuda.is_available(), force_reset_rng=True
    )
