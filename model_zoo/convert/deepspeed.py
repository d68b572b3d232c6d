"""DeepSpeed ZeRO checkpoints -> plain tensors by parameter name, with torch.load alone.

What DeepSpeed writes (0.19, ZeRO 1-3, no tensor or pipeline parallelism) into one folder:

    mp_rank_00_model_states.pt                    ZeRO 1, 2: every parameter in the working dtype, buffers
    zero_pp_rank_<r>_mp_rank_00_model_states.pt   ZeRO 3: buffers, this rank's slices of frozen parameters
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   this rank's slice of fp32 weights and Adam moments

In ZeRO 1 and 2 the trainable parameters of a group lie end to end in one flat vector, cut into equal parts
over the ranks; each file says which stretch of which parameter it holds. In ZeRO 3 every parameter is cut
over the ranks by itself, padded to a multiple of their number, and a rank's slices lie end to end.

No process group, no DeepSpeed: the few DeepSpeed classes in the pickles are stood in for, any other class
is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import Config, ConfigError
from configs.files import write_text
from model_zoo.config import DiffusionConfig, TransformerConfig
from model_zoo.convert.lazy import LazyTensors, Progress, Stored
from model_zoo.convert.pickles import read_pickle, tensors_of, write_pickle
from model_zoo.convert.rules import check_against

LAYOUT = "layout.json"  # in a checkpoint folder of training/diffusion ...
SHARDS = "zero"  # ... beside the folder of DeepSpeed's own files
START = "mp_rank_00_model_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(Config):
    """What training/diffusion says about its checkpoint: how it is cut, and of which model."""

    zero_stage: int
    world_size: int
    precision: str
    phase: str  # "main" | "control"
    model: DiffusionConfig
    shapes: dict[str, list[int]]  # of every parameter and persistent buffer

    def write(self, folder: Path) -> None:
        write_text(folder / LAYOUT, self.model_dump_json(indent=1))

    @staticmethod
    def read(folder: Path) -> Layout:
        try:
            return Layout.model_validate_json((folder / LAYOUT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{folder} is not a checkpoint of the diffusion trainer: it has no {LAYOUT}") from None
        except ValueError as error:
            raise ConfigError(f"{folder / LAYOUT} does not describe a diffusion checkpoint: {error}") from None


class _StandIn:
    """Takes the place of a DeepSpeed class in a pickle and keeps what the pickle says about it."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


class _LossScaler(_StandIn):
    pass


class _FragmentAddress(_StandIn):
    """Where a stretch of a parameter lies in a rank's flat vector: `start`, `numel`."""

    start: int
    numel: int


class _ZeroStage(_StandIn):
    pass


# Class in the pickle -> what stands in for it. torch's weights_only unpickler refuses every other.
ALLOWED: dict[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _ZeroStage,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _LossScaler,
    "deepspeed.utils.tensor_fragment.fragment_address": _FragmentAddress,
}


@dataclass(frozen=True)
class Assembled(Mapping[str, Tensor]):
    """Tensors that are put together from their shards when asked for: one at a time stays in memory."""

    makers: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the tensor
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclass(frozen=True)
class DeepSpeedState:
    """A checkpoint by parameter name, whatever its layout."""

    zero_stage: int
    world_size: int
    weights: Mapping[str, Tensor]  # trainable ones fp32 (the masters), frozen ones and buffers as trained with
    shapes: Mapping[str, torch.Size]  # of every one of them
    trainable: frozenset[str]
    moments: Mapping[str, Mapping[str, Tensor]]  # "exp_avg" | "exp_avg_sq" -> fp32 by name of trainable parameter
    optimizer_steps: int  # Adam's own count
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # of weights that shall not be exported in float32


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """Everything a DeepSpeed checkpoint folder holds. Raises ConfigError when parts of it are missing or foreign."""
    optimizer_files = _by_rank(folder, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
    if not optimizer_files and (folder / START).is_file():
        return _start(folder)
    if not optimizer_files:
        raise ConfigError(f"{folder} holds no ZeRO checkpoint (no *_optim_states.pt)")
    shards = [_load(path)["optimizer_state_dict"] for path in optimizer_files]
    stage = int(shards[0]["zero_stage"][0])
    counts = shards[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    if world_size != len(shards):
        raise ConfigError(f"{folder} was written by {world_size} ranks but holds the optimizer states of {len(shards)}")
    if stage == 3:
        model_files = _by_rank(folder, r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
        if len(model_files) != world_size:
            raise ConfigError(f"{folder} was written by {world_size} ranks but holds the model states of {len(model_files)}")
    else:
        model_files = [folder / START]
    models = [_load(path) for path in model_files]
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in models[0]["param_shapes"]]
    trainable = frozenset(name for group in shapes for name in group)
    still = _frozen_of_stage_3(models) if stage == 3 else _frozen_of_stage_2(models[0], trainable)
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    states = [shard[key]["state"] for shard in shards]
    flat = [shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for shard in shards]
    pieces = _stretches_of_stage_3(shapes, world_size) if stage == 3 else _stretches_of_stage_2(shapes, shards)

    def assembled(vectors: Sequence[Sequence[Stored]]) -> dict[str, Callable[[], Tensor]]:
        joined = [[_Vector(rank)] for rank in vectors] if stage == 3 else [[_Vector([v]) for v in rank] for rank in vectors]
        return {name: _maker(joined, stretches, shape) for name, (shape, stretches) in pieces.items()}

    def moment(name: str) -> list[list[Stored]]:
        return [[state[group][name] for group in sorted(state)] for state in states]

    steps = {int(_read(entry["step"])) for state in states for entry in state.values()}
    if len(steps) > 1:
        raise ConfigError(f"{folder} holds different Adam step counts, {sorted(steps)}: it mixes two checkpoints")
    return DeepSpeedState(
        zero_stage=stage, world_size=world_size,
        weights=Assembled({**{name: maker for name, (_, maker) in still.items()}, **assembled(flat)}),
        shapes={name: shape for name, (shape, _) in {**still, **pieces}.items()}, trainable=trainable,
        moments={name: Assembled(assembled(moment(name))) for name in MOMENTS} if steps else {},
        optimizer_steps=steps.pop() if steps else 0,
    )


def export_diffusion(folder: Path) -> tuple[str, Config, LazyTensors]:
    """A checkpoint of training/diffusion as a zoo entry: (kind, config, tensors under our names, read when asked for).

    Phase main gives the "transformer", phase control the whole "diffusion" model. All in float32, which is what
    trained weights are kept in; weights that start a run have the dtype they were written with.
    """
    layout = Layout.read(folder)
    state = read_deepspeed(folder / SHARDS)
    with torch.device("meta"):
        dtypes = {name: state.dtypes.get(name, torch.float32) for name in state.shapes}
        meta = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in state.shapes.items()}
    check_against(meta, layout.shapes, f"checkpoint {folder}")
    tensors = LazyTensors(meta, lambda name: state.weights[name].to(dtypes[name]))
    config: DiffusionConfig | TransformerConfig = layout.model
    return ("diffusion", config, tensors) if layout.phase == "control" else ("transformer", config.transformer, tensors)


def _start(folder: Path) -> DeepSpeedState:
    """Whole weights without an optimizer: what `write_start` writes, and DeepSpeed without ZeRO."""
    content = _load(folder / START)
    weights = tensors_of(content["module"])
    trainable = frozenset(name for group in content["param_shapes"] for name in group)
    return DeepSpeedState(
        zero_stage=0, world_size=1, weights=weights, shapes={name: tensor.shape for name, tensor in weights.meta.items()},
        trainable=trainable, moments={}, optimizer_steps=0, dtypes={name: t.dtype for name, t in weights.meta.items()},
    )


def write_start(folder: Path, kind: str, config: DiffusionConfig | TransformerConfig, tensors: LazyTensors,
                progress: Progress | None = None) -> None:
    """Weights that start a run: `engine.load_checkpoint(folder, tag="zero", load_module_only=True)` of DeepSpeed (ZeRO
    1, 2) reads them, and so does our own engine, at any stage and world size.

    Kind "transformer" is phase main, where all is trained; "diffusion" is phase control, where the main
    transformer is not, nor the branch's last norm, which influences nothing.
    """
    control = kind == "diffusion"
    frozen = ("transformer.", "control.final_norm.") if control else ()
    shapes = {name: torch.Size(tensor.shape) for name, tensor in tensors.meta.items() if not name.startswith(frozen)}

    def content(weights: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "module": dict(weights), "buffer_names": [], "param_shapes": [shapes], "frozen_param_shapes": None, "shared_params": {},
            "frozen_param_fragments": None, "optimizer": None, "lr_scheduler": None, "data_sampler": None, "random_ltd": None,
            "sparse_tensor_module_names": [], "skipped_steps": 0, "global_steps": 0, "global_samples": 0,
            "dp_world_size": 1, "mp_world_size": 1, "ds_config": {}, "ds_version": "0.19.8",
        }

    write_pickle(folder / SHARDS / START, tensors, content, progress)
    whole = config if control else DiffusionConfig(transformer=config, control_layers=min(15, config.num_layers))
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[tensors.dtype()]
    Layout(zero_stage=0, world_size=1, precision=precision, phase="control" if control else "main", model=whole,
           shapes={name: list(tensor.shape) for name, tensor in tensors.meta.items()}).write(folder)


def _load(path: Path) -> Any:
    """Unpickle with the allow-list, tensors left in the file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the checkpoint is not whole")
    return read_pickle(path, ALLOWED)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))}
    if sorted(found) != list(range(len(found))):
        raise ConfigError(f"{folder} holds the shards of ranks {sorted(found)} only: the checkpoint is not whole")
    return [found[rank] for rank in sorted(found)]


Still = dict[str, tuple[torch.Size, Callable[[], Tensor]]]


def _frozen_of_stage_2(model: Mapping[str, Any], trainable: frozenset[str]) -> Still:
    """Frozen parameters and buffers, whole in the one model file."""
    still = {name: tensor for name, tensor in model["module"].items() if name not in trainable}
    return {name: (torch.Size(tensor.shape), _constant(tensor)) for name, tensor in still.items()}


def _frozen_of_stage_3(models: Sequence[Mapping[str, Any]]) -> Still:
    """Buffers whole in every model file, frozen parameters in equal slices, the last one padded."""
    buffers = {name: models[0]["module"][name] for name in models[0]["buffer_names"]}

    def maker(name: str, shape: torch.Size) -> Callable[[], Tensor]:
        return lambda: torch.cat([_read(m["frozen_param_fragments"][name]) for m in models])[: shape.numel()].view(shape)

    frozen = {name: torch.Size(shape) for name, shape in (models[0]["frozen_param_shapes"] or {}).items()}
    still: Still = {name: (torch.Size(tensor.shape), _constant(tensor)) for name, tensor in buffers.items()}
    return still | {name: (shape, maker(name, shape)) for name, shape in frozen.items()}


@dataclass(frozen=True)
class _Stretch:
    rank: int
    group: int
    start: int
    numel: int


Pieces = dict[str, tuple[torch.Size, list[_Stretch]]]


def _stretches_of_stage_2(shapes: Sequence[Mapping[str, torch.Size]], shards: Sequence[Mapping[str, Any]]) -> Pieces:
    """ZeRO 1 and 2: each rank's file names its stretches; the ranks in order make up the parameter."""
    pieces: Pieces = {name: (shape, []) for group in shapes for name, shape in group.items()}
    for rank, shard in enumerate(shards):
        if any(any(padding) for padding in shard.get("param_alignment_paddings") or []):
            raise ConfigError("this checkpoint pads parameters inside its flat groups, which is not read here")
        for group, mapping in enumerate(shard["param_slice_mappings"]):
            for name, address in mapping.items():
                pieces[name][1].append(_Stretch(rank, group, address.start, address.numel))
    for name, (shape, stretches) in pieces.items():
        held = sum(s.numel for s in stretches)
        assert held == shape.numel(), f"{name}: the shards hold {held} of {shape.numel()} elements"
    return pieces


def _stretches_of_stage_3(shapes: Sequence[Mapping[str, torch.Size]], world_size: int) -> Pieces:
    """ZeRO 3: equal slices at the same place of every rank's joined vector, the last one padded."""
    pieces: Pieces = {}
    start = 0
    for group in shapes:
        for name, shape in group.items():
            slice_numel = math.ceil(shape.numel() / world_size)
            pieces[name] = (shape, [_Stretch(rank, 0, start, slice_numel) for rank in range(world_size)])
            start += slice_numel
    return pieces


@dataclass(frozen=True)
class _Vector:
    """Flat vectors in a file, end to end."""

    pieces: Sequence[Stored]

    def part(self, start: int, numel: int) -> Tensor:
        found = []
        for piece in self.pieces:
            size = torch.Size(piece.shape).numel()
            first, end = max(start, 0), min(start + numel, size)
            if first < end:
                assert piece.stride in (None, (1,)), piece  # flat vectors; a view of a larger one starts at its offset
                found.append(replace(piece, offset=piece.offset + first, shape=(end - first,), stride=None).read())
            start -= size
        return found[0] if len(found) == 1 else torch.cat(found)


def _maker(vectors: Sequence[Sequence[_Vector]], stretches: Sequence[_Stretch], shape: torch.Size) -> Callable[[], Tensor]:
    """The parameter of `shape` from its stretches of `vectors[rank][group]`; padding at its end is dropped."""
    return lambda: torch.cat([vectors[s.rank][s.group].part(s.start, s.numel) for s in stretches])[: shape.numel()].view(shape)


def _read(tensor: Stored | Tensor | float) -> Any:
    return tensor.read() if isinstance(tensor, Stored) else tensor


def _constant(tensor: Stored | Tensor) -> Callable[[], Tensor]:
    return lambda: _read(tensor)
