"""Where the components of a `LanDiffPipeline` are while they run, and how the VAE decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline


class ComponentPlacement(DiffusionPipeline):
    """Base class of the pipeline: offloading of whole components, and tiled decoding."""

    _offload_device: torch.device | None = None

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keeps all components on the CPU and moves each to `device` while it runs.

        Needs no accelerate. Its hooks around `forward` would not work here, because the sampler
        calls modules inside the components.
        """
        target = torch.device(device)
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                "enable_model_cpu_offload() moves components between the CPU and a CUDA device, "
                "but there is none; remove the call"
            )
        self.to("cpu")
        self._offload_device = target

    def enable_sequential_cpu_offload(self, *_args: Any, **_named: Any) -> None:
        """Not supported. Raises NotImplementedError."""
        raise NotImplementedError(
            "LanDiffPipeline offloads whole components only; call enable_model_cpu_offload()"
        )

    def enable_group_offload(self, *_args: Any, **_named: Any) -> None:
        """Not supported. Raises NotImplementedError."""
        raise NotImplementedError(
            "LanDiffPipeline offloads whole components only; call enable_model_cpu_offload()"
        )

    def enable_vae_tiling(self) -> None:
        """Decodes in overlapping tiles: less memory, slightly different pixels at the seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes whole frames again."""
        self.vae.disable_tiling()

    @contextmanager
    def _resident(self, *names: str) -> Iterator[None]:
        """Moves components to the device of `enable_model_cpu_offload`, and back at the end.

        Without offloading the components stay where they are.
        """
        device = self._offload_device
        if device is None:
            yield
            return
        components = [getattr(self, name) for name in names]
        for component in components:
            component.to(device)
        try:
            yield
        finally:
            for component in components:
                component.to("cpu")
