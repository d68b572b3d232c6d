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

_COMPONENTS = "landiff.model_zoo.diffusers.components"
_ENCODERS = "landiff.model_zoo.diffusers.encoders"
_PIPELINE = "landiff.model_zoo.diffusers.pipeline"
_LAZY = {
    # model_index.json of a saved pipeline names its components as classes of this module.
    "LanDiffCodec": (_ENCODERS, "LanDiffCodec"),
    "LanDiffControl": (_COMPONENTS, "LanDiffControl"),
    "LanDiffLM": (_COMPONENTS, "LanDiffLM"),
    "LanDiffLMConfig": (_COMPONENTS, "LanDiffLMConfig"),
    "LanDiffPipeline": (_PIPELINE, "LanDiffPipeline"),
    "LanDiffScheduler": (_COMPONENTS, "LanDiffScheduler"),
    "LanDiffTextEncoder": (_ENCODERS, "LanDiffTextEncoder"),
    "LanDiffTokenizer": (_COMPONENTS, "LanDiffTokenizer"),
    "LanDiffTransformer": (_COMPONENTS, "LanDiffTransformer"),
    "load_config": ("landiff.configs", "load"),
    "zoo": ("landiff.model_zoo.registry", ""),
}
"""Public names with their (module, attribute). An empty attribute stands for the module itself."""

_BASE_CLASSES = {
    "ModelMixin": ("diffusers", "ModelMixin"),
    "PreTrainedModel": ("transformers", "PreTrainedModel"),
    "SchedulerMixin": ("diffusers", "SchedulerMixin"),
}
"""Base classes of the components.

diffusers looks them up in the module that model_index.json names, to know how a component is
loaded. They are not part of the public interface.
"""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises AttributeError for an unknown name."""
    target = _LAZY.get(name) or _BASE_CLASSES.get(name)
    if target is None:
        raise AttributeError(f"module 'landiff' has no attribute {name!r}")
    module_name, attribute = target
    value = importlib.import_module(module_name)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All names, including those that are not imported yet."""
    return sorted({*globals(), *_LAZY})
