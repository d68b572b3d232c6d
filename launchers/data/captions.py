"""The command `landiff captions`: writes columns of captions and describes them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from landiff.configs import ConfigError, load
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.precompute.config import CaptionsColumn, PrecomputeConfig
from landiff.launchers.data.commands import precompute_command

MAX_CLIPS = 20_000  # whose captions are counted, spread over all shards
COMMON = 3  # captions that occur most often


def captions_command(args: argparse.Namespace) -> int:
    """Writes captions, or does what `landiff precompute` does with them. Returns the exit code.

    Raises ConfigError if the config has no column of captions.
    """
    config = load(PrecomputeConfig, args.config, args.overrides)
    names = [name for name, column in config.columns.items() if isinstance(column, CaptionsColumn)]
    if not names:
        raise ConfigError(
            f"--config {args.config} has no column of captions, only {', '.join(config.columns)}. "
            "Captions come from a vision-language model (columns.captions-NAME.encoder.kind = vlm) "
            "or from a file (kind = file), see docs/captions.md. Without either, "
            "`landiff shards missing_captions=file_name` takes file names, folder_name takes "
            "folders, and none trains without text"
        )
    if args.action != "stats":
        return precompute_command(args)
    for name in names:
        print("\n".join(caption_statistics(config.data, name)))
    return 0


def caption_statistics(data: Path, name: str) -> list[str]:
    """Lines about the captions of a finished column. Raises ShardError if it is not finished."""
    from landiff.data_pipeline.format.column_checks import check_column_fingerprints
    from landiff.data_pipeline.format.shards import read_manifest

    manifest = read_manifest(data)
    check_column_fingerprints(manifest, [name])
    captions = read_column(data, name, manifest)
    missing = sum(len(shard.missing) for shard in manifest.columns[name].shards)
    lines = [f"{name}: {len(captions)} clips read; {missing} clips have no caption"]
    for number in range(max((len(texts) for texts in captions), default=0)):
        texts = [own[number] for own in captions if len(own) > number]
        lines += describe(number, texts)
    return lines


def describe(number: int, texts: Sequence[str]) -> list[str]:
    """Lines about the captions of one number, those of one prompt for instance."""
    words = sorted(len(text.split()) for text in texts)
    counts = Counter(texts)
    lines = [
        f"  caption {number}: {len(texts)} clips, words: {words[0]} to {words[-1]}, median "
        f"{words[len(words) // 2]}; {len(counts)} different "
        f"({len(counts) / len(texts):.0%})"
    ]
    for text, count in counts.most_common(COMMON):
        if count > 1:
            lines.append(f"    {count} times: {text[:120]}")
    return lines


def read_column(
    data: Path, name: str, manifest: Manifest, limit: int = MAX_CLIPS
) -> list[list[str]]:
    """Captions of at most `limit` clips that are evenly spread over the shards."""
    from landiff.data_pipeline.format.columns import FolderReader
    from landiff.data_pipeline.precompute.captions import PART, unpack_captions

    shards = manifest.columns[name].shards
    total = sum(shard.samples for shard in shards)
    every = max(1, -(-total // limit))
    reader = FolderReader(data, name, PART, shards, keep=1)
    captions = []
    for shard, entry in enumerate(shards):
        for slot in range(0, entry.samples, every):
            captions.append(unpack_captions(reader.read_tensor(shard, slot)))
    reader.close()
    return captions
