"""Whether the columns of a data set are there and were made by the expected encoders.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from landiff.data_pipeline.format.schema import Column, Manifest
from landiff.data_pipeline.format.shards import ShardError


def check_column_fingerprints(
    manifest: Manifest, columns: Sequence[str], *, adopt: bool = False
) -> None:
    """Raise ShardError unless every column exists and belongs to the manifest's raw shards."""
    absent = [name for name in columns if name not in manifest.columns]
    if absent:
        raise ShardError(
            f"the data set has no column {', '.join(map(repr, absent))}; it has: "
            f"{', '.join(sorted(manifest.columns)) or 'none'}. Run `landiff "
            "precompute` with it in `columns`, "
            "then `landiff precompute finalize`"
        )
    for name in columns:
        column = manifest.columns[name]
        if [s.name for s in column.shards] != [s.name for s in manifest.shards]:
            raise ShardError(
                f"column {name!r} has {len(column.shards)} shards, the raw data {len(manifest.shards)}, or under "
                "other names; run `landiff precompute` again"
            )
        if column.raw_fingerprint not in ("", manifest.fingerprint) and not adopt:
            raise ShardError(
                f"column {name!r} was made from raw shards {column.raw_fingerprint}, the data set now is "
                f"{manifest.fingerprint}; run `landiff precompute` again, or set data.adopt=true to take it as it is"
            )


def encoders(column: Column) -> Mapping[str, str]:
    """{name: fingerprint} of the encoders that made a column."""
    return column.config.get("encoders", {})


def require_encoder(
    manifest: Manifest, column: str, fingerprint: str, what: str, *, adopt: bool = False
) -> None:
    """Raise ShardError unless `column` was made by the encoder `fingerprint` (with others, perhaps).

    `what` names that encoder as the user knows it, e.g. "model.tokenizer = tokenizer@3f2a...".
    """
    check_column_fingerprints(manifest, [column], adopt=adopt)
    made_by = encoders(manifest.columns[column])
    if fingerprint not in made_by.values() and not adopt:
        known = (
            ", ".join(f"{name} {mark}" for name, mark in made_by.items())
            or manifest.columns[column].encoder
        )
        raise ShardError(
            f"column {column!r} was made by {known}, but {what} is {fingerprint}; run `landiff precompute` with "
            "it, or set data.adopt=true to take the column as it is"
        )


def check_blend(manifests: Sequence[Manifest], columns: Sequence[str]) -> None:
    """Raise ShardError where the data sets of a blend have columns of different encoders."""
    for number, manifest in enumerate(manifests[1:]):
        for name in columns:
            first, other = manifests[0].columns[name], manifest.columns[name]
            if first.fingerprint != other.fingerprint:
                raise ShardError(
                    f"data.blend.{number}: its column {name!r} was made by {other.encoder} "
                    "(fingerprint "
                    f"{other.fingerprint}), that of the first data set by {first.encoder} "
                    "(fingerprint "
                    f"{first.fingerprint}); run `landiff precompute` with one of them on both, or "
                    "set "
                    "data.adopt=true to mix them"
                )
