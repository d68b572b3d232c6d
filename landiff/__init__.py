"""Pretraining framework for LanDiff text-to-video models. Importing it does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from landiff.launchers.version import __version__

if TYPE_CHECKING:
    from landiff.configs import load as load_config
    from landiff.model_zoo import registry as zoo
    from landiff.model_zoo.diffusers.pipeline import LanDiffPipeline

__all__ = ["LanDiffPipeline", "__version__", "load_config", "zoo"]

_PIPELINE = "landiff.model_zoo.diffusers.pipeline"
_LAZY = {
    "LanDiffControl": (_PIPELINE, "LanDiffControl"),
    "LanDiffLM": (_PIPELINE, "LanDiffLM"),
    "LanDiffPipeline": (_PIPELINE, "LanDiffPipeline"),
    "LanDiffScheduler": (_PIPELINE, "LanDiffScheduler"),
    "LanDiffTokenizer": (_PIPELINE, "LanDiffTokenizer"),
    "LanDiffTransformer": (_PIPELINE, "LanDiffTransformer"),
    "load_config": ("landiff.configs", "load"),
    "zoo": ("landiff.model_zoo.registry", ""),
}
"""Public names with their (module, attribute). An empty attribute stands for the module itself."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises AttributeError for an unknown name."""
    if name not in _LAZY:
        raise AttributeError(f"module 'landiff' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    value = importlib.import_module(module_name)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All names, including those that are not imported yet."""
    return sorted({*globals(), *_LAZY})
