"""Weights as other tools save them: prefixes of wrappers, adapters and quantised weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from landiff.model_zoo.convert.lazy import LazyTensors, quantised_error
from landiff.model_zoo.convert.rules import ConversionError

# DDP adds this before every name.
LEADING_PREFIXES = ("module.",)
# torch.compile, FSDP and activation checkpointing add these anywhere in a name.
INNER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# Names of LoRA and other adapters have a dotted part that starts or ends like this.
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


def without_wrappers(state: LazyTensors, what: str) -> LazyTensors:
    """`state` with the prefixes of DDP, torch.compile, FSDP and checkpointing removed.

    Raises ConversionError for adapters, quantised weights and names that become equal.
    """
    refuse_adapter(state, what)
    refuse_quantised(state, what)
    new_names = {name: unwrapped_name(name) for name in state}
    for prefix in LEADING_PREFIXES:
        while new_names and all(name.startswith(prefix) for name in new_names.values()):
            new_names = {old: new.removeprefix(prefix) for old, new in new_names.items()}
    if all(old == new for old, new in new_names.items()):
        return state
    if len(set(new_names.values())) < len(new_names):
        duplicates = [old for old, new in new_names.items() if old != new and new in new_names]
        examples = ", ".join(sorted(duplicates)[:3])
        raise ConversionError(
            f"{what} holds weights with and without the prefix of a wrapper, such as {examples}; "
            "save the state of one model"
        )
    return state.renamed(new_names.__getitem__)


def unwrapped_name(name: str) -> str:
    """A name without the prefixes that wrappers add anywhere in it."""
    for prefix in INNER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def refuse_adapter(names: Iterable[str], what: str) -> None:
    """Raise ConversionError if names belong to LoRA or another adapter."""
    for name in names:
        for part in name.split("."):
            if part.startswith(ADAPTER_STARTS) or part.endswith(ADAPTER_END):
                raise _adapter_error(what, f"its key {name}")


def refuse_adapter_folder(folder: Path) -> None:
    """Raise ConversionError for a folder that holds files of an adapter."""
    if not folder.is_dir():
        return
    found: list[str] = []
    for pattern in ADAPTER_FILES:
        found += [path.name for path in folder.glob(pattern)]
    if found:
        raise _adapter_error(str(folder), f"its file {min(found)}")


def _adapter_error(what: str, evidence: str) -> ConversionError:
    return ConversionError(
        f"{what} is an adapter (LoRA, peft), not a model: see {evidence}. Merge it into its base "
        "model (peft: merge_and_unload; diffusers: fuse_lora), save that and convert it"
    )


def refuse_quantised(state: LazyTensors, what: str) -> None:
    """Raise ConversionError for fp8 tensors and for names that quantisation adds."""
    found = []
    for name, meta in state.meta.items():
        if meta.is_floating_point() and meta.itemsize < 2:
            found.append(f"{name} ({str(meta.dtype).removeprefix('torch.')})")
    found += [name for name in state if name.endswith(QUANTISED_ENDS)]
    if found:
        raise quantised_error(what, found[0])
