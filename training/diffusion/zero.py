"""DeepSpeed as a library: set-up without compilation, and loading checkpoints of another layout.

Only this file imports DeepSpeed. What it changes in DeepSpeed:

* `prepare_deepspeed` declares the shared-memory all-reduce unavailable, and filters log messages.
* `initialize` replaces the choice of the optimizer for one call, and the engine's checkpoint files
  (`CheckpointFiles`), copies of frozen weights and recovery script for good.
* `ask_before_update` lets the guard decide between gradient norm and update.
* `FlatGradients` (gradients.py) sums and reduces the gradients of stages 1 and 2.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from landiff.data_pipeline.loading.loader import Batch
from landiff.model_zoo.convert.formats.deepspeed import (
    EMA,
    MOMENTS,
    SHARDS,
    DeepSpeedState,
)
from landiff.model_zoo.convert.rules import check_against
from landiff.training.diffusion.zero_files import CheckpointFiles
from landiff.training.optim import step_count
from landiff.training.replace import replaced


def prepare_deepspeed() -> None:
    """Set up DeepSpeed in a process group that exists already. Call before `initialize`.

    On the CPU DeepSpeed compiles a shared-memory all-reduce at start-up. That takes a minute, needs
    a compiler and is used in inference only, so it is declared unavailable. On CUDA nothing is
    compiled here either, because the optimizer is torch's.
    """
    # DeepSpeed logs during its import.
    logging.getLogger("DeepSpeed").addFilter(_is_relevant)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    initialized = deepspeed.comm.is_initialized()
    deepspeed.init_distributed(dist_init_required=False if initialized else None)
    # torch 2.13 warns about DeepSpeed's calls dozens of times a step.
    warnings.filterwarnings(
        "ignore",
        category=FutureWarning,
        message=(
            r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
        ),
    )


def _is_relevant(record: logging.LogRecord) -> bool:
    """Whether a log record of DeepSpeed is shown."""
    if record.levelno < logging.WARNING:
        return False
    return "Setting accelerator to CPU" not in record.getMessage()


def initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    device: torch.device,
) -> Any:
    """DeepSpeed's engine on `device`, with `CheckpointFiles` for its checkpoints."""
    import deepspeed
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
    from deepspeed.utils import groups

    # The group of ranks of hierarchical ZeRO. DeepSpeed would use that of an earlier engine.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    # Without this DeepSpeed reads LOCAL_RANK, which is wrong if each rank sees one device only.
    args = SimpleNamespace(device_rank=device.index or 0)
    # With bfloat16 weights and float32 gradients DeepSpeed would choose another optimizer for stage
    # 1 than for stages 2 and 3, with files of its own. ZeRO's optimizer handles both, so it is
    # chosen for all stages.
    with replaced(DeepSpeedEngine, "_do_optimizer_sanity_check", lambda *_: ZERO_OPTIMIZATION):
        engine, _, _, _ = deepspeed.initialize(
            args=args,
            model=module,
            optimizer=optimizer,
            config=dict(config),
            dist_init_required=False,
        )
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    engine.checkpoint_engine = CheckpointFiles(engine.checkpoint_engine, frozen)
    # DeepSpeed would copy frozen weights to the host in each save of stages 2 and 3.
    engine._get_param_fragment_func = _own_part
    if engine.zero_optimization_partition_weights():
        _zero_padding(engine)
    # DeepSpeed would copy scripts beside its files that do what
    # model_zoo/convert/formats/deepspeed.py does.
    engine._copy_recovery_script = lambda folder: None
    return engine


def ask_before_update(engine: Any, allow: Callable[[Tensor], bool]) -> None:
    """Let `allow(grad_norm)` decide in each step of `engine` whether it updates the weights.

    DeepSpeed's `step` computes the norm of the gradients and updates the weights unless the norm is
    not finite. The functions that compute the norm are replaced by ones that ask `allow`, and
    return an infinite norm if it says no. DeepSpeed then takes its own way out of such a step: it
    clears the gradients and changes nothing else. So the decision is made at the only place where
    the norm is known and the weights are old, in all stages and precisions.

    grad_norm: of all ranks, infinite if gradients are NaN or infinite. `allow` is called once in a
    step on every rank and may use collectives.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        norms_of_groups = optimizer._get_norm_groups

        def norms_after_asking() -> list[Tensor]:
            norms = norms_of_groups()
            norm = combine_grad_norm_groups(norms)  # infinite if a norm of `norms` is not finite
            return norms if allow(norm) else [torch.full_like(norm, math.inf)]

        optimizer._get_norm_groups = norms_after_asking
        return
    global_norm = optimizer.scaled_global_norm

    def norm_after_asking() -> Tensor:
        norm = global_norm()
        return norm if allow(norm) else torch.full_like(norm, math.inf)

    optimizer.scaled_global_norm = norm_after_asking
    # With bfloat16 DeepSpeed would look for infinities before it computes the norm, which says the
    # same: one pass over the gradients and one collective less.
    optimizer.check_overflow = lambda partition_gradients=True: None


def set_batch(engine: Any, batch: Batch, sequence_parallel: int) -> None:
    """Let `engine` update the weights after the micro-batches of `batch`. Call between steps.

    sequence_parallel: ranks that compute each clip, see `landiff.training.diffusion.zero_settings`.
    """
    micro_batch_size = len(batch.micro_batches[0])
    if engine.train_micro_batch_size_per_gpu() != micro_batch_size:
        engine.set_train_micro_batch_size(micro_batch_size)
    batch_size = batch.global_batch_size * sequence_parallel
    if engine.train_batch_size() != batch_size:
        engine.set_train_batch_size(batch_size)
    # An update is due when this count is a multiple of the accumulation steps, so that a new number
    # of them must count from 0.
    engine.micro_steps = 0


def _own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter under ZeRO-3, else all of it."""
    part: Tensor = getattr(parameter, "ds_tensor", parameter)
    return part.detach()


def full_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Complete shapes of all parameters and persistent buffers, also with ZeRO-3."""
    parameters = dict(module.named_parameters())
    shapes = {}
    for name, tensor in module.state_dict().items():
        shapes[name] = list(getattr(parameters.get(name), "ds_shape", tensor.shape))
    return shapes


def group_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the parameters in each group of an optimizer that DeepSpeed does not have yet."""
    name_of = {parameter: name for name, parameter in module.named_parameters()}
    return [[name_of[each] for each in group["params"]] for group in optimizer.param_groups]


def load_same_layout(engine: Any, folder: Path) -> None:
    """Let DeepSpeed load a checkpoint of the same ZeRO stage, world size and parameter groups.

    The settings of the groups stay those of the run. DeepSpeed would take the checkpoint's.
    """
    groups = engine.optimizer.param_groups
    settings = []
    for group in groups:
        settings.append({key: value for key, value in group.items() if key != "params"})
    path, _ = engine.load_checkpoint(str(folder), tag=SHARDS)
    assert path is not None, folder
    _drop_node_copies(engine)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)


@torch.no_grad()
def restore(engine: Any, state: DeepSpeedState, averages: Sequence[Tensor] = ()) -> None:
    """Load a checkpoint of any world size and ZeRO stage into a DeepSpeed engine.

    First buffers and frozen parameters, which DeepSpeed's own universal checkpoints lose, then the
    working copies, float32 master weights, Adam's moments and its step count of all trainable
    parameters, by name. With them `averages`, the moving averages of `master_weights`, if the
    checkpoint has some.

    Raises ConversionError if names or shapes do not fit.
    """
    check_against(_shapes(state), full_shapes(engine.module), "the checkpoint")
    parameters = dict(engine.module.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert state.trainable == set(trained), sorted(state.trainable ^ set(trained))
    buffers = dict(engine.module.named_buffers())
    weights = state.weights  # tensors are read on access
    for name in weights:
        if name in buffers:
            buffers[name].copy_(weights[name])
    for name, parameter in parameters.items():
        _write_working_copy(parameter, weights[name])
    # A checkpoint without optimizer steps holds initial weights of a run, and no moments.
    keys = list(MOMENTS) if state.optimizer_steps else []
    if keys:
        _create_optimizer_state(engine, state.optimizer_steps)
    if averages and EMA in state.moment_places:
        keys.append(EMA)
    moments = state.moments
    with averages_in_optimizer(engine, averages):
        if keys:
            _link_optimizer_state(engine)
        for name, parameter in trained.items():
            _write_partitioned(parameter, weights[name], None)
            for key in keys:
                _write_partitioned(parameter, moments[key][name], key)
    _drop_node_copies(engine)


def read_full(parameter: nn.Parameter) -> Tensor:
    """The float32 master weights of a trained parameter, or a frozen parameter as it is.

    Collective with ZeRO-3.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach().clone()
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _shapes(state: DeepSpeedState) -> dict[str, Tensor]:
    """Tensors without data, with the shapes of the checkpoint."""
    with torch.device("meta"):
        return {name: torch.empty(shape) for name, shape in state.shapes.items()}


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned a parameter. Otherwise it is complete on every rank."""
    return hasattr(parameter, "ds_id")


def _write_working_copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weights that forward and backward use."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    if not _is_partitioned(parameter):
        parameter.copy_(value)
        return
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def master_weights(engine: Any) -> list[Tensor]:
    """This rank's part of the float32 master weights, one flat vector per parameter group."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def complete_optimizer_state(engine: Any) -> None:
    """Create moments of zero before the first step, as AdamW does in it.

    A checkpoint with them can be loaded after later steps.
    """
    if not engine.optimizer.optimizer.state:
        _create_optimizer_state(engine, 0)


def _create_optimizer_state(engine: Any, steps: int) -> None:
    """Create the state that AdamW creates in its first step, so that it can be filled now."""
    zero = engine.optimizer
    for flat in master_weights(engine):
        state = zero.optimizer.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        state["step"] = step_count(float(steps), flat, zero.optimizer.defaults["fused"])


def _link_optimizer_state(engine: Any) -> None:
    """Map parameters to parts of all values in the optimizer's state, for `_write_partitioned`.

    ZeRO 1 and 2 do this themselves in their first step only.
    """
    if engine.zero_optimization_stage() != 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def averages_in_optimizer(engine: Any, averages: Sequence[Tensor]) -> Iterator[None]:
    """Context in which the optimizer's state holds `averages` as a further moment, EMA.

    DeepSpeed saves it then with Adam's moments. `averages`: of `master_weights`, or none.
    """
    states = engine.optimizer.optimizer.state
    masters = master_weights(engine)
    if averages:
        for master, average in zip(masters, averages, strict=True):
            states[master][EMA] = average
    try:
        yield
    finally:
        for master in masters:
            states.get(master, {}).pop(EMA, None)


@torch.no_grad()
def take_averages(engine: Any, averages: Sequence[Tensor]) -> bool:
    """Move moving averages that DeepSpeed has loaded to `averages`, which may be none.

    Returns whether the checkpoint had some.
    """
    states = engine.optimizer.optimizer.state
    stored = [states.get(master, {}).pop(EMA, None) for master in master_weights(engine)]
    found = [average for average in stored if average is not None]
    if found and averages:
        torch._foreach_copy_(list(averages), found)
    return bool(found)


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Cast the float32 master weights to the weights that forward passes read. Collective.

    The same as at the end of DeepSpeed's step.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    _drop_node_copies(engine)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _drop_node_copies(engine: Any) -> None:
    """Let forward passes make new copies for `zero.hpz_partition_size`. The weights have changed.

    DeepSpeed does it for trained weights after its own steps.
    """
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def _write_partitioned(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Set the float32 master weights (`key` None) or a moment of a parameter.

    `value` is complete. Every rank takes its own part.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(parameter.device, torch.float32)
    if _is_partitioned(parameter):
        local = _local_part(parameter, value)
        if key is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _local_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a value of a parameter that ZeRO-3 has partitioned.

    DeepSpeed's own setter reads past the end of a tensor whose size is not a multiple of the number
    of ranks. Here the tensor is padded with zeros, as DeepSpeed pads its own.
    """
    numel = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    size = torch.distributed.get_world_size(parameter.ds_process_group)
    padded = value.new_zeros(numel * size)
    padded[: value.numel()] = value.flatten()
    return padded[rank * numel : (rank + 1) * numel]


def _zero_padding(engine: Any) -> None:
    """Zero what ZeRO-3 leaves undefined: the ends of parts that the weights do not fill.

    Undefined values may be NaN, and a checkpoint with NaN is refused.
    """
    for parameter in engine.module.parameters():
        if _is_partitioned(parameter):
            parameter.ds_tensor[_own_numel(parameter) :] = 0
    zero = engine.optimizer
    for parameters, master in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in parameters:
            end = start + parameter.ds_tensor.numel()
            master.data[start + _own_numel(parameter) : end] = 0
            start = end


def _own_numel(parameter: Any) -> int:
    """Elements of a partitioned parameter that this rank holds."""
    numel: int = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return min(max(parameter.ds_numel - rank * numel, 0), numel)


def local_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and this rank's float32 master weights, not copied.

    With ZeRO-3 the parameters are this rank's parts.
    """
    for name, parameter in engine.module.named_parameters():
        yield name, _own_part(parameter)
    yield from engine.module.named_buffers()
    for group, master in enumerate(master_weights(engine)):
        yield f"float32 weights of parameter group {group}", master
