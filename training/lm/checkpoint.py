"""Megatron-core's distributed checkpoints (`torch_dist`): weights and optimizer in any layout.

Unlike `megatron.core.dist_checkpointing.save`, nothing is gathered or written here: each rank
describes its files (training/checkpoint/parts.py), and the same process writes them as those of the
other trainers. The format is the same.

Loading never runs code from a checkpoint: the pickles in it (`.metadata`, common.pt, objects in
*.distcp) are limited to the allow-lists of `landiff.model_zoo.convert`.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as core_torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import flatten_state_dict
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader, read_metadata
from landiff.model_zoo.convert.formats.megatron import COMMON, EMA_PREFIX
from landiff.model_zoo.convert.pickles import check_pickle, check_plain_pickle, read_pickle
from landiff.model_zoo.convert.rules import ConversionError
from landiff.training.checkpoint.dist_files import DistFiles, Piece, boxes
from landiff.training.checkpoint.parts import StateFile, torch_archive
from landiff.training.lm.averages import (
    OwnedParts,
    ShardedAverages,
    copy_to_model,
    is_trained,
    parts_of,
)
from landiff.training.lm.checks import other_optimizer
from landiff.training.lm.model import ModelChunks
from landiff.training.optim import step_count
from landiff.training.replace import replaced

FORMAT = CheckpointingConfig("torch_dist", 1)
STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")  # of the distributed optimizer


def _layout() -> dict[str, Any]:
    """How Megatron-core divides the state: layers by name, moments by parameter, not by rank."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(
    model: ModelChunks, optimizer: MegatronOptimizer, averages: ShardedAverages, owned: OwnedParts
) -> dict[str, Any]:
    """This rank's part of the state. `owned` collects what is divided."""
    layout = _layout()
    weights = model.sharded_state_dict(metadata=layout)
    if is_distributed(optimizer):
        own = _divided_state(optimizer, weights, owned)
    else:
        own = optimizer.sharded_state_dict(weights, is_loading=False, metadata=layout)
    state = {
        "model": weights,
        "optimizer": own,
        "distributed_optimizer": is_distributed(optimizer),
    }
    if averages.ema.enabled:
        state["averages"] = averages.state(weights, owned)
    return state


def _whole_state(
    model: ModelChunks, optimizer: MegatronOptimizer, averages: ShardedAverages | None
) -> dict[str, Any]:
    """What a rank reads whole: the state that is not divided over data-parallel ranks.

    With the distributed optimizer no trained weights, which follow from their float32 copies.
    """
    layout = _layout()
    weights = model.sharded_state_dict(metadata=layout)
    if is_distributed(optimizer):
        return {"model": {name: e for name, e in weights.items() if not is_trained(e)}}
    own = optimizer.sharded_state_dict(weights, is_loading=True, metadata=layout)
    state = {"model": weights, "optimizer": own}
    if averages is not None and averages.ema.enabled:
        state["averages"] = averages.state(weights, None)
    return state


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the optimizer divides its state over the data-parallel ranks.

    The two kinds of state differ on disk.
    """
    return any(isinstance(part, DistributedOptimizer) for part in parts_of(optimizer))


def state_files(
    files: DistFiles,
    model: ModelChunks,
    optimizer: MegatronOptimizer,
    averages: ShardedAverages,
    device: torch.device,
) -> list[StateFile]:
    """This rank's files with model, optimizer and averages. Collective, but nothing is gathered.

    Each data-parallel rank writes the parts of optimizer state and averages that it holds, and its
    share of what all of them hold.
    """
    owned = OwnedParts()
    state = _sharded_state(model, optimizer, averages, owned)
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    found = files.files(_pieces(sharded, owned), device)
    if torch.distributed.get_rank() == 0:
        found.append(StateFile(COMMON, torch_archive(common)))
        found.append(StateFile(CONFIG_FNAME, [json.dumps(asdict(FORMAT)).encode()]))
    return found


def _divided_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], owned: OwnedParts
) -> dict[str, Any]:
    """`sharded_state_dict` of the distributed optimizer, with stand-ins for its values.

    Megatron-core's also collects garbage, which takes longer than all of the rest.
    """
    (part,) = parts_of(optimizer)
    assert isinstance(part, DistributedOptimizer)
    layout = _layout()
    with replaced(part, "get_parameter_state_dp_zero", partial(_owned_state, part, owned)):
        values = part.sharded_param_state_fully_reshardable(weights, False, layout)
    kind = layout["distrib_optim_sharding_type"]
    return {**part.state_dict(), "param_state": values, "param_state_sharding_type": kind}


def _owned_state(part: DistributedOptimizer, owned: OwnedParts, **_: Any) -> dict[int, Any]:
    """Replaces `get_parameter_state_dp_zero`, which gathers the state of all data-parallel ranks.

    Megatron-core gives names and shapes to stand-ins of the whole buffers. Positions count the
    padding between buckets, as those of parameters do. (Megatron-core's own method leaves it out,
    and so moves values between parameters if there are several buckets with padding.)
    """
    state: dict[int, Any] = {}
    for number, ranges in enumerate(part.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        whole = {key: owned.stand_in((part.buffers[number].numel,)) for key in STATE_KEYS}
        for bucket in buckets:
            for parameter, places in bucket["param_map"].items():
                tensors = part._get_main_param_and_optimizer_states(parameter)
                for key in STATE_KEYS:
                    owned.add(whole[key], places["gbuf_world"].start, tensors[key])
        state[number] = {dtype: whole}
    return state


def _pieces(sharded: dict[str, Any], owned: OwnedParts) -> list[Piece]:
    """What this rank writes of a sharded state."""
    entries, _ = flatten_state_dict(sharded)
    pieces = []
    shared: list[ShardedTensor] = []  # by all data-parallel ranks
    for entry in entries.values():
        if isinstance(entry, ShardedObject):
            if is_main_replica(entry.replica_id):
                content = io.BytesIO()
                torch.save([entry.data], content)
                pieces.append(Piece(entry.unique_key, content.getvalue()))
            continue
        if any(entry.replica_id[:-1]):  # another tensor or pipeline rank writes it
            continue
        if entry.data.is_meta:  # a stand-in
            pieces += _owned_pieces(entry, owned)
        else:
            shared.append(entry)
    for entry in _own_share(shared):
        data = entry.data.detach()[(None,) * entry.prepend_axis_num]  # an axis of layers
        pieces.append(Piece(entry.key, data, entry.global_offset, entry.global_shape))
    return pieces


def _owned_pieces(entry: ShardedTensor, owned: OwnedParts) -> Iterator[Piece]:
    """This rank's elements of a tensor that is divided as a flat vector, as boxes.

    Their data are views of the engine's.
    """
    shape = (1,) * entry.prepend_axis_num + entry.local_shape  # an axis of layers
    for start, flat in owned.parts(entry.data):
        position = 0
        for offsets, sizes in boxes(shape, start, start + flat.numel()):
            box = flat[position : position + prod(sizes)].view(sizes)
            position += box.numel()
            where = tuple(map(add, entry.global_offset, offsets))
            yield Piece(entry.key, box, where, entry.global_shape)


@torch.no_grad()
def _load_divided(
    reader: DistReader,
    model: ModelChunks,
    optimizer: MegatronOptimizer,
    averages: ShardedAverages | None,
) -> None:
    """Read this rank's parts of optimizer state and averages, and nothing of the other ranks'.

    `optimizer` has tensors for its state. Raises ConversionError if a part is missing.
    """
    owned = OwnedParts()
    weights = model.sharded_state_dict(metadata=_layout())
    state = {"optimizer": _divided_state(optimizer, weights, owned)}
    if averages is not None and averages.ema.enabled:
        state["averages"] = averages.state(weights, owned)
    sharded, _ = save_preprocess(state, validate_access_integrity=False)
    for entry in flatten_state_dict(sharded)[0].values():
        if not isinstance(entry, ShardedTensor) or not entry.data.is_meta:
            continue
        stored = reader.entries.get(entry.key)
        if stored is None or tuple(stored.size) != tuple(entry.global_shape):
            found = "nothing" if stored is None else f"the shape {tuple(stored.size)}"
            raise ConversionError(
                f"{reader.folder} has {found} for {entry.key}, whose shape is "
                f"{tuple(entry.global_shape)}; it is a checkpoint of another model"
            )
        for piece in _owned_pieces(entry, owned):
            assert isinstance(piece.data, torch.Tensor), piece.key
            reader.read_box(piece.key, piece.offsets, piece.data)


def _own_share(entries: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """The entries that this data-parallel rank writes, of those that all of them hold.

    Each goes to the rank with the fewest bytes so far, large ones first. The result is equal on all
    ranks.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    loads = [0] * group.size()
    own = []
    for entry in sorted(entries, key=lambda entry: -entry.data.nbytes):
        rank = loads.index(min(loads))
        loads[rank] += entry.data.nbytes
        if rank == group.rank():
            own.append(entry)
    return own


def load_checkpoint(
    folder: Path, model: ModelChunks, optimizer: MegatronOptimizer, averages: ShardedAverages
) -> bool:
    """Restore a checkpoint, on any number of tensor, pipeline and data-parallel ranks.

    Collective. The weights are cast from the optimizer's float32 copies if it keeps them. With the
    distributed optimizer a rank reads its part of these, of moments and of averages, and the
    caller gathers the weights of the others. Returns whether the checkpoint has moving averages;
    they are loaded if the run has some too.

    Raises ConfigError if only one of the two optimizers is distributed, and ConversionError for
    files that hold more than this trainer writes.
    """
    stored = read_pickle(folder / COMMON).get("distributed_optimizer")
    if stored != is_distributed(optimizer):
        raise ConfigError(other_optimizer(folder, stored))
    reader = AllowListReader(folder)
    # Raised here, its errors are equal on all ranks and not wrapped as those of collectives.
    keys = reader.read_metadata().state_dict_metadata
    has_averages = any(key.startswith(EMA_PREFIX) for key in keys)
    wanted = averages if has_averages else None
    # Megatron-core has no option for the reader, and its own unpickles whatever a file holds.
    with replaced(core_torch_dist, "_get_filesystem_reader", lambda *_, **__: reader):
        try:
            state = dist_checkpointing.load(
                _whole_state(model, optimizer, wanted),
                str(folder),
                common_strategy=_OwnGroups(optimizer),
            )
        except CheckpointException as error:
            raise _explained(folder, error) from error
    divided = is_distributed(optimizer)
    weights = state.get("model", {})
    _check_extra_states(folder, weights)
    model.load_state_dict(weights, strict=not divided)
    if divided:
        # In common.pt it is empty. Megatron-core would read whole tensors into it.
        state["optimizer"].pop("param_state", None)
    with torch.no_grad():  # Megatron-core copies into leaves
        optimizer.load_state_dict(state["optimizer"])
    if divided:
        _load_divided(DistReader(folder, reader.read_metadata()), model, optimizer, wanted)
    copy_to_model(optimizer)
    _separate_steps(optimizer)
    if has_averages and not divided:
        averages.load(model.sharded_state_dict(metadata=_layout()), state.get("averages", {}))
    return has_averages


class _OwnGroups(TorchCommonLoadStrategy):
    """Reads common.pt with the run's own parameter groups in place of the checkpoint's.

    Megatron-core would look for the run's groups in the checkpoint, and fail if `optim.groups` has
    changed. All state of parameters is stored by name and does not depend on the groups.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer

    def load_common(self, folder: str | Path) -> dict[str, Any]:
        """The content of common.pt."""
        common = super().load_common(folder)
        stored = common["optimizer"]
        stored = stored.get("optimizer", stored)
        steps = {group["step"] for group in stored["param_groups"] if "step" in group}
        groups = []
        for own in self.optimizer.param_groups:
            group = {key: value for key, value in own.items() if key != "params"}
            for step in steps:  # one, or none if it is stored elsewhere
                group["step"] = step
            groups.append(group)
        stored["param_groups"] = groups
        return common


def _explained(folder: Path, error: CheckpointException) -> BaseException:
    """The error to raise for one that torch collected from the ranks."""
    causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, ConfigError):
            return cause
        if isinstance(cause, pickle.UnpicklingError):
            return ConversionError(
                f"{folder} is refused: it holds more than tensors ({str(cause).splitlines()[0]})"
            )
    return error


class AllowListReader(dcp.FileSystemReader):
    """Reads a checkpoint folder with its pickles limited to an allow-list. Raises ConversionError.

    It replaces Megatron-core's reader, which unpickles whatever a checkpoint holds.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a checkpoint folder."""
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The metadata, read once."""
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read tensors and objects, with each object checked before it is unpickled."""
        checked: Any = _CheckedObjects(planner, Path(self.path))  # behaves like a LoadPlanner
        return super().read_data(plan, checked)


class _CheckedObjects:
    """A load planner that checks an object before the inner planner unpickles it."""

    def __init__(self, inner: LoadPlanner, folder: Path) -> None:
        self._inner = inner
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        """All other attributes are those of the inner planner."""
        return getattr(self._inner, name)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        """Check an object and pass it on."""
        check_pickle(value, f"{self._folder}, object {item.storage_index.fqn}")
        self._inner.load_bytes(item, value)


def _check_extra_states(folder: Path, weights: Mapping[str, Any]) -> None:
    """Check the states of FP8 scaling, which Transformer Engine unpickles itself.

    Raises ConversionError.
    """
    for name, value in weights.items():
        if not name.endswith("_extra_state"):
            continue
        what = f"{folder}, object {name}"
        if isinstance(value, io.BytesIO):
            check_pickle(value, what)
        elif isinstance(value, torch.Tensor) and value.numel():
            check_plain_pickle(value.cpu().numpy().tobytes(), what)


# Megatron-core's distributed optimizer expects the Adam of apex or Transformer Engine. If neither
# is installed it falls back to torch's, with which three things fail in version 0.16.1:
#
# 1. `state_dict` asserts that a step has been taken.
# 2. The loader expects the step of each parameter in the file, where it is not.
# 3. After loading, all parameters share one step tensor, which AdamW increments once for each.


def prepare_optimizer(optimizer: MegatronOptimizer, *, fused: bool) -> None:
    """Work around failures 1 and 2. Call once, before the first step, save or load.

    fused: the update of torch's AdamW is one kernel. Megatron-core has no option for that.
    """
    for part in parts_of(optimizer):
        if fused and isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True
        if not isinstance(part, DistributedOptimizer):
            continue
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": step_count(0.0, parameter, fused),
                        "exp_avg": torch.zeros_like(parameter.detach()),
                        "exp_avg_sq": torch.zeros_like(parameter.detach()),
                    }
        part._set_main_param_and_optimizer_states = _KeepingStep(part)


class _KeepingStep:
    """Replaces `_set_main_param_and_optimizer_states` of one optimizer.

    It passes the step that the optimizer has already, instead of one from the file.
    """

    def __init__(self, part: DistributedOptimizer) -> None:
        self.part = part

    def __call__(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        """Set master weights and moments of `model_param`."""
        group, order = self.part.model_param_group_index_map[model_param]
        main = self.part.optimizer.param_groups[group]["params"][order]
        step = self.part.optimizer.state[main]["step"]
        DistributedOptimizer._set_main_param_and_optimizer_states(
            self.part, model_param, {"step": step, **tensors}
        )


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Work around failure 3: give each parameter a step tensor of its own. Call after loading."""
    for part in parts_of(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
