"""Tensors by parameter name -> a DeepSpeed checkpoint of any world size and ZeRO stage, without DeepSpeed.

The files are those that DeepSpeed itself would have written (deepspeed.py describes them), so its own
`engine.load_checkpoint` goes on from them. They are filled stretch by stretch: neither a rank's vectors nor
the model is ever whole in memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.formats.deepspeed import (
    CLASSES,
    SHARDS,
    START,
    DeepSpeedState,
    FragmentAddress,
    LossScaler,
    OptimizerGroup,
    Scattered,
    ZeroLayout,
    ZeroStage,
)
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, megabytes
from landiff.model_zoo.convert.pickles import replace_leaves, write_pickle
from landiff.model_zoo.health import require_finite

ALIGNMENT = 2  # elements: ZeRO 1 and 2 pad a group to a multiple of this and the ranks
SUB_GROUP = 1_000_000_000  # elements: ZeRO 3 closes a vector once it holds so many, where sub_group_size says nothing else


@dataclass(frozen=True)
class Cut:
    """How a checkpoint lies over ranks."""

    stage: int  # 1 | 2 | 3
    world_size: int
    dtype: torch.dtype | None = None  # of what the module computes with; None: as it is


def write_deepspeed(
    folder: Path, state: DeepSpeedState, cut: Cut, progress: ProgressCallback | None = None
) -> None:
    """Write all of `state` as `cut.world_size` ranks of ZeRO `cut.stage` would save it.

    Raises UnhealthyError for weights or moments with NaN or infinity.
    """
    assert cut.stage in (1, 2, 3) and cut.world_size > 0, cut
    require_finite(state.weights.items(), "the checkpoint")
    for name, moments in state.moments.items():
        require_finite(moments.items(), f"{name} of the checkpoint")
    working = _working(state, cut.dtype)
    state = replace(state, working=working, rest=_with_stage(state.rest, cut.stage))
    bf16 = torch.bfloat16 in {working[name] for name in state.trainable}
    files: dict[str, _File] = {}
    for rank in range(cut.world_size if cut.stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_{START}" if cut.stage == 3 else START
        files[name] = (
            _model_of_stage_3(state, rank, cut.world_size)
            if cut.stage == 3
            else _model_of_stage_2(state, cut)
        )
    for rank in range(cut.world_size):
        name = f"{'bf16_' * bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # the name that DeepSpeed looks for
        files[name] = (
            _optimizer_of_stage_3(state, rank, cut.world_size)
            if cut.stage == 3
            else _optimizer_of_stage_2(state, rank, cut)
        )
    sizes = [megabytes(0, file.tensors.num_bytes)[1] for file in files.values()]
    for number, (name, file) in enumerate(files.items()):
        file.write(folder / name, progress and _shifted(progress, sum(sizes[:number]), sum(sizes)))


def _shifted(progress: ProgressCallback, before: int, total: int) -> ProgressCallback:
    """One file's counts as those of all files."""
    return lambda done, _own_total: progress(before + done, total)


def write_start(
    folder: Path,
    kind: str,
    config: DiffusionConfig | TransformerConfig,
    tensors: LazyTensors,
    progress: ProgressCallback | None = None,
    cut: Cut | None = None,
) -> None:
    """Weights that start a run; our own engine reads them at any stage and world size. DeepSpeed itself:

        engine.load_checkpoint(folder, tag="zero", load_module_only=True)                                  ZeRO 1, 2, any world size
        engine.load_checkpoint(folder, tag="zero", load_module_only=True, load_optimizer_states=False)     ZeRO 3

    The latter needs a `cut` of stage 3 and its world size, since in ZeRO 3 every rank looks for a file of its own.
    Kind "transformer" is phase main, where all is trained; "diffusion" is phase control, where the main
    transformer is not, nor the branch's last norm, which influences nothing.
    """
    control = kind == "diffusion"
    frozen = ("transformer.", "control.final_norm.") if control else ()
    trained = tuple(name for name in tensors.meta if not name.startswith(frozen))
    zero_3 = cut is not None and cut.stage == 3
    state = DeepSpeedState(
        zero_stage=0,
        world_size=1,
        places={name: Made(tensors, name) for name in tensors.meta},
        groups=(OptimizerGroup(trained, {}),),
        buffers=(),
        working={name: meta.dtype for name, meta in tensors.meta.items()},
        moment_places={},
        optimizer_steps=0,
        rest={"start": True},
    )
    if zero_3:
        write_deepspeed(folder / SHARDS, state, cut, progress)
        write_text(
            folder / "latest", SHARDS
        )  # where DeepSpeed looks for weights without an optimizer
    else:
        _model_of_stage_2(replace(state, rest=_with_stage(state.rest, 0)), Cut(1, 1)).write(
            folder / SHARDS / START, progress
        )
    whole = (
        config
        if control
        else DiffusionConfig(transformer=config, control_layers=min(15, config.num_layers))
    )
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[
        tensors.dtype()
    ]
    ZeroLayout(
        zero_stage=0,
        world_size=1,
        precision=precision,
        phase="control" if control else "main",
        model=whole,
        shapes={name: list(tensor.shape) for name, tensor in tensors.meta.items()},
    ).write(folder)


@dataclass(frozen=True)
class Made:
    """A tensor of another format in the place of a `Scattered` one."""

    tensors: LazyTensors
    name: str

    @property
    def shape(self) -> torch.Size:
        return self.tensors.meta[self.name].shape

    def part(self, start: int, numel: int) -> Tensor:
        return self.read().reshape(-1)[start : start + numel]

    def read(self) -> Tensor:
        return self.tensors.read(self.name)


def _working(state: DeepSpeedState, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """What the module computes with, by name; buffers keep theirs, as DeepSpeed keeps them."""
    known = list(state.working.values())
    default = max(known, key=known.count, default=torch.float32)
    working = {name: state.working.get(name, default) for name in state.places}
    return {
        name: dtype
        if dtype is not None and old.is_floating_point and name not in state.buffers
        else old
        for name, old in working.items()
    }


def _with_stage(rest: Mapping[str, Any], stage: int) -> dict[str, Any]:
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


# ---------------------------------------------------------------- one file


class _File:
    """Tensors that will be filled in, and what is put around them."""

    def __init__(self) -> None:
        self.meta: dict[str, Tensor] = {}
        self.makers: dict[str, Callable[[], Iterator[Tensor]]] = {}
        self.content: dict[Any, Any] = {}

    def add(
        self, shape: Sequence[int], dtype: torch.dtype, stretches: Callable[[], Iterator[Tensor]]
    ) -> _Key:
        """A tensor to come; the result holds its place in `content`."""
        key = _Key(str(len(self.meta)))
        self.meta[key.name], self.makers[key.name] = (
            torch.empty(tuple(shape), dtype=dtype, device="meta"),
            stretches,
        )
        return key

    def whole(self, place: Scattered, dtype: torch.dtype) -> _Key:
        return self.add(place.shape, dtype, lambda: iter([place.read().to(dtype)]))

    def small(self, value: Any) -> Any:
        """A tensor in memory; anything else stays what it is."""
        return (
            self.add(value.shape, value.dtype, lambda: iter([value]))
            if isinstance(value, Tensor)
            else value
        )

    def vector(
        self, places: Mapping[str, Scattered], stretches: Sequence[_Stretch], dtype: torch.dtype
    ) -> _Key:
        def parts() -> Iterator[Tensor]:
            for stretch in stretches:
                if stretch.numel:
                    yield places[stretch.name].part(stretch.start, stretch.numel).to(dtype)
                if stretch.zeros:
                    yield torch.zeros(stretch.zeros, dtype=dtype)

        return self.add((sum(s.numel + s.zeros for s in stretches),), dtype, parts)

    @property
    def tensors(self) -> LazyTensors:
        return LazyTensors(
            self.meta,
            lambda name: torch.cat([t.flatten() for t in self.makers[name]()]),
            lambda name: self.makers[name](),
        )

    def write(self, path: Path, progress: ProgressCallback | None) -> None:
        def content(fakes: Mapping[str, Tensor]) -> Any:
            return replace_leaves(
                self.content, lambda leaf: fakes[leaf.name] if isinstance(leaf, _Key) else leaf
            )

        write_pickle(path, self.tensors, content, progress, CLASSES)


@dataclass(frozen=True)
class _Key:
    name: str


# ---------------------------------------------------------------- model files


def _model_of_stage_2(state: DeepSpeedState, cut: Cut) -> _File:
    """Everything whole. ZeRO 2 names the frozen parameters a second time; ZeRO 1 does not."""
    file = _File()
    module = OrderedDict(
        (name, file.whole(place, state.working[name])) for name, place in state.places.items()
    )
    frozen = _frozen(state) if cut.stage == 2 else None
    _around(
        file,
        state,
        cut.world_size,
        module,
        [group.names for group in state.groups],
        frozen,
        frozen and {name: module[name] for name in frozen},
    )
    return file


def _model_of_stage_3(state: DeepSpeedState, rank: int, world_size: int) -> _File:
    """Of parameters the names alone; buffers whole; this rank's slices of frozen parameters."""
    file, frozen = _File(), _frozen(state)
    module = OrderedDict(
        (
            name,
            file.whole(place, state.working[name])
            if name in state.buffers
            else file.small(torch.empty(0, dtype=state.working[name])),
        )
        for name, place in state.places.items()
    )
    fragments = {
        name: file.vector(
            state.places, [_slice(state, name, rank, world_size)], state.working[name]
        )
        for name in frozen
    }
    _around(
        file,
        state,
        world_size,
        module,
        [names for vectors in _sub_groups(state, world_size) for names in vectors],
        frozen,
        fragments,
    )
    return file


def _frozen(state: DeepSpeedState) -> list[str]:
    return [
        name for name in state.places if name not in state.trainable and name not in state.buffers
    ]


def _around(
    file: _File,
    state: DeepSpeedState,
    world_size: int,
    module: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    frozen: Sequence[str] | None,
    fragments: Mapping[str, Any] | None,
) -> None:
    shapes = state.shapes
    file.content = {
        **replace_leaves(state.rest, file.small),
        "module": module,
        "buffer_names": list(state.buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, shapes[name]) for name in names) for names in groups],
        "frozen_param_shapes": None
        if frozen is None
        else OrderedDict((name, shapes[name]) for name in frozen),
        "frozen_param_fragments": None if frozen is None else OrderedDict(fragments),
        "shared_params": {},
        "dp_world_size": world_size,
    }


# ---------------------------------------------------------------- optimizer files


@dataclass(frozen=True)
class _Stretch:
    """Elements [start, start + numel) of a parameter, and zeros behind them."""

    name: str
    start: int
    numel: int
    zeros: int = 0


def _optimizer_of_stage_2(state: DeepSpeedState, rank: int, cut: Cut) -> _File:
    """Every group end to end, in equal parts. Weights are stored without the padding of the last ones, moments with it."""
    file, masters, moments, paddings, mappings = _File(), [], [], [], []
    for group in state.groups:
        stretches, padding = _part(state, group, rank, cut.world_size)
        masters.append(file.vector(state.places, stretches, torch.float32))
        moments.append(_of_adam(file, state, [*stretches, _Stretch("", 0, 0, padding)]))
        paddings.append(padding)
        addresses, start = OrderedDict(), 0
        for stretch in stretches:
            addresses[stretch.name], start = (
                FragmentAddress(stretch.numel, start),
                start + stretch.numel,
            )
        mappings.append(addresses)
    _optimizer_around(
        file,
        state,
        {
            "base_optimizer_state": _torch_state(
                state, moments, [[i] for i in range(len(state.groups))]
            ),
            "single_partition_of_fp32_groups": masters,
            "zero_stage": ZeroStage(cut.stage),
            "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(group.names) for group in state.groups],
            "partition_count": [cut.world_size] * len(state.groups),
            "ds_version": state.rest["ds_version"],
            "param_slice_mappings": mappings,
        },
    )
    return file


def _part(
    state: DeepSpeedState, group: OptimizerGroup, rank: int, world_size: int
) -> tuple[list[_Stretch], int]:
    """This rank's stretches of the group's vector, and how many zeros pad them to the size of a part."""
    numels = {name: state.shapes[name].numel() for name in group.names}
    size = math.ceil(sum(numels.values()) / (ALIGNMENT * world_size)) * ALIGNMENT
    stretches, start = [], 0
    for name, numel in numels.items():
        first, end = max(start, rank * size), min(start + numel, (rank + 1) * size)
        if first < end:
            stretches.append(_Stretch(name, first - start, end - first))
        start += numel
    return stretches, size - sum(stretch.numel for stretch in stretches)


def _optimizer_of_stage_3(state: DeepSpeedState, rank: int, world_size: int) -> _File:
    """Every parameter in equal slices; a rank's slices end to end."""
    file, masters, moments, numbers = _File(), [], [], []
    for vectors in _sub_groups(state, world_size):
        numbers.append(list(range(len(masters), len(masters) + len(vectors))))
        for names in vectors:
            stretches = [_slice(state, name, rank, world_size) for name in names]
            masters.append(file.vector(state.places, stretches, torch.float32))
            moments.append(_of_adam(file, state, stretches))
    _optimizer_around(
        file,
        state,
        {
            "zero_stage": ZeroStage(3),
            "partition_count": world_size,
            "optimizer_state_dict": _torch_state(state, moments, numbers),
            "fp32_flat_groups": masters,
        },
    )
    return file


def _slice(state: DeepSpeedState, name: str, rank: int, world_size: int) -> _Stretch:
    numel = state.shapes[name].numel()
    size = math.ceil(numel / world_size)
    start = min(rank * size, numel)
    held = min(size, numel - start)
    return _Stretch(name, start, held, size - held)


def _sub_groups(state: DeepSpeedState, world_size: int) -> list[list[list[str]]]:
    """By group of the optimizer: the names in each of its vectors."""
    found = []
    asked = state.rest["ds_config"]["zero_optimization"].get("sub_group_size")
    limit = asked if isinstance(asked, int | float) else SUB_GROUP
    for group in state.groups:
        sizes = {name: math.ceil(state.shapes[name].numel() / world_size) for name in group.names}
        vectors: list[list[str]] = [[]]
        for name in group.names:
            if sum(sizes[other] for other in vectors[-1]) >= limit:
                vectors.append([])
            vectors[-1].append(name)
        found.append(vectors)
    return found


def _of_adam(file: _File, state: DeepSpeedState, stretches: Sequence[_Stretch]) -> dict[str, Any]:
    """What the optimizer keeps for one vector. The count of steps is a tensor of its own for each: Adam counts it up in place."""
    if not state.moment_places:
        return {}  # before its first step
    numbers = state.numbers or {"step": torch.tensor(float(state.optimizer_steps))}
    return {
        **replace_leaves(numbers, file.small),
        **{
            key: file.vector(places, stretches, torch.float32)
            for key, places in state.moment_places.items()
        },
    }


def _torch_state(
    state: DeepSpeedState, moments: Sequence[Mapping[str, Any]], numbers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    return {
        "state": dict(enumerate(moments)) if state.moment_places else {},
        "param_groups": [
            {**group.settings, "params": list(own)}
            for group, own in zip(state.groups, numbers, strict=True)
        ],
    }


def _optimizer_around(file: _File, state: DeepSpeedState, content: Mapping[str, Any]) -> None:
    common = {
        "loss_scaler": LossScaler(1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        **state.optimizer,
    }
    # ZeRO 1 and 2 clip at what the file says, ZeRO 3, which doesn't write it, at what its config says
    common.setdefault("clip_grad", state.rest["ds_config"].get("gradient_clipping", 0.0))
    file.content = {
        "optimizer_state_dict": {**common, **replace_leaves(content, file.small)},
        "ds_config": state.rest["ds_config"],
        "ds_version": state.rest["ds_version"],
    }
