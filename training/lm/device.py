"""Megatron-core on a machine without CUDA, for tests and the nano preset.

Megatron-core assumes CUDA: it passes `torch.cuda.current_device()` and the literal "cuda" as
devices, calls `torch.cuda.synchronize`, tells parameters of the device by the name of their type,
and saves CUDA's random state for recomputation. It has no option to change that.

With CUDA, nothing here is replaced. Without, `megatron_device()` replaces the following while its
block runs. The originals could only raise an error there.

    torch.cuda.current_device           returns the CPU
    torch.cuda.synchronize              does nothing
    megatron random._get_cuda_rng_state returns None: there is no CUDA state to save. The CPU's is
                                        saved beside it by Megatron-core itself.
    megatron random._set_cuda_rng_state does nothing
    torch functions and methods         see `_CudaMeansCpu`
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
    """Changes three things in calls of torch.

    device="cuda"    reads as "cpu". Megatron-core's optimizers, gradient norms and schedules
                     allocate tensors with this literal.
    tensor.type()    returns "torch.cuda.FloatTensor" for a CPU tensor, and so on. The optimizers
                     compare this string to sort parameters by precision, and reject all others.
    tensor.cuda()    returns the tensor itself.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call `func` with these changes."""
        if kwargs:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        elif func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def megatron_device() -> Iterator[torch.device]:
    """Context in which Megatron-core is built and run. Yields the device of the model."""
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
        return
    cpu = torch.device("cpu")
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, "current_device", lambda: cpu))
        stack.enter_context(replaced(torch.cuda, "synchronize", lambda device=None: None))
        stack.enter_context(replaced(core_random, "_get_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(replaced(core_random, "_set_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(_CudaMeansCpu())
        yield cpu


def without_replacements() -> contextlib.AbstractContextManager[object]:
    """Context without `_CudaMeansCpu`, inside that of `megatron_device`.

    It costs some microseconds in each call of torch, and the model's own forward pass needs none
    of its changes.
    """
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()


def seed_tensor_parallel(seed: int) -> None:
    """Register Megatron-core's random states per tensor-parallel rank.

    The model does not draw from them, since it has no dropout, but Megatron-core switches to them
    whenever it allocates a weight. On the CPU this uses Megatron-core's tracker that does nothing.
    """
    core_random.model_parallel_cuda_manual_seed(
        seed, inference_rng_tracker=not torch.cuda.is_available(), force_reset_rng=True
    )
