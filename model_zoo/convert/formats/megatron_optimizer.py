"""A Megatron checkpoint with its optimizer -> one for another padding, precision or kind of optimizer, file to file.

Tensor, pipeline and data parallel need nothing: the folder stores whole tensors, also of the optimizer. But the two kinds of
optimizer keep their state in two forms, neither of which loads into the other:

    plain          weights, with float32 ones beside them (`fp32_param`) where they are bfloat16; one count of steps in common.pt
    distributed    weights, with float32 ones beside them (`param`) always; a count of steps in every group of common.pt

Both keep `exp_avg` and `exp_avg_sq` by parameter (`fully_reshardable`). What a rank-wise form holds is refused by name.
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
    Padded,
    extra_states,
    layers_apart,
    megatron_rules,
    padding_of,
    under_our_names,
    write_documents,
)
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, Stored, converted
from landiff.model_zoo.convert.pickles import read_pickle, replace_leaves
from landiff.model_zoo.convert.rules import ConversionError

STATE = "optimizer.state."
MASTERS = {False: "fp32_param", True: "param"}  # by: is the optimizer distributed?
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class MegatronCut:
    """What a checkpoint must have in common with the run that loads it."""

    padded: Padded
    distributed: bool  # parallel.distributed_optimizer
    dtype: torch.dtype  # of weights and activations


@dataclass(frozen=True)
class MegatronState:
    """A checkpoint under our names."""

    cut: MegatronCut
    weights: LazyTensors  # what the model computes with
    masters: LazyTensors  # float32
    moments: Mapping[str, LazyTensors]
    steps: float  # Adam's own count
    groups: tuple[Mapping[str, Any], ...]  # settings of the optimizer's groups


def has_optimizer(folder: Path) -> bool:
    """Is there a state of the optimizer by parameter? Raises ConversionError where there is one by rank."""
    entries = DistReader(folder).entries
    by_rank = _by_rank(entries)
    if by_rank:
        raise ConversionError(
            f"{folder} keeps the optimizer's state by rank ({by_rank[0]}, ...); only distrib_optim_sharding_type = fully_reshardable "
            "can be converted. Save it so, or take the weights alone (--weights-only)"
        )
    return _whole(entries)


def describe_changes(folder: Path) -> str:
    """What `has_optimizer` finds, for people."""
    entries = DistReader(folder).entries
    return (
        "optimizer's state by rank"
        if _by_rank(entries)
        else "with the optimizer"
        if _whole(entries)
        else "no optimizer"
    )


def _by_rank(entries: Iterable[str]) -> list[str]:
    return [key for key in entries if key.startswith("optimizer.") and not key.startswith(STATE)]


def _whole(entries: Iterable[str]) -> bool:
    return all(any(key.startswith(f"{STATE}{moment}.") for key in entries) for moment in MOMENTS)


def read_state(folder: Path, config: LMConfig) -> MegatronState:
    """Everything but objects in memory. Raises ConversionError for what is missing, of another model or of an unknown form."""
    reader = DistReader(folder)
    theirs = layers_apart(
        reader, {key: key for key in reader.entries if not key.startswith("optimizer.")}
    )
    padded = padding_of(theirs, config, folder)

    def kept(what: str) -> LazyTensors | None:
        prefix = f"{STATE}{what}."
        found = layers_apart(
            reader,
            {key.removeprefix(prefix): key for key in reader.entries if key.startswith(prefix)},
        )
        return (
            under_our_names(found, config, padded, f"{folder}, {prefix}*") if len(found) else None
        )

    weights = under_our_names(theirs, config, padded, str(folder))
    inner, distributed = _torch_optimizer(folder)
    masters, moments = kept(MASTERS[distributed]), {moment: kept(moment) for moment in MOMENTS}
    if None in moments.values() or (
        masters is None and (distributed or weights.dtype() != torch.float32)
    ):
        raise ConversionError(
            f"{folder} holds no whole state of the optimizer; --weights-only takes its weights"
        )
    groups = inner["param_groups"]
    steps = {
        float(step)
        for step in (
            [group["step"] for group in groups] if distributed else [inner["state"]["common_step"]]
        )
    }
    if len(steps) != 1:
        raise ConversionError(
            f"{folder} counts different steps in the groups of its optimizer: {sorted(steps)}"
        )
    settings = tuple(
        {key: value for key, value in group.items() if key != "step"} for group in groups
    )
    return MegatronState(
        MegatronCut(padded, distributed, weights.dtype()),
        weights,
        masters or weights,
        moments,
        steps.pop(),
        settings,
    )


def _torch_optimizer(folder: Path) -> tuple[Mapping[str, Any], bool]:
    """Groups and count of steps out of common.pt, and whether the optimizer is distributed."""
    common = replace_leaves(
        read_pickle(folder / COMMON), lambda leaf: leaf.read() if isinstance(leaf, Stored) else leaf
    )
    outer = common.get("optimizer")
    inner = outer.get("optimizer", outer) if isinstance(outer, Mapping) else None
    if not isinstance(inner, Mapping) or "param_groups" not in inner:
        raise ConversionError(
            f"{folder / COMMON} describes no single optimizer with param_groups; --weights-only takes the weights"
        )
    distributed = "param_state_sharding_type" in outer
    if not distributed and "common_step" not in inner.get("state", {}):
        raise ConversionError(
            f"{folder / COMMON} does not say how many steps the optimizer has made; --weights-only takes the weights"
        )
    return inner, distributed


def write_state(
    folder: Path,
    config: LMConfig,
    state: MegatronState,
    cut: MegatronCut,
    progress: ProgressCallback | None = None,
) -> None:
    """`state` as a run of `cut` would have saved it, for any tensor, pipeline and data parallel layout.

    The weights are cast from the float32 ones, also where `state` has some of the right precision: those of a
    checkpoint that an older version wrote with `parallel.overlap` can be one step old.
    """
    table = megatron_rules(config, cut.padded)
    tensors = converted(state.masters.cast(cut.dtype), table, "to_theirs")
    beside = dict(state.moments)
    if cut.distributed or cut.dtype != torch.float32:
        beside[MASTERS[cut.distributed]] = state.masters
    for name, kept in beside.items():
        tensors = tensors.joined(converted(kept, table, "to_theirs").with_prefix(f"{STATE}{name}."))
    write_dist(folder, tensors.checked("the checkpoint"), extra_states(config), progress)
    write_documents(
        folder, {"optimizer": _common(state, cut), "distributed_optimizer": cut.distributed}
    )


def _common(state: MegatronState, cut: MegatronCut) -> dict[str, Any]:
    if cut.distributed:
        groups = [{**group, "step": state.steps} for group in state.groups]
        return {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": "fully_reshardable",
        }
    inner = {
        "state": {"common_step": torch.tensor(state.steps)},
        "param_groups": [dict(group) for group in state.groups],
    }
    return (
        inner if cut.dtype == torch.float32 else {"optimizer": inner}
    )  # the optimizer of bfloat16 weights wraps torch's
