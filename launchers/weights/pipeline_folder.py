"""`landiff convert CONFIG --to diffusers`: the whole pipeline of a config of `landiff sample`.

Does not import torch before the folder is written.
"""

from __future__ import annotations

from pathlib import Path

from landiff.configs.problems import Problem, require_none
from landiff.launchers.checks import load_with_problems
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.sampling.checks import check_sample
from landiff.launchers.weights.request import ConvertRequest, check_out
from landiff.training.checks import Launch


def check_pipeline(request: ConvertRequest, launch: Launch) -> list[Problem]:
    """All problems of a request whose source is a config, found without torch.

    Raises ConfigError if the config cannot be read.
    """
    config, problems = load_with_problems(SampleConfig, request.sources[0], request.overrides)
    problems += [Problem(text) for text in _conflicts(request)]
    problems += check_out(request)
    # Prompts and the folder of videos have no effect on the pipeline.
    out = request.out or Path("LanDiff")
    values = {
        "prompts": ("a prompt",),
        "prompts_file": None,
        "prompt_schedule": (),
        "out": out.parent,
    }
    return problems + check_sample(config.model_copy(update=values), launch)


def _conflicts(request: ConvertRequest) -> list[str]:
    """Messages about options that a config does not go with."""
    config = request.sources[0]
    texts = []
    if len(request.sources) > 1:
        others = " and ".join(request.sources[1:])
        texts.append(f"{config} is the config of a whole pipeline; convert {others} apart from it")
    if request.to != "diffusers":
        texts.append(
            f"{config} is the config of a whole pipeline, for --to diffusers; to convert a model "
            "of it, name the model's zoo entry"
        )
    elif request.out is None:
        texts.append("--to diffusers needs --out FOLDER")
    given = {
        "--dtype": request.dtype,
        "--merge": request.merge,
        "--weights": request.weights,
        "--name": request.name,
        "--allow-missing": request.allow_missing,
    }
    for option, value in given.items():
        if value not in (None, ()):
            texts.append(
                f"{option} does not go with a config, whose models are used as `landiff sample` "
                "uses them; precision and adapters are keys of the config"
            )
    return texts


def describe_pipeline(request: ConvertRequest) -> list[str]:
    """What `write_pipeline` would do, as text."""
    return [f"would convert the models of {request.sources[0]} to the pipeline {request.out}"]


def write_pipeline(request: ConvertRequest) -> list[str]:
    """Writes the folder, which appears complete or not at all. Returns one line about it.

    Raises ConfigError if the folder exists, UnhealthyError for weights with NaN or infinity.
    """
    import torch

    from landiff.launchers.results.sample import model_references, sampler_options
    from landiff.launchers.results.sampling.loading import load_models
    from landiff.model_zoo.convert.output_folder import new_folder
    from landiff.model_zoo.diffusers.pipeline import LanDiffPipeline

    source = request.sources[0]
    config, problems = load_with_problems(SampleConfig, source, request.overrides)
    require_none(problems)
    assert request.out is not None, request
    # Adapters become part of the weights: the folder has no place for them.
    config = config.model_copy(update={"merge_adapters": True})
    provenance = {"config": config.model_dump(mode="json"), "models": model_references(config)}
    with new_folder(request.out, provenance) as folder:
        models = load_models(config, torch.device("cpu"))
        pipeline = LanDiffPipeline.from_models(models, config.clean_frames, sampler_options(config))
        pipeline.save_pretrained(folder)
    return [f"models of {source} -> {request.out} (pipeline for diffusers)"]
