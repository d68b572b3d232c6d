"""The commands `landiff sample` and `landiff evaluate`.

Torch is imported after the checks.
"""

from __future__ import annotations

import argparse

from landiff.configs import ConfigError
from landiff.launchers.commands import load_for_job
from landiff.launchers.config import EvaluateConfig, SampleConfig


def sample_command(args: argparse.Namespace) -> int:
    """Generates a video for each prompt. Returns the exit code."""
    values = {"prompts": args.prompts} if args.prompts else None
    try:
        config = load_for_job(args, SampleConfig, describe_sample, values=values)
    except ConfigError as error:
        if any(" " in override for override in args.overrides):
            hint = "(write a prompt that begins with KEY= after --)"
            raise ConfigError(f"{error}\n{hint}") from None
        raise
    if config is not None:
        from landiff.launchers.results.sample import sample_videos

        sample_videos(config)
    return 0


def describe_sample(config: SampleConfig) -> str:
    """What `landiff sample` would do."""
    return f"would sample {len(config.prompts)} video(s) into {config.out}"


def evaluate_command(args: argparse.Namespace) -> int:
    """Compares losses under right and wrong conditions. Returns the exit code."""
    config = load_for_job(args, EvaluateConfig, describe_evaluate)
    if config is not None:
        from landiff.launchers.results.evaluate import evaluate_conditions

        evaluate_conditions(config)
    return 0


def describe_evaluate(config: EvaluateConfig) -> str:
    """What `landiff evaluate` would do."""
    return f"would evaluate {config.lm} and {config.diffusion} on {config.samples} samples"
