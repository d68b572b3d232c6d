"""One call of `landiff convert`, and what is wrong with it before any weights are opened.

Torch-free.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from landiff.configs import load
from landiff.configs.problems import Problem, check_writable, problems_of
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig
from landiff.training.checkpoint.run_folder import STATE, committed_steps
from landiff.training.checks import Launch

ENGINES = ("megatron", "deepspeed")  # targets that a trainer resumes or starts from


@dataclass(frozen=True)
class ConvertRequest:
    """One call of `landiff convert`."""

    sources: tuple[str, ...]  # paths and zoo references
    zoo: Path = Path("zoo")
    to: str = "zoo"
    name: str | None = None  # --to zoo
    out: Path | None = None  # any other format
    model: str = "landiff/model"  # sizes of a release and of bare Megatron folders
    dtype: str | None = None  # None: as in the source
    allow_missing: tuple[str, ...] = ()
    weights_only: bool = False  # leave the optimizer of a checkpoint behind
    world_size: int | None = None  # --to deepspeed
    overrides: tuple[
        str, ...
    ] = ()  # --to megatron, deepspeed: key=value, as in the config of the run that resumes


def request_of(args: argparse.Namespace) -> ConvertRequest:
    """The request of a parsed command line."""
    return ConvertRequest(
        tuple(args.sources),
        Path(args.zoo),
        args.to,
        args.name,
        Path(args.out) if args.out else None,
        args.model,
        args.dtype,
        tuple(args.allow_missing),
        args.weights_only,
        args.world_size,
        tuple(args.overrides),
    )


def check_request(request: ConvertRequest, launch: Launch) -> list[Problem]:
    """All problems that are known without opening the weights: options, names, paths."""
    problems = [Problem(text) for text in _options(request)]
    problems += problems_of(lambda: load(ModelConfig, request.model))
    if request.to == "zoo":
        problems += check_writable("--zoo", request.zoo)
        if request.name is not None:
            problems += problems_of(lambda: registry.check_name(request.name))
    elif request.out is not None:
        problems += check_writable("--out", request.out.parent)
        if request.out.exists():
            problems.append(Problem(f"{request.out} exists already; name a folder that doesn't"))
    if launch.inputs_exist:
        for source in request.sources:
            problems += check_source(source, request.zoo)
    return problems


def _options(request: ConvertRequest) -> list[str]:
    """Options that do not go together."""
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
            f"--world-size {request.world_size}: the ranks of a --to deepspeed, at least 1; other "
            "formats serve any "
            "number"
        )
    return texts


def check_source(source: str, zoo: Path) -> list[Problem]:
    """Whether a source is there: a run with a checkpoint, another path, or a zoo entry."""
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
    if (
        (path / "checkpoints").is_dir()
        and not (path / STATE).is_file()
        and not committed_steps(path / "checkpoints")
    ):
        return [
            Problem(
                f"{path} holds no whole checkpoint; it must be a run folder (runs/lm) or a "
                "checkpoint in it"
            )
        ]
    return []
