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
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import Config, ConfigError
from configs.files import write_text
from model_zoo.config import DiffusionConfig, TransformerConfig
from model_zoo.convert.rules import check_against

LAYOUT = "layout.json"  # in a checkpoint folder of training/diffusion ...
SHARDS = "zero"  # ... beside the folder of DeepSpeed's own files
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


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """Everything a DeepSpeed checkpoint folder holds. Raises ConfigError when parts of it are missing or foreign."""
    optimizer_files = _by_rank(folder, r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
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
        model_files = [folder / "mp_rank_00_model_states.pt"]
    models = [_load(path) for path in model_files]
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in models[0]["param_shapes"]]
    trainable = frozenset(name for group in shapes for name in group)
    still = _frozen_of_stage_3(models) if stage == 3 else _frozen_of_stage_2(models[0], trainable)
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    states = [shard[key]["state"] for shard in shards]
    flat = [shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for shard in shards]
    pieces = _stretches_of_stage_3(shapes, world_size) if stage == 3 else _stretches_of_stage_2(shapes, shards)

    def assembled(vectors: Sequence[Sequence[Tensor]]) -> dict[str, Callable[[], Tensor]]:
        joined = [[_join(rank)] for rank in vectors] if stage == 3 else vectors
        return {name: _maker(joined, stretches, shape) for name, (shape, stretches) in pieces.items()}

    def moment(name: str) -> list[list[Tensor]]:
        return [[state[group][name].reshape(-1) for group in sorted(state)] for state in states]

    steps = {int(entry["step"]) for state in states for entry in state.values()}
    if len(steps) > 1:
        raise ConfigError(f"{folder} holds different Adam step counts, {sorted(steps)}: it mixes two checkpoints")
    return DeepSpeedState(
        zero_stage=stage, world_size=world_size,
        weights=Assembled({**{name: maker for name, (_, maker) in still.items()}, **assembled(flat)}),
        shapes={name: shape for name, (shape, _) in {**still, **pieces}.items()}, trainable=trainable,
        moments={name: Assembled(assembled(moment(name))) for name in MOMENTS} if steps else {},
        optimizer_steps=steps.pop() if steps else 0,
    )


def export_diffusion(folder: Path) -> tuple[str, Config, dict[str, Tensor]]:
    """A checkpoint of training/diffusion as a zoo entry: (kind, config, tensors under our names, trained ones fp32).

    Phase main gives the "transformer", phase control the whole "diffusion" model.
    """
    layout = Layout.read(folder)
    state = read_deepspeed(folder / SHARDS)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.weights.items()}
    check_against(tensors, layout.shapes, f"checkpoint {folder}")
    config: DiffusionConfig | TransformerConfig = layout.model
    return ("diffusion", config, tensors) if layout.phase == "control" else ("transformer", config.transformer, tensors)


def _load(path: Path) -> Any:
    """Unpickle with the allow-list, tensors mapped from the file."""
    allowed = [(stand_in, name) for name, stand_in in ALLOWED.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: the checkpoint is not whole") from None
    except pickle.UnpicklingError:
        foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(ALLOWED))
        raise ConfigError(f"{path} holds classes that no ZeRO checkpoint of ours holds, so it is refused: "
                          f"{', '.join(foreign) or 'an unreadable pickle'}") from None
    except (RuntimeError, EOFError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    found = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))}
    if sorted(found) != list(range(len(found))):
        raise ConfigError(f"{folder} holds the shards of ranks {sorted(found)} only: the checkpoint is not whole")
    return [found[rank] for rank in sorted(found)]


Still = dict[str, tuple[torch.Size, Callable[[], Tensor]]]


def _frozen_of_stage_2(model: Mapping[str, Any], trainable: frozenset[str]) -> Still:
    """Frozen parameters and buffers, whole in the one model file."""
    still = {name: tensor for name, tensor in model["module"].items() if name not in trainable}
    return {name: (tensor.shape, _constant(tensor)) for name, tensor in still.items()}


def _frozen_of_stage_3(models: Sequence[Mapping[str, Any]]) -> Still:
    """Buffers whole in every model file, frozen parameters in equal slices, the last one padded."""
    buffers = {name: models[0]["module"][name] for name in models[0]["buffer_names"]}

    def maker(name: str, shape: torch.Size) -> Callable[[], Tensor]:
        return lambda: torch.cat([m["frozen_param_fragments"][name] for m in models])[: shape.numel()].view(shape)

    frozen = {name: torch.Size(shape) for name, shape in (models[0]["frozen_param_shapes"] or {}).items()}
    still: Still = {name: (tensor.shape, _constant(tensor)) for name, tensor in buffers.items()}
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


def _maker(vectors: Sequence[Sequence[Tensor]], stretches: Sequence[_Stretch], shape: torch.Size) -> Callable[[], Tensor]:
    """The parameter of `shape` from its stretches of `vectors[rank][group]`; padding at its end is dropped."""
    return lambda: torch.cat(
        [vectors[s.rank][s.group].narrow(0, s.start, s.numel) for s in stretches]
    )[: shape.numel()].view(shape)


def _join(vectors: Sequence[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor

