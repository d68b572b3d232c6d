"""Where the components of a `LanDiffPipeline` are while they run, and how the VAE decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.placement.offload import Level, OffloadedModule
from landiff.model_zoo.sample.placement.on_demand import (
    OnDemand,
    OnDemandCodec,
    OnDemandText,
    Place,
)

WHOLE = ("lm", "vae")
"""Components that always move as a whole: each token takes all weights of the language model."""


class ComponentPlacement(DiffusionPipeline):
    """Base class of the pipeline: offloading to the memory of the host, and tiled decoding.

    Needs no accelerate. The hooks of diffusers around `forward` of components would not work here,
    because the sampler calls modules inside the components.
    """

    _offloading: tuple[torch.device, Level] | None = None
    _offloaded: dict[str, OffloadedModule] | None = None
    _place: Place | None = None

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keeps all components on the CPU and moves each to `device` while it runs."""
        self._offload(device, gpu_id, "part")

    def enable_group_offload(
        self,
        onload_device: torch.device | str = "cuda",
        offload_type: Literal["block_level", "leaf_level"] = "block_level",
    ) -> None:
        """As `enable_model_cpu_offload`, but moves blocks or single layers while they run.

        The language model and the VAE move as a whole.
        """
        levels: dict[str, Level] = {"block_level": "block", "leaf_level": "layer"}
        if offload_type not in levels:
            raise ValueError(f"offload_type = {offload_type!r} must be one of {', '.join(levels)}")
        self._offload(onload_device, None, levels[offload_type])

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """As `enable_group_offload` with `offload_type="leaf_level"`."""
        self._offload(device, gpu_id, "layer")

    def _offload(self, device: torch.device | str, gpu_id: int | None, level: Level) -> None:
        target = torch.device(device)
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                "offloading moves components between the CPU and a CUDA device, but there is none; "
                "remove the call"
            )
        self.to("cpu")
        self._offloading = target, level
        self._place = Place(target)
        self._offloaded = {}
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                own: Level = "part" if name in WHOLE else level
                self._offloaded[name] = OffloadedModule(component, target, own)

    def to(self, *args: Any, **options: Any) -> Any:
        """Moves all components for good, as in diffusers. Ends offloading."""
        self._restore()
        self._offloading = None
        return super().to(*args, **options)

    def _restore(self) -> None:
        """Puts the weights of offloaded components back, on the CPU."""
        for offloaded in (self._offloaded or {}).values():
            offloaded.restore()
        self._offloaded = None
        self._place = None

    @contextmanager
    def _all_on_host(self) -> Iterator[None]:
        """Interrupts offloading, so that the weights can be read and changed."""
        offloading = self._offloading
        self._restore()
        try:
            yield
        finally:
            if offloading is not None:
                device, level = offloading
                self._offload(device, None, level)

    def enable_vae_tiling(self) -> None:
        """Decodes in overlapping tiles: less memory, slightly different pixels at the seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes whole frames again."""
        self.vae.disable_tiling()

    @contextmanager
    def _resident(self, *names: str) -> Iterator[None]:
        """Moves offloaded components to their device, and frees its memory at the end.

        Without offloading the components stay where they are.
        """
        if self._offloaded is None:
            yield
            return
        assert self._place is not None
        self._place.clear()  # of what a video stream has left there
        offloaded = [self._offloaded[name] for name in names]
        for component in offloaded:
            component.enter()
        try:
            yield
        finally:
            for component in offloaded:
                component.leave()

    def _on_demand(self, models: Models) -> Models:
        """Models that move to the device when they are used, one at a time.

        models: those of the components. Without offloading they are returned as they are.
        """
        place = self._place
        offloaded = self._offloaded
        if place is None or offloaded is None:
            return models

        def part(kind: type[OnDemand], module: Any, components: str, known: str) -> Any:
            """Stands for a module of these components. `known` attributes need no weights."""
            moved = [offloaded[name] for name in components.split()]
            attributes = {name: getattr(module, name) for name in known.split()}
            return kind.of(place, module, moved, attributes)

        text = "name dim max_length"
        return Models(
            lm=part(OnDemand, models.lm, "lm", "config layout"),
            tokenizer=part(OnDemand, models.tokenizer, "semantic_tokenizer", "config"),
            diffusion=part(OnDemand, models.diffusion, "control transformer", "config"),
            schedule=models.schedule,
            lm_text=part(OnDemandText, models.lm_text, "lm_text_encoder", text),
            diffusion_text=part(OnDemandText, models.diffusion_text, "text_encoder", text),
            codec=part(OnDemandCodec, models.codec, "vae", "name channels space time"),
        )
