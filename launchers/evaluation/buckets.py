"""Clip shapes that `landiff evaluate` measures. Torch-free."""

from __future__ import annotations

from landiff.configs import ConfigError
from landiff.data_pipeline.format.buckets import bucket_names
from landiff.data_pipeline.format.schema import Manifest
from landiff.launchers.config import EvaluateConfig


def evaluate_columns(config: EvaluateConfig) -> list[str]:
    """Columns that `landiff evaluate` reads."""
    return ["tokens", "latents", config.lm_text_column, config.diffusion_text_column]


def evaluated_buckets(config: EvaluateConfig, manifest: Manifest) -> list[str | None]:
    """Buckets that are evaluated, each by itself. None: all clips of data of one shape.

    Raises ConfigError for `buckets` that the data do not have, and for a bucket of fewer than two
    clips.
    """
    counts = _clips_by_bucket(manifest, evaluate_columns(config))
    if config.buckets is None and len(counts) < 2:
        return [None]
    names = list(counts) if config.buckets is None else list(config.buckets)
    shown = ", ".join(name or "one that the manifest does not name" for name in counts)
    for name in names:
        if name not in counts:
            raise ConfigError(
                f"buckets: no clip of {config.data} has the shape {name} and all columns; those "
                f"with all columns have {shown or 'none'}"
            )
        if not name or counts[name] < 2:
            raise ConfigError(
                f"data = {config.data} holds {counts[name]} clip(s) of the shape "
                f"{name or 'that the manifest does not name'}, which cannot be evaluated: a wrong "
                "condition is that of another clip of the same shape. Set `buckets` to others of "
                f"its shapes: {shown}"
            )
    return list(names)


def _clips_by_bucket(manifest: Manifest, columns: list[str]) -> dict[str, int]:
    """Clips of each bucket that may have all columns, in the order of the shards."""
    counts: dict[str, int] = {}
    for number, name in enumerate(bucket_names(manifest)):
        found = [manifest.columns[column].shards[number].samples for column in columns]
        if min(found):
            counts[name] = counts.get(name, 0) + min(found)
    return counts
