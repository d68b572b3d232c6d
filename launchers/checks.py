"""Checks before a job starts: all problems of its config and inputs, at once and without torch.

`check(stage, config, launch)` serves the command itself, its `--dry-run`, and submission. Checks of
the trainers are beside their configs (training/<stage>/checks.py), those of other stages here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from landiff.configs import Config, ConfigError
from landiff.configs.loader import load_leniently
from landiff.configs.problems import Problem, check_writable, problems_of, require_none
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute.config import PrecomputeConfig, TokensColumn
from landiff.launchers.config import EvaluateConfig, SampleConfig, ShardsJobConfig
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.sample.sizes import Sizes, check_length
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checks import Launch, check_manifest, check_package, find_entry
from landiff.training.diffusion.checks import check_steps

C = TypeVar("C", bound=Config)
MODELS = (
    ("lm", "lm"),
    ("tokenizer", "tokenizer"),
    ("diffusion", "diffusion"),
)  # config key -> kind in the zoo


def check(stage: str, config: Any, launch: Launch) -> list[Problem]:
    """All problems of a stage's config.

    `stage`: a trainer, or shards, precompute, sample, evaluate.
    """
    return _check_of(stage)(config, launch)


def _check_of(stage: str) -> Callable[[Any, Launch], list[Problem]]:
    if stage == "tokenizer":
        from landiff.training.tokenizer import checks
    elif stage == "lm":
        from landiff.training.lm import checks
    elif stage == "diffusion":
        from landiff.training.diffusion import checks
    else:
        return {
            "shards": check_shards,
            "precompute": check_precompute,
            "sample": check_sample,
            "evaluate": check_evaluate,
        }[stage]
    return checks.check


def load_checked(
    stage: str,
    cls: type[C],
    source: str,
    overrides: Sequence[str],
    launch: Launch,
    values: Mapping[str, Any] | None = None,
) -> tuple[C, list[Problem]]:
    """The config of a stage, and all its problems: of single values, and those `check` finds.

    Arguments and errors are those of `load_with_problems`.
    """
    config, problems = load_with_problems(cls, source, overrides, values)
    return config, [*problems, *check(stage, config, launch)]


def load_with_problems(
    cls: type[C],
    source: str,
    overrides: Sequence[str],
    values: Mapping[str, Any] | None = None,
) -> tuple[C, list[Problem]]:
    """A config and the problems of its values.

    `values` replace keys of the config as they are, without being read as YAML. Raises ConfigError
    where the config cannot be read at all.
    """
    config, problems = load_leniently(cls, source, overrides, values)
    if config is None:
        require_none(problems)
    return config, problems


def count_gpus(devices: Path, chosen: str | None) -> int:
    """GPUs of this machine, of which CUDA_VISIBLE_DEVICES = `chosen` may hide some.

    Known without torch.
    """
    present = len(list(devices.glob("nvidia[0-9]*")))
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    hidden = names.index("-1") if "-1" in names else len(names)  # what follows -1 is hidden too
    return min(present, hidden)


def check_processes(processes: int, gpus: int) -> list[Problem]:
    """`--nproc`: at least one process, and on a machine with GPUs at most one for each."""
    if processes < 1:
        return [Problem(f"--nproc {processes}: at least one process")]
    if gpus and processes > gpus:
        return [
            Problem(
                f"--nproc {processes}: this machine shows {gpus} GPUs, one for each process; lower "
                "it"
            )
        ]
    return []


def check_pipeline(configs: Mapping[str, Any]) -> list[Problem]:
    """Whether the models that the stages of a pipeline train fit each other.

    `configs`: by name of the stage.
    """
    sample: SampleConfig = configs["sample"]
    sizes = Sizes(
        configs["lm"].model,
        configs["tokenizer"].model,
        configs["diffusion-control"].model,
        width_of(sample.lm_text),
        width_of(sample.diffusion_text),
        width_of(sample.codec),
    )
    problems = [
        Problem(f"these models are not made for each other: {text}") for text in sizes.differences()
    ]
    if (
        configs["diffusion-main"].model.transformer
        != configs["diffusion-control"].model.transformer
    ):
        problems.append(
            Problem(
                "diffusion-main.model.transformer and diffusion-control.model.transformer differ, "
                "but the second starts "
                "from the first; set them alike"
            )
        )
    return problems


def check_shards(config: ShardsJobConfig, launch: Launch) -> list[Problem]:
    problems = check_writable("data", config.data)
    is_path = ".tar" not in config.source and config.source != "packaged"
    if launch.inputs_exist and is_path and not Path(config.source).exists():
        problems.append(
            Problem(
                f"source = {config.source!r} does not exist; give a folder, a .csv, a .jsonl, a "
                '.tar, or "packaged"'
            )
        )
    if config.shots is not None:
        from landiff.data_pipeline.ingest.shots import EXTRAS, PACKAGES

        way_out = (
            f"pip install 'landiff-pretrain[{EXTRAS[config.shots.detector]}]', or set shots=null"
        )
        problems += check_package(
            PACKAGES[config.shots.detector], "shots.detector", config.shots.detector, way_out
        )
    if config.filters.text_area_max is not None:
        way_out = "pip install 'landiff-pretrain[text]', or set filters.text_area_max=null"
        problems += check_package(
            "rapidocr_onnxruntime", "filters.text_area_max", config.filters.text_area_max, way_out
        )
    return problems


def check_precompute(config: PrecomputeConfig, launch: Launch) -> list[Problem]:
    problems = check_writable("data", config.data)
    for name, column in config.columns.items():
        problems += check_encoder(f"columns.{name}.encoder", column.encoder)
        if isinstance(column, TokensColumn) and launch.inputs_exist:
            key = f"columns.{name}.tokenizer"
            entry, found = find_entry(key, config.zoo, column.tokenizer, "tokenizer")
            problems += found
            if entry is not None:
                problems += _check_tokenizer(key, entry, width_of(column.encoder))
    if launch.inputs_exist:
        problems += read_data(config.data, ())[1]
    return problems


def _check_tokenizer(key: str, entry: ZooEntry, channels: int | None) -> list[Problem]:
    """Whether a tokenizer takes the features of a vision encoder and its codes fit a column."""
    problems = []
    if channels is not None and channels != entry.config.feature_channels:
        problems.append(
            Problem(
                f"{key} = {entry.reference} takes features of {entry.config.feature_channels} "
                "channels, the encoder makes "
                f"{channels}; name the encoder that the tokenizer was trained on"
            )
        )
    if entry.config.codebook_size > 1 << 16:
        problems.append(
            Problem(
                f"{key} = {entry.reference} has a codebook of {entry.config.codebook_size}; tokens "
                "are uint16"
            )
        )
    return problems


def read_data(data: Path, columns: Sequence[str]) -> tuple[Manifest | None, list[Problem]]:
    """The manifest of a data folder if it has clips and `columns`, else None; and the problems."""
    try:
        manifest = read_manifest(data)
        problems = check_manifest(manifest, columns, data)
    except ConfigError as error:
        problems = [Problem(str(error))]
    except OSError as error:
        problems = [Problem(f"it cannot be read: {error.strerror}")]
    if problems:
        return None, [Problem(f"data = {data}: {problem}") for problem in problems]
    return manifest, []


def find_models(config: SampleConfig | EvaluateConfig) -> tuple[dict[str, ZooEntry], list[Problem]]:
    """The zoo entries of the three models that could be found, and the problems of the others."""
    entries: dict[str, ZooEntry] = {}
    problems: list[Problem] = []
    for key, kind in MODELS:
        entry, found = find_entry(key, config.zoo, getattr(config, key), kind)
        problems += found
        if entry is not None:
            entries[key] = entry
    return entries, problems


def check_sample(config: SampleConfig, launch: Launch) -> list[Problem]:
    problems = check_writable("out", config.out)
    if not config.prompts:
        problems.append(
            Problem(
                'prompts is empty; give one: landiff sample --config ... -- "a rabbit runs over a '
                'meadow"'
            )
        )
    problems += check_steps("steps", config.steps, config.schedule)
    for key in ("lm_text", "diffusion_text", "codec"):
        problems += check_encoder(key, getattr(config, key))
    if not launch.inputs_exist:
        return problems
    entries, found = find_models(config)
    problems += found
    sizes = Sizes(
        *(entries[key].config if key in entries else None for key, _ in MODELS),
        width_of(config.lm_text),
        width_of(config.diffusion_text),
        width_of(config.codec),
    )
    problems += [
        Problem(f"these models were not made for each other: {text}")
        for text in sizes.differences()
    ]
    if "lm" in entries:
        problems += _check_positions(config, entries["lm"])
    if "diffusion" in entries:
        main = entries["diffusion"].config.transformer
        problems += [
            Problem(
                f"num_latent_frames = {config.num_latent_frames}, clean_frames = "
                f"{config.clean_frames}: {problem}"
            )
            for problem in problems_of(
                lambda: check_length(
                    config.num_latent_frames, main.latent_frames, config.clean_frames
                )
            )
        ]
        if config.diffusion_text.max_length != main.text_length:
            problems.append(
                Problem(
                    f"diffusion_text.max_length = {config.diffusion_text.max_length}, but "
                    f"{entries['diffusion'].reference} "
                    f"takes text_length = {main.text_length} rows; set them alike"
                )
            )
        if not getattr(config.diffusion_text, "padded", config.diffusion_text.kind == "t5-v1.1"):
            problems.append(
                Problem(
                    f"diffusion_text = {config.diffusion_text.kind} returns real rows only, but "
                    "the diffusion model takes "
                    "padded ones; set diffusion_text.padded=true, or kind=t5-v1.1"
                )
            )
    return problems


def _check_positions(config: SampleConfig, entry: ZooEntry) -> list[Problem]:
    """Whether the shortest text and all tokens of the video fit the language model."""
    model = entry.config
    problems = []
    needed = TokenLayout.of(model).sequence_length(config.num_latent_frames, 1)
    if needed > model.max_positions:
        problems.append(
            Problem(
                f"num_latent_frames = {config.num_latent_frames} takes at least {needed} "
                "positions, more than "
                f"max_positions = {model.max_positions} of {entry.reference}; lower it"
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


def check_evaluate(config: EvaluateConfig, launch: Launch) -> list[Problem]:
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
    entries, found = find_models(config)
    problems += found
    manifest, found = read_data(
        config.data, ("tokens", "latents", config.lm_text_column, config.diffusion_text_column)
    )
    problems += found
    sizes = Sizes(*(entries[key].config if key in entries else None for key, _ in MODELS))
    if manifest is not None:
        sizes = Sizes(
            sizes.lm,
            sizes.tokenizer,
            sizes.diffusion,
            manifest.columns[config.lm_text_column].shape[-1] or None,
            manifest.columns[config.diffusion_text_column].shape[-1] or None,
        )
        if manifest.num_samples < 2:
            problems.append(
                Problem(
                    f"data = {config.data} holds {manifest.num_samples} clip: a wrong condition is "
                    "that of another clip, "
                    "so at least 2 are needed"
                )
            )
    problems += [
        Problem(f"models and columns were not made for each other: {text}")
        for text in sizes.differences()
    ]
    if (
        sizes.diffusion is not None
        and config.prefix_frames >= sizes.diffusion.transformer.latent_frames
    ):
        problems.append(
            Problem(
                f"prefix_frames = {config.prefix_frames} leaves nothing to compare of the "
                f"{sizes.diffusion.transformer.latent_frames} latent frames of "
                f"{entries['diffusion'].reference}; lower it"
            )
        )
    return problems
