"""T5 encoders from folders in the hub's layout: tiny random weights, a tokenizer built here."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from landiff.configs import ConfigError
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.base import TextEncoder
from landiff.model_zoo.frozen.config import FlanT5Config, T5V11Config

WORDS = ["a", "rabbit", "hops", "over", "the", "grass", "snow"]
TEXTS = ["a rabbit hops over the grass", "snow"]
PAD, END = 0, 1
SIZES = T5Config(
    vocab_size=64,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 with decoder and tokenizer in one folder, like google/flan-t5-xxl."""
    path = tmp_path_factory.mktemp("flan-t5")
    torch.manual_seed(0)
    T5ForConditionalGeneration(SIZES).save_pretrained(path)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + w, -1.0) for w in WORDS)]
    T5Tokenizer(
        vocab=pieces + [(c, -5.0) for c in "abcdefghijklmnopqrstuvwxyz▁"], extra_ids=0
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def flan(folder):
    return build(FlanT5Config(path=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def padded(folder):
    return build(T5V11Config(path=str(folder), dtype="float32", max_length=12))


@pytest.fixture(scope="module")
def direct(folder):
    return T5EncoderModel.from_pretrained(folder).eval()


def ids(text: str) -> list[int]:
    return [3 + WORDS.index(w) for w in text.split()] + [END]


def test_flan_returns_real_tokens_at_the_front_of_each_row(flan, direct):
    assert isinstance(flan, TextEncoder)
    states, lengths = flan(TEXTS)
    assert (
        states.shape == (2, 7, 16) and states.dtype == torch.float32 and lengths.tolist() == [7, 2]
    )
    assert (states[1, 2:] == 0).all()
    for row, text in enumerate(TEXTS):
        with torch.no_grad():
            alone = direct(input_ids=torch.tensor([ids(text)])).last_hidden_state[0]
        # positions are relative and pads masked, so left padding leaves only float32 rounding
        torch.testing.assert_close(states[row, : len(alone)], alone, atol=1e-5, rtol=0)


def test_v11_attends_its_pads_without_a_mask(padded, direct):
    states, lengths = padded(TEXTS)
    assert states.shape == (2, 12, 16) and lengths.tolist() == [12, 12]
    rows = [ids(t) + [PAD] * (12 - len(ids(t))) for t in TEXTS]
    with torch.no_grad():
        expected = direct(input_ids=torch.tensor(rows)).last_hidden_state
        masked = direct(
            input_ids=torch.tensor(rows), attention_mask=torch.tensor(rows).ne(PAD).long()
        ).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)
    assert (states[1, :2] - masked[1, :2]).abs().max() > 1e-3


def test_long_texts_are_cut_and_keep_their_end_token(folder, direct):
    encoder = build(FlanT5Config(path=str(folder), dtype="float32", max_length=4))
    states, lengths = encoder([TEXTS[0]])
    with torch.no_grad():
        expected = direct(input_ids=torch.tensor([[*ids(TEXTS[0])[:3], END]])).last_hidden_state
    assert lengths.tolist() == [4]
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)


def test_weights_and_activations_have_the_configured_dtype(folder, flan):
    half = build(FlanT5Config(path=str(folder)))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    states, _ = half(TEXTS)
    assert states.dtype == torch.float32 and torch.equal(states, states.bfloat16().float())
    torch.testing.assert_close(states, flan(TEXTS)[0], atol=0.1, rtol=0.1)  # 8 bits of mantissa


def test_a_pipelines_subfolders_are_read(folder, padded, tmp_path):
    T5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "text_encoder")
    T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer")
    other = build(
        T5V11Config(
            path=str(tmp_path),
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            dtype="float32",
            max_length=12,
        )
    )
    assert other.fingerprint == padded.fingerprint
    assert torch.equal(other(TEXTS)[0], padded(TEXTS)[0])


def test_fingerprint_follows_kind_length_dtype_and_a_single_weight(folder, flan, padded, tmp_path):
    changed = T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        changed.encoder.final_layer_norm.weight[0] += 1e-3
    changed.save_pretrained(tmp_path)
    T5Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    marks = [flan.fingerprint, padded.fingerprint] + [
        build(c).fingerprint
        for c in (
            FlanT5Config(path=str(folder), dtype="float32", max_length=12),
            FlanT5Config(path=str(folder)),
            FlanT5Config(path=str(tmp_path), dtype="float32"),
        )
    ]
    assert len(set(marks)) == len(marks)


def test_a_folder_without_tokenizer_or_weights_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"flan-t5: .*path = "):
        build(FlanT5Config(path=str(tmp_path)))


def test_compiled_blocks_give_the_same_states_for_every_length(folder, flan):
    compiled = build(FlanT5Config(path=str(folder), dtype="float32"))
    compiled.compile_blocks(backend="aot_eager", fullgraph=True)
    for texts in (TEXTS, ["snow"]):
        for found, expected in zip(compiled(texts), flan(texts), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_text_that_is_cut_off_is_told(padded, flan):
    # 12 tokens, the last of them </s>
    fits = " ".join(WORDS[:6]) + " " + " ".join(WORDS[:5])
    texts = [fits, f"{fits} snow over the grass", "", "snow"]
    assert padded.cut_off(texts) == ["", "snow over the grass", "", ""]
    assert flan.cut_off(texts) == ["", "", "", ""]  # 512 tokens
    assert padded.num_tokens(texts) == [12, 12, 1, 2]
    assert flan.num_tokens(texts) == [12, 16, 1, 2]
    first, second = (padded([f"{fits} {end}"])[0] for end in ("snow", "grass"))
    assert torch.equal(first, second)
