"""One call of `landiff convert`, and the checks before any weights are opened.

Does not import torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from landiff.configs import load
from landiff.configs.loader import packaged_names
from landiff.configs.problems import Problem, check_writable, problems_of
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.checkpoint.run_folder import CHECKPOINTS, STATE, committed_steps
from landiff.training.checks import Launch

WeightChoice = Literal["ema", "raw"]
ENGINES = ("megatron", "deepspeed")  # formats from which a run resumes or starts


@dataclass(frozen=True)
class ConvertRequest:
    """One call of `landiff convert`."""

    sources: tuple[str, ...]  # paths and zoo references
    zoo: Path = Path("zoo")
    to: str = "zoo"
    name: str | None = None  # for --to zoo
    out: Path | None = None  # for all other formats
    model: str = "landiff/model"  # sizes of a release and of Megatron folders without a config
    dtype: str | None = None  # None: as in the source
    allow_missing: tuple[str, ...] = ()
    merge: float | None = None  # scale of adapters that are added to their base
    weights: WeightChoice | None = None  # of a run; None: the moving average if there is one
    weights_only: bool = False  # convert a checkpoint without its optimizer
    world_size: int | None = None  # for --to deepspeed
    # For --to megatron and deepspeed: key=value, as in the config of the run that uses the result.
    overrides: tuple[str, ...] = ()


def request_of(args: argparse.Namespace) -> ConvertRequest:
    """The request of a parsed command line."""
    return ConvertRequest(
        sources=tuple(args.sources),
        zoo=Path(args.zoo),
        to=args.to,
        name=args.name,
        out=Path(args.out) if args.out else None,
        model=args.model,
        dtype=args.dtype,
        allow_missing=tuple(args.allow_missing),
        merge=args.merge,
        weights=args.weights,
        weights_only=args.weights_only,
        world_size=args.world_size,
        overrides=tuple(args.overrides),
    )


def check_request(request: ConvertRequest, launch: Launch) -> list[Problem]:
    """All problems that can be found without opening the weights: options, names and paths."""
    problems = [Problem(text) for text in _option_conflicts(request)]
    problems += problems_of(lambda: load(ModelConfig, request.model))
    name = request.name
    if request.to == "zoo":
        problems += check_writable("--zoo", request.zoo)
        if name is not None:
            problems += problems_of(lambda: registry.check_name(name))
    else:
        problems += check_out(request)
    if launch.inputs_exist:
        for source in request.sources:
            problems += check_source(source, request.zoo)
    return problems


def names_config(request: ConvertRequest) -> bool:
    """Whether the first source is a config, packaged or a .yaml file, and not weights."""
    source = request.sources[0]
    if source.endswith((".yaml", ".yml")):
        return True
    return source in packaged_names() and not Path(source).exists()


def check_out(request: ConvertRequest) -> list[Problem]:
    """Check that the folder of --out is new and can be written."""
    if request.out is None:
        return []
    problems = check_writable("--out", request.out.parent)
    if request.out.exists():
        problems.append(Problem(f"{request.out} exists already; name a folder that doesn't"))
    return problems


def _option_conflicts(request: ConvertRequest) -> list[str]:
    """Messages about options that contradict each other."""
    texts = []
    if request.to == "zoo" and request.out is not None:
        texts.append(
            "--out goes with a --to other than zoo; a zoo entry is named by --name and --zoo"
        )
    if request.to != "zoo" and request.out is None:
        texts.append(f"--to {request.to} needs --out FOLDER")
    if request.to != "zoo" and request.name is not None:
        texts.append(f"--name goes with --to zoo; --to {request.to} writes the folder of --out")
    if request.overrides and request.to not in ENGINES:
        texts.append(
            f"{request.overrides[0]} is for a run that continues from the result, so for --to "
            f"{' or '.join(ENGINES)}; this is --to {request.to}"
        )
    if request.world_size is not None and (request.to != "deepspeed" or request.world_size < 1):
        texts.append(
            f"--world-size {request.world_size}: this is the number of ranks for --to deepspeed, "
            "at least 1; other formats fit any number"
        )
    return texts


def check_source(source: str, zoo: Path) -> list[Problem]:
    """Check that a source exists: a run with a checkpoint, another path, or a zoo entry."""
    path = Path(source)
    try:
        exists = path.exists()
    except OSError as error:
        return [Problem(f"{path} cannot be read: {error.strerror}")]
    if not exists:
        if "/" in source:
            return [
                Problem(f"{path} does not exist, so it holds no whole checkpoint and no weights")
            ]
        return problems_of(lambda: registry.resolve(zoo, source))
    checkpoints = path / CHECKPOINTS
    is_run = checkpoints.is_dir() and not (path / STATE).is_file()
    if is_run and not committed_steps(checkpoints):
        return [
            Problem(
                f"{path} holds no whole checkpoint; it must be a run folder (runs/lm) or a "
                "checkpoint in it"
            )
        ]
    return []
