"""Text states: captions of similar length are encoded together, whatever the threads do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from landiff.data_pipeline.precompute import texts
from landiff.data_pipeline.precompute.clips import Clip
from landiff.data_pipeline.precompute.interface import ProducerContext
from landiff.data_pipeline.precompute.texts import ShardCaptions, TextProducer
from landiff.model_zoo import frozen
from tests.data_pipeline.data_sets import raw_sample
from tests.data_pipeline.precompute_data import config, write_clips

SENTENCE = "a small bird runs over the grass and looks at its long shadow on the wall"
WORDS = SENTENCE.split()
BATCH = 4


@pytest.fixture
def producer(tmp_path):
    write_clips(tmp_path / "data", [1])
    settings = config(tmp_path / "data", tmp_path, ["text-minilm"], batch_size=BATCH)
    column = settings.columns["text-minilm"]
    return TextProducer(column, frozen.build(column.encoder), ProducerContext.of(settings))


def clips_of(captions: list[str]) -> list[Clip]:
    return [
        Clip(number, f"clip{number}", raw_sample(f"clip{number}", caption=caption))
        for number, caption in enumerate(captions)
    ]


def encoded(captions: list[str], producer: TextProducer, threads: int) -> list[Tensor]:
    """States of the captions of a shard, encoded in batches by several threads."""
    encode = ShardCaptions(dict(enumerate(captions)), producer)
    clips = clips_of(captions)
    batches = [clips[start : start + BATCH] for start in range(0, len(clips), BATCH)]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda batch: encode(batch, {}), batches))
    return [state for batch in results for state in batch]


def test_captions_of_similar_length_are_encoded_together_and_give_their_own_states(
    producer, monkeypatch
):
    monkeypatch.setattr(texts, "CAPTIONS_SORTED", 16)
    captions = [" ".join(WORDS[: 1 + 5 * n % 13]) + f" {n % 29}" for n in range(40)]
    rows: list[tuple[int, int]] = []  # computed and needed ones of each batch

    def count(encoder, inputs, outputs):
        states_BLD, lengths_B = outputs
        rows.append((states_BLD.shape[0] * states_BLD.shape[1], int(lengths_B.sum())))

    producer.encoder.register_forward_hook(count)
    found = encoded(captions, producer, threads=1)
    computed = sum(row[0] for row in rows)
    needed = sum(row[1] for row in rows)
    assert len(rows) == 10  # of 40 captions
    assert computed < 1.15 * needed
    in_order = [producer.encoder.num_tokens(captions[i : i + BATCH]) for i in range(0, 40, BATCH)]
    assert sum(BATCH * max(lengths) for lengths in in_order) > 1.4 * needed
    for caption, states in zip(captions, found, strict=True):
        (alone,) = producer.states([caption])
        torch.testing.assert_close(states, alone, rtol=2**-7, atol=1e-2)
    for threads in (2, 5):
        again = encoded(captions, producer, threads)
        assert all(map(torch.equal, found, again))


def test_an_error_reaches_all_threads_that_wait_for_the_captions(producer, monkeypatch):
    monkeypatch.setattr(texts, "CAPTIONS_SORTED", 8)
    captions = [f"{' '.join(WORDS[: 1 + n % 8])}" for n in range(8)] * 4  # found by later batches
    both = threading.Barrier(2, timeout=60)

    def fail(encoder, inputs):
        both.wait()
        raise MemoryError(f"no memory for {len(inputs[0])} captions")

    producer.encoder.register_forward_pre_hook(fail)
    encode = ShardCaptions(dict(enumerate(captions)), producer)
    clips = clips_of(captions)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(encode, clips[n : n + BATCH], {}) for n in range(0, 32, BATCH)]
        for call in calls:
            with pytest.raises(MemoryError, match="no memory for 4 captions"):
                call.result(timeout=60)
