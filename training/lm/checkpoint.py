"""Megatron-core's distributed checkpoints (`torch_dist`): weights and optimizer in any layout.

Unlike `megatron.core.dist_checkpointing.save`, this process writes the files itself, through
torch's writer. Megatron-core writes with forked helpers and a queue server. If a helper dies, the
trainer waits forever, but a full disk must raise an error on every rank. The format is the same.

Loading never runs code from a checkpoint: the pickles in it (`.metadata`, common.pt, objects in
*.distcp) are limited to the allow-lists of `landiff.model_zoo.convert`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as core_torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from landiff.configs.base import ConfigError
from landiff.model_zoo.convert.formats.dist_checkpoint import read_metadata
from landiff.model_zoo.convert.formats.megatron import COMMON, EMA_PREFIX
from landiff.model_zoo.convert.pickles import check_pickle, check_plain_pickle, read_pickle
from landiff.model_zoo.convert.rules import ConversionError
from landiff.training.lm.averages import ShardedAverages, copy_to_model, parts_of
from landiff.training.lm.checks import other_optimizer
from landiff.training.lm.model import MegatronLM
from landiff.training.optim import step_count
from landiff.training.replace import replaced


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
    model: MegatronLM,
    optimizer: MegatronOptimizer,
    averages: ShardedAverages | None,
    *,
    loading: bool,
) -> dict[str, Any]:
    """This rank's part of the state."""
    layout = _layout()
    weights = model.sharded_state_dict(metadata=layout)
    state = {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=layout),
        "distributed_optimizer": is_distributed(optimizer),
    }
    if averages is not None and averages.ema.enabled:
        state["averages"] = averages.state(weights, loading=loading)
    return state


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the optimizer divides its state over the data-parallel ranks.

    The two kinds of state differ on disk.
    """
    return any(isinstance(part, DistributedOptimizer) for part in parts_of(optimizer))


def save(
    folder: Path, model: MegatronLM, optimizer: MegatronOptimizer, averages: ShardedAverages
) -> None:
    """Write model, optimizer and averages into `folder`, which exists and is empty. Collective.

    The files are closed on return. Raises OSError on all ranks if one of them cannot write. The two
    small documents are written after the last collective, and their errors are raised on rank 0
    only.
    """
    sharded, common = save_preprocess(
        _sharded_state(model, optimizer, averages, loading=False), True
    )
    sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        dcp.save(
            mcore_to_pyt_state_dict(sharded, False),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except CheckpointException as error:
        causes = {rank: failure[0] for rank, failure in error.failures.items()}
        raise OSError(f"checkpoint {folder} was not written: {causes}") from error
    if torch.distributed.get_rank() == 0:
        torch.save(common, folder / COMMON)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def load_checkpoint(
    folder: Path, model: MegatronLM, optimizer: MegatronOptimizer, averages: ShardedAverages
) -> bool:
    """Restore what `save` wrote, on any number of tensor, pipeline and data-parallel ranks.

    Collective. The weights are cast from the optimizer's float32 copies if it keeps them. With the
    distributed optimizer that is this rank's part, and the caller gathers the others. Returns
    whether the checkpoint has moving averages; they are loaded if the run has some too.

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
    # Megatron-core has no option for the reader, and its own unpickles whatever a file holds.
    with replaced(core_torch_dist, "_get_filesystem_reader", lambda *_, **__: reader):
        try:
            wanted = averages if has_averages else None
            state = dist_checkpointing.load(
                _sharded_state(model, optimizer, wanted, loading=True),
                str(folder),
                common_strategy=_OwnGroups(optimizer),
            )
        except CheckpointException as error:
            raise _explained(folder, error) from error
    _check_extra_states(folder, state["model"])
    model.load_state_dict(state["model"])
    with torch.no_grad():  # the distributed optimizer copies into views of leaves
        optimizer.load_state_dict(state["optimizer"])
    copy_to_model(optimizer)
    _separate_steps(optimizer)
    if has_averages:
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
