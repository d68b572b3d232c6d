"""Replacement of dead codes without reads on the host equals the library's."""

from __future__ import annotations

import copy

import pytest
import torch

from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.tokenizer.sampling import KeyedSampling
from tests.training.tokenizer.tiny import MODEL
from tests.training.toy import alone

CODES = MODEL.codebook_size


@pytest.mark.parametrize("dead", [0, 1, 5, CODES])
@pytest.mark.parametrize("vectors_per_clip", [1, 4, 20])  # of 2 clips: also fewer than dead codes
def test_dead_codes_become_the_vectors_that_the_library_would_take(dead, vectors_per_clip):
    generator = torch.Generator().manual_seed(dead)
    tokenizer = SemanticTokenizer(MODEL).train()
    codebook = tokenizer.quantizer._codebook
    codebook.cluster_size[0] = 10.0
    codebook.cluster_size[0, torch.randperm(CODES, generator=generator)[:dead]] = 0.5
    codebook.embed.normal_(generator=generator)
    codebook.embed_avg.normal_(generator=generator)
    theirs = copy.deepcopy(codebook)
    vectors_1ME = torch.randn(1, 2 * vectors_per_clip, MODEL.codebook_dim, generator=generator)

    sampling = KeyedSampling(7, alone())
    sampling.install(tokenizer)
    sampling.begin_step(3, [[0, 1]])
    sampling.place(0)
    codebook.expire_codes_(vectors_1ME)
    theirs.replace_sample_fn = sampling._sampler("dead codes")
    theirs.expire_codes_(vectors_1ME)

    for name, buffer in theirs.named_buffers():
        assert torch.equal(dict(codebook.named_buffers())[name], buffer), name
    assert (codebook.cluster_size == codebook.reset_cluster_size).sum() == dead
