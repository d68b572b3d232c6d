"""Loads models and encoders for `landiff sample` and `landiff evaluate`, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from landiff.launchers.progress import ProgressLine
from landiff.model_zoo import registry
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.base import apply_adapter, base_fingerprint, find_adapter
from landiff.model_zoo.lora.config import AdapterUse, adapts, require_base
from landiff.model_zoo.tokenizer import SemanticTokenizer

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class ModelLoader:
    """Loads `total` parts one after the other and prints which one is being loaded."""

    def __init__(
        self,
        title: str,
        total: int,
        zoo: Path,
        device: torch.device,
        adapters: Sequence[AdapterUse] = (),
        *,
        merge_adapters: bool = True,
    ) -> None:
        """`adapters`: added to the models that they belong to when these are loaded."""
        self.zoo = zoo
        self.device = device
        self.adapters = tuple(adapters)
        self.merge_adapters = merge_adapters
        self._progress = ProgressLine(title, "models", every_s=0.0)
        self._total = total
        self._done = 0

    def load(self, name: str, build: Callable[[], T]) -> T:
        """The result of `build()`. Progress shows `name` meanwhile."""
        self._progress(self._done, self._total, name)
        part = build()
        self._done += 1
        if self._done == self._total:
            self._progress(self._done, self._total)
        return part

    def lm(self, reference: str) -> LanguageModel:
        """The language model behind a zoo reference. Raises ConfigError."""
        return self.load(reference, lambda: self._model(reference, "lm", LanguageModel))

    def tokenizer(self, reference: str) -> SemanticTokenizer:
        """The tokenizer behind a zoo reference. Raises ConfigError."""
        return self.load(reference, lambda: self._model(reference, "tokenizer", SemanticTokenizer))

    def diffusion(self, reference: str) -> ControlledDiffusion:
        """The diffusion model behind a zoo reference. Raises ConfigError."""
        return self.load(
            reference, lambda: self._model(reference, "diffusion", ControlledDiffusion)
        )

    def _model(self, reference: str, kind: str, model_class: type[M]) -> M:
        """The zoo entry of this kind as a module on the device, in eval mode, with its adapters."""
        entry = registry.resolve(self.zoo, reference, kind)
        model = registry.load_model(entry, self.device)
        assert isinstance(model, model_class), (entry.reference, type(model))
        for number, use in enumerate(self.adapters):
            adapter, config = find_adapter(self.zoo, use)
            if not adapts(config, kind):
                continue
            found = base_fingerprint(entry, config.base_kind)
            require_base(adapter.reference, config, found, entry.reference)
            apply_adapter(
                model,
                adapter,
                name=f"adapter_{number}",
                scale=use.scale,
                merged=self.merge_adapters,
            )
        return model
