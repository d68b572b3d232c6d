"""Weights as other tools leave them: wrapper prefixes, adapters, quantised weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from landiff.model_zoo.convert.lazy import LazyTensors, quantised
from landiff.model_zoo.convert.rules import ConversionError

# what DDP puts in front of every name
FRONT = ("module.",)
# what torch.compile, FSDP and activation checkpointing put anywhere in a name
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# parts of a name that LoRA and other adapters begin, or end, with
ADAPTER_STARTS = ("lora", "hada_", "lokr_", "ia3_", "oft_", "adapter_", "base_model")
ADAPTER_END = "_lora"
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.*",
    "*lora*.safetensors",
    "*lora*.bin",
    "*lora*.pt",
)
QUANTISED_ENDS = (
    ".absmax",
    ".quant_map",
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".scale_weight",
    ".weight_scale_inv",
    "scaled_fp8",
    ".SCB",
)


def prepared(state: LazyTensors, what: str) -> LazyTensors:
    """`state` without the prefixes of wrappers.

    Raises ConversionError for adapters and quantised weights, and where two names become one.
    """
    refuse_adapter(state, what)
    refuse_quantised(state, what)
    names = {name: unwrapped_name(name) for name in state}
    for prefix in FRONT:
        while names and all(name.startswith(prefix) for name in names.values()):
            names = {old: name.removeprefix(prefix) for old, name in names.items()}
    if all(old == new for old, new in names.items()):
        return state
    if len(set(names.values())) < len(names):
        twice = sorted(old for old, new in names.items() if old != new and new in names)
        raise ConversionError(
            f"{what} holds weights with and without the prefix of a wrapper, such as "
            f"{', '.join(twice[:3])}; "
            "save the state of one model"
        )
    return state.renamed(names.__getitem__)


def unwrapped_name(name: str) -> str:
    """A name without the parts that wrappers put anywhere in it."""
    for part in ANYWHERE:
        name = name.replace(part, "")
    return name


def refuse_adapter(names: Iterable[str], what: str) -> None:
    """Raise ConversionError where names are those of LoRA or another adapter."""
    for name in names:
        for part in name.split("."):
            if part.startswith(ADAPTER_STARTS) or part.endswith(ADAPTER_END):
                raise _adapter(what, f"its key {name}")


def refuse_adapter_folder(folder: Path) -> None:
    """Raise ConversionError for a folder of adapter files."""
    if not folder.is_dir():
        return
    found = sorted(path.name for pattern in ADAPTER_FILES for path in folder.glob(pattern))
    if found:
        raise _adapter(str(folder), f"its file {found[0]}")


def _adapter(what: str, sign: str) -> ConversionError:
    return ConversionError(
        f"{what} is an adapter (LoRA, peft), not a model: see {sign}. Merge it into its base model "
        "(peft: "
        "merge_and_unload; diffusers: fuse_lora), save that and convert it"
    )


def refuse_quantised(state: LazyTensors, what: str) -> None:
    """Raise ConversionError for fp8 tensors and for names that quantisation adds."""
    found = [
        f"{name} ({str(meta.dtype).removeprefix('torch.')})"
        for name, meta in state.meta.items()
        if meta.is_floating_point() and meta.itemsize < 2
    ]
    found += [name for name in state if name.endswith(QUANTISED_ENDS)]
    if found:
        raise quantised(what, found[0])
