"""Checks that columns exist and were computed by the expected encoders. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import Column, Manifest, column_stem
from landiff.data_pipeline.format.shards import ShardError


def check_column_fingerprints(
    manifest: Manifest, columns: Sequence[str], *, adopt: bool = False
) -> None:
    """Raise ShardError unless every column exists and belongs to the raw shards of the manifest.

    With `adopt`, the fingerprint of the raw shards may differ.
    """
    absent = [name for name in columns if name not in manifest.columns]
    if absent:
        wanted = ", ".join(map(repr, absent))
        available = ", ".join(sorted(manifest.columns)) or "none"
        raise ShardError(
            f"the data set has no column {wanted}; it has: {available}. Run `landiff precompute` "
            "with it in `columns`, then `landiff precompute finalize`"
        )
    for name in columns:
        column = manifest.columns[name]
        if [shard.name for shard in column.shards] != [shard.name for shard in manifest.shards]:
            raise ShardError(
                f"column {name!r} has {len(column.shards)} shards, the raw data "
                f"{len(manifest.shards)}, or under other names; run `landiff precompute` again"
            )
        if column.raw_fingerprint not in ("", manifest.fingerprint) and not adopt:
            raise ShardError(
                f"column {name!r} was made from raw shards {column.raw_fingerprint}, the data set "
                f"now is {manifest.fingerprint}; run `landiff precompute` again, or set "
                "data.adopt=true to use it anyway"
            )


def encoders(column: Column) -> Mapping[str, str]:
    """Fingerprints of the encoders that computed a column, by name."""
    return column.config.get("encoders", {})


def require_encoder(
    manifest: Manifest, column: str, fingerprint: str, what: str, *, adopt: bool = False
) -> None:
    """Raise ShardError unless the encoder `fingerprint` computed `column`, alone or with others.

    `what` describes that encoder for the user, e.g. "model.tokenizer = tokenizer@3f2a...".
    """
    check_column_fingerprints(manifest, [column], adopt=adopt)
    made_by = encoders(manifest.columns[column])
    if fingerprint in made_by.values() or adopt:
        return
    known = ", ".join(f"{name} {its_fingerprint}" for name, its_fingerprint in made_by.items())
    raise ShardError(
        f"column {column!r} was made by {known or manifest.columns[column].encoder}, but {what} is "
        f"{fingerprint}; run `landiff precompute` with it, or set data.adopt=true to use the "
        "column anyway"
    )


def check_blend(
    manifests: Sequence[Manifest], columns: Sequence[str], key: str | None = None
) -> None:
    """Raise ShardError if the data sets of a blend have columns of different encoders.

    `key`: config key of the second data set. None for entries of data.blend.
    """
    for number, manifest in enumerate(manifests[1:]):
        for name in columns:
            first = manifests[0].columns[name]
            other = manifest.columns[name]
            if first.fingerprint != other.fingerprint:
                where = key or f"data.blend.{number}"
                raise ShardError(
                    f"{where}: its column {name!r} was made by {other.encoder} "
                    f"(fingerprint {other.fingerprint}), that of the first data set by "
                    f"{first.encoder} (fingerprint {first.fingerprint}); run `landiff precompute` "
                    "with one of them on both, or set data.adopt=true to mix them"
                )


def main_caption(captions: Mapping[str, float], columns: Sequence[str]) -> str:
    """The column of `data.captions` that a trainer reads. Raises ConfigError."""
    texts = [name for name in columns if column_stem(name) == "text"]
    found = [name for name in texts if name in captions]
    if len(found) == 1:
        return found[0]
    given = ", ".join(captions)
    raise ConfigError(
        f"data.captions names {given}, and this trainer reads {', '.join(texts) or 'no text'}: "
        "name exactly one of its text columns there, and columns of other captions of the same "
        "clips beside it"
    )


def check_captions(
    manifest: Manifest, captions: Mapping[str, float], columns: Sequence[str], *, adopt: bool
) -> None:
    """Raise ConfigError unless the columns of `data.captions` exist and have one encoder."""
    main = main_caption(captions, columns)
    check_column_fingerprints(manifest, list(captions), adopt=adopt)
    expected = encoders(manifest.columns[main])
    for name in captions:
        if encoders(manifest.columns[name]) != expected and not adopt:
            raise ConfigError(
                f"data.captions.{name} was made by {dict(encoders(manifest.columns[name]))}, "
                f"{main} by {dict(expected)}; captions of one run need the same text encoder"
            )


def with_captions(columns: Sequence[str], captions: Mapping[str, float] | None) -> list[str]:
    """The columns that a loader reads: those of the trainer, then those of other captions."""
    return [*columns, *sorted(set(captions or ()) - set(columns))]
