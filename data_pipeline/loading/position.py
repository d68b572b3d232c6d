"""Checks the position of a loader in its data, as stored in a checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from landiff.configs.base import ConfigError

NOT_STORED = {"validation": ""}  # values of entries that a state may lack
_OTHER_CLIPS = "the columns reject other clips now; restore them, or start a new run"
_WAY_OUT = {
    "data": "point data.manifest at the data set that the run began with, or start a new run",
    "validation": "other clips are held out of training now; set data.validation back, or start a "
    "new run",
    "num_samples": _OTHER_CLIPS,
    "exclusions": _OTHER_CLIPS,
    "seed": "set data.seed back, or start a new run",
    "shuffle_window": "set data.shuffle_window back, or start a new run",
    "global_batch_size": "set data.global_batch_size back (ranks and micro-batches may change), or "
    "start a new run",
}


def check_position(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise ConfigError if the stored `state` belongs to another sample order than `identity`.

    States of runs without held-out clips have no entry "validation"; the identity has "" for it.
    """
    for name, value in identity.items():
        if state.get(name, NOT_STORED.get(name)) != value:
            raise ConfigError(
                f"the checkpoint's data order has {name} = {state.get(name)!r}, this run has "
                f"{value!r}; {_WAY_OUT[name]}"
            )
