"""Checks the position of a loader in its data, as stored in a checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import FORMAT_VERSION, Manifest, content_fingerprint
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.phases import BatchSizes, OrderPlan

_OTHER_CLIPS = "the columns reject other clips now, or the data set has changed; restore it"
_WAY_OUT = {
    "data": "point data.manifest at the data set that the run began with",
    "validation": "other clips are held out of training now; set data.validation back",
    "num_samples": _OTHER_CLIPS,
    "exclusions": _OTHER_CLIPS,
    "selection": "other clips meet data.where now; set data.where and data.blend back, and restore "
    "the columns of scores",
    "seed": "set data.seed back",
    "shuffle_window": "set data.shuffle_window back",
    "global_batch_size": "set data.global_batch_size back (ranks and micro-batches may change)",
    "ramp": "set data.ramp back",
    "buckets": "set data.buckets back",
    "batch_factors": "set data.balance_tokens and data.buckets back",
    "order_first_step": "set from_step of the phase back",
}
# Changes that a new phase allows, and the keys of `data` that it names.
_DATA_KEYS = ("manifest", "remote", "weight", "where", "blend", "buckets", "balance_tokens")
_PHASE_KEYS = {
    "data": _DATA_KEYS,
    "num_samples": _DATA_KEYS,
    "exclusions": _DATA_KEYS,
    "selection": _DATA_KEYS,
    "buckets": _DATA_KEYS,
    "batch_factors": _DATA_KEYS,
    "global_batch_size": ("global_batch_size", "ramp"),
    "ramp": ("global_batch_size", "ramp"),
}
# Entries that a state lacks if they have these values.
NOT_STORED = {
    "validation": "",
    "selection": "",
    "ramp": None,
    "order_first_step": None,
    "buckets": None,
    "batch_factors": None,
}


def phase_identity(config: DataConfig, plan: OrderPlan) -> dict[str, Any]:
    """What determines the order of samples in a phase, as far as its config tells."""
    return {
        "seed": config.seed,
        "shuffle_window": config.shuffle_window,
        "global_batch_size": config.global_batch_size,
        "ramp": config.ramp.model_dump() if config.ramp is not None else None,
        "order_first_step": plan.first_step or None,
        "buckets": list(config.buckets) if config.buckets is not None else None,
        "batch_factors": dict(plan.factors) or None,
    }


def data_fingerprint(manifests: Sequence[Manifest], config: DataConfig) -> str:
    """Identity of the data sets of a config and of their weights."""
    if len(manifests) == 1:
        return manifests[0].fingerprint
    parts = []
    for manifest, source in zip(manifests, config.sources, strict=True):
        parts.append((manifest.fingerprint, source.weight))
    return content_fingerprint(*parts)


def state_of(step: int, sizes: BatchSizes, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a loader before the batch of `step`."""
    state = {
        "format": FORMAT_VERSION,
        "step": step,
        "consumed_samples": sizes.samples_before(step),
        **identity,
    }
    for name, value in NOT_STORED.items():
        if state.get(name) == value:
            state.pop(name, None)
    return state


def step_of(state: Mapping[str, Any]) -> int:
    """The step before which `state` was taken. Raises ConfigError for a damaged state."""
    if "step" in state:
        return state["step"]
    # States from before there were phases and ramps.
    step, rest = divmod(state["consumed_samples"], state["global_batch_size"])
    if rest:
        raise ConfigError(
            f"consumed_samples = {state['consumed_samples']} is not a multiple of "
            f"data.global_batch_size = {state['global_batch_size']}; the checkpoint's loader state "
            "is damaged"
        )
    return step


def check_position(
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    config: DataConfig | None = None,
    step: int = 0,
) -> None:
    """Raise ConfigError if the stored `state` belongs to another sample order than `identity`.

    config: the data of the phase, and `step` that of the checkpoint. With them the message names
        the phase that would allow the change.
    """
    for name, value in identity.items():
        if state.get(name, NOT_STORED.get(name)) == value:
            continue
        text = (
            f"the checkpoint's data order has {name} = {state.get(name)!r}, this run has "
            f"{value!r}; {_WAY_OUT[name]}, or start a new run"
        )
        if config is not None and name in _PHASE_KEYS:
            text += phase_advice(config, _PHASE_KEYS[name], step)
        raise ConfigError(text)


def phase_advice(config: DataConfig, keys: tuple[str, ...], step: int) -> str:
    """End of a message: the entry of `phases` that changes `keys` from `step` on."""
    plain = config.model_dump(mode="json", include=set(keys), exclude_defaults=True)
    entry = {"from_step": step, "data": plain}
    text = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1000).strip()
    return (
        f". To continue this run with the change from step {step} on, append it as a phase, below "
        f"the earlier values of `data`: `phases: [{text}]`"
    )
