"""A real data set on disk for the LM: shards whose tokens follow from the text."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.model_zoo import keyed_random
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.token_layout import TokenLayout
from tests.data_pipeline.data_sets import write_column, write_raw
from tests.training import mixed

NUM_TOPICS = 6


def topic(key: str) -> int:
    return int(hashlib.sha1(key.encode()).hexdigest(), 16) % NUM_TOPICS


def write_data_set(
    data: Path,
    config: LMConfig,
    sizes: list[int],
    num_frames: int,
    *,
    bad: str = "",
    source: str = "raw",
) -> Manifest:
    """Write tokens and text states. That of clip `bad` is not finite.

    Tokens: a sequence of the clip's topic, one code in five random. Text: 3 to 8 rows around the
    topic's direction.
    """
    layout = TokenLayout.of(config)
    count = layout.num_codes(num_frames)

    def tokens(key: str) -> Tensor:
        own = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16)
        draw = keyed_random.generator(0, "test-tokens", own)
        plain = torch.randint(
            0,
            layout.codebook_size,
            (count,),
            generator=keyed_random.generator(0, "test-topic", topic(key)),
        )
        noise = torch.randint(0, layout.codebook_size, (count,), generator=draw)
        return torch.where(torch.rand(count, generator=draw) < 0.2, noise, plain).to(torch.uint16)

    def text(key: str) -> Tensor:
        own = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16)
        draw = keyed_random.generator(0, "test-text", own)
        direction = torch.randn(
            config.text_dim, generator=keyed_random.generator(0, "test-direction", topic(key))
        )
        noise = 0.5 * torch.randn(3 + own % 6, config.text_dim, generator=draw)
        found = (direction + noise).to(torch.bfloat16)
        return found * math.nan if key == bad else found

    def meta(key: str) -> dict[str, object]:
        return {"source": f"{source} {key}", "source_sha256": f"{source} {key}"}

    write_raw(data, sizes, source, meta)
    write_column(data, "tokens", value=tokens)
    write_column(data, "text-minilm", value=text)
    manifest = read_manifest(data)
    shapes = {"tokens": [count], "text-minilm": [0, config.text_dim]}
    columns = {
        name: column.model_copy(update={"shape": shapes[name]})
        for name, column in manifest.columns.items()
    }
    manifest = manifest.model_copy(update={"columns": columns})
    write_manifest(data, manifest)
    return manifest


def write_mixed_data(folder: Path, config: LMConfig, bad: str = "") -> Path:
    """Images and videos in two sizes with tokens and text states. Those of `bad` are not finite."""
    columns = {
        "tokens": mixed.tokens(TokenLayout.of(config)),
        "text-minilm": mixed.text(3, config.text_dim),
    }
    return mixed.write_mixed(folder, columns, bad)
