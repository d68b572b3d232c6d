"""LoRA adapters in the components of a `LanDiffPipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from landiff.configs import Config
from landiff.model_zoo import registry
from landiff.model_zoo.convert.fingerprint import weights_fingerprint
from landiff.model_zoo.convert.formats import diffusers_folder
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import CONTROL, Part, joined
from landiff.model_zoo.lora.base import apply_adapter
from landiff.model_zoo.lora.config import AdapterConfig, BaseKind, require_base


class PipelineAdapters:
    """Adds adapters to the models of a pipeline, and knows the bases that they were loaded from.

    Bases are fingerprinted once, before the first adapter changes them.
    """

    def __init__(self, pipeline: Any) -> None:
        """`pipeline`: a LanDiffPipeline."""
        self.pipeline = pipeline
        self.fingerprints: dict[BaseKind, str] = {}
        self.count = 0

    def add(self, folder: Path, scale: float, *, merged: bool) -> None:
        """Add the adapter in the folder of a zoo entry. Raises ConfigError for another base."""
        entry = registry.read_entry(folder)
        config = entry.config
        if not isinstance(config, AdapterConfig):
            raise registry.ZooError(f"{entry.reference} is a {entry.kind}, not an adapter")
        kind = config.base_kind
        if kind not in self.fingerprints:
            self.fingerprints[kind] = self._fingerprint(kind)
        require_base(entry.reference, config, self.fingerprints[kind], "the pipeline")
        if not merged:
            self.count += 1
        name = f"adapter_{self.count}"
        apply_adapter(self._model(kind), entry, name=name, scale=scale, merged=merged)

    def _model(self, kind: BaseKind) -> nn.Module:
        """The model that adapters of a kind change, sharing its layers with the components."""
        pipeline = self.pipeline
        if kind == "lm":
            return pipeline.lm.model
        return pipeline.control.model.with_main(pipeline.transformer.model)

    def _fingerprint(self, kind: BaseKind) -> str:
        """Fingerprint of the base that the components were loaded from."""
        pipeline = self.pipeline
        if kind == "lm":
            part = _part("lm", pipeline.lm.model, Path(pipeline.lm.config._name_or_path or "."))
        else:
            transformer = pipeline.transformer
            part = _part("transformer", transformer.model, transformer.folder)
            if kind == "diffusion":
                control = _part(CONTROL, pipeline.control.model, pipeline.control.folder)
                part = joined(control, part)
        return weights_fingerprint(part.kind, part.config, part.tensors)


def _part(kind: str, model: nn.Module, folder: Path | None) -> Part:
    """A model as it is in the folder that it was loaded from; without one, as it is now.

    A component may have been loaded in another dtype than that of its files.
    """
    if folder is not None and diffusers_folder.class_of(folder) is not None:
        return diffusers_folder.read_model(folder)
    config = model.config
    assert isinstance(config, Config), config
    return Part(kind, config, LazyTensors.of(model.state_dict()))
