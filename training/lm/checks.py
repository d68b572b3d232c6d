"""Checks of the language model trainer's config before its ranks start. Torch-free."""

from __future__ import annotations

from pathlib import Path

from landiff.configs.base import ConfigError
from landiff.configs.documents import read_yaml
from landiff.configs.problems import Problem
from landiff.data_pipeline.loading.config import require_micro_batches
from landiff.data_pipeline.loading.phases import batch_sizes
from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.training.checkpoint.run_folder import (
    CHECKPOINTS,
    CONFIG,
    committed_steps,
    step_folder,
)
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
from landiff.training.float8.requirements import PACKAGE, WAY_OUT
from landiff.training.layout import model_copies
from landiff.training.lm.columns import check_lm_columns, check_lm_tokenizer
from landiff.training.lm.config import LMTrainConfig

# Fields of the model that determine the shapes of its weights.
SHAPES = (
    "codebook_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "ffn_size",
    "text_dim",
    "micro_hidden_size",
    "micro_frequency_dim",
)


def check(config: LMTrainConfig, launch: Launch) -> list[Problem]:
    """All problems that are known before ranks start."""
    phases, problems = check_trainer(config, launch)
    if config.layers == "te":
        problems += check_package("transformer_engine", "layers", "te", "use layers = local")
    if config.fp8:
        problems += check_package(PACKAGE, "fp8", "true", WAY_OUT)
    problems += _check_optimizer(config)
    problems += check_rows(config, launch.ranks)
    problems += check_parameter_groups(config)
    if not launch.inputs_exist:
        return problems
    tokenizer, found = find_entry("tokenizer", config.zoo, config.tokenizer, "tokenizer")
    problems += found
    if tokenizer is not None:
        problems += check_lm_tokenizer(config, tokenizer)
    start, found = find_entry("init_from", config.zoo, config.init_from, "lm")
    problems += found
    if start is not None:
        problems += different_fields("model", config.model, start, SHAPES)
    problems += check_renderer(config)
    problems += check_prompts(config, config.model.text_dim, "model.text_dim")
    for phase in phases:
        problems += check_lm_columns(phase.manifest, phase.config, tokenizer)
    return problems


def check_rows(config: LMTrainConfig, ranks: int) -> list[Problem]:
    """Whether the interleaved schedule can run the rows of each step.

    Each micro-batch is a row. Batches that do not divide at all are reported by `check_trainer`.
    """
    parallel = config.parallel
    if parallel.virtual_pipeline == 1:
        return []
    try:
        copies = model_copies(config, ranks)
        for level in batch_sizes(config.data_phases).levels:
            size = level.global_batch_size
            require_micro_batches(size, level.micro_batch_size, copies)
            rows = size // (level.micro_batch_size * copies)
            if rows % parallel.pipeline:
                multiple = level.micro_batch_size * copies * parallel.pipeline
                return [
                    Problem(
                        f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs a multiple "
                        f"of parallel.pipeline = {parallel.pipeline} micro-batches per rank, but "
                        f"from step {level.first_step} on there are {rows} (data."
                        f"global_batch_size = {size}, data.micro_batch_size = "
                        f"{level.micro_batch_size}, {copies} copies of the model); choose a "
                        f"global_batch_size that is a multiple of {multiple}, or set "
                        "virtual_pipeline = 1"
                    )
                ]
    except ConfigError:
        pass
    return []


def check_parameter_groups(config: LMTrainConfig) -> list[Problem]:
    """Whether every entry of `optim.groups` applies to some parameter, and none to half a tensor.

    Megatron-core stacks w1 and w3 in one tensor.
    """
    if not config.optim.groups:
        return []
    names = trained_names(config)
    problems = check_groups(config.optim, names)
    scales = {name: config.optim.scales_of(name, 2) for name in names}
    for name in names:
        other = name.replace(".w1.", ".w3.")
        if scales.get(other, scales[name]) != scales[name]:
            problems.append(
                Problem(
                    f"optim.groups: {name} and {other} are one tensor in Megatron-core and need "
                    "the same scales; match both, for example with `blocks.*.w[13].*`"
                )
            )
            break
    return problems


def trained_names(config: LMTrainConfig) -> list[str]:
    """Names of the parameters that are trained, from a model without memory."""
    import torch

    from landiff.model_zoo.lm import LanguageModel

    if config.lora is not None:
        from landiff.training.lm.lora import InitialAdapter

        return list(InitialAdapter(config.model, config.lora, config.loop.seed))
    with torch.device("meta"):
        model = LanguageModel(config.model)
    return [name for name, _ in model.named_parameters()]


def check_renderer(config: LMTrainConfig) -> list[Problem]:
    """Whether the models of `renderer` exist and fit the tokenizer's latents."""
    renderer = config.renderer
    if renderer is None:
        return []
    problems = check_encoder("renderer.codec", renderer.codec)
    problems += check_steps("renderer.steps", renderer.steps, renderer.schedule)
    if config.tokenizer is None:
        problems.append(
            Problem("renderer needs `tokenizer`, the zoo entry that decodes the sampled tokens")
        )
    entry, found = find_entry("renderer.diffusion", config.zoo, renderer.diffusion, "diffusion")
    problems += found
    if entry is None:
        return problems
    assert isinstance(entry.config, DiffusionConfig), entry.reference
    window = entry.config.transformer.latent_frames
    if renderer.clean_frames >= window:
        problems.append(
            Problem(
                f"renderer.clean_frames = {renderer.clean_frames} must be less than the {window} "
                f"latent frames of renderer.diffusion = {entry.reference}"
            )
        )
    channels = width_of(renderer.codec)
    latent = entry.config.transformer.latent_channels
    if channels is not None and channels != latent:
        problems.append(
            Problem(
                f"renderer.codec = {renderer.codec.kind} decodes {channels} channels, but "
                f"renderer.diffusion = {entry.reference} has latents of {latent}; name the codec "
                "of its latents"
            )
        )
    return problems


def _check_optimizer(config: LMTrainConfig) -> list[Problem]:
    """Whether the newest checkpoint was written with the same kind of optimizer."""
    checkpoints = config.run / CHECKPOINTS
    steps = committed_steps(checkpoints)
    if not steps:
        return []
    folder = step_folder(checkpoints, steps[-1])
    stored = _stored_kind(folder)
    if stored is None or stored == config.parallel.distributed_optimizer:
        return []
    return [Problem(other_optimizer(folder, stored))]


def other_optimizer(folder: Path, stored: bool) -> str:
    """Message for a checkpoint with `parallel.distributed_optimizer` = `stored`, unlike the run."""
    own = str(not stored).lower()
    return (
        f"{folder} was written with parallel.distributed_optimizer = {stored}, and its state "
        f"cannot be read by the other kind; set it to {stored}, or let `landiff convert RUN --to "
        f"megatron --out NEW_RUN parallel.distributed_optimizer={own}` make a run that continues it"
    )


def _stored_kind(folder: Path) -> bool | None:
    """`parallel.distributed_optimizer` of a checkpoint, or None if it is not stored."""
    try:
        stored = read_yaml(folder / CONFIG)
        found = stored["parallel"]["distributed_optimizer"]
    except (OSError, ConfigError, KeyError, TypeError):
        return None
    return found if isinstance(found, bool) else None
