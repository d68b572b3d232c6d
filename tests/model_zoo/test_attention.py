"""Attention against the formula written out in float64."""

import math

import pytest
import torch

from landiff.model_zoo.attention import attention, attention_varlen


def rows(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(3)]


def formula(q, k, v, mask, scale=None):
    """softmax(q k^T * scale) v in float64; mask [.., queries, keys], true = may attend."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2)


def triangle(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_formula(causal, scale):
    q, k, v = rows(2, 7, 3, 8)
    mask = triangle(7, 7) if causal else torch.ones(7, 7, dtype=torch.bool)
    torch.testing.assert_close(
        attention(q, k, v, causal=causal, scale=scale).double(),
        formula(q, k, v, mask, scale),
        atol=1e-6,
        rtol=0,
    )  # float32 rounding


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_causal_queries_are_the_last_positions(queries):
    q, k, v = rows(2, 7, 3, 8)
    whole = attention(q, k, v, causal=True)
    torch.testing.assert_close(
        attention(q[:, -queries:], k, v, causal=True), whole[:, -queries:], atol=1e-6, rtol=0
    )


def test_a_mask_says_who_may_attend():
    q, k, v = rows(2, 5, 3, 8)
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(
        attention(q, k, v, mask=mask).double(), formula(q, k, v, mask), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_see_each_other(causal):
    q, k, v = rows(9, 3, 8)
    ends = [0, 4, 4, 5, 9]  # an empty one too
    packed = attention_varlen(q, k, v, torch.tensor(ends, dtype=torch.int32), 4, causal=causal)
    alone = [
        attention(q[None, a:b], k[None, a:b], v[None, a:b], causal=causal)[0]
        for a, b in [(0, 4), (4, 5), (5, 9)]
    ]
    assert torch.equal(packed, torch.cat(alone))


def test_packed_gradients_equal_those_of_a_block_diagonal_mask():
    q, k, v = rows(9, 3, 8)
    grown = torch.randn(9, 3, 8, generator=torch.Generator().manual_seed(2))
    of = torch.tensor([0] * 4 + [1] * 5)
    block = (of[:, None] == of[None]) & triangle(9, 9)
    found = []
    for run in (
        lambda a, b, c: attention_varlen(
            a, b, c, torch.tensor([0, 4, 9], dtype=torch.int32), 5, causal=True
        ),
        lambda a, b, c: attention(a[None], b[None], c[None], mask=block)[0],
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad((run(*leaves) * grown).sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)  # another order of float32 sums


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_equals_sdpa(dtype):
    """Needs flash-attn (extra `gpu`). Both round the output to `dtype`; sums are float32."""
    import flash_attn

    from landiff.model_zoo.attention import _flash_attn_for

    q, k, v = (x.cuda() for x in rows(2, 130, 4, 64, dtype=dtype))
    assert _flash_attn_for(q) is flash_attn
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for queries in (1, 5, 130):
        mask = triangle(queries, 130).cuda()
        found = attention(q[:, -queries:], k, v, causal=True)
        torch.testing.assert_close(
            found, attention(q[:, -queries:], k, v, mask=mask), atol=tolerance, rtol=0
        )
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, 100, 130, 260], dtype=torch.int32, device="cuda")
    packed = attention_varlen(*flat, ends, 130, causal=True)
    of = torch.repeat_interleave(torch.arange(3, device="cuda"), ends.diff())
    block = (of[:, None] == of[None]) & triangle(260, 260).cuda()
    torch.testing.assert_close(
        packed, attention(*(x[None] for x in flat), mask=block)[0], atol=tolerance, rtol=0
    )
