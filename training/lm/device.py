"""Megatron-core's device and process groups.

Device: Megatron-core assumes CUDA. It passes `torch.cuda.current_device()` and the literal "cuda"
as devices, calls `torch.cuda.synchronize`, tells parameters of the device by the name of their
type, and saves CUDA's random state for recomputation. It has no option to change that.

With CUDA, nothing here is replaced. Without, `megatron_device()` replaces the following while its
block runs. The originals could only raise an error there.

    torch.cuda.current_device           returns the CPU
    torch.cuda.synchronize              does nothing
    megatron random._get_cuda_rng_state returns None: there is no CUDA state to save. The CPU's is
                                        saved beside it by Megatron-core itself.
    megatron random._set_cuda_rng_state does nothing
    torch functions and methods         see `_CudaMeansCpu`

Process groups: Megatron-core lets every rank call `new_group` for all groups of all ranks, about
10,000 calls at 1,024 ranks. Without a device, a call for a group of other ranks only advances
torch's counter of groups. With NCCL and a default group that is bound to a device, each call splits
the communicator of all ranks (ncclCommSplit), in which all ranks take part, and those of a group
connect at once, although training uses only some of the groups.

Within `create_groups`, a rank creates only the groups that it is a member of, and the default group
is not bound to a device, so that NCCL connects the ranks of a group at its first collective. This
is also what Megatron-LM does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as core_random
from torch.distributed import distributed_c10d as c10d
from torch.overrides import TorchFunctionMode

from landiff.training.lm.config import LMTrainConfig
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


def create_groups(config: LMTrainConfig) -> None:
    """Create the process groups of `config.parallel`. Every rank calls it, in the same order."""
    create = _among_members(parallel_state.create_group)
    with (
        replaced(parallel_state, "create_group", create),
        replaced(c10d, "_process_group_name", _numbered(c10d._process_group_name)),
        replaced(dist.group.WORLD, "bound_device_id", None),
    ):
        parallel_state.initialize_model_parallel(
            config.parallel.tensor,
            config.parallel.pipeline,
            virtual_pipeline_model_parallel_size=config.parallel.virtual_stages,
            context_parallel_size=config.parallel.context,
            distributed_timeout_minutes=round(config.loop.collective_timeout_s / 60),
            # Only checkpoint formats that are not used here need them.
            create_gloo_process_groups=False,
        )


def _among_members(create: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-core's `create_group` for members, and for the other ranks a count of the group."""
    rank = dist.get_rank()

    def create_group(ranks: Sequence[int], **options: Any) -> Any:
        if rank in ranks:
            return create(ranks, **options, use_local_synchronization=True)
        c10d._process_group_name(ranks, use_hashed_name=False)
        return c10d.GroupMember.NON_GROUP_MEMBER

    return create_group


def _numbered(name_of: Callable[..., str]) -> Callable[..., str]:
    """torch's `_process_group_name` with names that are equal on all members of a group.

    With `use_local_synchronization`, torch hashes the ranks and the number of groups that this rank
    is a member of. Ranks with different numbers would wait for each other under different names
    (https://github.com/pytorch/pytorch/issues/173608). Without it, torch counts all groups.
    """

    def name(ranks: Sequence[int], use_hashed_name: bool) -> str:
        return name_of(ranks, use_hashed_name=False)

    return name


def destroy_groups() -> None:
    """Destroy the groups of `create_groups`, in the order of their creation. Collective."""
    dist.barrier()  # until no other rank needs a group
    for group in getattr(parallel_state, "_global_process_group_list", None) or []:
        # None stands for the default group, which belongs to `landiff.training.distributed`.
        if group is not None:
            # Megatron-core would drop the group and leave its threads running.
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
