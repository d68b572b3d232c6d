"""DeepSpeed ZeRO checkpoints -> tensors by parameter name, wherever their elements lie; with torch.load alone.

What DeepSpeed writes (0.19, ZeRO 1-3, no tensor or pipeline parallelism) into one folder:

    mp_rank_00_model_states.pt                    ZeRO 1, 2: every parameter in the working dtype, buffers
    zero_pp_rank_<r>_mp_rank_00_model_states.pt   ZeRO 3: buffers, this rank's slices of frozen parameters
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   this rank's slice of fp32 weights and Adam moments

In ZeRO 1 and 2 the trainable parameters of a group lie end to end in one flat vector, cut into equal parts
over the ranks; each file says which stretch of which parameter it holds. In ZeRO 3 every parameter is cut
over the ranks by itself, padded to a multiple of their number, and a rank's slices lie end to end.

No process group, no DeepSpeed: the few DeepSpeed classes in the pickles are stood in for, any other class
is refused by name. deepspeed_write.py writes such folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.configs import Config, ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import read_json_as
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.lazy import LazyTensors, Stored
from landiff.model_zoo.convert.pickles import IgnoredObject, read_pickle, replace_leaves
from landiff.model_zoo.convert.rules import check_against

LAYOUT = "layout.json"  # in a checkpoint folder of training/diffusion ...
SHARDS = "zero"  # ... beside the folder of DeepSpeed's own files
START = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroLayout(Config):
    """What training/diffusion says about its checkpoint: how it is cut, and of which model."""

    zero_stage: int  # 0: whole weights without an optimizer
    world_size: int
    precision: str
    phase: str  # "main" | "control"
    model: DiffusionConfig
    shapes: dict[str, list[int]]  # of every parameter and persistent buffer

    @property
    def part(self) -> tuple[str, DiffusionConfig | TransformerConfig]:
        """Kind and config of what is trained: phase main the transformer, phase control the whole model."""
        return (
            ("diffusion", self.model)
            if self.phase == "control"
            else ("transformer", self.model.transformer)
        )

    def write(self, folder: Path) -> None:
        write_text(folder / LAYOUT, self.model_dump_json(indent=1))

    @staticmethod
    def read(folder: Path) -> ZeroLayout:
        try:
            return read_json_as(ZeroLayout, folder / LAYOUT)
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} is not a checkpoint of the diffusion trainer: it has no {LAYOUT}"
            ) from None
        except ConfigError as error:
            raise ConfigError(
                f"{folder / LAYOUT} does not describe a diffusion checkpoint: {error}"
            ) from None


# These take the place of DeepSpeed's classes in a pickle and keep what it says about them.


class LossScaler:
    def __init__(self, scale: float) -> None:
        self.cur_scale, self.dynamic = scale, False


class DynamicLossScaler:
    """Of float16; whatever it holds."""


class FragmentAddress:
    """Where a stretch of a parameter lies in a rank's flat vector."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class ZeroStage:
    """An enumeration, there."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return ZeroStage, (self.stage,)


# Class in the pickle -> what stands in for it. torch's weights_only unpickler refuses every other.
CLASSES: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
}


@dataclass(frozen=True)
class Scattered:
    """A tensor whose elements lie end to end in several places."""

    shape: torch.Size
    pieces: tuple[Stored, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def part(self, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor; nothing else is read."""
        found = []
        for piece in self.pieces:
            size = torch.Size(piece.shape).numel()
            first, end = max(start, 0), min(start + numel, size)
            if first < end:
                found.append(piece.part(first, end - first))
            start -= size
        return (
            found[0]
            if len(found) == 1
            else torch.cat(found)
            if found
            else torch.empty(0, dtype=self.dtype)
        )

    def read(self) -> Tensor:
        return self.part(0, self.shape.numel()).view(self.shape)


@dataclass(frozen=True)
class Assembled(Mapping[str, Tensor]):
    """Tensors that are put together when asked for: one at a time stays in memory."""

    places: Mapping[str, Scattered]

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the tensor
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that are trained alike."""

    names: tuple[str, ...]  # in the order of the flat vectors
    settings: Mapping[str, Any]  # lr, betas, ...


@dataclass(frozen=True)
class DeepSpeedState:
    """A checkpoint by parameter name, whatever its layout."""

    zero_stage: int  # 0: whole weights without an optimizer
    world_size: int
    places: Mapping[
        str, Scattered
    ]  # trainable ones fp32 (the masters), frozen ones and buffers as trained with
    groups: tuple[OptimizerGroup, ...]
    buffers: tuple[str, ...]
    working: Mapping[str, torch.dtype]  # what the module computes with
    moment_places: Mapping[
        str, Mapping[str, Scattered]
    ]  # "exp_avg" | "exp_avg_sq" -> fp32 by name of trainable parameter
    optimizer_steps: int  # Adam's own count
    numbers: Mapping[str, Any] = field(
        default_factory=dict
    )  # what the optimizer counts beside its vectors: step, as it counts it
    optimizer: Mapping[str, Any] = field(
        default_factory=dict
    )  # what else the optimizer files say, equal on all ranks
    rest: Mapping[str, Any] = field(
        default_factory=dict
    )  # what else the model file says: counts, schedules, the user's own

    @property
    def weights(self) -> Assembled:
        return Assembled(self.places)

    @property
    def moments(self) -> dict[str, Assembled]:
        return {key: Assembled(places) for key, places in self.moment_places.items()}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: place.shape for name, place in self.places.items()}

    @property
    def trainable(self) -> frozenset[str]:
        return frozenset(name for group in self.groups for name in group.names)


# What a model file says about tensors and layout; the rest of it is `DeepSpeedState.rest`.
OF_TENSORS = (
    "module",
    "buffer_names",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "optimizer",
    "dp_world_size",
)


def find_shards(path: Path) -> Path | None:
    """Where the files of a ZeRO optimizer lie: in a checkpoint of our trainer, in the folder that `latest` names, in `path` itself."""
    latest = path / "latest"
    names = [SHARDS, "."] + (
        [latest.read_text(encoding="utf-8").strip()] if latest.is_file() else []
    )
    for folder in (path / name for name in names):
        if folder.is_dir() and any(
            re.fullmatch(OPTIMIZER_FILE, file.name) for file in folder.iterdir()
        ):
            return folder
    return None


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """Everything a DeepSpeed checkpoint folder holds. Raises ConfigError when parts of it are missing or foreign."""
    optimizer_files = _by_rank(folder, OPTIMIZER_FILE)
    other = [
        path.name
        for path in folder.iterdir()
        if re.search(r"mp_rank_(?!00)\d\d_|^layer_\d|^expp_rank_", path.name)
    ]
    if other:
        raise ConfigError(
            f"{folder} is of a run with tensor, pipeline or expert parallelism ({sorted(other)[0]}), which is not read here"
        )
    if not optimizer_files and (folder / START).is_file():
        return _start(folder)
    if not optimizer_files:
        raise ConfigError(f"{folder} holds no ZeRO checkpoint (no *_optim_states.pt)")
    shards = [_load(path)["optimizer_state_dict"] for path in optimizer_files]
    stage = shards[0]["zero_stage"].stage
    counts = shards[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    if world_size != len(shards):
        raise ConfigError(
            f"{folder} was written by {world_size} ranks but holds the optimizer states of {len(shards)}"
        )
    if stage == 3:
        model_files = _by_rank(folder, r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
        if len(model_files) != world_size:
            raise ConfigError(
                f"{folder} was written by {world_size} ranks but holds the model states of {len(model_files)}"
            )
    else:
        model_files = [folder / START]
    models = [_load(path) for path in model_files]
    if models[0].get("shared_params"):
        raise ConfigError(
            f"{folder} ties parameters together ({', '.join(models[0]['shared_params'])}), which is not read here"
        )
    if (_zero_config(models[0]) or {}).get("round_robin_gradients"):
        raise ConfigError(
            f"{folder} was written with zero_optimization.round_robin_gradients = true, which is not read here"
        )
    shapes = [
        {name: torch.Size(shape) for name, shape in group.items()}
        for group in models[0]["param_shapes"]
    ]
    trainable = frozenset(name for group in shapes for name in group)
    states = [_optimizer(shard, stage, folder) for shard in shards]
    flat = [
        shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        for shard in shards
    ]
    still = _frozen_of_stage_3(models) if stage == 3 else _frozen_of_stage_2(models[0], trainable)
    pieces = _pieces_of_stage_3 if stage == 3 else _pieces_of_stage_2
    moments = {
        key: pieces(
            shapes,
            shards,
            [[state["state"][i][key] for i in sorted(state["state"])] for state in states],
        )
        for key in _moments(states[0])
    }
    steps = {
        int(_read(entry["step"]))
        for state in states
        for entry in state["state"].values()
        if "step" in entry
    }
    if len(steps) > 1:
        raise ConfigError(
            f"{folder} holds different Adam step counts, {sorted(steps)}: it mixes two checkpoints"
        )
    return DeepSpeedState(
        zero_stage=stage,
        world_size=world_size,
        places={**still, **pieces(shapes, shards, flat)},
        groups=_groups(shapes, states[0], stage),
        buffers=tuple(models[0]["buffer_names"]),
        moment_places=moments,
        working={
            name: tensor.dtype
            for name, tensor in models[0]["module"].items()
            if isinstance(tensor, Stored)
        },
        optimizer_steps=steps.pop() if steps else 0,
        numbers=_numbers(states[0]),
        optimizer={
            key: shards[0][key]
            for key in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
            if key in shards[0]
        },
        rest=_plain({key: value for key, value in models[0].items() if key not in OF_TENSORS}),
    )


def export_diffusion(folder: Path) -> tuple[str, Config, LazyTensors]:
    """A checkpoint of training/diffusion as a zoo entry: (kind, config, tensors under our names, read when asked for).

    Phase main gives the "transformer", phase control the whole "diffusion" model. All in float32, which is what
    trained weights are kept in; weights that start a run have the dtype they were written with.
    """
    layout = ZeroLayout.read(folder)
    tensors = exported(read_deepspeed(folder / SHARDS))
    check_against(tensors.meta, layout.shapes, f"checkpoint {folder}")
    return *layout.part, tensors


def exported(state: DeepSpeedState) -> LazyTensors:
    """All weights of a checkpoint; floating-point ones in float32, but of weights that start a run as they are stored."""
    start = is_start(state)
    tensors = LazyTensors(
        {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta")
            for name, place in state.places.items()
        },
        lambda name: state.places[name].read(),
    )
    if not start:
        return tensors.cast(torch.float32)
    meta = {
        name: tensor.to(state.working.get(name, tensor.dtype))
        for name, tensor in tensors.meta.items()
    }
    return LazyTensors(meta, lambda name: tensors.read(name).to(meta[name].dtype))


def is_start(state: DeepSpeedState) -> bool:
    """Weights without an optimizer, as `deepspeed_write.write_start` puts them down."""
    return state.zero_stage == 0 or bool(state.rest.get("start"))


def _start(folder: Path) -> DeepSpeedState:
    """Whole weights without an optimizer: what `write_start` writes, and DeepSpeed without ZeRO."""
    content = _load(folder / START)
    weights = {
        name: value for name, value in content["module"].items() if isinstance(value, Stored)
    }
    if any(isinstance(value, Tensor) for value in content["module"].values()):
        raise ConfigError(
            f"{folder / START} is of before torch 1.6; save it again with a newer one"
        )
    groups = content["param_shapes"] or [weights]
    return DeepSpeedState(
        zero_stage=0,
        world_size=1,
        places={name: _whole(stored) for name, stored in weights.items()},
        buffers=(),
        groups=tuple(OptimizerGroup(tuple(group), {}) for group in groups),
        moment_places={},
        optimizer_steps=0,
        working={name: stored.dtype for name, stored in weights.items()},
    )


def _load(path: Path) -> Any:
    """Unpickle with the allow-list, tensors left in the file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the checkpoint is not whole")
    return read_pickle(path, CLASSES)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    found = {
        int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))
    }
    if sorted(found) != list(range(len(found))):
        raise ConfigError(
            f"{folder} holds the shards of ranks {sorted(found)} only: the checkpoint is not whole"
        )
    return [found[rank] for rank in sorted(found)]


def _optimizer(shard: Mapping[str, Any], stage: int, folder: Path) -> Mapping[str, Any]:
    """state and param_groups of torch's optimizer, over flat vectors."""
    state = shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"{folder} was written with zero_optimization.elastic_checkpoint = true, which is not read here"
        )
    return state


def _moments(state: Mapping[str, Any]) -> list[str]:
    """What the optimizer keeps for every weight."""
    return [
        key
        for key, value in next(iter(state["state"].values()), {}).items()
        if isinstance(value, Stored) and len(value.shape) == 1
    ]


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _read(value)
        for key, value in next(iter(state["state"].values()), {}).items()
        if not (isinstance(value, Stored) and value.shape)
    }


def _zero_config(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """zero_optimization of the DeepSpeed config that wrote a checkpoint."""
    config = model.get("ds_config")
    return config.get("zero_optimization") if isinstance(config, Mapping) else None


def _groups(
    shapes: Sequence[Mapping[str, torch.Size]], state: Mapping[str, Any], stage: int
) -> tuple[OptimizerGroup, ...]:
    """ZeRO 3 may cut a group of the optimizer into several vectors, each with its own entry of `shapes`."""
    listed = state.get("param_groups") or [{"params": [i]} for i in range(len(shapes))]
    groups = []
    for group in listed:
        names = tuple(name for i in group["params"] for name in shapes[i])
        groups.append(
            OptimizerGroup(
                names, {key: value for key, value in _plain(group).items() if key != "params"}
            )
        )
    return tuple(groups)


def _frozen_of_stage_2(model: Mapping[str, Any], trainable: frozenset[str]) -> dict[str, Scattered]:
    """Frozen parameters and buffers, whole in the one model file."""
    return {
        name: _whole(tensor)
        for name, tensor in model["module"].items()
        if name not in trainable and isinstance(tensor, Stored)
    }


def _frozen_of_stage_3(models: Sequence[Mapping[str, Any]]) -> dict[str, Scattered]:
    """Buffers whole in every model file, frozen parameters in equal slices, the last ones padded."""
    buffers = {name: _whole(models[0]["module"][name]) for name in models[0]["buffer_names"]}
    frozen = {}
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        frozen[name] = _joined(
            torch.Size(shape), [(model["frozen_param_fragments"][name], 0) for model in models]
        )
    return buffers | frozen


def _whole(stored: Stored) -> Scattered:
    return Scattered(torch.Size(stored.shape), (stored,))


def _joined(shape: torch.Size, places: Sequence[tuple[Stored, int]]) -> Scattered:
    """A tensor from (vector, first element in it), in order, each used to its end or as far as elements are missing."""
    left, pieces = shape.numel(), []
    for vector, start in places:
        numel = min(left, torch.Size(vector.shape).numel() - start)
        pieces.append(_flat(vector, start, numel))
        left -= numel
    assert left == 0, f"the shards hold {shape.numel() - left} of {shape.numel()} elements"
    return Scattered(shape, tuple(pieces))


def _flat(vector: Stored, start: int, numel: int) -> Stored:
    assert len(vector.shape) == 1 and vector.stride in (None, (1,)), (
        vector
    )  # may be a view of a larger one, from its offset on
    return Stored(vector.path, vector.start, vector.dtype, (numel,), (1,), vector.offset + start)


Vectors = Sequence[Sequence[Stored]]  # by rank and group


def _pieces_of_stage_2(
    shapes: Sequence[Mapping[str, torch.Size]],
    shards: Sequence[Mapping[str, Any]],
    vectors: Vectors,
) -> dict[str, Scattered]:
    """ZeRO 1 and 2: each rank's file names its stretches; the ranks in order make up the parameter."""
    pieces: dict[str, list[Stored]] = {name: [] for group in shapes for name in group}
    for rank, shard in enumerate(shards):
        if any(
            any(padding)
            for padding in shard.get("param_alignment_paddings") or []
            if isinstance(padding, list)
        ):
            raise ConfigError(
                "this checkpoint pads parameters inside its flat groups, which is not read here"
            )
        for group, mapping in enumerate(shard["param_slice_mappings"]):
            for name, address in mapping.items():
                pieces[name].append(_flat(vectors[rank][group], address.start, address.numel))
    found = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        held = sum(piece.shape[0] for piece in pieces[name])
        assert held == shape.numel(), f"{name}: the shards hold {held} of {shape.numel()} elements"
        found[name] = Scattered(shape, tuple(pieces[name]))
    return found


def _pieces_of_stage_3(
    shapes: Sequence[Mapping[str, torch.Size]],
    shards: Sequence[Mapping[str, Any]],
    vectors: Vectors,
) -> dict[str, Scattered]:
    """ZeRO 3: equal slices at the same place of every rank's vectors, which lie end to end; the last slice is padded."""
    index, start, found = 0, 0, {}  # of the vector, and of the slice in it
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        size = math.ceil(shape.numel() / len(shards))
        while start >= vectors[0][index].shape[0] and index + 1 < len(vectors[0]):
            index, start = index + 1, 0
        left, pieces = shape.numel(), []
        for rank in vectors:
            numel = min(size, left)
            pieces.append(_flat(rank[index], start, numel))
            left -= numel
        found[name] = Scattered(shape, tuple(pieces))
        start += size
    return found


def _read(tensor: Stored | Tensor | float) -> Any:
    return tensor.read() if isinstance(tensor, Stored) else tensor


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what holds stood-in objects, whose content is gone; tensors are read, they are few and small."""

    def foreign(node: Any) -> bool:
        if isinstance(node, Mapping | list | tuple):
            return any(map(foreign, node.values() if isinstance(node, Mapping) else node))
        return isinstance(node, IgnoredObject)

    return {
        key: replace_leaves(value, _read) for key, value in values.items() if not foreign(value)
    }
