"""Megatron checkpoints with their optimizer state, converted file to file.

The padding, the precision and the kind of optimizer can change. Tensor, pipeline and data
parallelism need no conversion, because the folder stores whole tensors, also of the optimizer. But
the two kinds of optimizer store their state in different forms, and neither loads the other's:

    plain         float32 master weights (`fp32_param`) only for bfloat16 models;
                  one step count in common.pt
    distributed   float32 master weights (`param`) always;
                  a step count in every parameter group of common.pt

Both store `exp_avg` and `exp_avg_sq` by parameter (`fully_reshardable`). Optimizer state that is
stored by rank cannot be converted and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader, write_dist
from landiff.model_zoo.convert.formats.megatron import (
    COMMON,
    EMA_PREFIX,
    Padded,
    extra_states,
    megatron_rules,
    padding_of,
    separate_layers,
    under_our_names,
    write_documents,
)
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, Stored, converted
from landiff.model_zoo.convert.pickles import read_pickle, replace_leaves
from landiff.model_zoo.convert.rules import ConversionError

STATE = "optimizer.state."
MASTERS = {False: "fp32_param", True: "param"}  # name of the master weights by: is distributed
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = EMA_PREFIX.removeprefix(STATE).removesuffix(".")  # of our trainer; stored like a moment


@dataclass(frozen=True)
class MegatronLayout:
    """The properties in which a checkpoint must agree with the run that loads it."""

    padded: Padded
    distributed: bool  # parallel.distributed_optimizer
    dtype: torch.dtype  # of weights and activations

    def __str__(self) -> str:
        """Human-readable text."""
        optimizer = "distributed" if self.distributed else "plain"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{optimizer} optimizer, {dtype}, vocabulary padded to {self.padded.vocab}, "
            f"heads padded to {self.padded.heads}"
        )


@dataclass(frozen=True)
class MegatronState:
    """A checkpoint with its optimizer state, under our names."""

    layout: MegatronLayout
    weights: LazyTensors  # those that the model computes with
    masters: LazyTensors  # float32
    moments: Mapping[str, LazyTensors]  # of Adam, and moving averages if there are any
    steps: float  # Adam's own step count
    groups: tuple[Mapping[str, Any], ...]  # settings of the optimizer's parameter groups


def has_optimizer(folder: Path) -> bool:
    """Whether a checkpoint holds optimizer state by parameter.

    Raises ConversionError if it holds optimizer state by rank.
    """
    entries = DistReader(folder).entries
    by_rank = _state_by_rank(entries)
    if by_rank:
        raise ConversionError(
            f"{folder} stores the optimizer's state by rank ({by_rank[0]}, ...); only "
            "distrib_optim_sharding_type = fully_reshardable can be converted. Save it in this "
            "form, or convert the weights alone (--weights-only)"
        )
    return _has_all_moments(entries)


def describe_optimizer(folder: Path) -> str:
    """The optimizer state in a checkpoint as text."""
    entries = DistReader(folder).entries
    if _state_by_rank(entries):
        return "optimizer's state by rank"
    if _has_all_moments(entries):
        return "with the optimizer"
    return "no optimizer"


def _state_by_rank(entries: Iterable[str]) -> list[str]:
    return [key for key in entries if key.startswith("optimizer.") and not key.startswith(STATE)]


def _has_all_moments(entries: Iterable[str]) -> bool:
    keys = list(entries)

    def is_stored(moment: str) -> bool:
        return any(key.startswith(f"{STATE}{moment}.") for key in keys)

    return all(is_stored(moment) for moment in MOMENTS)


def read_state(folder: Path, config: LMConfig) -> MegatronState:
    """Read a checkpoint with its optimizer state; tensors are read on access.

    Raises ConversionError for a checkpoint that is incomplete, of another model or in an unknown
    form.
    """
    reader = DistReader(folder)
    weight_keys = {key: key for key in reader.entries if not key.startswith("optimizer.")}
    theirs = separate_layers(reader, weight_keys)
    padded = padding_of(theirs, config, folder)

    def stored(value: str) -> LazyTensors | None:
        """A value that the optimizer stores for every weight, or None."""
        prefix = f"{STATE}{value}."
        keys = [key for key in reader.entries if key.startswith(prefix)]
        if not keys:
            return None
        found = separate_layers(reader, {key.removeprefix(prefix): key for key in keys})
        return under_our_names(found, config, padded, f"{folder}, {prefix}*")

    weights = under_our_names(theirs, config, padded, str(folder))
    inner, is_distributed = _torch_optimizer(folder)
    masters = stored(MASTERS[is_distributed])
    moments = {}
    for name in MOMENTS:
        moment = stored(name)
        if moment is not None:
            moments[name] = moment
    needs_masters = is_distributed or weights.dtype() != torch.float32
    if len(moments) < len(MOMENTS) or (masters is None and needs_masters):
        raise ConversionError(
            f"{folder} holds no complete optimizer state; --weights-only converts its weights"
        )
    averages = stored(EMA)
    if averages is not None:
        moments[EMA] = averages
    groups = []
    for group in inner["param_groups"]:
        groups.append({key: value for key, value in group.items() if key != "step"})
    return MegatronState(
        MegatronLayout(padded, is_distributed, weights.dtype()),
        weights,
        masters or weights,
        moments,
        _step_count(folder, inner, is_distributed),
        tuple(groups),
    )


def _torch_optimizer(folder: Path) -> tuple[Mapping[str, Any], bool]:
    """The state of torch's optimizer in common.pt, and whether the optimizer is distributed."""

    def loaded(leaf: Any) -> Any:
        return leaf.read() if isinstance(leaf, Stored) else leaf

    common = replace_leaves(read_pickle(folder / COMMON), loaded)
    outer = common.get("optimizer")
    inner = outer.get("optimizer", outer) if isinstance(outer, Mapping) else None
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        raise ConversionError(
            f"{folder / COMMON} describes no single optimizer with param_groups; --weights-only "
            "converts the weights"
        )
    is_distributed = "param_state_sharding_type" in outer
    if not is_distributed and "common_step" not in inner.get("state", {}):
        raise ConversionError(
            f"{folder / COMMON} holds no step count of the optimizer; --weights-only converts the "
            "weights"
        )
    return inner, is_distributed


def _step_count(folder: Path, inner: Mapping[str, Any], is_distributed: bool) -> float:
    """Adam's step count. Raises ConversionError if parameter groups disagree."""
    if is_distributed:
        steps = {float(group["step"]) for group in inner["param_groups"]}
    else:
        steps = {float(inner["state"]["common_step"])}
    if len(steps) != 1:
        raise ConversionError(
            f"{folder} has different step counts in the groups of its optimizer: {sorted(steps)}"
        )
    return steps.pop()


def write_state(
    folder: Path,
    config: LMConfig,
    state: MegatronState,
    layout: MegatronLayout,
    progress: ProgressCallback | None = None,
) -> None:
    """Write `state` as a run with this layout would have saved it.

    The folder loads into any tensor, pipeline and data parallel layout.

    Weights are always cast from the master weights, even if `state` has weights of the right dtype:
    in checkpoints that an older version wrote with `parallel.overlap`, they can be one step old.
    """
    rules = megatron_rules(config, layout.padded)
    tensors = converted(state.masters.cast(layout.dtype), rules, "to_theirs")
    optimizer_values = dict(state.moments)
    if layout.distributed or layout.dtype != torch.float32:
        optimizer_values[MASTERS[layout.distributed]] = state.masters
    for name, values in optimizer_values.items():
        theirs = converted(values, rules, "to_theirs")
        tensors = tensors.joined(theirs.with_prefix(f"{STATE}{name}."))
    write_dist(folder, tensors.checked("the checkpoint"), extra_states(config), progress)
    common = {
        "optimizer": _optimizer_in_common(state, layout),
        "distributed_optimizer": layout.distributed,
    }
    write_documents(folder, common)


def _optimizer_in_common(state: MegatronState, layout: MegatronLayout) -> dict[str, Any]:
    """The entry `optimizer` of common.pt."""
    if layout.distributed:
        groups = [{**group, "step": state.steps} for group in state.groups]
        return {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": "fully_reshardable",
        }
    inner = {
        "state": {"common_step": torch.tensor(state.steps)},
        "param_groups": [dict(group) for group in state.groups],
    }
    if layout.dtype == torch.float32:
        return inner
    return {"optimizer": inner}  # Megatron's bfloat16 optimizer wraps torch's
