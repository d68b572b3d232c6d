"""`landiff evaluate` warns about text columns whose captions were cut."""

import logging
from pathlib import Path

from landiff.data_pipeline.format.schema import Column, Manifest, ShardEntry
from landiff.launchers.config import EvaluateConfig
from landiff.launchers.results.evaluate import warn_of_cut_captions


def test_a_column_with_cut_captions_is_named_with_their_number(caplog):
    shard = ShardEntry(name="000000", samples=9, bytes=0, sha256="")
    columns = {}
    for name, truncated in (("text-a", 4), ("text-b", 0)):
        columns[name] = Column(
            dtype="bfloat16",
            shape=[0, 8],
            encoder="minilm",
            fingerprint=name,
            config={},
            truncated=truncated,
            shards=[shard],
        )
    manifest = Manifest(fingerprint="m", config={}, shards=[shard], columns=columns)
    config = EvaluateConfig.model_construct(
        data=Path("data"), lm_text_column="text-a", diffusion_text_column="text-b"
    )
    with caplog.at_level(logging.WARNING):
        warn_of_cut_captions(manifest, config)
    [record] = caplog.records
    expected = "column text-a: 4 of 9 captions are longer than text encoder minilm takes"
    assert expected in record.getMessage()
