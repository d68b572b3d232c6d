"""Loads models and encoders for `landiff sample` and `landiff evaluate`, with progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from landiff.launchers.config import SampleConfig
from landiff.launchers.progress import ProgressLine
from landiff.model_zoo import frozen, registry
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.frozen.checks import width_of
from landiff.model_zoo.layers import require_compiler
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.base import apply_adapter, base_fingerprint, find_adapter
from landiff.model_zoo.lora.config import AdapterUse, adapts, require_base
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.placement.offload import Level
from landiff.model_zoo.sample.placement.on_demand import OnDemand, OnDemandText, Place
from landiff.model_zoo.sample.placement.quantized import quantize_blocks
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import SemanticTokenizer

log = logging.getLogger(__name__)

PARTS = ("lm", "tokenizer", "diffusion", "lm_text", "diffusion_text")
LEVELS: dict[str, Level] = {"model": "part", "group": "block", "sequential": "layer"}
"""What moves at once, by `offload`."""
EXCHANGED: tuple[Level, ...] = ("block", "layer")
"""Parts of a model that have a place on the device in turn."""

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def in_precision(model: M, precision: str) -> M:
    """A model of the zoo with the precision of `landiff sample`, changed in place."""
    if precision == "fp32":
        return model.float()
    if isinstance(model, LanguageModel):
        model.to_inference(torch.bfloat16)
        return model
    return model.bfloat16()


def load_models(
    config: SampleConfig, device: torch.device, needed: Collection[str] = PARTS
) -> Models:
    """The models and encoders of `config` on `device`, with progress.

    With `offload`, parts are loaded when they are used.

    needed: those that will be used. Others are loaded if they are used after all.
    """
    models = models_on_demand(config, device)
    if config.offload != "none":
        return models
    progress = ProgressLine("sample loads", "models", every_s=0.0)
    loaded = {}
    for done, name in enumerate(needed):
        part = getattr(config, name)
        progress(done, len(needed), part if isinstance(part, str) else part.kind)
        loaded[name] = getattr(models, name).module()
    progress(len(needed), len(needed))
    return replace(models, **loaded)


def models_on_demand(config: SampleConfig, device: torch.device) -> Models:
    """The models and encoders of `config`, each loaded when it is used.

    With `offload`, one of them is on `device` at a time. The codec, which is small, is always
    there.
    """
    place = Place(device, shared=config.offload == "none")
    level = LEVELS.get(config.offload)
    home = device if level is None else torch.device("cpu")
    loader = ModelLoader(
        "",
        0,
        config.zoo,
        home,
        config.adapters,
        merge_adapters=config.merge_adapters,
        precision=config.precision,
        quantized=config.quantize == "int8",
        compiled=is_compiled(config, device),
    )

    def entry_part(kind: str, model_class: type[nn.Module], *names: str) -> Any:
        """A model of the zoo, with attributes that are known without its weights."""
        reference = getattr(config, kind)
        entry = registry.resolve(config.zoo, reference, kind)
        with torch.device("meta"):
            empty = registry.build_module(entry.kind, entry.config)

        def load() -> nn.Module:
            log.info("sample loads %s", entry.reference)
            return loader.model(reference, kind, model_class)

        known = {name: getattr(empty, name) for name in names}
        own_level = level
        if kind == "lm" and level is not None:
            own_level = "part"  # each token takes all of its weights
        return OnDemand(place, load, level=own_level, known=known)

    def text_part(key: str) -> Any:
        """A text encoder, whose width is known without its weights if the files are here."""
        text = getattr(config, key)

        def load() -> nn.Module:
            log.info("sample loads %s", text.kind)
            return frozen.build(text, home)

        known = {"max_length": text.max_length, "name": text.kind}
        width = width_of(text)
        if width is not None:
            known["dim"] = width
        return OnDemandText(place, load, level=level, known=known)

    return Models(
        lm=entry_part("lm", LanguageModel, "config", "layout"),
        tokenizer=entry_part("tokenizer", SemanticTokenizer, "config"),
        diffusion=entry_part("diffusion", ControlledDiffusion, "config"),
        schedule=NoiseSchedule(config.schedule),
        lm_text=text_part("lm_text"),
        diffusion_text=text_part("diffusion_text"),
        codec=frozen.build(config.codec, device),
    )


def is_compiled(config: SampleConfig, device: torch.device) -> bool:
    """Whether blocks are compiled. Raises ConfigError if they are to be and there is no compiler.

    Not where blocks or layers exchange their weights.
    """
    if (
        not config.compile_blocks
        or device.type != "cuda"
        or LEVELS.get(config.offload) in EXCHANGED
    ):
        return False
    require_compiler(device)
    return True


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
        precision: str | None = None,
        quantized: bool = False,
        compiled: bool = False,
    ) -> None:
        """`adapters`: added to the models that they belong to when these are loaded.

        precision: of the models, see `in_precision`. None keeps that of their files.
        quantized: blocks of language and diffusion model to int8, on the CPU, so that the device
            never holds the weights before.
        compiled: blocks of the diffusion model, at their first call.
        """
        self.zoo = zoo
        self.device = device
        self.adapters = tuple(adapters)
        self.merge_adapters = merge_adapters
        self.precision = precision
        self.quantized = quantized
        self.compiled = compiled
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
        return self.load(reference, lambda: self.model(reference, "lm", LanguageModel))

    def tokenizer(self, reference: str) -> SemanticTokenizer:
        """The tokenizer behind a zoo reference. Raises ConfigError."""
        return self.load(reference, lambda: self.model(reference, "tokenizer", SemanticTokenizer))

    def diffusion(self, reference: str) -> ControlledDiffusion:
        """The diffusion model behind a zoo reference. Raises ConfigError."""
        return self.load(reference, lambda: self.model(reference, "diffusion", ControlledDiffusion))

    def model(self, reference: str, kind: str, model_class: type[M]) -> M:
        """The zoo entry of this kind as a module on the device, in eval mode, with its adapters."""
        if not self.quantized or kind == "tokenizer":
            model = self._load(reference, kind, model_class, self.device)
        else:
            model = self._load(reference, kind, model_class, torch.device("cpu"))
            quantize_blocks(model)
            model = model.to(self.device)
        if self.compiled and isinstance(model, ControlledDiffusion):
            model.compile_blocks()
        return model

    def _load(self, reference: str, kind: str, model_class: type[M], device: torch.device) -> M:
        """The model on a device, not quantized."""
        entry = registry.resolve(self.zoo, reference, kind)
        uses = []
        for number, use in enumerate(self.adapters):
            adapter, config = find_adapter(self.zoo, use)
            if adapts(config, kind):
                uses.append((number, use, adapter, config))
        cast = None
        if self.precision is not None and not uses:
            cast = partial(in_precision, precision=self.precision)
        model = registry.load_model(entry, device, cast)
        assert isinstance(model, model_class), (entry.reference, type(model))
        for number, use, adapter, config in uses:
            found = base_fingerprint(entry, config.base_kind)
            require_base(adapter.reference, config, found, entry.reference)
            apply_adapter(
                model,
                adapter,
                name=f"adapter_{number}",
                scale=use.scale,
                merged=self.merge_adapters,
            )
        if self.precision is not None and uses:  # which were added to the weights as stored
            return in_precision(model, self.precision)
        return model
