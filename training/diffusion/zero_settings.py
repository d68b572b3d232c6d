"""The trainer's config in DeepSpeed's format."""

from __future__ import annotations

import sys
from typing import Any

from landiff.configs.base import ConfigError
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.distributed import World


def deepspeed_config(config: DiffusionTrainConfig, world: World) -> dict[str, Any]:
    """The trainer's config in DeepSpeed's format."""
    micro_batch_size = config.data.micro_batch_size  # of the first phase; see `set_batch`
    zero = config.zero
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "allgather_bucket_size": zero.allgather_bucket_size,
    }
    # In the other stages `FlatGradients` reduces the gradients.
    if zero.stage == 3:
        optimization |= {
            "reduce_bucket_size": zero.reduce_bucket_size,
            "overlap_comm": zero.overlap_communication,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": zero.parameter_persistence_threshold,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_max_live_parameters": zero.max_live_parameters,
        }
        if zero.node_copies(world.size):
            _require_whole_nodes(zero.hpz_partition_size, world.local_size)
            optimization["zero_hpz_partition_size"] = zero.hpz_partition_size
    samples_per_forward = micro_batch_size * world.size
    # To DeepSpeed every rank has clips of its own: those of a sequence-parallel group count as
    # often as the group has ranks. Gradients are averaged over all ranks.
    batch_size = config.data.global_batch_size * config.sequence_parallel
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": batch_size // samples_per_forward,
        "gradient_clipping": config.optim.clip_grad,
        "bf16": {"enabled": config.precision == "bf16"},
        # DeepSpeed's default for both is bfloat16 with bfloat16 weights: a relative error of 6e-3
        # after 64 micro-batches
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }


def _require_whole_nodes(size: int, local_size: int) -> None:
    """Raise ConfigError if ranks that share a copy of the weights are parts of several nodes."""
    if local_size and local_size % size and size % local_size:
        raise ConfigError(
            f"zero.hpz_partition_size = {size} neither divides the {local_size} ranks of a node "
            f"nor is a multiple of them; set it to {local_size}"
        )
