"""Checks of `landiff evaluate videos`. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem, check_writable
from landiff.launchers.config import VideoMetricsConfig
from landiff.model_zoo.frozen.checks import check_encoder
from landiff.training.checks import Launch


def check_videos(config: VideoMetricsConfig, launch: Launch) -> list[Problem]:
    """Problems of `landiff evaluate videos`: folders, output file and network."""
    problems = check_writable("out", config.out.parent)
    problems += check_encoder("features", config.features)
    folders = {"videos": config.videos, "reference": config.reference}
    for key, folder in folders.items():
        if folder is not None and launch.inputs_exist and not folder.is_dir():
            problems.append(
                Problem(f"{key} = {folder} is not a folder; give a folder of mp4 files")
            )
    return problems
