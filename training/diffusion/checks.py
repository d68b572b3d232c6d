"""Checks of the diffusion trainer's config before its ranks start. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.registry import ZooEntry
from landiff.training.checks import (
    Launch,
    check_groups,
    check_package,
    check_prompts,
    check_steps,
    check_trainer,
    different_fields,
    find_entry,
)
from landiff.training.diffusion.columns import check_diffusion_columns, check_diffusion_tokenizer
from landiff.training.diffusion.config import START_KINDS, DiffusionTrainConfig
from landiff.training.float8.requirements import PACKAGE, WAY_OUT


def check(config: DiffusionTrainConfig, launch: Launch) -> list[Problem]:
    """All problems that are known before ranks start."""
    phases, problems = check_trainer(config, launch)
    problems += check_preview(config)
    if config.fp8:
        problems += check_package(PACKAGE, "fp8", "true", WAY_OUT)
    if config.optim.groups and config.lora is None:
        problems += check_parameter_groups(config)
    if not launch.inputs_exist:
        return problems
    start, found = find_entry("init_from", config.zoo, config.init_from, START_KINDS)
    problems += found
    if start is not None:
        found = check_start(config, start)
        if config.optim.groups and config.lora is not None and not found:
            found = check_parameter_groups(config)
        problems += found
    tokenizer = None
    if config.phase == "control":
        tokenizer, found = find_entry("tokenizer", config.zoo, config.tokenizer, "tokenizer")
        problems += found
        if tokenizer is not None:
            problems += check_diffusion_tokenizer(config, tokenizer)
    for phase in phases:
        problems += check_diffusion_columns(phase.manifest, phase.config, tokenizer)
    return problems


def check_start(config: DiffusionTrainConfig, start: ZooEntry) -> list[Problem]:
    """Whether the entry `init_from` has the sizes of the parts that are loaded from it."""
    if config.lora is not None and config.phase == "control" and start.kind != "diffusion":
        return [
            Problem(
                f"lora in phase control adapts a trained control branch, and init_from = "
                f"{config.init_from} is a {start.kind}; name an entry of kind diffusion, or set "
                "lora = null to train a control branch"
            )
        ]
    if start.kind == "transformer":
        return different_fields("model.transformer", config.model.transformer, start)
    if config.phase == "main":
        return different_fields(
            "model.transformer", config.model.transformer, start, section="transformer"
        )
    return different_fields("model", config.model, start)


def check_parameter_groups(config: DiffusionTrainConfig) -> list[Problem]:
    """Whether every entry of `optim.groups` applies to some parameter.

    With `lora`, the entry `init_from` exists.
    """
    from landiff.training.diffusion.model import trained_names

    return check_groups(config.optim, trained_names(config))


def check_preview(config: DiffusionTrainConfig) -> list[Problem]:
    """Whether previews can be sampled and decoded."""
    if config.preview_codec is None:
        return []
    problems = check_steps("preview_steps", config.preview_steps, config.schedule)
    width = config.model.transformer.text_dim
    problems += check_prompts(config, width, "model.transformer.text_dim")
    problems += check_encoder("preview_codec", config.preview_codec)
    channels = width_of(config.preview_codec)
    latent = config.model.transformer.latent_channels
    if channels is not None and channels != latent:
        problems.append(
            Problem(
                f"preview_codec = {config.preview_codec.kind} decodes {channels} channels, but "
                f"model.transformer.latent_channels = {latent}; set preview_codec to the codec of "
                "the latents, or to null"
            )
        )
    return problems
