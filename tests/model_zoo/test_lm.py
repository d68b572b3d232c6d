"""The language model: sizes, initialization, cache, precision, errors, names of the release."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from landiff.configs import load
from landiff.configs.base import ConfigError
from landiff.model_zoo import registry
from landiff.model_zoo.config import LMConfig, ModelConfig
from landiff.model_zoo.convert.formats.release_lm import RULES
from landiff.model_zoo.convert.rules import ConversionError, apply_rules, check_against
from landiff.model_zoo.layers import rotary_table, rotate
from landiff.model_zoo.lm import LanguageModel, TextProjection

CONFIG = LMConfig(
    codebook_size=20,
    iframe_tokens=3,
    pframe_tokens=2,
    segment_frames=2,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    ffn_size=48,
    max_positions=40,
    text_dim=12,
    max_text_tokens=6,
    micro_hidden_size=16,
    micro_frequency_dim=8,
)
RELEASE = Path(__file__).parents[1] / "golden" / "keys" / "llm.json"


def drawn_model(seed=0):
    """All parameters drawn, those that start as zero too."""
    model = LanguageModel(CONFIG).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.requires_grad_(False)


def some_inputs(model, batch=2, frames=3, length=4):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(
        CONFIG.codebook_size, (batch, model.layout.num_codes(frames)), generator=generator
    )
    ids = torch.stack([torch.from_numpy(model.layout.build(row, length)) for row in codes])
    text = torch.randn(batch, length, CONFIG.text_dim, generator=generator)
    return ids, text, torch.full((batch,), float(frames)), torch.linspace(0.1, 0.9, batch)


def on_meta(config):
    with torch.device("meta"):
        return LanguageModel(config)


def test_the_released_size_has_the_released_number_of_parameters():
    model = on_meta(load(ModelConfig, "landiff/model").lm)
    assert sum(p.numel() for p in model.parameters()) == 2_049_321_984


def test_every_release_key_maps_to_ours_and_back():
    shapes = {name: entry["shape"] for name, entry in json.loads(RELEASE.read_text()).items()}
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours = on_meta(LMConfig()).state_dict()
    assert len(shapes) == 185
    check_against(
        apply_rules(theirs, RULES, "to_ours"), {k: v.shape for k, v in ours.items()}, "release"
    )
    check_against(apply_rules(ours, RULES, "to_theirs"), shapes, "ours")


def test_an_unknown_release_key_is_named():
    with pytest.raises(ConversionError, match=r"unexpected: transformer\.blocks\.\*\.wq\.weight"):
        apply_rules({"transformer.blocks.0.wq.weight": torch.empty(1)}, RULES, "to_ours")


def test_a_model_built_on_meta_and_loaded_equals_the_original():
    model = drawn_model()
    assert not list(model.buffers())  # a buffer outside the state dict would stay unset
    loaded = on_meta(CONFIG)
    loaded.load_state_dict(model.state_dict(), assign=True)
    inputs = some_inputs(model)
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_the_zoo_gives_back_the_same_model(tmp_path):
    model = drawn_model()
    entry = registry.export(tmp_path, "lm", "lm", CONFIG, model.state_dict(), {})
    loaded = registry.load_model(registry.resolve(tmp_path, "lm", kind="lm"))
    assert entry.config == loaded.config == CONFIG
    inputs = some_inputs(model)
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_initialisation_is_that_of_the_specification():
    config = CONFIG.model_copy(update={"hidden_size": 256, "ffn_size": 512, "text_dim": 128})
    model = LanguageModel(config)
    block = model.blocks[0]
    for weight in (
        block.wqkv.weight,
        block.wo.weight,
        block.w1.weight,
        block.w2.weight,
        block.w3.weight,
        model.token_embedding.weight,
        model.head.weight,
    ):
        assert abs(weight.std().item() / 0.02 - 1) < 0.05
    assert abs(model.text.fc0.weight.std().item() / math.sqrt(2 / 128) - 1) < 0.05
    assert abs(model.text.fc1.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.05
    assert abs(model.text.null.std().item() * math.sqrt(256) - 1) < 0.2
    assert not model.text.fc0.bias.any() and not model.text.fc1.bias.any()
    assert not model.micro(torch.tensor([13.0]), torch.tensor([0.5])).any()
    assert model.micro.frames.fc0.weight.any()


def test_initialisation_covers_every_parameter_and_follows_the_generator():
    model = on_meta(CONFIG).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights(torch.Generator().manual_seed(3))
    again = LanguageModel(CONFIG)
    again.init_weights(torch.Generator().manual_seed(3))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_position_sees_itself_and_what_stands_before_it():
    model = drawn_model()
    ids, *rest = some_inputs(model)
    other = ids.clone()
    other[:, 12] = (other[:, 12] + 1) % CONFIG.codebook_size
    before = model(ids, *rest)
    after = model(other, *rest)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


def test_decoding_with_the_cache_equals_the_whole_sequence():
    model = drawn_model()
    inputs = some_inputs(model)
    x = model.embed(*inputs)
    cache = model.new_cache(len(x), x.shape[1])
    pieces = [
        model.transform(piece, cache=cache)
        for piece in x.split([8, 1, 1, 3, x.shape[1] - 13], dim=1)
    ]
    assert cache.length == cache.capacity == x.shape[1]
    torch.testing.assert_close(
        model.logits(torch.cat(pieces, 1)), model(*inputs), atol=1e-5, rtol=0
    )  # order of sums


def test_dropped_text_is_the_null_vector_of_the_same_length():
    model = drawn_model()
    ids, text, *scalars = some_inputs(model)
    full = model(ids, text, *scalars)
    mixed = model(ids, text, *scalars, drop_text_B=torch.tensor([False, True]))
    assert torch.equal(mixed[0], full[0]) and not torch.equal(mixed[1], full[1])
    other_text = model(ids, text.flip(0), *scalars, drop_text_B=torch.tensor([True, True]))
    assert torch.equal(other_text[1], mixed[1])  # whatever the text was
    projected = model.embed_prompt(text, *scalars, drop_text_B=torch.tensor([False, True]))
    assert torch.equal(projected[1, 3:], model.text.null.expand(4, -1))
    assert torch.equal(
        projected[1, :3], model.embed_prompt(text, *scalars)[1, :3]
    )  # micro-conditions stay


def test_a_model_may_be_told_the_grid_of_a_clip():
    config = CONFIG.model_copy(update={"grid_condition": True})
    model = LanguageModel(config).eval().requires_grad_(False)
    inputs = some_inputs(model)
    square = torch.tensor([[2.0, 2.0], [4.0, 4.0]])
    plain = LanguageModel(CONFIG).eval().requires_grad_(False)
    own = {name: model.state_dict()[name] for name in plain.state_dict()}
    plain.load_state_dict(own)
    without = plain(*inputs)
    assert torch.equal(model(*inputs, grid_B2=square), without), "zero until it is trained"
    assert torch.equal(plain(*inputs, grid_B2=square), without), "ignored"
    for scalar in (model.micro.rows, model.micro.columns):
        torch.nn.init.normal_(scalar.fc1.weight, generator=torch.Generator().manual_seed(3))
    told = model(*inputs, grid_B2=square)
    tall = model(*inputs, grid_B2=torch.tensor([[2.0, 2.0], [6.0, 4.0]]))
    assert torch.equal(told[0], tall[0]) and not torch.allclose(told[1], tall[1], atol=1e-3)
    with pytest.raises(ValueError, match="grid_condition = true: the model needs rows"):
        model(*inputs)


def test_text_projection_drops_rows_of_a_packed_batch():
    projection = TextProjection(12, 32)
    drop = torch.tensor([True, False, True])
    out = projection(torch.randn(3, 12), drop)
    assert torch.equal(out[drop], projection.null.expand(2, -1)) and not torch.equal(
        out[1], projection.null
    )


def test_every_parameter_learns():
    model = drawn_model().requires_grad_(True)
    model(*some_inputs(model), drop_text_B=torch.tensor([True, False])).logsumexp(
        -1
    ).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    scores = []
    for shift in (0, 5):
        at_q, at_k = (rotary_table(torch.tensor([place + shift]), 8, 10000.0) for place in (9, 4))
        scores.append((rotate(q, *at_q) * rotate(k, *at_k)).sum())
        torch.testing.assert_close(rotate(q, *at_q).norm(), q.norm())
    torch.testing.assert_close(scores[0], scores[1])
    assert torch.equal(rotate(q, *rotary_table(torch.tensor([0]), 8, 10000.0)), q)


def test_under_autocast_the_stream_is_half_and_the_head_is_not():
    model = drawn_model()
    inputs = some_inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transform(model.embed(*inputs))
        logits = model.logits(hidden)
        assert model.new_cache(1, 4).keys_and_values.dtype == torch.bfloat16
    assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
    head = nn.functional.linear(model.final_norm(hidden.float()), model.head.weight)
    assert torch.equal(logits, head)
    error = (logits - model(*inputs)).abs().max()
    assert 0 < error < 0.3  # bf16 has 8 bits; the logits reach about 5


def test_inference_weights_give_the_numbers_of_autocast():
    inputs = some_inputs(drawn_model())
    with torch.autocast("cpu", torch.bfloat16):
        expected = drawn_model()(*inputs)
    model = drawn_model().to_inference(torch.bfloat16)
    assert torch.equal(model(*inputs), expected)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        "blocks.0.norm0.weight",
        "blocks.0.norm1.weight",
        "blocks.1.norm0.weight",
        "blocks.1.norm1.weight",
        "final_norm.weight",
        "final_norm.bias",
        "head.weight",
    }


def test_a_model_of_half_weights_throughout_runs():
    model = drawn_model().to(torch.bfloat16)
    assert model(*some_inputs(model)).dtype == torch.float32


def test_ids_that_do_not_fit_the_text_are_refused():
    model = drawn_model()
    ids, text, *scalars = some_inputs(model)
    with pytest.raises(ValueError, match="do not fit a text of 3 tokens"):
        model(ids, text[:, :3], *scalars)
    with pytest.raises(ValueError, match="text_dim = 12, 1 to max_text_tokens = 6"):
        model(ids, torch.zeros(2, 7, 12), *scalars)
    with pytest.raises(ValueError, match="text_dim = 12"):
        model(ids, torch.zeros(2, 4, 13), *scalars)


def test_more_positions_than_the_model_has_are_refused():
    model = drawn_model()
    with pytest.raises(ValueError, match="41 positions exceed max_positions = 40"):
        model.transform(torch.zeros(1, 41, 32))
    with pytest.raises(ConfigError, match="take 41 positions.*max_positions = 40"):
        model.new_cache(1, 41)
