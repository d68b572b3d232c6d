"""Attention against the formula written out in float64, and the choice of its kernel."""

import importlib
import logging
import math
import sys

import pytest
import torch

from landiff.model_zoo.attention import (
    BACKENDS,
    PREFERENCES,
    Case,
    attention,
    attention_varlen,
    choose,
    find_installed,
)


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


def test_neighbours_of_equal_length_are_bit_equal_to_single_calls():
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.requires_grad_() for x in rows(26, 2, 16, dtype=dtype)]
        grown = rows(26, 2, 16, seed=1, dtype=dtype)[0]
        ends = torch.tensor([0, 7, 14, 19, 26], dtype=torch.int32)  # lengths 7, 7, 5, 7
        packed = attention_varlen(*leaves, ends, 7, causal=True)
        single = []
        for start, end in ((0, 7), (7, 14), (14, 19), (19, 26)):
            single.append(attention(*(x[None, start:end] for x in leaves), causal=True)[0])
        single = torch.cat(single)
        assert torch.equal(packed, single)
        found, expected = (torch.autograd.grad(x, leaves, grown) for x in (packed, single))
        assert all(map(torch.equal, found, expected))


H100 = Case(architecture=9, head_dim=64, length=17_776, causal=False, dtype=torch.bfloat16)


def case(**changes) -> Case:
    return Case(**{**vars(H100), **changes})


@pytest.mark.parametrize(
    ("changes", "installed", "expected"),
    [
        ({}, BACKENDS, "flash-3"),
        ({}, ("flash-2", "cudnn", "torch"), "cudnn"),
        ({"deterministic": True}, ("flash-2", "cudnn", "torch"), "flash-2"),
        ({"packed": True}, ("flash-2", "cudnn", "torch"), "flash-2"),
        ({"packed": True}, ("cudnn", "torch"), "torch"),
        ({"length": 1}, BACKENDS, "flash-2"),
        ({"architecture": 8}, BACKENDS, "flash-2"),
        ({"architecture": 10}, BACKENDS, "flash-4"),
        ({"architecture": 10, "head_dim": 192}, BACKENDS, "flash-2"),
        ({"architecture": 7}, BACKENDS, "torch"),
        ({"head_dim": 20}, BACKENDS, "torch"),  # the kernels take multiples of 8
    ],
)
def test_the_table_decides_which_kernel_computes_a_case(changes, installed, expected):
    assert choose(case(**changes), installed) == expected


def test_a_preferred_kernel_comes_first_where_it_applies():
    assert choose(H100, BACKENDS, "cudnn") == "cudnn"
    assert choose(case(packed=True), BACKENDS, "cudnn") == "flash-3"
    assert choose(H100, ("torch",), "cudnn") == "torch"


def test_every_case_has_a_row():
    assert PREFERENCES[-1].fits(case(architecture=12, head_dim=8, length=1))


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(tmp_path, monkeypatch):
    """Its package has a folder `flash_attn` without a module of its own."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert find_installed.__wrapped__() == {"flash-4", "cudnn", "torch"}
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


def test_the_chosen_kernel_is_named_in_the_log_and_one_that_fails_is_left(caplog, monkeypatch):
    from landiff.model_zoo import attention as module

    monkeypatch.setattr(module, "find_installed", lambda: frozenset({"flash-3", "cudnn", "torch"}))
    choices = module._Choices()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert choices.of(H100) == "cudnn"  # flash_attn_interface cannot be imported here
        assert choices.of(H100) == "cudnn"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("attention kernel flash-3 cannot be used")
    assert messages[1].startswith("attention kernel cudnn for Case(architecture=9")


class _Chosen:
    """Choices that are always the same, of cases that are kept."""

    def __init__(self, backend):
        self.backend = backend
        self.cases = []
        self.flash_2 = {"flash_attn_func": flash_attn_func}

    def of(self, case):
        self.cases.append(case)
        return self.backend


def flash_attn_func(q, k, v, softmax_scale, causal, deterministic):
    parts = [x.transpose(1, 2) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal)
    return out.transpose(1, 2)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Lets `attention` choose kernels for half precision on the CPU, as on an H100."""
    from landiff.model_zoo import attention as module

    def choose_always(backend):
        chosen = _Chosen(backend)
        monkeypatch.setattr(module, "_CHOICES", chosen)
        return chosen

    monkeypatch.setattr(module, "_has_choice", lambda q: q.dtype in module.FLASH_DTYPES)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return choose_always


@pytest.mark.parametrize("backend", ["torch", "flash-2"])
def test_compiled_attention_is_one_graph_for_sequences_of_any_length(backend, as_on_cuda):
    """As in compiled blocks on CUDA, with clips of several shapes."""
    chosen = as_on_cuda(backend)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    for length in (8, 12, 520, 600):
        q, k, v = rows(1, length, 2, 16, dtype=torch.bfloat16)
        assert torch.equal(compiled(q, k, v), attention(q, k, v)), length
    assert {case.length for case in chosen.cases} == {0, 512}  # not one case for each length


def test_rows_are_packed_without_torchs_kernel_on_gpus_that_lack_it(as_on_cuda, monkeypatch):
    as_on_cuda("torch")
    q, k, v = rows(9, 3, 16, dtype=torch.bfloat16)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = attention_varlen(q, k, v, ends, 5, causal=True)
    whole = [
        attention(*(x[None, a:b] for x in (q, k, v)), causal=True)[0] for a, b in ((0, 4), (4, 9))
    ]
    assert torch.equal(found, torch.cat(whole))


def test_another_preference_restores_torchs_own_kernel(monkeypatch, no_preference):
    from landiff.model_zoo import attention as module

    active = ["FA3"]
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: (active or [None])[0])
    monkeypatch.setattr(module, "restore_flash_attention_impl", active.clear)
    module.prefer("torch")
    assert not active


@pytest.fixture
def no_preference():
    from landiff.model_zoo.attention import prefer

    yield
    prefer(None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", sorted(find_installed()))
@pytest.mark.parametrize("packed", [False, True])
def test_every_installed_kernel_equals_the_formula(backend, packed, no_preference):
    """bfloat16 rounds the output and its gradients to 8 bits; sums are float32."""
    from landiff.model_zoo.attention import prefer

    prefer(backend)
    leaves = [x.cuda().requires_grad_() for x in rows(2, 640, 4, 64, dtype=torch.bfloat16)]
    mask = triangle(640, 640)
    if packed:
        ends = torch.tensor([0, 640, 1280], dtype=torch.int32, device="cuda")
        flat = [x.flatten(0, 1) for x in leaves]
        found = attention_varlen(*flat, ends, 640, causal=True).unflatten(0, (2, 640))
    else:
        found = attention(*leaves, causal=True)
    expected = formula(*(x.detach().cpu() for x in leaves), mask)
    torch.testing.assert_close(found.double().cpu(), expected, atol=2e-2, rtol=0)
    found.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_equals_sdpa(dtype, no_preference):
    """Needs flash-attn (extra `gpu`). Both round the output to `dtype`; sums are float32."""
    from landiff.model_zoo.attention import prefer

    assert "flash-2" in find_installed()
    prefer("flash-2")
    q, k, v = (x.cuda() for x in rows(2, 130, 4, 64, dtype=dtype))
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


def test_sequences_of_a_row_may_have_fewer_queries_than_keys():
    """As of a row of which a rank has the end of one sequence and the begin of the next."""
    generator = torch.Generator().manual_seed(5)
    keys, queries = [9, 4, 6, 6], [5, 4, 2, 2]
    q = torch.randn(sum(queries), 2, 8, generator=generator, requires_grad=True)
    k, v = torch.randn(2, sum(keys), 2, 8, generator=generator, requires_grad=True).unbind()
    ends = []
    for lengths in (queries, keys):
        ends.append(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))
    packed = attention_varlen(q, k, v, ends[0], 9, causal=True, cu_seqlens_k=ends[1])
    alone = []
    for parts in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        alone.append(attention(*[part[None] for part in parts], causal=True)[0])
    expected = torch.cat(alone)
    torch.testing.assert_close(packed, expected)
    last = attention(q[None, 4:5], k[None, :9], v[None, :9])[0]  # its own position is the ninth
    torch.testing.assert_close(packed[4:5], last)
    weight = torch.randn(expected.shape, generator=generator)
    found = torch.autograd.grad((packed * weight).sum(), [q, k, v], retain_graph=True)
    wanted = torch.autograd.grad((expected * weight).sum(), [q, k, v])
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other)
