"""Memory of `landiff sample`, and the `offload` that fits a given memory. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from landiff.configs.base import ConfigError
from landiff.launchers.config import SampleConfig
from landiff.launchers.local.gpus import visible_gpus
from landiff.model_zoo import registry
from landiff.model_zoo.frozen.checks import local_or_hub
from landiff.model_zoo.frozen.config import FrozenConfig

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|MiB|MB)", re.IGNORECASE)
UNITS = {"gib": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}
FOR_WEIGHTS = 0.75  # of the memory; the rest is for activations, caches and libraries
PACKAGED_BYTES = 100 << 20  # at most, of an encoder whose weights come from a Python package
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part.

    loaded: of its weights, ready for use.
    loading: at the peak while they are loaded.
    """

    loaded: int
    loading: int


def parse_memory(text: str) -> int:
    """Bytes of `24GB` or `16 GiB`. Raises ConfigError."""
    match = SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"--memory {text!r} is no size such as 24GB or 16GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def memory_of_parts(config: SampleConfig) -> dict[str, PartMemory]:
    """Memory of each model and encoder, from the sizes of their files.

    An encoder of a hub id that is not here yet counts as nothing.
    """
    found = {}
    for kind in ("lm", "tokenizer", "diffusion"):
        tensors = registry.resolve(config.zoo, getattr(config, kind), kind).lazy()
        stored = tensors.num_bytes
        found[kind] = PartMemory(stored, stored)
        width = 2 if config.precision == "bf16" else 4
        floating = [tensor for tensor in tensors.meta.values() if tensor.is_floating_point()]
        if width == 2 or any(tensor.itemsize != width for tensor in floating):
            converted = width * tensors.num_elements  # in memory
            found[kind] = PartMemory(converted, stored + converted)
    for key in ("lm_text", "diffusion_text", "codec"):
        size = encoder_bytes(getattr(config, key))
        found[key] = PartMemory(size, size)
    return found


def encoder_bytes(config: FrozenConfig) -> int:
    """Bytes of the weight files of an encoder."""
    path = getattr(config, "path", None)
    if path is None:
        return PACKAGED_BYTES
    try:
        place = Path(local_or_hub(config.kind, path))
    except ConfigError:
        return 0
    if place.is_file():
        return place.stat().st_size
    folder = place / getattr(config, "subfolder", "")
    if not folder.is_dir():
        folder = place
    for pattern in WEIGHT_FILES:
        files = list(folder.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    return 0


def choose_offload(config: SampleConfig, memory: int) -> str:
    """The fastest `offload` with which `landiff sample` fits `memory` bytes.

    They are of the GPU if the config uses one, else of the host. Raises ConfigError if none fits.
    """
    parts = memory_of_parts(config)
    usable = int(memory * FOR_WEIGHTS)
    codec = parts.pop("codec").loaded
    loaded = [part.loaded for part in parts.values()]
    on_gpu = config.device.startswith("cuda") or (config.device == "auto" and visible_gpus() > 0)
    all_loaded = sum(loaded) + codec
    # The last part is loaded while all others are there.
    peak = all_loaded + max(part.loading - part.loaded for part in parts.values())
    if (all_loaded if on_gpu else peak) <= usable:
        return "none"
    if on_gpu and max(loaded) + codec <= usable and peak <= psutil.virtual_memory().available:
        return "model"
    if max(part.loading for part in parts.values()) + codec <= usable:
        return "disk"
    raise ConfigError(f"--memory {memory / 1e9:.1f}GB is too little: {largest(parts)}")


def largest(parts: Mapping[str, PartMemory]) -> str:
    """What the largest part needs, and the way out."""
    name = max(parts, key=lambda key: parts[key].loading)
    needed = (parts[name].loading) / FOR_WEIGHTS / 1e9
    return (
        f"{name} takes {parts[name].loading / 1e9:.1f} GB while it is loaded, so at least "
        f"{needed:.1f}GB are needed, a quarter of them for activations"
    )
