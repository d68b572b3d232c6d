"""Description of a LoRA adapter. Torch-free.

An adapter adds `alpha / rank * B A` to some matrices of a base model, which stays unchanged. It
belongs to one base only, which is known by the fingerprint of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from landiff.configs.base import Config, ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import read_json_as

ADAPTER = "lora.json"  # in a checkpoint of a run that trains an adapter
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of all names in PEFT_WEIGHTS

BaseKind = Literal["lm", "transformer", "diffusion"]

# Kind of the base -> where the adapted blocks are. An adapter of a whole diffusion model changes
# the control branch. That of its main transformer is an adapter of kind "transformer".
BLOCKS: dict[BaseKind, str] = {
    "lm": "blocks",
    "transformer": "blocks",
    "diffusion": "control.blocks",
}


def target_pattern(base_kind: BaseKind, targets: Sequence[str]) -> str:
    """Regular expression of the names of the layers `targets` in the adapted blocks."""
    blocks = BLOCKS[base_kind].replace(".", r"\.")
    return rf"{blocks}\.\d+\.({'|'.join(sorted(targets))})"


class AdapterConfig(Config):
    """What an adapter changes, and of which base model."""

    base_kind: BaseKind = Field(
        description="Kind of the base: lm, transformer, or diffusion for its control branch."
    )
    base: str = Field(description="Fingerprint of the weights of the base, 16 hex digits.")
    rank: PositiveInt = Field(description="Rank of the update of each matrix.")
    alpha: PositiveFloat = Field(description="The update is scaled by `alpha / rank`.")
    targets: tuple[str, ...] = Field(
        description="Names of the linear layers of each block that are adapted."
    )

    @property
    def scaling(self) -> float:
        """Factor of the product B A."""
        return self.alpha / self.rank

    @property
    def target_pattern(self) -> str:
        """Regular expression of the names of the changed layers, as peft takes it."""
        return target_pattern(self.base_kind, self.targets)

    def peft_document(self) -> dict[str, Any]:
        """The content of peft's adapter_config.json."""
        return {
            "base_model_name_or_path": f"{self.base_kind}@{self.base}",
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": self.target_pattern,
            "task_type": None,
        }

    def write(self, folder: Path) -> None:
        """Write the description into a checkpoint folder."""
        write_text(folder / ADAPTER, self.model_dump_json(indent=1))


def read_adapter(folder: Path) -> AdapterConfig | None:
    """The adapter that a checkpoint holds, or None for whole weights. Raises ConfigError."""
    if not (folder / ADAPTER).is_file():
        return None
    return read_json_as(AdapterConfig, folder / ADAPTER)


def require_same_adapter(folder: Path, own: AdapterConfig | None) -> None:
    """Raise ConfigError unless a checkpoint holds the adapter that a run trains.

    `own`: None if the run trains whole weights.
    """
    stored = read_adapter(folder)
    if stored == own:
        return
    if stored is None or own is None:
        found = "whole weights" if stored is None else "a LoRA adapter"
        raise ConfigError(
            f"{folder} holds {found}, unlike this run (lora = "
            f"{'null' if own is None else 'set'}); choose another run folder (run=...)"
        )
    if stored.base != own.base:
        raise ConfigError(
            f"{folder} holds an adapter of the {stored.base_kind} with fingerprint {stored.base}, "
            f"and init_from now names {own.base}; set init_from=NAME@FINGERPRINT to the entry that "
            "the run started from"
        )
    raise ConfigError(
        f"{folder} holds another adapter ({stored.rank = }, {stored.alpha = }, {stored.targets = })"
        "; restore lora, or choose another run folder (run=...)"
    )


def require_base(reference: str, adapter: AdapterConfig, found: str, what: str) -> None:
    """Raise ConfigError unless the base of an adapter has the fingerprint `found`.

    `reference`, `what`: the adapter and the base as messages call them.
    """
    if found != adapter.base:
        raise ConfigError(
            f"{reference} is an adapter of the {adapter.base_kind} with fingerprint "
            f"{adapter.base}, and {what} holds the weights {found}; name the base that it was "
            "trained on, in the dtype that it had then"
        )


def adapts(adapter: AdapterConfig, kind: str) -> bool:
    """Whether an adapter changes models of a kind. A diffusion model holds a main transformer."""
    return kind == adapter.base_kind or (kind, adapter.base_kind) == ("diffusion", "transformer")


class AdapterUse(Config):
    """An adapter of the zoo, added to its base model."""

    adapter: str = Field(description="Zoo reference of an adapter: name, name@fingerprint or path.")
    scale: float = Field(
        default=1.0,
        description=(
            "Factor by which the adapter's update is multiplied. 0 leaves the base unchanged."
        ),
    )
