"""DeepSpeed as a library: set up without compiling anything, and filled from a checkpoint of another layout.

DeepSpeed is imported here and in engine.py alone.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from landiff.model_zoo.convert.formats.deepspeed import CLASSES, MOMENTS, DeepSpeedState
from landiff.model_zoo.convert.pickles import load_pickle
from landiff.model_zoo.convert.rules import check_against
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.distributed import World
from landiff.training.replace import replaced


def prepare_deepspeed() -> None:
    """Ready DeepSpeed for ranks that have joined already (`landiff.training.distributed.start`). Call before `initialize`.

    On the CPU DeepSpeed compiles a shared-memory all-reduce at start-up, a minute of work that needs a compiler
    and serves inference only; it is declared unavailable. On CUDA nothing here is compiled either, since the
    optimizer is torch's.
    """
    logging.getLogger("DeepSpeed").addFilter(
        _worth_reading
    )  # before the import: that is where it starts to talk
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_init_required=False if deepspeed.comm.is_initialized() else None
    )
    warnings.filterwarnings(  # torch 2.13 says it about DeepSpeed's calls, dozens of times a step
        "ignore",
        category=FutureWarning,
        message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    )


def _worth_reading(record: logging.LogRecord) -> bool:
    return (
        record.levelno >= logging.WARNING
        and "Setting accelerator to CPU" not in record.getMessage()
    )


def deepspeed_config(config: DiffusionTrainConfig, world: World) -> dict[str, Any]:
    """Our config in DeepSpeed's words. Gradient accumulation follows from the batch sizes."""
    micro, zero = config.data.micro_batch_size, config.zero
    optimization: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "overlap_comm": zero.overlap_communication,
        "contiguous_gradients": True,
    }
    if zero.stage == 3:
        optimization |= {
            "stage3_param_persistence_threshold": zero.parameter_persistence_threshold,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_max_live_parameters": zero.max_live_parameters,
        }
    return {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.data.global_batch_size // (micro * world.size),
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


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    device: torch.device,
) -> Any:
    """deepspeed.initialize on `device`, with `CheckpointFiles` for its checkpoints."""
    import deepspeed
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    place = SimpleNamespace(
        device_rank=device.index or 0
    )  # else LOCAL_RANK, wrong where each rank sees one device only
    # With bfloat16 weights and float32 gradients DeepSpeed would take another optimizer for stage 1
    # than for stages 2 and 3, with files of its own. The one for stages 1 and 2 can do both.
    with replaced(DeepSpeedEngine, "_do_optimizer_sanity_check", lambda *_: ZERO_OPTIMIZATION):
        engine, _, _, _ = deepspeed.initialize(
            args=place,
            model=module,
            optimizer=optimizer,
            config=dict(config),
            dist_init_required=False,
        )
    engine.checkpoint_engine = CheckpointFiles(engine.checkpoint_engine)
    # The scripts DeepSpeed would copy beside its files do what model_zoo/convert/formats/deepspeed.py does.
    engine._copy_recovery_script = lambda folder: None
    return engine


class CheckpointFiles:
    """Writes and reads DeepSpeed's checkpoint files.

    A write that fails waits for `raise_failure` after the last collective, so that the ranks stay in step.
    Files are unpickled with an allow-list; DeepSpeed itself would run any code in them.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.failure: OSError | RuntimeError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's zip writer reports a full disk as RuntimeError
            self.failure = self.failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises ConversionError for a file that holds more than what DeepSpeed writes."""
        classes = {name: _imported(name) for name in CLASSES}
        return load_pickle(Path(path), classes, map_location)

    def raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def _imported(name: str) -> Any:
    """The object that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def full_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of all parameters and persistent buffers; ZeRO-3 hides those of its parameters."""
    parameters = dict(module.named_parameters())
    return {
        name: list(getattr(parameters.get(name), "ds_shape", tensor.shape))
        for name, tensor in module.state_dict().items()
    }


@torch.no_grad()
def restore(engine: Any, state: DeepSpeedState) -> None:
    """Fill a DeepSpeed engine from a checkpoint of any world size and ZeRO stage.

    Buffers and frozen parameters first (DeepSpeed's own universal checkpoints lose them), then the working
    copies, the fp32 masters, Adam's moments and its step count of everything trainable, by name.
    Raises ConversionError where names or shapes don't fit.
    """
    check_against(_shapes(state), full_shapes(engine.module), "the checkpoint")
    parameters = dict(engine.module.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert state.trainable == set(trained), sorted(state.trainable ^ set(trained))
    buffers = dict(engine.module.named_buffers())
    for name in state.weights:
        if name in buffers:
            buffers[name].copy_(state.weights[name])
    for name, parameter in parameters.items():
        _write_working_copy(parameter, state.weights[name])
    moments = state.moments if state.optimizer_steps else {}  # none: weights that start a run
    if moments:
        _open_optimizer_state(engine, state.optimizer_steps)
    for name, parameter in trained.items():
        _write_partitioned(parameter, state.weights[name], None)
        for key in moments and MOMENTS:
            _write_partitioned(parameter, moments[key][name], key)


def read_full(parameter: nn.Parameter) -> Tensor:
    """The fp32 master of a trained parameter, or a frozen one as it is. Collective in ZeRO-3."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach().clone()
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _shapes(state: DeepSpeedState) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {name: torch.empty(shape) for name, shape in state.shapes.items()}


def _write_working_copy(parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    if not hasattr(parameter, "ds_id"):  # whole on every rank
        parameter.copy_(value)
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def _open_optimizer_state(engine: Any, steps: int) -> None:
    """AdamW makes its state at the first step; here it must be there before. One flat vector per group."""
    zero = engine.optimizer
    stage_3 = engine.zero_optimization_stage() == 3
    for flat in (
        zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    ):
        state = zero.optimizer.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        state["step"] = torch.tensor(float(steps))
    if not stage_3:
        zero._lazy_init_hp_params_optimizer_state()  # what its step() does first: names -> stretches of the vectors


def _write_partitioned(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Set the fp32 master (`key` None) or a moment; every rank takes its own part of the full `value`."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's full setter for ZeRO-3 reads past the end of a tensor that the ranks don't divide, so the
    # slice is cut here, zeros at its end as DeepSpeed pads.
    numel, rank = (
        parameter.ds_tensor.numel(),
        torch.distributed.get_rank(parameter.ds_process_group),
    )
    padded = value.new_zeros(numel * torch.distributed.get_world_size(parameter.ds_process_group))
    padded[: value.numel()] = value.flatten()
    local = padded[rank * numel : (rank + 1) * numel]
    if key is None:
        safe_set_local_fp32_param(parameter, local)
    else:
        safe_set_local_optimizer_state(parameter, local, key)


def local_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters (in ZeRO-3 this rank's slices), buffers and this rank's float32 masters; not copied."""
    for name, parameter in engine.module.named_parameters():
        yield name, getattr(parameter, "ds_tensor", parameter)
    yield from engine.module.named_buffers()
    if engine.zero_optimization_stage() == 3:
        masters = engine.optimizer.fp32_partitioned_groups_flat
    else:
        masters = engine.optimizer.single_partition_of_fp32_groups
    for group, master in enumerate(masters):
        yield f"float32 weights of parameter group {group}", master
