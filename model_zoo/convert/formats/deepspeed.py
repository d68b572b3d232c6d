"""DeepSpeed ZeRO checkpoints: their files, and reading them by parameter name without DeepSpeed.

DeepSpeed (0.19, ZeRO 1-3, no tensor or pipeline parallelism) writes into one folder:

    mp_rank_00_model_states.pt
        ZeRO 1, 2: all parameters in the working dtype, buffers
    zero_pp_rank_<r>_mp_rank_00_model_states.pt
        ZeRO 3: buffers, this rank's slices of frozen parameters
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt
        this rank's part of the float32 weights and of the Adam moments

Our trainer moves the frozen parameters of each model file to a file of their own, which is the same
in all checkpoints of a run:

    mp_rank_00_frozen.pt, zero_pp_rank_<r>_mp_rank_00_frozen.pt
        `FROZEN_ENTRIES` of the model file, without trained parameters and buffers

In ZeRO 1 and 2, the trainable parameters of a group are concatenated to one flat vector, which is
divided into equal parts, one for each rank. Each file lists the fragments of parameters that it
holds. In ZeRO 3, each parameter is divided over the ranks by itself, padded to a multiple of their
number, and the slices of a rank are concatenated.

The few DeepSpeed classes in the pickles are replaced by placeholders; all others are refused.
`deepspeed_write` writes such folders.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from landiff.configs import Config, ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import read_json_as
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.formats.zero.partitions import (
    frozen_of_stage_2,
    frozen_of_stage_3,
    trainable_of_stage_2,
    trainable_of_stage_3,
    whole,
)
from landiff.model_zoo.convert.formats.zero.state import CLASSES, DeepSpeedState, OptimizerGroup
from landiff.model_zoo.convert.lazy import LazyTensors, Stored
from landiff.model_zoo.convert.pickles import IgnoredObject, read_pickle, replace_leaves
from landiff.model_zoo.convert.rules import check_against

LAYOUT = "layout.json"  # written by the diffusion trainer into a checkpoint folder
SHARDS = "zero"  # subfolder of a checkpoint with the files of DeepSpeed
START = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt"
STAGE_3_MODEL_FILE = r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt"
FROZEN_ENTRIES = ("module", "frozen_param_fragments")  # of a model file, with frozen parameters
OTHER_PARALLELISM = r"mp_rank_(?!00)\d\d_|^layer_\d|^expp_rank_"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"  # name of the moving averages of the weights, stored like a moment


class ZeroLayout(Config):
    """The description of a checkpoint of the diffusion trainer (`layout.json`)."""

    zero_stage: int = Field(
        description="ZeRO stage of the checkpoint; 0 for whole weights without an optimizer."
    )
    world_size: int = Field(description="Number of ranks that the checkpoint is divided over.")
    precision: str = Field(description="Dtype of the module: fp32, bf16 or fp16.")
    phase: str = Field(description="Training phase: main or control.")
    model: DiffusionConfig = Field(description="Sizes of the diffusion model.")
    shapes: dict[str, list[int]] = Field(
        description="Shape of every parameter and persistent buffer, by name."
    )
    groups: list[list[str]] = Field(
        default=[],
        description=(
            "Names of the parameters in each group of the optimizer. Empty if they are divided "
            "into matrices and vectors only."
        ),
    )

    @property
    def part(self) -> tuple[str, DiffusionConfig | TransformerConfig]:
        """Kind and config of the trained model.

        Phase main trains the main transformer, phase control the whole diffusion model.
        """
        if self.phase == "control":
            return "diffusion", self.model
        return "transformer", self.model.transformer

    def write(self, folder: Path) -> None:
        """Write the description into a checkpoint folder."""
        write_text(folder / LAYOUT, self.model_dump_json(indent=1))

    @staticmethod
    def read(folder: Path) -> ZeroLayout:
        """Read the description in a checkpoint folder. Raises ConfigError."""
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


# Entries of a model file about tensors and layout. All others become `DeepSpeedState.rest`.
TENSOR_ENTRIES = (
    "module",
    "buffer_names",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "optimizer",
    "dp_world_size",
)
# Entries of an optimizer file that are kept as `DeepSpeedState.optimizer`.
OPTIMIZER_ENTRIES = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


def find_shards(path: Path) -> Path | None:
    """The folder with the files of a ZeRO optimizer.

    Searched are the subfolder `zero` of a checkpoint of our trainer, `path` itself and the folder
    that the file `latest` names.
    """
    names = [SHARDS, "."]
    latest = path / "latest"
    if latest.is_file():
        names.append(latest.read_text(encoding="utf-8").strip())
    for name in names:
        folder = path / name
        if folder.is_dir() and _has_optimizer_file(folder):
            return folder
    return None


def _has_optimizer_file(folder: Path) -> bool:
    return any(re.fullmatch(OPTIMIZER_FILE, file.name) for file in folder.iterdir())


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """Read a folder with the files of DeepSpeed; tensors stay in the files.

    Raises ConfigError if files are missing or the checkpoint uses features that are not supported.
    """
    optimizer_files = _files_by_rank(folder, OPTIMIZER_FILE)
    _refuse_other_parallelism(folder)
    if not optimizer_files and (folder / START).is_file():
        return _read_start(folder)
    if not optimizer_files:
        raise ConfigError(f"{folder} holds no ZeRO checkpoint (no *_optim_states.pt)")
    shards = [_load(path)["optimizer_state_dict"] for path in optimizer_files]
    stage = shards[0]["zero_stage"].stage
    world_size = _world_size(folder, shards)
    models = []
    for path in _model_files(folder, stage, world_size):
        models.append(_load(path))
        if frozen_file(path).exists():
            add_frozen(models[-1], _load(frozen_file(path)))
    model = models[0]
    _refuse_unsupported(folder, model)
    shapes = _shapes_by_group(model)
    trainable: set[str] = set().union(*shapes)
    states = [_torch_optimizer_state(shard, stage, folder) for shard in shards]
    if stage == 3:
        places = frozen_of_stage_3(models)
        find_trainable = trainable_of_stage_3
        masters = [shard["fp32_flat_groups"] for shard in shards]
    else:
        places = frozen_of_stage_2(model, trainable)
        find_trainable = trainable_of_stage_2
        masters = [shard["single_partition_of_fp32_groups"] for shard in shards]
    moments = {}
    for key in _moment_names(states[0]):
        vectors = [_vectors_of_moment(state, key) for state in states]
        moments[key] = find_trainable(shapes, shards, vectors)
    return DeepSpeedState(
        zero_stage=stage,
        world_size=world_size,
        places={**places, **find_trainable(shapes, shards, masters)},
        groups=_optimizer_groups(shapes, states[0]),
        buffers=tuple(model["buffer_names"]),
        moment_places=moments,
        working=_working_dtypes(model["module"]),
        optimizer_steps=_optimizer_steps(folder, states),
        numbers=_numbers(states[0]),
        optimizer={key: shards[0][key] for key in OPTIMIZER_ENTRIES if key in shards[0]},
        rest=_plain({key: value for key, value in model.items() if key not in TENSOR_ENTRIES}),
    )


def frozen_file(model_file: Path) -> Path:
    """Where our trainer keeps the frozen parameters of a model file."""
    return model_file.with_name(model_file.name.replace("model_states", "frozen"))


def divide_frozen(model: Mapping[str, Any], names: Set[str]) -> tuple[dict, dict]:
    """The content of a model file without the frozen parameters `names`, and these."""
    rest = dict(model)
    frozen: dict[str, dict] = {}
    for entry in FROZEN_ENTRIES:
        if rest.get(entry) is None:
            continue
        rest[entry] = copy.copy(rest[entry])
        found = names & rest[entry].keys()
        frozen[entry] = {name: rest[entry].pop(name) for name in sorted(found)}
    return rest, frozen


def add_frozen(model: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
    """Undo `divide_frozen`, in place."""
    for entry, values in frozen.items():
        model[entry].update(values)


def export_diffusion(folder: Path) -> tuple[str, Config, LazyTensors]:
    """Kind, config and tensors of a checkpoint of the diffusion trainer, read on access.

    Phase main gives the kind "transformer", phase control the kind "diffusion". Trained weights are
    float32; weights that start a run keep the dtype they were written with.
    """
    layout = ZeroLayout.read(folder)
    tensors = exported(read_deepspeed(folder / SHARDS))
    check_against(tensors.meta, layout.shapes, f"checkpoint {folder}")
    return *layout.part, tensors


def exported(state: DeepSpeedState, *, ema: bool = False) -> LazyTensors:
    """All weights of a checkpoint, with `ema` the moving averages of those that have one.

    Floating-point weights of a training run are float32; weights that start a run keep their dtype.
    """
    places = dict(state.places)
    if ema:
        places.update(state.moment_places[EMA])
    meta = {}
    for name, place in places.items():
        meta[name] = torch.empty(place.shape, dtype=place.dtype, device="meta")
    tensors = LazyTensors(meta, lambda name: places[name].read())
    if not is_start(state):
        return tensors.cast(torch.float32)
    working = {}
    for name, tensor in meta.items():
        working[name] = tensor.to(state.working.get(name, tensor.dtype))
    return LazyTensors(working, lambda name: tensors.read(name).to(working[name].dtype))


def is_start(state: DeepSpeedState) -> bool:
    """Whether the checkpoint holds weights without an optimizer, as `write_start` writes them."""
    return state.zero_stage == 0 or bool(state.rest.get("start"))


def _read_start(folder: Path) -> DeepSpeedState:
    """Whole weights without an optimizer, from `write_start` or from DeepSpeed without ZeRO."""
    content = _load(folder / START)
    module = content["module"]
    if any(isinstance(value, Tensor) for value in module.values()):
        raise ConfigError(
            f"{folder / START} was written by torch before 1.6; save it again with a newer version"
        )
    weights = {name: value for name, value in module.items() if isinstance(value, Stored)}
    groups = content["param_shapes"] or [weights]
    return DeepSpeedState(
        zero_stage=0,
        world_size=1,
        places={name: whole(stored) for name, stored in weights.items()},
        buffers=(),
        groups=tuple(OptimizerGroup(tuple(group), {}) for group in groups),
        moment_places={},
        optimizer_steps=0,
        working=_working_dtypes(module),
    )


# ---------------------------------------------------------------- files


def _load(path: Path) -> Any:
    """Unpickle a file with the allow-list; tensors stay in the file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the checkpoint is incomplete")
    return read_pickle(path, CLASSES)


def _files_by_rank(folder: Path, pattern: str) -> list[Path]:
    """The files that match `pattern`, in the order of the rank in their names."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        match = re.fullmatch(pattern, path.name)
        if match:
            found[int(match[1])] = path
    if sorted(found) != list(range(len(found))):
        raise ConfigError(
            f"{folder} holds the shards of ranks {sorted(found)} only: the checkpoint is incomplete"
        )
    return [found[rank] for rank in sorted(found)]


def _model_files(folder: Path, stage: int, world_size: int) -> list[Path]:
    """One model file in ZeRO 1 and 2, one for each rank in ZeRO 3."""
    if stage != 3:
        return [folder / START]
    found = _files_by_rank(folder, STAGE_3_MODEL_FILE)
    if len(found) != world_size:
        raise ConfigError(
            f"{folder} was written by {world_size} ranks but holds the model states of {len(found)}"
        )
    return found


def _world_size(folder: Path, shards: Sequence[Mapping[str, Any]]) -> int:
    """The number of ranks that wrote the checkpoint. Raises ConfigError if shards are missing."""
    counts = shards[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else int(counts)
    if world_size != len(shards):
        raise ConfigError(
            f"{folder} was written by {world_size} ranks but holds the optimizer states of "
            f"{len(shards)}"
        )
    return world_size


def _refuse_other_parallelism(folder: Path) -> None:
    names = [path.name for path in folder.iterdir() if re.search(OTHER_PARALLELISM, path.name)]
    if names:
        raise ConfigError(
            f"{folder} was written with tensor, pipeline or expert parallelism ({min(names)}), "
            "which is not supported"
        )


def _refuse_unsupported(folder: Path, model: Mapping[str, Any]) -> None:
    """Raise ConfigError for tied parameters and for round_robin_gradients."""
    if model.get("shared_params"):
        tied = ", ".join(model["shared_params"])
        raise ConfigError(f"{folder} ties parameters together ({tied}), which is not supported")
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    if zero and zero.get("round_robin_gradients"):
        raise ConfigError(
            f"{folder} was written with zero_optimization.round_robin_gradients = true, which is "
            "not supported"
        )


def _shapes_by_group(model: Mapping[str, Any]) -> list[dict[str, torch.Size]]:
    """Shapes of the trainable parameters of each group of flat vectors."""
    shapes = []
    for group in model["param_shapes"]:
        shapes.append({name: torch.Size(shape) for name, shape in group.items()})
    return shapes


def _working_dtypes(module: Mapping[str, Any]) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in module.items() if isinstance(value, Stored)}


# ---------------------------------------------------------------- state of torch's optimizer


def _torch_optimizer_state(shard: Mapping[str, Any], stage: int, folder: Path) -> Mapping[str, Any]:
    """`state` and `param_groups` of torch's optimizer, whose parameters are flat vectors."""
    state = shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if not isinstance(state, Mapping):
        raise ConfigError(
            f"{folder} was written with zero_optimization.elastic_checkpoint = true, which is not "
            "supported"
        )
    return state


def _first_entry(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer state of the first flat vector; empty before the first step."""
    return next(iter(state["state"].values()), {})


def _moment_names(state: Mapping[str, Any]) -> list[str]:
    """The names of the values that the optimizer keeps for every weight."""
    names = []
    for key, value in _first_entry(state).items():
        if isinstance(value, Stored) and len(value.shape) == 1:
            names.append(key)
    return names


def _vectors_of_moment(state: Mapping[str, Any], key: str) -> list[Stored]:
    """The flat vectors of one moment on one rank, in the order of the groups."""
    entries = state["state"]
    return [entries[index][key] for index in sorted(entries)]


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the optimizer keeps for a whole vector, its step count for instance."""
    found = {}
    for key, value in _first_entry(state).items():
        if not (isinstance(value, Stored) and value.shape):
            found[key] = _read(value)
    return found


def _optimizer_steps(folder: Path, states: Sequence[Mapping[str, Any]]) -> int:
    """Adam's step count. Raises ConfigError if ranks or vectors disagree."""
    steps = set()
    for state in states:
        for entry in state["state"].values():
            if "step" in entry:
                steps.add(int(_read(entry["step"])))
    if len(steps) > 1:
        raise ConfigError(
            f"{folder} holds different Adam step counts, {sorted(steps)}: it mixes two checkpoints"
        )
    return steps.pop() if steps else 0


def _optimizer_groups(
    shapes: Sequence[Mapping[str, torch.Size]], state: Mapping[str, Any]
) -> tuple[OptimizerGroup, ...]:
    """Parameter groups by name.

    ZeRO 3 may divide a group of the optimizer into several vectors, each with its own entry of
    `shapes`.
    """
    listed = state.get("param_groups") or [{"params": [index]} for index in range(len(shapes))]
    groups = []
    for group in listed:
        names: list[str] = []
        for index in group["params"]:
            names.extend(shapes[index])
        settings = {key: value for key, value in _plain(group).items() if key != "params"}
        groups.append(OptimizerGroup(tuple(names), settings))
    return tuple(groups)


def _read(value: Stored | Tensor | float) -> Any:
    return value.read() if isinstance(value, Stored) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without placeholders of ignored objects. Tensors in them are read."""
    plain = {}
    for key, value in values.items():
        if not _has_ignored(value):
            plain[key] = replace_leaves(value, _read)
    return plain


def _has_ignored(node: Any) -> bool:
    if isinstance(node, Mapping):
        return any(map(_has_ignored, node.values()))
    if isinstance(node, list | tuple):
        return any(map(_has_ignored, node))
    return isinstance(node, IgnoredObject)
