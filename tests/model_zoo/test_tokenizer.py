"""Semantic tokenizer beyond the golden cases: sizes, errors, precision, training, conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.convert.formats.release_tokenizer import RULES
from landiff.model_zoo.convert.rules import apply_rules, check_against
from landiff.model_zoo.positions.frame_spans import (
    LatentGrid,
    Sequence,
    _gather,
    _slices,
    decoder_spans,
    dense_mask,
    encoder_spans,
    span_attention,
)
from landiff.model_zoo.quantizer import Quantizer
from landiff.model_zoo.registry import export, load_model
from landiff.model_zoo.tokenizer import SemanticTokenizer

KEYS = Path(__file__).parents[1] / "golden" / "keys" / "tokenizer.json"
TINY = TokenizerConfig(
    feature_channels=6,
    grid_height=2,
    grid_width=3,
    hidden_size=32,
    num_heads=2,
    num_layers=2,
    token_size=12,
    codebook_size=16,
    codebook_dim=4,
    iframe_tokens=5,
    pframe_tokens=2,
    segment_frames=3,
)


def features(batch: int = 2, num_frames: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_frames, 6, 2, 3, generator=generator)


@pytest.fixture
def tokenizer() -> SemanticTokenizer:
    """Untrained weights, a codebook filled by one training step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SemanticTokenizer(TINY)
        model.train()(features(batch=8))
    return model.eval()


def test_release_size_has_the_released_counts():
    with torch.device("meta"):
        model = SemanticTokenizer(TokenizerConfig())
    count = {}
    for name in ("encoder", "decoder", "quantizer"):
        parameters = getattr(model, name).parameters()
        count[name] = sum(parameter.numel() for parameter in parameters)
    assert count == {"encoder": 86_512_128, "decoder": 87_973_632, "quantizer": 25_360}
    assert sum(b.numel() for b in model.buffers()) == 69_121


def test_release_keys_are_exactly_the_released_ones():
    with torch.device("meta"):
        model = SemanticTokenizer(TokenizerConfig())
    released = apply_rules(model.state_dict(), RULES, "to_theirs")
    check_against(
        released,
        {k: v["shape"] for k, v in json.loads(KEYS.read_text()).items()},
        "the converted tokenizer",
    )


def test_conversion_there_and_back_is_bit_equal(tokenizer):
    state = tokenizer.state_dict()
    back = apply_rules(apply_rules(state, RULES, "to_theirs"), RULES, "to_ours")
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)


@pytest.mark.parametrize("spans", [encoder_spans, decoder_spans])
def test_spans_equal_one_dense_mask(spans):
    sequence = SemanticTokenizer(TINY).sequence(3)
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, sequence.length, 2, 16, generator=generator)
    mask = dense_mask(spans(sequence), sequence.length)
    dense = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    # float32 rounding in another order of summation
    torch.testing.assert_close(
        span_attention(q, k, v, spans(sequence)), dense, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", [encoder_spans, decoder_spans])
def test_gradients_of_spans_equal_those_of_slices_without_their_full_length(spans, dtype):
    sequence = Sequence(3, 6, 4, 2)
    random = torch.Generator().manual_seed(0)
    shape = (2, sequence.length, 2, 8)
    leaf = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    groups = [span.keys for span in spans(sequence)]
    gathered = _gather(leaf, groups)
    sliced = _slices(leaf, groups)
    assert all(map(torch.equal, gathered, sliced))
    grown = [torch.randn(x.shape, generator=random).to(dtype) for x in sliced]
    (expected,) = torch.autograd.grad(sliced, leaf, grown)
    with torch.profiler.profile() as profile:
        (found,) = torch.autograd.grad(gathered, leaf, grown)
    assert torch.equal(found, expected)
    assert not any("slice_backward" in event.key for event in profile.key_averages())


def test_compiled_blocks_equal_eager_ones(tokenizer):
    """Traced and differentiated by the compiler, and run by the same kernels."""
    x_BTChw = features()
    found = []
    for compiled in (False, True):
        if compiled:
            tokenizer.compile_blocks(backend="aot_eager")
        tokenizer.zero_grad()
        output = tokenizer(x_BTChw)
        output.loss.backward()
        gradients = [p.grad.clone() for p in tokenizer.parameters() if p.grad is not None]
        found.append((output.indices, output.decoded.detach(), gradients))
    assert torch.equal(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1:], found[0][1:], atol=1e-6, rtol=1e-5)


def test_earlier_frames_do_not_know_later_ones(tokenizer):
    long = features(num_frames=3)
    codes = tokenizer.encode_latents(long)
    # other shapes of the matrix products round differently
    torch.testing.assert_close(
        tokenizer.encode_latents(long[:, :2]), codes[:, : 5 + 2], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        tokenizer.encode_latents(long[:, :1]), codes[:, :5], atol=1e-5, rtol=0
    )


def test_long_clips_are_cut_into_segments_of_their_own(tokenizer):
    long = features(num_frames=8)
    codes = tokenizer.encode(long)
    parts = [tokenizer.encode(long[:, a:b]) for a, b in ((0, 3), (3, 6), (6, 8))]
    assert torch.equal(codes, torch.cat(parts, dim=1))
    assert codes.shape == (2, 2 * (5 + 2 * 2) + 5 + 2)
    decoded = [tokenizer.decode(part, n) for part, n in zip(parts, (3, 3, 2), strict=True)]
    assert torch.equal(tokenizer.decode(codes, 8), torch.cat(decoded, dim=1))


def test_one_window_may_be_longer_than_a_segment(tokenizer):
    assert tokenizer.encode_latents(features(batch=1, num_frames=40)).shape == (1, 5 + 39 * 2, 12)


def test_queries_start_at_the_scale_of_the_width_and_the_codebook_empty():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = SemanticTokenizer(
            TINY.model_copy(update={"hidden_size": 128, "iframe_tokens": 200, "pframe_tokens": 200})
        )
    for table in (
        fresh.encoder.iframe_queries,
        fresh.encoder.pframe_queries,
        fresh.decoder.mask_token,
    ):
        # Deviation width^-0.5. The mask token has only 128 numbers, whose deviation varies by 6 %.
        assert float(table.square().mean().sqrt()) == pytest.approx(128**-0.5, rel=0.2)
    assert not fresh.quantizer._codebook.initted and not fresh.quantizer._codebook.embed.any()


def test_the_target_of_the_loss_is_in_the_working_dtype(tokenizer):
    half = tokenizer.bfloat16().eval()
    given = features() + 100.0  # where bfloat16 is coarse
    result = half(given)
    assert float(result.reconstruction) == float(
        functional.mse_loss(result.decoded.float(), given.bfloat16().float())
    )


def test_stored_statistics_that_nobody_uses_are_told_of(tokenizer, caplog):
    state = tokenizer.state_dict()
    tokenizer.load_state_dict(state)
    assert not caplog.records
    tokenizer.load_state_dict(state | {"std": state["std"] * 3})
    assert "deviations 3 to 3" in caplog.text and "normalize_features is off" in caplog.text
    caplog.clear()
    normalising = SemanticTokenizer(
        tokenizer.config.model_copy(update={"normalize_features": True})
    )
    normalising.load_state_dict(state | {"std": state["std"] * 3})
    assert not caplog.records


def small_quantizer(**changes) -> Quantizer:
    """Three codes of the width of the vectors, the third far from all vectors and never used."""
    quantizer = Quantizer(
        TokenizerConfig(token_size=4, codebook_size=3, codebook_dim=4, **changes)
    ).train()
    book = quantizer._codebook
    book.initted.fill_(True)
    book.embed.copy_(torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 50, 50]]]))
    book.cluster_size.copy_(torch.tensor([[10.0, 10, 0]]))
    book.embed_avg.fill_(1e-5)
    return quantizer


def test_an_unused_code_is_smoothed_by_a_hundred_thousandth():
    quantizer = small_quantizer(dead_code_threshold=0.0)
    quantizer.quantize(torch.zeros(1, 20, 4))
    # an average that decayed to 0.8e-5, over a count of 0 that was raised to 1e-5
    torch.testing.assert_close(
        quantizer._codebook.embed[0, 2], torch.full((4,), 0.8), atol=1e-3, rtol=0
    )


def test_a_code_that_fewer_than_two_vectors_use_becomes_one_of_them():
    quantizer = small_quantizer()
    vectors = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    book = quantizer._codebook
    book.cluster_size[0, 2] = 2  # 1.6 after its decay
    with torch.random.fork_rng(devices=[]):
        quantizer.quantize(vectors)
    assert bool((vectors[0] == book.embed[0, 2]).all(1).any())
    assert float(book.cluster_size[0, 2]) == 2 and torch.equal(
        book.embed_avg[0, 2], 2 * book.embed[0, 2]
    )
    assert bool((book.cluster_size[0, :2] > 2).all())


def test_untrained_codebook_refuses_to_encode_and_stays_untrained():
    model = SemanticTokenizer(TINY).eval()
    with pytest.raises(ValueError, match="codebook is untrained"):
        model.encode(features())
    with pytest.raises(ValueError, match="codebook is untrained"):
        model(features())
    with pytest.raises(ValueError, match="codebook is untrained"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64), 1)
    assert not model.quantizer._codebook.initted


@pytest.mark.parametrize(
    "indices, num_frames, message",
    [
        (torch.zeros(1, 6, dtype=torch.int64), 1, r"\[B, 5\], not \[1, 6\]"),
        (torch.full((1, 5), 16), 1, "codes 16..16 do not fit a codebook of 16"),
        (torch.full((1, 5), -1), 1, "codes -1..-1"),
        (torch.zeros(1, 0, dtype=torch.int64), 0, "num_frames = 0 must be"),
    ],
)
def test_codes_that_do_not_fit_are_refused(tokenizer, indices, num_frames, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(indices, num_frames)


def test_features_of_another_geometry_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"\[B, T >= 1, 6, rows, columns\].*not \[2, 3, 2, 6, 3\]"):
        tokenizer.encode(features().transpose(2, 3))


def test_encoding_never_changes_the_codebook(tokenizer):
    before = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    tokenizer.train()
    tokenizer.encode(features(seed=3))
    assert all(torch.equal(v, before[k]) for k, v in tokenizer.state_dict().items())


def test_quantiser_stays_float32_when_the_model_is_cast(tokenizer):
    expected = tokenizer.quantizer.codebook.clone()
    cast = tokenizer.bfloat16()
    assert cast.encoder.embed.weight.dtype == torch.bfloat16
    assert {t.dtype for t in cast.quantizer.state_dict().values()} == {torch.float32, torch.bool}
    assert torch.equal(cast.quantizer.codebook, expected)
    indices = cast.encode(features())
    assert cast.decode(indices, 3).dtype == torch.bfloat16


def test_quantiser_computes_in_float32_under_autocast(tokenizer):
    latents = tokenizer.encode_latents(features())
    tokenizer.train()
    exact = tokenizer.quantizer.lookup(tokenizer.quantizer.nearest(latents))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.quantizer.lookup(tokenizer.quantizer.nearest(latents)), exact)
        values, _, commitment = tokenizer.quantizer.quantize(latents)
    assert values.dtype == commitment.dtype == torch.float32
    torch.testing.assert_close(values, exact, atol=1e-5, rtol=0)  # the gradient trick rounds


def test_codes_under_autocast_are_those_of_projections_with_its_rounding(tokenizer):
    latents = torch.randn(2, 4096, TINY.token_size, generator=torch.Generator().manual_seed(1))
    rounded = [
        part.bfloat16()
        for part in (
            latents,
            tokenizer.quantizer.project_in.weight,
            tokenizer.quantizer.project_in.bias,
        )
    ]
    codes = torch.nn.functional.linear(*rounded).float()
    expected = (
        torch.cdist(codes.flatten(0, 1), tokenizer.quantizer.codebook).argmin(-1).view(2, 4096)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer.quantizer.nearest(latents)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tokenizer.quantizer.nearest(latents))


def test_half_precision_file_fills_a_float32_quantiser(tokenizer):
    state = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in tokenizer.state_dict().items()
    }
    with torch.device("meta"):
        model = SemanticTokenizer(TINY)
    model.load_state_dict(state, assign=True)
    assert model.quantizer.codebook.dtype == torch.float32
    assert model.encoder.embed.weight.dtype == torch.bfloat16


def test_model_from_the_zoo_encodes_the_same_and_can_train_on(tokenizer, tmp_path):
    entry = export(tmp_path, "tokenizer", "tokenizer", TINY, tokenizer.state_dict(), {})
    loaded = load_model(entry)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(loaded.encode(features()), tokenizer.encode(features()))
    loaded.requires_grad_(True).train()(features()).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_recomputed_activations_give_the_same_gradients(tokenizer):
    gradients = []
    for recompute in (False, True):
        model = SemanticTokenizer(TINY).train()
        model.load_state_dict(tokenizer.state_dict())
        model.set_recompute(recompute)
        model(features(batch=8)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_evaluation_loss_is_the_training_loss_of_the_same_codebook(tokenizer):
    evaluated = tokenizer(features(batch=4))
    trained = tokenizer.train()(features(batch=4))
    # the gradient trick returns the code up to rounding
    torch.testing.assert_close(trained.loss, evaluated.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.commitment, evaluated.commitment, atol=1e-6, rtol=0)


def test_commitment_weight_scales_one_part_of_the_loss(tokenizer):
    model = SemanticTokenizer(TINY.model_copy(update={"commitment_weight": 0.25})).eval()
    model.load_state_dict(tokenizer.state_dict())
    result = model(features())
    assert result.loss == 0.25 * result.commitment + result.reconstruction


def test_normalised_features_round_trip_through_the_same_scale(tokenizer):
    model = SemanticTokenizer(TINY.model_copy(update={"normalize_features": True})).eval()
    model.load_state_dict(tokenizer.state_dict())
    mean = torch.arange(6.0)
    std = torch.arange(1.0, 7.0)
    model.set_feature_statistics(mean, std)
    scaled = features() * std[:, None, None] + mean[:, None, None]
    indices = model.encode(scaled)
    assert torch.equal(indices, tokenizer.encode(features()))
    expected = tokenizer.decode(indices, 3) * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(model.decode(indices, 3), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model(scaled).reconstruction, tokenizer(features()).reconstruction, atol=1e-5, rtol=0
    )


def test_training_learns_what_the_codes_can_carry():
    torch.manual_seed(1)
    model = SemanticTokenizer(TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clips = features(batch=4)[:, :1, :, :1, :1].expand(
        4, 3, 6, 2, 3
    )  # four still clips of one colour each
    losses = []
    for _ in range(25):
        result = model(clips)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.reconstruction.item())
    assert losses[-1] < 0.5 * losses[0], losses


def _train_one_step_on_a_rank(rank: int, folder: str, state: dict[str, Tensor]) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    model = SemanticTokenizer(TINY).train()
    model.load_state_dict(state)
    model(features(batch=8)[rank::2])
    torch.save(model.quantizer.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_one_codebook(tokenizer, tmp_path):
    """Two ranks with half a batch each update the codebook like one process with the batch."""
    config = TINY.model_copy(update={"dead_code_threshold": 0.0})
    alone = SemanticTokenizer(config).train()
    alone.load_state_dict(tokenizer.state_dict())
    # No code near its death, so nothing is replaced by chance.
    alone.quantizer._codebook.cluster_size += 100
    alone.quantizer._codebook.embed_avg.copy_(
        alone.quantizer.codebook * alone.quantizer._codebook.cluster_size[..., None]
    )
    state = {k: v.clone() for k, v in alone.state_dict().items()}
    alone(features(batch=8))
    torch.multiprocessing.spawn(_train_one_step_on_a_rank, (str(tmp_path), state), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in alone.quantizer.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        # float32 sums in another order
        torch.testing.assert_close(ranks[0][name], value, atol=1e-5, rtol=1e-5)
    assert not torch.equal(ranks[0]["_codebook.embed"], state["quantizer._codebook.embed"])


GRID = TINY.model_copy(
    update={
        "latent_positions": "grid",
        "local_paths": True,
        "cell_mask_tokens": True,
        "dead_code_share": 0.25,
    }
)


def test_latents_of_a_frame_are_spread_evenly_over_its_cells():
    grid = LatentGrid.of(6, 30, 45)
    assert (grid.rows, grid.columns) == (2, 3)
    assert grid.centers()[0].tolist() == [7.0, 7.0]
    overlap = LatentGrid.of(5, 2, 3).overlap()
    assert overlap.shape == (5, 6)
    # Thirds and fifths of a cell are rounded to float32.
    torch.testing.assert_close(overlap.sum(0), torch.ones(6))
    torch.testing.assert_close(overlap.sum(1), torch.full((5,), 6 / 5))


def test_local_paths_carry_a_cell_to_its_latents_and_back_before_attention_does():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SemanticTokenizer(GRID)
    for stack in (model.encoder, model.decoder):
        for block in stack.blocks:
            for linear in (block.out, block.mlp_out):
                torch.nn.init.zeros_(linear.weight)
    plain = features(batch=1)
    changed = plain.clone()
    changed[0, 1, :, 0, 0] += 1  # a cell of the second frame, whose latents are 5 and 6
    moved = (model.encode_latents(changed) != model.encode_latents(plain)).any(dim=2)[0]
    assert moved.nonzero().flatten().tolist() == [5]
    latents = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(1))
    other = latents.clone()
    other[0, 5] += 1
    differs = (model.decode_latents(other, 3) != model.decode_latents(latents, 3)).any(dim=2)[0]
    assert differs.flatten(1).any(dim=1).tolist() == [False, True, False]


def test_without_quantization_the_codebook_stays_untrained_and_all_weights_learn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SemanticTokenizer(GRID).train()
        output = model(features(), quantized=False)
        output.loss.backward()
        assert not bool(model.quantizer._codebook.initted)
        assert output.commitment == 0 and not output.indices.any()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model(features(batch=8))
    assert bool(model.quantizer._codebook.initted)
    # 8 clips x 9 tokens / 16 codes = 4.5 expected uses
    assert model.quantizer._codebook.threshold_ema_dead_code == 0.25 * 4.5


def test_local_paths_need_the_grid():
    with pytest.raises(ValidationError, match="latent_positions = grid"):
        TokenizerConfig(local_paths=True)
