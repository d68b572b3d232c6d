"""What a visitor of `landiff demo` asks for, checked and turned into a unit of `landiff sample`.

Nothing that comes from a browser is trusted: every value is checked here, whatever the page offers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.loader import validate
from landiff.configs.problems import require_none
from landiff.launchers.config import GIVEN, SampleConfig
from landiff.launchers.results.prompts import SampleUnit, sample_units
from landiff.launchers.results.sample import MAX_LOGGED, model_references
from landiff.launchers.results.sample_folder import common_settings
from landiff.launchers.results.sampling.checks import check_sample
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig
from landiff.training.checks import Launch

MODELS = ("lm", "tokenizer", "diffusion")
KEYS = ("seed", "num_latent_frames", "guidance", "motion_score", "steps", *MODELS)
"""Keys of the values of the page, in its order."""
MAX_PROMPT = 4000  # characters
MAX_SEED = (1 << 32) - 1
MAX_STEPS = 200
MAX_CHUNKS = 8  # of a video


@dataclass(frozen=True)
class DemoRequest:
    """One video to generate, with everything that its frames depend on.

    config: of `landiff sample`; its `out` is the folder of all videos with these settings.
    settings: what the videos of that folder have in common.
    """

    config: SampleConfig
    unit: SampleUnit
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The finished video."""
        return self.config.out / self.unit.name


def build_request(
    base: SampleConfig, values: Mapping[str, Any], given: Mapping[str, Path] | None = None
) -> DemoRequest:
    """A request from the values of the page.

    base: the config of the demo. Videos go to a folder below its `out` for each combination of
        settings, named by its hash, because the videos of a sample folder have equal settings.
    values: `prompt` and values of `SampleConfig` by key, from the browser.
    given: `first_frame` or `tokens_from`, a file that the server has chosen.

    Raises ConfigError that says what to change.
    """
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError("the prompt is empty; describe what the video shows")
    if len(prompt) > MAX_PROMPT:
        raise ConfigError(
            f"the prompt has {len(prompt)} characters; at most {MAX_PROMPT} are taken"
        )
    chosen = {key: value for key, value in values.items() if key != "prompt"}
    for key in chosen:
        if key not in KEYS:
            raise ConfigError(f"{key} is not a value of the page")
    data = base.model_dump() | chosen | {"prompts": (prompt,), "seeds": (), "num_videos": 1}
    data |= {"prompts_file": None, "prompt_schedule": (), "batch_size": 1, "tokens_only": False}
    data |= {"split_guidance": False}
    data |= dict.fromkeys(GIVEN) | dict(given or {})
    config = validate(SampleConfig, data, "demo")
    _check_limits(config)
    require_none(check_sample(config, Launch()))
    settings = common_settings(config, model_references(config))
    text = json.dumps(settings, sort_keys=True)
    folder = config.out / hashlib.sha256(text.encode()).hexdigest()[:16]
    (unit,) = sample_units(config)
    # The name must tell apart videos of one prompt and seed with another length or motion.
    stem = unit.name.removesuffix(".mp4").partition("-")[2]
    # The first numbers of a list are logged to TensorBoard, which this is not meant for.
    unit = replace(unit, number=MAX_LOGGED, file=f"{stem}-{unit.key[:8]}.mp4")
    return DemoRequest(config.model_copy(update={"out": folder}), unit, settings)


def _check_limits(config: SampleConfig) -> None:
    """Raises ConfigError for values that the page does not offer."""
    if config.seed > MAX_SEED:
        raise ConfigError(f"seed = {config.seed} is above {MAX_SEED}")
    if config.steps > MAX_STEPS:
        raise ConfigError(f"steps = {config.steps} is above {MAX_STEPS}")
    for kind in MODELS:
        reference = getattr(config, kind)
        if reference not in model_choices(config.zoo, kind):
            raise ConfigError(f"{kind} = {reference!r} is not offered; choose one of the list")
    lengths = video_lengths(config)
    if config.num_latent_frames not in lengths:
        shown = ", ".join(str(length) for length in lengths)
        raise ConfigError(
            f"num_latent_frames = {config.num_latent_frames} is not offered; choose one of {shown}"
        )


def model_choices(zoo: Path, kind: str) -> list[str]:
    """References with fingerprints of all models of a kind that a zoo holds."""
    found = []
    for entry in registry.entries(zoo):
        if entry.kind == kind:
            found.append(entry.reference)
    return found


def video_lengths(config: SampleConfig) -> list[int]:
    """Lengths in latent frames that the page offers: 1 to `MAX_CHUNKS` chunks, and one frame."""
    entry = registry.resolve(config.zoo, config.diffusion, "diffusion")
    assert isinstance(entry.config, DiffusionConfig), entry.reference
    window = entry.config.transformer.latent_frames
    stride = window - config.clean_frames
    lengths = {1, window}
    if stride > 0:
        lengths |= {window + stride * chunk for chunk in range(1, MAX_CHUNKS)}
    return sorted(lengths)
