"""Checks of `landiff sample` and `landiff evaluate`, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from landiff.configs import Config
from landiff.configs.problems import Problem, check_writable, problems_of
from landiff.launchers.config import EvaluateConfig, SampleConfig
from landiff.launchers.evaluation.buckets import evaluate_columns, evaluated_buckets
from landiff.launchers.results.prompts import SampleUnit, sample_units
from landiff.launchers.results.sampling.given_files import check_given
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig
from landiff.model_zoo.frozen.checks import CELL, TIME, check_encoder, width_of
from landiff.model_zoo.frozen.clip_shape import LATENT_CELL
from landiff.model_zoo.lora.config import AdapterConfig, require_base
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.sample.placement import quantized
from landiff.model_zoo.sample.sizes import Sizes, check_length
from landiff.model_zoo.sample.texts import check_schedule
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checks import Launch, check_package, check_steps, find_entry, read_data

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class FoundModels:
    """Zoo entries of the three models; None for one that was not found."""

    lm: ZooEntry | None
    tokenizer: ZooEntry | None
    diffusion: ZooEntry | None

    def sizes(self) -> Sizes:
        """Sizes of the models that were found."""
        lm, tokenizer, diffusion = self.lm, self.tokenizer, self.diffusion
        return Sizes(
            lm=None if lm is None else _config_of(lm, LMConfig),
            tokenizer=None if tokenizer is None else _config_of(tokenizer, TokenizerConfig),
            diffusion=None if diffusion is None else _config_of(diffusion, DiffusionConfig),
        )


def _config_of(entry: ZooEntry, cls: type[C]) -> C:
    """Config of a zoo entry whose kind is known to have the config class `cls`."""
    assert isinstance(entry.config, cls), (entry.reference, entry.kind, cls)
    return entry.config


def find_models(config: SampleConfig | EvaluateConfig) -> tuple[FoundModels, list[Problem]]:
    """The zoo entries of the three models, and the problems of those that are not there."""
    lm, lm_problems = find_entry("lm", config.zoo, config.lm, "lm")
    tokenizer, tokenizer_problems = find_entry(
        "tokenizer", config.zoo, config.tokenizer, "tokenizer"
    )
    diffusion, diffusion_problems = find_entry(
        "diffusion", config.zoo, config.diffusion, "diffusion"
    )
    problems = [*lm_problems, *tokenizer_problems, *diffusion_problems]
    return FoundModels(lm, tokenizer, diffusion), problems


def check_adapters(config: SampleConfig, models: FoundModels) -> list[Problem]:
    """Whether the adapters exist and belong to the models.

    The fingerprint of the main transformer in a whole diffusion model is compared when it is
    loaded.
    """
    problems = []
    for number, use in enumerate(config.adapters):
        key = f"adapters.{number}.adapter"
        entry, found = find_entry(key, config.zoo, use.adapter, "adapter")
        problems += found
        if entry is None:
            continue
        adapter = _config_of(entry, AdapterConfig)
        base = models.lm if adapter.base_kind == "lm" else models.diffusion
        if base is not None and base.kind == adapter.base_kind:
            check = partial(
                require_base, entry.reference, adapter, base.fingerprint, base.reference
            )
            problems += problems_of(check)
    return problems


def check_sample(config: SampleConfig, launch: Launch) -> list[Problem]:
    """Problems of `landiff sample`: output folder, prompts, encoders, models and their sizes."""
    problems = check_writable("out", config.out)
    if not config.prompts and config.prompts_file is None and not config.prompt_schedule:
        problems.append(
            Problem(
                'prompts is empty; give one: landiff sample --config ... -- "a rabbit runs over a '
                'meadow", or a file: --prompts FILE'
            )
        )
    units: list[SampleUnit] = []
    problems += problems_of(lambda: units.extend(sample_units(config)))
    problems += _check_tokens(config, units)
    problems += check_steps("steps", config.steps, config.schedule)
    problems += _check_quantization(config)
    problems += check_encoder("lm_text", config.lm_text)
    problems += check_encoder("diffusion_text", config.diffusion_text)
    problems += check_encoder("codec", config.codec)
    if config.vision is not None:
        problems += check_encoder("vision", config.vision)
    if not launch.inputs_exist:
        return problems
    models, found = find_models(config)
    problems += found
    problems += _check_vision(config, models)
    sizes = replace(
        models.sizes(),
        lm_text_width=width_of(config.lm_text),
        diffusion_text_width=width_of(config.diffusion_text),
        codec_channels=width_of(config.codec),
    )
    for text in sizes.differences():
        problems.append(Problem(f"these models do not fit each other: {text}"))
    problems += check_adapters(config, models)
    problems += _check_size(config, models)
    if models.lm is not None:
        problems += _check_positions(config, models.lm, units)
    window = None
    if models.diffusion is not None:
        problems += _check_diffusion_inputs(config, models.diffusion, units)
        window = _config_of(models.diffusion, DiffusionConfig).transformer.latent_frames
    lm = None if models.lm is None else _config_of(models.lm, LMConfig)
    return problems + check_given(config, units, lm, window)


def _check_quantization(config: SampleConfig) -> list[Problem]:
    """Checks the package, and that adapters are merged before weights are quantized."""
    if config.quantize == "none":
        return []
    problems = check_package(quantized.PACKAGE, "quantize", config.quantize, quantized.WAY_OUT)
    if config.adapters and not config.merge_adapters:
        problems.append(
            Problem(
                f"quantize = {config.quantize} needs adapters in the weights; set "
                "merge_adapters=true or quantize=none"
            )
        )
    return problems


def _check_vision(config: SampleConfig, models: FoundModels) -> list[Problem]:
    """Checks that the tokenizer takes the vision features."""
    if config.vision is None or models.tokenizer is None:
        return []
    width = width_of(config.vision)
    wanted = _config_of(models.tokenizer, TokenizerConfig).feature_channels
    if width is None or width == wanted:
        return []
    text = f"vision gives {width} channels, but {models.tokenizer.reference} takes {wanted}"
    return [Problem(f"{text}; set vision to the features that it was trained on")]


def _check_size(config: SampleConfig, models: FoundModels) -> list[Problem]:
    """Whether tokenizer and diffusion model were trained on clips of `size`."""
    if config.size is None:
        return []
    problems = []
    for entry in (models.tokenizer, models.diffusion):
        if entry is None:
            continue
        sizes = {f"{shape.height}x{shape.width}" for shape in entry.buckets}
        if isinstance(entry.config, TokenizerConfig):
            cells = (entry.config.grid_height, entry.config.grid_width)
            sizes.add(f"{cells[0] * CELL}x{cells[1] * CELL}")
        else:
            transformer = _config_of(entry, DiffusionConfig).transformer
            height = transformer.latent_height * LATENT_CELL
            sizes.add(f"{height}x{transformer.latent_width * LATENT_CELL}")
        if config.size not in sizes:
            problems.append(
                Problem(
                    f"size = {config.size}, but {entry.reference} was trained on clips of "
                    f"{', '.join(sorted(sizes))}; choose one of them, or train on that shape with "
                    "data.buckets"
                )
            )
    return problems


def _check_tokens(config: SampleConfig, units: Sequence[SampleUnit]) -> list[Problem]:
    """Checks options of the language model against batches and prompts that change."""
    tokens = config.tokens
    problems = []
    if tokens.predict_end and config.batch_size != 1:
        problems.append(
            Problem(
                f"batch_size = {config.batch_size} with tokens.predict_end = true: each video may "
                "end at another frame, so they are generated one at a time; set batch_size=1"
            )
        )
    by_segment = tokens.context_segments is not None or any(unit.schedule for unit in units)
    if by_segment and (tokens.predict_end or tokens.reference_behaviour):
        problems.append(
            Problem(
                "tokens.predict_end and tokens.reference_behaviour need the tokens of the whole "
                "video sampled at once: leave out tokens.context_segments and prompts that change"
            )
        )
    return problems


def _check_positions(
    config: SampleConfig, entry: ZooEntry, units: Sequence[SampleUnit]
) -> list[Problem]:
    """Checks that the shortest text and all tokens of the videos fit the language model."""
    model = _config_of(entry, LMConfig)
    problems = []
    longest = max([unit.num_latent_frames for unit in units], default=config.num_latent_frames)
    seen = longest
    way_out = "set tokens.context_segments, which has no limit of the length, or lower it"
    if config.tokens.context_segments is not None:
        seen = min(longest, (config.tokens.context_segments + 1) * model.segment_frames)
        way_out = "lower tokens.context_segments"
    needed = TokenLayout.of(model).sequence_length(seen, 1)
    if needed > model.max_positions:
        problems.append(
            Problem(
                f"num_latent_frames = {longest} takes at least {needed} positions, more than "
                f"max_positions = {model.max_positions} of {entry.reference}; {way_out}"
            )
        )
    if config.lm_text.max_length > model.max_text_tokens:
        problems.append(
            Problem(
                f"lm_text.max_length = {config.lm_text.max_length} is more than max_text_tokens = "
                f"{model.max_text_tokens} of {entry.reference}; lower it"
            )
        )
    return problems


def _check_unit(config: SampleConfig, unit: SampleUnit, window: int) -> list[Problem]:
    """Checks the length of a video, and the frames at which its prompt changes."""
    length = unit.num_latent_frames
    problems = problems_of(lambda: check_length(length, window, config.clean_frames))
    if not problems:
        problems = problems_of(
            lambda: check_schedule(
                unit.texts, length, time=TIME, window=window, clean=config.clean_frames
            )
        )
    keys = f"num_latent_frames = {length}, clean_frames = {config.clean_frames}"
    place = f"prompt {unit.number}: " if config.prompts_file is not None else ""
    return [Problem(f"{place}{keys}: {problem}") for problem in problems]


def _check_diffusion_inputs(
    config: SampleConfig, entry: ZooEntry, units: Sequence[SampleUnit]
) -> list[Problem]:
    """Checks lengths and text states against the main transformer of the diffusion model."""
    transformer = _config_of(entry, DiffusionConfig).transformer
    text = config.diffusion_text
    problems = []
    window = transformer.latent_frames
    for unit in units:
        problems += _check_unit(config, unit, window)
        if problems:
            break  # others usually have the same
    if text.max_length != transformer.text_length:
        problems.append(
            Problem(
                f"diffusion_text.max_length = {text.max_length}, but {entry.reference} takes "
                f"text_length = {transformer.text_length} rows; set them to the same value"
            )
        )
    if not getattr(text, "padded", text.kind == "t5-v1.1"):
        problems.append(
            Problem(
                f"diffusion_text = {text.kind} returns unpadded text states, but the diffusion "
                "model takes padded ones; set diffusion_text.padded=true, or kind=t5-v1.1"
            )
        )
    return problems


def check_evaluate(config: EvaluateConfig, launch: Launch) -> list[Problem]:
    """Problems of `landiff evaluate`: output file, models, columns and their sizes."""
    problems = check_writable("out", config.out.parent)
    if config.out.is_dir():
        problems.append(
            Problem(f"out = {config.out} is a folder; it must be the file of the results")
        )
    if config.samples < 2:
        problems.append(
            Problem(
                f"samples = {config.samples}: a wrong condition is that of another clip, so at "
                "least 2 are needed"
            )
        )
    if not launch.inputs_exist:
        return problems
    models, found = find_models(config)
    problems += found
    manifest, found = read_data(config.data, evaluate_columns(config))
    problems += found
    sizes = models.sizes()
    if manifest is not None:
        sizes = replace(
            sizes,
            lm_text_width=manifest.columns[config.lm_text_column].shape[-1] or None,
            diffusion_text_width=manifest.columns[config.diffusion_text_column].shape[-1] or None,
        )
        if manifest.num_samples < 2:
            problems.append(
                Problem(
                    f"data = {config.data} holds {manifest.num_samples} clip: a wrong condition is "
                    "that of another clip, so at least 2 are needed"
                )
            )
        else:
            problems += problems_of(partial(evaluated_buckets, config, manifest))
    for text in sizes.differences():
        problems.append(Problem(f"models and columns do not fit each other: {text}"))
    if models.diffusion is not None and sizes.diffusion is not None:
        latent_frames = sizes.diffusion.transformer.latent_frames
        if config.prefix_frames >= latent_frames:
            problems.append(
                Problem(
                    f"prefix_frames = {config.prefix_frames} leaves nothing to compare of the "
                    f"{latent_frames} latent frames of {models.diffusion.reference}; lower it"
                )
            )
    return problems
