"""Megatron-core's process groups: each rank takes part only in the creation of its own.

Megatron-core lets every rank call `new_group` for all groups of all ranks: about 10,000 calls at
1,024 ranks. Without a device, a call for a group of other ranks only advances torch's counter of
groups. With NCCL and a default group that is bound to a device, each call splits the communicator
of all ranks (ncclCommSplit), in which all ranks take part, and those of a group connect at once,
although training uses only some of the groups.

Within `create_groups`, a rank creates only the groups that it is a member of, and the default group
is not bound to a device, so that NCCL connects the ranks of a group at its first collective. This
is also what Megatron-LM does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d as c10d

from landiff.training.lm.config import LMTrainConfig
from landiff.training.replace import replaced


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
