"""Memory of `landiff sample`, and the `offload` that fits a given memory. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from landiff.configs.base import ConfigError
from landiff.configs.safetensors_header import read_header
from landiff.launchers.config import SampleConfig
from landiff.launchers.local.gpus import visible_gpus
from landiff.model_zoo import registry
from landiff.model_zoo.frozen.checks import local_or_hub
from landiff.model_zoo.frozen.config import FrozenConfig
from landiff.model_zoo.sample.placement.quantized import is_block_weight, quantized_bytes

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|MiB|MB)", re.IGNORECASE)
UNITS = {"gib": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}
FOR_WEIGHTS = 0.75  # of the memory; the rest is for activations, caches and libraries
PACKAGED_BYTES = 100 << 20  # at most, of an encoder whose weights come from a Python package
# The first number in a name is that of a block in a list (model_zoo/sample/placement).
BLOCK = re.compile(r".*?\.\d+\.")
LAYER = re.compile(r".*(?=\.)")  # all but the last word of a name
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part.

    loaded: of its weights, ready for use.
    loading: at the peak while they are loaded.
    in_groups, in_layers: of the weights that are on the device at once with `offload=group` and
        with `offload=sequential`.
    """

    loaded: int
    loading: int
    in_groups: int
    in_layers: int

    @classmethod
    def whole(cls, loaded: int) -> PartMemory:
        """A part whose weights move together."""
        return cls(loaded, loaded, loaded, loaded)

    @classmethod
    def of_tensors(cls, sizes: Mapping[str, int], largest: int = 0) -> PartMemory:
        """A part with tensors of these sizes by name, read one at a time.

        largest: of the tensors as they are stored, if they are converted.
        """
        loaded = sum(sizes.values())
        groups = at_once(sizes, lambda name: BLOCK.match(name))
        layers = at_once(sizes, lambda name: BLOCK.match(name) and LAYER.match(name))
        return cls(loaded, loaded + largest, groups, layers)


def at_once(sizes: Mapping[str, int], group_of: Callable[[str], re.Match[str] | None]) -> int:
    """Bytes of the largest group of tensors, and of those that are in no group."""
    rest = 0
    groups: dict[str, int] = {}
    for name, size in sizes.items():
        group = group_of(name)
        if group is None:
            rest += size
        else:
            groups[group[0]] = groups.get(group[0], 0) + size
    return rest + max(groups.values(), default=0)


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
        width = 2 if config.precision == "bf16" else 4
        sizes = {}
        largest = 0  # of those that are converted while they are read
        for name, meta in tensors.meta.items():
            sizes[name] = meta.numel() * meta.itemsize
            if meta.is_floating_point() and meta.itemsize != width:
                largest = max(largest, sizes[name])
                sizes[name] = meta.numel() * width
        part = PartMemory.of_tensors(sizes, largest)
        if config.quantize == "int8" and kind != "tokenizer":
            for name, meta in tensors.meta.items():
                if is_block_weight(name, meta.ndim):
                    sizes[name] = quantized_bytes(*meta.shape)
            # They are quantized after they were loaded.
            part = replace(PartMemory.of_tensors(sizes), loading=part.loading)
        found[kind] = part
    # Each token takes all weights of the language model, which are therefore moved together.
    lm = found["lm"]
    found["lm"] = replace(lm, in_groups=lm.loaded, in_layers=lm.loaded)
    for key in ("lm_text", "diffusion_text", "codec"):
        found[key] = encoder_memory(getattr(config, key))
    return found


def encoder_memory(config: FrozenConfig) -> PartMemory:
    """Memory of an encoder, from its weight files."""
    files = encoder_files(config)
    if files is None:
        return PartMemory.whole(PACKAGED_BYTES)
    sizes: dict[str, int] = {}
    for file in files:
        if file.suffix != ".safetensors":
            return PartMemory.whole(sum(file.stat().st_size for file in files))
        for name, entry in read_header(file).entries.items():
            sizes[name] = entry.end - entry.begin
    return PartMemory.of_tensors(sizes)


def encoder_files(config: FrozenConfig) -> list[Path] | None:
    """The weight files of an encoder that are here; None if they are in a Python package."""
    path = getattr(config, "path", None)
    if path is None:
        return None
    try:
        place = Path(local_or_hub(config.kind, path))
    except ConfigError:
        return []
    if place.is_file():
        return [place]
    folder = place / getattr(config, "subfolder", "")
    if not folder.is_dir():
        folder = place
    for pattern in WEIGHT_FILES:
        files = list(folder.glob(pattern))
        if files:
            return files
    return []


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
    if on_gpu and peak <= psutil.virtual_memory().available:
        needed = {
            "model": max(loaded),
            "group": max(part.in_groups for part in parts.values()),
            "sequential": max(part.in_layers for part in parts.values()),
        }
        for offload, size in needed.items():
            if size + codec <= usable:
                return offload
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
