"""Writing DeepSpeed checkpoints of any ZeRO stage and world size, without DeepSpeed.

The files are those that DeepSpeed itself would have written (see `deepspeed`), so that its own
`engine.load_checkpoint` resumes from them. They are written fragment by fragment: neither the
vectors of a rank nor the model are ever whole in memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.formats.deepspeed import EMA, SHARDS, START, ZeroLayout
from landiff.model_zoo.convert.formats.zero.file import Fragment, TensorKey, ZeroFile
from landiff.model_zoo.convert.formats.zero.state import (
    DeepSpeedState,
    FragmentAddress,
    LazyTensorPlace,
    LossScaler,
    OptimizerGroup,
    ZeroStage,
)
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, megabytes
from landiff.model_zoo.convert.pickles import replace_leaves
from landiff.model_zoo.health import require_finite

# ZeRO 1 and 2 pad a group to a multiple of this many elements times the number of ranks.
ALIGNMENT = 2
# ZeRO 3 starts a new vector after this many elements, unless the config has a sub_group_size.
SUB_GROUP = 1_000_000_000
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class ZeroPartition:
    """How a DeepSpeed checkpoint is divided over ranks, and the dtype of its module."""

    stage: int  # 1 | 2 | 3
    world_size: int
    dtype: torch.dtype | None = None  # of the module; None keeps the dtypes

    def __str__(self) -> str:
        """Human-readable text."""
        text = f"ZeRO {self.stage}, world size {self.world_size}"
        return text if self.dtype is None else f"{text}, {str(self.dtype).removeprefix('torch.')}"


def write_deepspeed(
    folder: Path,
    state: DeepSpeedState,
    partition: ZeroPartition,
    progress: ProgressCallback | None = None,
) -> None:
    """Write `state` as a run with this ZeRO stage and world size would save it.

    Raises UnhealthyError for weights or moments with NaN or infinity.
    """
    assert partition.stage in (1, 2, 3) and partition.world_size > 0, partition
    require_finite(state.weights.items(), "the checkpoint")
    for name, moments in state.moments.items():
        require_finite(moments.items(), f"{name} of the checkpoint")
    working = _working_dtypes(state, partition.dtype)
    state = replace(state, working=working, rest=_with_stage(state.rest, partition.stage))
    files = _model_files(state, partition) | _optimizer_files(state, partition)
    sizes = [megabytes(0, file.tensors.num_bytes)[1] for file in files.values()]
    total = sum(sizes)
    before = 0
    for (name, file), size in zip(files.items(), sizes, strict=True):
        file.write(folder / name, progress and _progress_of_file(progress, before, total))
        before += size


def _progress_of_file(progress: ProgressCallback, before: int, total: int) -> ProgressCallback:
    """Reports the progress of one file as progress of all files."""
    return lambda done, _total_of_file: progress(before + done, total)


def write_start(
    folder: Path,
    kind: str,
    config: DiffusionConfig | TransformerConfig,
    tensors: LazyTensors,
    progress: ProgressCallback | None = None,
    *,
    partition: ZeroPartition | None = None,
) -> None:
    """Write weights without an optimizer, from which a run starts.

    Our engine loads them with any ZeRO stage and world size. DeepSpeed itself loads them with

        engine.load_checkpoint(folder, tag="zero", load_module_only=True)

    in ZeRO 1 and 2 with any world size. In ZeRO 3, each rank reads a file of its own: this needs a
    `partition` of stage 3 with the world size, and `load_optimizer_states=False` in addition.

    Kind "transformer" is written as phase main, in which all parameters are trained. Kind
    "diffusion" is written as phase control, in which the main transformer is frozen, and also the
    last norm of the control branch, which has no effect.
    """
    is_control = kind == "diffusion"
    frozen = ("transformer.", "control.final_norm.") if is_control else ()
    trained = tuple(name for name in tensors.meta if not name.startswith(frozen))
    state = DeepSpeedState(
        zero_stage=0,
        world_size=1,
        places={name: LazyTensorPlace(tensors, name) for name in tensors.meta},
        groups=(OptimizerGroup(trained, {}),),
        buffers=(),
        working={name: meta.dtype for name, meta in tensors.meta.items()},
        moment_places={},
        optimizer_steps=0,
        rest={"start": True},
    )
    if partition is not None and partition.stage == 3:
        write_deepspeed(folder / SHARDS, state, partition, progress)
        write_text(folder / "latest", SHARDS)  # DeepSpeed needs it without an optimizer
    else:
        state = replace(state, rest=_with_stage(state.rest, 0))
        file = _model_of_stage_2(state, ZeroPartition(1, 1))
        file.write(folder / SHARDS / START, progress)
    ZeroLayout(
        zero_stage=0,
        world_size=1,
        precision=PRECISIONS[tensors.dtype()],
        phase="control" if is_control else "main",
        model=_whole_model(config),
        shapes={name: list(tensor.shape) for name, tensor in tensors.meta.items()},
    ).write(folder)


def _whole_model(config: DiffusionConfig | TransformerConfig) -> DiffusionConfig:
    """The config of a diffusion model; around a main transformer, one with default sizes."""
    if isinstance(config, DiffusionConfig):
        return config
    return DiffusionConfig(transformer=config, control_layers=min(15, config.num_layers))


def _working_dtypes(state: DeepSpeedState, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The module's dtypes by name, with `dtype` for floating-point parameters unless None.

    Buffers keep their dtypes, as in DeepSpeed.
    """
    known = list(state.working.values())
    default = max(known, key=known.count, default=torch.float32)
    working = {}
    for name in state.places:
        working[name] = state.working.get(name, default)
        if dtype is not None and working[name].is_floating_point and name not in state.buffers:
            working[name] = dtype
    return working


def _with_stage(rest: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """The other entries of a model file, completed and with the ZeRO stage in the config."""
    config = rest.get("ds_config")
    config = dict(config) if isinstance(config, Mapping) else {}
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "stage": stage}
    return {
        "ds_version": "0.19.8",
        "mp_world_size": 1,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 0,
        "global_samples": 0,
        **rest,
        "ds_config": config,
    }


# ---------------------------------------------------------------- model files


def _model_files(state: DeepSpeedState, partition: ZeroPartition) -> dict[str, ZeroFile]:
    """Model files by name: a single one in ZeRO 1 and 2, one for each rank in ZeRO 3."""
    if partition.stage != 3:
        return {START: _model_of_stage_2(state, partition)}
    files = {}
    for rank in range(partition.world_size):
        name = f"zero_pp_rank_{rank}_{START}"
        files[name] = _model_of_stage_3(state, rank, partition.world_size)
    return files


def _model_of_stage_2(state: DeepSpeedState, partition: ZeroPartition) -> ZeroFile:
    """The model file of ZeRO 1 and 2: all tensors whole.

    ZeRO 2 lists the frozen parameters a second time, ZeRO 1 does not.
    """
    file = ZeroFile()
    module = OrderedDict()
    for name, place in state.places.items():
        module[name] = file.add_whole(place, state.working[name])
    fragments = None
    if partition.stage == 2:
        fragments = OrderedDict((name, module[name]) for name in _frozen(state))
    groups = [group.names for group in state.groups]
    file.content = _model_content(
        file, state, partition.world_size, module=module, groups=groups, fragments=fragments
    )
    return file


def _model_of_stage_3(state: DeepSpeedState, rank: int, world_size: int) -> ZeroFile:
    """The model file of one rank in ZeRO 3.

    Buffers are whole, frozen parameters are the slices of this rank, and of trainable parameters
    only the names are stored.
    """
    file = ZeroFile()
    module = OrderedDict()
    for name, place in state.places.items():
        dtype = state.working[name]
        if name in state.buffers:
            module[name] = file.add_whole(place, dtype)
        else:
            module[name] = file.add_value(torch.empty(0, dtype=dtype))
    fragments = OrderedDict()
    for name in _frozen(state):
        slice_of_rank = _slice(state, name, rank, world_size)
        fragments[name] = file.add_vector(state.places, [slice_of_rank], state.working[name])
    groups: list[list[str]] = []
    for vectors in _sub_groups(state, world_size):
        groups += vectors
    file.content = _model_content(
        file, state, world_size, module=module, groups=groups, fragments=fragments
    )
    return file


def _frozen(state: DeepSpeedState) -> list[str]:
    """Names of the parameters that are not trained."""
    trainable = state.trainable
    return [name for name in state.places if name not in trainable and name not in state.buffers]


def _model_content(
    file: ZeroFile,
    state: DeepSpeedState,
    world_size: int,
    *,
    module: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    fragments: Mapping[str, Any] | None,
) -> dict[Any, Any]:
    """The entries of a model file. `fragments` holds the frozen parameters, if they are listed."""
    shapes = state.shapes
    frozen_shapes = None
    if fragments is not None:
        frozen_shapes = OrderedDict((name, shapes[name]) for name in fragments)
    param_shapes = []
    for names in groups:
        param_shapes.append(OrderedDict((name, shapes[name]) for name in names))
    return {
        **replace_leaves(state.rest, file.add_value),
        "module": module,
        "buffer_names": list(state.buffers),
        "optimizer": None,
        "param_shapes": param_shapes,
        "frozen_param_shapes": frozen_shapes,
        "frozen_param_fragments": fragments,
        "shared_params": {},
        "dp_world_size": world_size,
    }


# ---------------------------------------------------------------- optimizer files


def _optimizer_files(state: DeepSpeedState, partition: ZeroPartition) -> dict[str, ZeroFile]:
    """Optimizer files by name, one for each rank."""
    is_bf16 = torch.bfloat16 in {state.working[name] for name in state.trainable}
    prefix = "bf16_" if is_bf16 else ""  # DeepSpeed looks for this name
    files = {}
    for rank in range(partition.world_size):
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        if partition.stage == 3:
            files[name] = _optimizer_of_stage_3(state, rank, partition.world_size)
        else:
            files[name] = _optimizer_of_stage_2(state, rank, partition)
    return files


def _optimizer_of_stage_2(state: DeepSpeedState, rank: int, partition: ZeroPartition) -> ZeroFile:
    """The optimizer file of one rank in ZeRO 1 and 2: its equal part of every group's vector.

    As in DeepSpeed, moments are stored with the padding of the last parts, weights without it.
    """
    file = ZeroFile()
    masters: list[TensorKey] = []
    moments: list[dict[str, Any]] = []
    paddings: list[int] = []
    mappings: list[OrderedDict[str, FragmentAddress]] = []
    for group in state.groups:
        fragments, padding = _part_of_group(state, group, rank, partition.world_size)
        masters.append(file.add_vector(state.places, fragments, torch.float32))
        padded = [*fragments, Fragment("", 0, 0, padding)]
        moments.append(_adam_state(file, state, padded))
        paddings.append(padding)
        mappings.append(_addresses(fragments))
    params = [[index] for index in range(len(state.groups))]
    content = {
        "base_optimizer_state": _torch_optimizer_state(state, moments, params),
        "single_partition_of_fp32_groups": masters,
        "zero_stage": ZeroStage(partition.stage),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group.names) for group in state.groups],
        "partition_count": [partition.world_size] * len(state.groups),
        "ds_version": state.rest["ds_version"],
        "param_slice_mappings": mappings,
    }
    file.content = _optimizer_content(file, state, content)
    return file


def _addresses(fragments: Sequence[Fragment]) -> OrderedDict[str, FragmentAddress]:
    """Where each fragment lies in a vector of them."""
    addresses = OrderedDict()
    start = 0
    for fragment in fragments:
        addresses[fragment.name] = FragmentAddress(fragment.numel, start)
        start += fragment.numel
    return addresses


def _part_of_group(
    state: DeepSpeedState, group: OptimizerGroup, rank: int, world_size: int
) -> tuple[list[Fragment], int]:
    """This rank's fragments of a group's vector, and the number of zeros that pad them."""
    numels = {name: state.shapes[name].numel() for name in group.names}
    size = math.ceil(sum(numels.values()) / (ALIGNMENT * world_size)) * ALIGNMENT
    fragments = []
    start = 0  # of the parameter in the vector
    for name, numel in numels.items():
        first = max(start, rank * size)
        end = min(start + numel, (rank + 1) * size)
        if first < end:
            fragments.append(Fragment(name, first - start, end - first))
        start += numel
    return fragments, size - sum(fragment.numel for fragment in fragments)


def _optimizer_of_stage_3(state: DeepSpeedState, rank: int, world_size: int) -> ZeroFile:
    """The optimizer file of one rank in ZeRO 3: its slices of all parameters, concatenated."""
    file = ZeroFile()
    masters: list[TensorKey] = []
    moments: list[dict[str, Any]] = []
    params: list[list[int]] = []  # numbers of the vectors of each group
    for vectors in _sub_groups(state, world_size):
        params.append(list(range(len(masters), len(masters) + len(vectors))))
        for names in vectors:
            fragments = [_slice(state, name, rank, world_size) for name in names]
            masters.append(file.add_vector(state.places, fragments, torch.float32))
            moments.append(_adam_state(file, state, fragments))
    content = {
        "zero_stage": ZeroStage(3),
        "partition_count": world_size,
        "optimizer_state_dict": _torch_optimizer_state(state, moments, params),
        "fp32_flat_groups": masters,
    }
    file.content = _optimizer_content(file, state, content)
    return file


def _slice(state: DeepSpeedState, name: str, rank: int, world_size: int) -> Fragment:
    """This rank's slice of a parameter in ZeRO 3, padded to the size of all slices."""
    numel = state.shapes[name].numel()
    size = math.ceil(numel / world_size)
    start = min(rank * size, numel)
    held = min(size, numel - start)
    return Fragment(name, start, held, size - held)


def _sub_groups(state: DeepSpeedState, world_size: int) -> list[list[list[str]]]:
    """The names in each vector of each parameter group in ZeRO 3."""
    configured = state.rest["ds_config"]["zero_optimization"].get("sub_group_size")
    limit = configured if isinstance(configured, int | float) else SUB_GROUP
    found = []
    for group in state.groups:
        sizes = {name: math.ceil(state.shapes[name].numel() / world_size) for name in group.names}
        vectors: list[list[str]] = [[]]
        for name in group.names:
            if sum(sizes[other] for other in vectors[-1]) >= limit:
                vectors.append([])
            vectors[-1].append(name)
        found.append(vectors)
    return found


def _adam_state(
    file: ZeroFile, state: DeepSpeedState, fragments: Sequence[Fragment]
) -> dict[str, Any]:
    """The state of Adam for one vector; empty before the first step.

    Each vector has its own tensor for the step count, because Adam increments it in place.
    """
    if not state.moment_places:
        return {}
    numbers = state.numbers
    if not numbers and state.moment_places.keys() != {EMA}:
        numbers = {"step": torch.tensor(float(state.optimizer_steps))}
    entries = replace_leaves(numbers, file.add_value)
    for key, places in state.moment_places.items():
        entries[key] = file.add_vector(places, fragments, torch.float32)
    return entries


def _torch_optimizer_state(
    state: DeepSpeedState, moments: Sequence[Mapping[str, Any]], params: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The state dict of torch's optimizer over flat vectors; `params` are those of each group."""
    groups = []
    for group, numbers in zip(state.groups, params, strict=True):
        groups.append({**group.settings, "params": list(numbers)})
    return {
        "state": dict(enumerate(moments)) if state.moment_places else {},
        "param_groups": groups,
    }


def _optimizer_content(
    file: ZeroFile, state: DeepSpeedState, content: Mapping[str, Any]
) -> dict[Any, Any]:
    """The entries of an optimizer file, with those that do not depend on the ZeRO stage."""
    common = {
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        **state.optimizer,
    }
    # ZeRO 1 and 2 take the clipping norm from the file. ZeRO 3 does not store it and takes it from
    # its config.
    common.setdefault("clip_grad", state.rest["ds_config"].get("gradient_clipping", 0.0))
    return {
        "optimizer_state_dict": {**common, **replace_leaves(content, file.add_value)},
        "ds_config": state.rest["ds_config"],
        "ds_version": state.rest["ds_version"],
    }
