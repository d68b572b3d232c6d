"""Token sampling against a loop that recomputes everything, and each option on its own."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from landiff.configs import ConfigError, validate
from landiff.model_zoo.config import LMConfig, TokenSamplingConfig
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample import tokens
from landiff.model_zoo.sample.decode import Decoder
from landiff.model_zoo.sample.tokens import (
    Prompts,
    keep_top_k,
    keep_top_p,
    sample_tokens,
    seeded_draw,
)
from landiff.model_zoo.token_layout import CODE, IGNORE
from tests.golden.conftest import Case
from tests.golden.released_models import load_lm

GOLDEN = Case(Path(__file__).parents[1] / "golden" / "data" / "lm_sampling")
CONFIG = LMConfig(
    codebook_size=20,
    iframe_tokens=3,
    pframe_tokens=2,
    segment_frames=2,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    ffn_size=48,
    max_positions=60,
    text_dim=12,
    max_text_tokens=6,
    micro_hidden_size=16,
    micro_frequency_dim=8,
)


@pytest.fixture
def model():
    model = LanguageModel(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return model


def some_prompts(batch=2, length=4, **more):
    generator = torch.Generator().manual_seed(1)
    return Prompts(
        torch.randn(batch, length, CONFIG.text_dim, generator=generator),
        torch.linspace(0.1, 0.9, batch),
        **more,
    )


def prefer(model, token):
    """Make `token` by far the most likely everywhere."""
    model.final_norm.weight.zero_()
    model.final_norm.bias.fill_(1.0)
    model.head.weight.zero_()
    model.head.weight[token] = 3.0


def recomputed(model, prompts, frames, guidance, seeds):
    """One position at a time, the whole sequence anew for each."""
    layout = model.layout
    (batch, length, _) = prompts.text_BLD.shape
    template = layout.template(frames)
    start = layout.first_start(length)
    ids = torch.full((batch, start), IGNORE)
    ids[:, 0] = layout.bos
    draw = seeded_draw(seeds, (template == CODE).sum(), torch.device("cpu"))
    scalars = torch.full((batch,), float(frames)), prompts.motion_score_B
    for step, forced in enumerate(template.tolist()):
        if forced == CODE:
            dropped = torch.ones(batch, dtype=torch.bool)
            with_text = model(ids, prompts.text_BLD, *scalars, drop_text_B=~dropped)
            without = model(ids, prompts.text_BLD, *scalars, drop_text_B=dropped)
            with_text = with_text[:, -1, : layout.codebook_size]
            without = without[:, -1, : layout.codebook_size]
            new = draw((without + guidance * (with_text - without)).softmax(-1), step)
        else:
            new = torch.full((batch,), forced)
        ids = torch.cat([ids, new[:, None]], 1)
    return torch.stack([torch.from_numpy(layout.codes(row.numpy(), length)) for row in ids])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_equals_recomputing_everything(model, frames, guidance):
    prompts = some_prompts(3)
    seeds = [0, 7, 8]
    config = TokenSamplingConfig(guidance=guidance)
    sampled = sample_tokens(model, prompts, frames, config, seeds=seeds)
    assert torch.equal(sampled.codes_BK, recomputed(model, prompts, frames, guidance, seeds))
    assert sampled.codes_BK.shape == (3, model.layout.num_codes(frames))
    assert sampled.num_frames_B.tolist() == [frames] * 3


def test_a_seed_decides_and_zero_is_a_seed(model):
    prompts = some_prompts(1)
    config = TokenSamplingConfig()
    results = [
        sample_tokens(model, prompts, 4, config, seeds=[seed]).codes_BK for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_surrounding_random_state_is_neither_used_nor_moved(model):
    prompts = some_prompts(1)
    config = TokenSamplingConfig()
    state = torch.get_rng_state()
    sample_tokens(model, prompts, 2, config, seeds=[0])
    assert torch.equal(torch.get_rng_state(), state)


class Listen:
    """Draws as seeded, and keeps the probabilities [B, V] of every step."""

    def __init__(self, seeds):
        self.draw = seeded_draw(seeds, 100, torch.device("cpu"))
        self.heard = []

    def __call__(self, probabilities_BV, step):
        self.heard.append(probabilities_BV)
        return self.draw(probabilities_BV, step)


def test_a_row_does_not_depend_on_its_neighbours(model):
    lengths = torch.tensor([6, 1, 4])
    config = TokenSamplingConfig(guidance=2.0)
    prompts = some_prompts(3, length=6, text_lengths_B=lengths)
    together = Listen([3, 4, 5])
    codes = sample_tokens(model, prompts, 4, config, draw=together).codes_BK
    for row, length in enumerate(lengths.tolist()):
        text = prompts.text_BLD[row : row + 1, :length]
        alone = Listen([3 + row])
        found = sample_tokens(
            model, Prompts(text, prompts.motion_score_B[row : row + 1]), 4, config, draw=alone
        ).codes_BK
        assert torch.equal(found[0], codes[row])
        for one, of_many in zip(alone.heard, together.heard, strict=True):
            torch.testing.assert_close(
                one[0], of_many[row], atol=1e-5, rtol=0
            )  # float32, sums in another order


def test_what_stands_behind_a_texts_length_is_not_read(model):
    prompts = some_prompts(2, length=6, text_lengths_B=torch.tensor([5, 2]))
    other = prompts.text_BLD.clone()
    other[1, 2:] = 9.0
    other[:, 5:] = math.nan
    config = TokenSamplingConfig(guidance=2.0)
    found = []
    for text in (prompts.text_BLD, other):
        changed = Prompts(text, prompts.motion_score_B, prompts.text_lengths_B)
        found.append(sample_tokens(model, changed, 4, config, seeds=[1, 2]))
    assert torch.equal(found[0].codes_BK, found[1].codes_BK)


def test_prompts_differ_and_so_do_their_codes(model):
    prompts = some_prompts(2)
    codes = sample_tokens(model, prompts, 4, TokenSamplingConfig(), seeds=[0, 0]).codes_BK
    assert not torch.equal(codes[0], codes[1])


def test_an_id_that_is_no_code_is_never_drawn(model):
    prefer(model, model.layout.eos)
    config = TokenSamplingConfig(guidance=1.0)
    codes = sample_tokens(model, some_prompts(1), 4, config, seeds=[0]).codes_BK
    assert len(codes.unique()) > 3  # uniform over the codes, not one clamped value


def test_reference_behaviour_feeds_such_ids_back_and_clamps_them_at_the_end(model):
    eos = model.layout.eos
    prefer(model, eos)
    fed = []
    model.token_embedding.register_forward_pre_hook(lambda _module, inputs: fed.append(inputs[0]))
    config = TokenSamplingConfig(guidance=1.0, top_k=1, reference_behaviour=True)
    codes = sample_tokens(model, some_prompts(1), 1, config, seeds=[0]).codes_BK
    assert torch.cat(fed[1:], 1)[0].tolist() == [
        model.layout.start_iframe,
        eos,
        eos,
        eos,
        model.layout.end_iframe,
    ]
    assert codes.tolist() == [[CONFIG.codebook_size - 1] * 3]


@pytest.mark.parametrize(
    "run", [run for run in GOLDEN.config["runs"] if "rng" in run], ids=lambda run: run["name"]
)
def test_a_seed_gives_in_reference_behaviour_what_the_reference_drew_with_it(run):
    """The golden cases record the seed of their draws too; on a CPU it gives the recorded codes."""
    config = TokenSamplingConfig(
        guidance=run.get("guidance_scale") or 1.0,
        temperature=run.get("temperature") or 1.0,
        top_k=run.get("top_k"),
        top_p=run.get("top_p"),
        reference_behaviour=True,
    )
    prompts = Prompts(
        GOLDEN.inputs["text_embeddings"], GOLDEN.inputs[f"{run['name']}.motion_score"]
    )
    sampled = sample_tokens(load_lm(GOLDEN), prompts, run["num_frames"], config, seeds=[run["rng"]])
    assert torch.equal(sampled.codes_BK, GOLDEN.outputs[f"{run['name']}.codes"])


def test_only_codes_cost_a_step(model, monkeypatch):
    calls = []
    forward = Decoder._forward

    def counting(*arguments):
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(Decoder, "_forward", counting)
    codes = sample_tokens(model, some_prompts(2), 5, TokenSamplingConfig(), seeds=[0, 1]).codes_BK
    assert len(calls) == codes.shape[1]


def test_top_k_of_one_takes_the_most_likely_code(model):
    likely = []

    def draw(probabilities_BV, _step):
        assert ((probabilities_BV > 0).sum(-1) == 1).all()
        likely.append(probabilities_BV.argmax(-1))
        return likely[-1]

    prompts = some_prompts(2)
    found = sample_tokens(model, prompts, 3, TokenSamplingConfig(top_k=1), draw=draw).codes_BK
    assert torch.equal(found, torch.stack(likely, 1))
    assert torch.equal(
        found, sample_tokens(model, prompts, 3, TokenSamplingConfig(top_k=1), seeds=[5, 6]).codes_BK
    )


def test_temperature_sharpens(model):
    def entropy(temperature):
        seen = []

        def draw(probabilities_BV, _step):
            seen.append(-(probabilities_BV * probabilities_BV.clamp(min=1e-30).log()).sum())
            return torch.zeros(1, dtype=torch.long)

        sample_tokens(
            model,
            some_prompts(1),
            2,
            TokenSamplingConfig(guidance=1.0, temperature=temperature),
            draw=draw,
        )
        return torch.stack(seen)

    assert (entropy(0.5) < entropy(1.0)).all() and (entropy(1.0) < entropy(2.0)).all()


def test_temperature_and_top_p_change_linearly_over_the_tokens(model):
    def probabilities(**options):
        seen = []

        def draw(probabilities_BV, _step):
            seen.append(probabilities_BV[0])
            return torch.zeros(1, dtype=torch.long)

        config = TokenSamplingConfig(guidance=1.0, **options)
        sample_tokens(model, some_prompts(1), 3, config, draw=draw)
        return seen

    plain, cooled = probabilities(), probabilities(temperature_end=0.25)
    gains = []
    for first, second in zip(plain, cooled, strict=True):
        peak, other = first.topk(2).indices.tolist()
        gap = (first[peak].log() - first[other].log()).item()
        gains.append((second[peak].log() - second[other].log()).item() / gap)
    # The gap of two log-probabilities is divided by the temperature, which falls from 1 to 1/4. The
    # last token of a video is not drawn.
    rounded = [round(gain, 3) for gain in gains]
    assert rounded == sorted(rounded) and 1 < gains[0] < 1.3 and 2.5 < gains[-1] < 4
    kept = [int((row > 0).sum()) for row in probabilities(top_p=1.0, top_p_end=1e-6)]
    assert kept[0] > kept[-1] >= 1


def test_filters_keep_what_they_say():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.2, 0.2, 0.2]]).log()

    def kept(filtered):
        return (filtered > -math.inf).tolist()

    assert kept(keep_top_k(logits, 2)) == [
        [False, True, True, False],
        [True] * 4,
    ]  # ties with the k-th stay
    assert kept(keep_top_k(logits, 9)) == [[True] * 4] * 2
    assert kept(keep_top_p(logits, 0.39)) == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    assert kept(keep_top_p(logits[:1], 0.65)) == [[False, True, True, False]]
    assert kept(keep_top_p(logits[:1], 0.75)) == [[False, True, True, True]]
    assert kept(keep_top_p(logits, 1.0)) == [[True] * 4] * 2
    assert kept(keep_top_p(logits, 1e-9))[0] == [False, True, False, False]  # never nothing


def test_draws_have_the_given_frequencies_and_never_an_impossible_id():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    draw = seeded_draw([0], 4000, torch.device("cpu"))
    counts = (
        torch.bincount(torch.cat([draw(probabilities, step) for step in range(4000)]), minlength=6)
        / 4000
    )
    assert not counts[[0, 2, 5]].any()
    # four standard deviations of a share of 4000 draws: 4 * sqrt(0.25 / 4000) = 0.032
    torch.testing.assert_close(counts, probabilities[0], atol=0.032, rtol=0)


def test_given_frames_stay_and_the_rest_continues_them(model):
    layout = model.layout
    config = TokenSamplingConfig(guidance=1.0)
    prompts = some_prompts(2)
    frames = 4
    prefix = torch.tensor([[1, 2, 3], [4, 5, 6]])
    given = Prompts(prompts.text_BLD, prompts.motion_score_B, prefix_codes_BK=prefix)
    sampled = sample_tokens(
        model, given, frames, config, draw=lambda p, _step: p.argmax(-1)
    ).codes_BK
    assert torch.equal(sampled[:, :3], prefix)
    ids = torch.stack([torch.from_numpy(layout.build(row, 4)) for row in sampled])
    logits = model(ids, prompts.text_BLD, torch.full((2,), float(frames)), prompts.motion_score_B)
    best = logits[..., : layout.codebook_size].argmax(-1)[:, layout.first_start(4) :]
    template = torch.from_numpy(layout.template(frames))
    continued = best[:, :-1][:, template[1:] == CODE]
    assert torch.equal(sampled[:, 3:], continued[:, 3:]) and not torch.equal(
        prefix, continued[:, :3]
    )


@pytest.mark.parametrize("reference", [False, True])
def test_a_prefix_of_all_frames_needs_no_draw(model, reference):
    prefix = torch.tensor([[1, 2, 3, 4, 5]])
    config = TokenSamplingConfig(reference_behaviour=reference)
    found = sample_tokens(model, some_prompts(1, prefix_codes_BK=prefix), 2, config, seeds=[0])
    assert torch.equal(found.codes_BK, prefix)


def test_in_reference_behaviour_the_first_draw_stands_behind_the_given_frames_start(model):
    steps = []

    def draw(probabilities_BV, step):
        steps.append(step)
        return probabilities_BV.argmax(-1)

    config = TokenSamplingConfig(reference_behaviour=True)
    sample_tokens(
        model, some_prompts(1, prefix_codes_BK=torch.tensor([[1, 2, 3]])), 2, config, draw=draw
    )
    # body: SI 1 2 3 EI SP x x EP EOS, step 0 = the position behind SI
    assert steps == [5, 6, 7, 8]


def test_a_video_may_end_behind_its_first_segment_where_the_model_says_so(model):
    layout = model.layout
    config = TokenSamplingConfig(guidance=1.0, predict_end=True)
    template = layout.template(6)  # three segments of SI 3 EI SP 2 EP
    is_start = (template == layout.start_iframe) | (template == layout.start_pframe)
    starts = np.flatnonzero(is_start).tolist()

    def draw(probabilities_BV, step):
        ids = probabilities_BV.argmax(-1)
        position = step + 1
        if position in starts:
            allowed = set(probabilities_BV[0].nonzero().flatten().tolist())
            assert allowed == {layout.eos, template[position]}
            ends = torch.tensor(
                [position in starts[3:], position == starts[4]]
            )  # the first row would end twice
            ids = torch.where(ends, layout.eos, template[position])
        return ids

    sampled = sample_tokens(model, some_prompts(2), 6, config, draw=draw)
    assert sampled.num_frames_B.tolist() == [3, 4]
    assert sampled.codes_BK.shape == (2, layout.num_codes(6))
    assert sampled.codes_BK.min() >= 0


def test_progress_counts_up_to_the_whole(model):
    heard = []
    sample_tokens(
        model,
        some_prompts(1),
        3,
        TokenSamplingConfig(),
        seeds=[0],
        progress=lambda *pair: heard.append(pair),
    )
    done, total = zip(*heard, strict=True)
    assert set(total) == {model.layout.body_length(3)}
    assert list(done) == sorted(done) and done[-1] == total[-1]


def test_half_weights_and_autocast_draw_the_same(model):
    prompts = some_prompts(2, text_lengths_B=torch.tensor([4, 3]))
    config = TokenSamplingConfig()
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample_tokens(model, prompts, 3, config, seeds=[0, 1]).codes_BK
    assert torch.equal(
        sample_tokens(
            model.to_inference(torch.bfloat16), prompts, 3, config, seeds=[0, 1]
        ).codes_BK,
        expected,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_equals_the_model_with_a_cache(model, dtype):
    """In float32 sums are added in another order.

    In bfloat16 all roundings are the same, except that attention to the whole cache, of which the
    static step masks a part, rounds probabilities of 8 bits in other blocks.
    """
    model.to_inference(dtype)
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    cache = model.new_cache(2, 20)
    decoders = [Decoder(model, 2, 20), Decoder(model, 2, 20, graphs=True)]  # dynamic, static
    for start, end in ((0, 9), (9, 10), (10, 13), (13, 20)):
        hidden = model.transform(x[:, start:end], cache=cache)
        expected = model.logits(hidden[:, -1:])[:, 0]
        for decoder in decoders:
            found = decoder.step(x[:, start:end])
            tolerance = 4e-3 if decoder.graphs and dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert [decoder.length for decoder in decoders] == [20, 20]


@pytest.mark.parametrize("graphs", [False, True])
def test_padding_in_front_of_a_row_changes_nothing(model, graphs):
    """Also in the operators of a CUDA graph, which prompts of different lengths use too."""
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, 2, 12, padding_R=torch.tensor([0, 3]), graphs=graphs)
    alone = Decoder(model, 1, 9)  # the second row without padding
    for start, end in ((0, 6), (6, 7), (7, 9), (9, 12)):
        found = decoder.step(x[:, start:end])
        expected = alone.step(x[1:, max(start, 3) : end] if start == 0 else x[1:, start:end])
        torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=0)  # turned positions


def test_prompts_of_different_lengths_are_decoded_by_graphs(model, monkeypatch):
    steps = []
    static_step = Decoder.static_step

    def counted(decoder, x, positions):
        steps.append(decoder.padding_R)
        return static_step(decoder, x, positions)

    prompts = some_prompts(2, text_lengths_B=torch.tensor([4, 3]))
    expected = sample_tokens(model, prompts, 3, TokenSamplingConfig(), seeds=[0, 1]).codes_BK
    monkeypatch.setattr(Decoder, "static_step", counted)
    graphs = partial(Decoder, graphs=True)
    monkeypatch.setattr(tokens, "new_cache", lambda *given: graphs(*given[:3], padding_R=given[3]))
    found = sample_tokens(model, prompts, 3, TokenSamplingConfig(), seeds=[0, 1]).codes_BK
    assert torch.equal(found, expected)
    assert len(steps) > 5 and all(padding is not None for padding in steps)


def test_a_decoding_step_takes_few_operators_and_none_that_waits(model):
    """Each costs some microseconds of dispatch, which at batch 1 is most of the time."""
    decoder = Decoder(model, 2, 20)
    decoder.step(torch.zeros(2, 9, 32))
    with torch.profiler.profile() as profile:
        decoder.step(torch.zeros(2, 1, 32))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "aten::item" not in counts and "aten::_local_scalar_dense" not in counts
    assert "aten::cat" not in counts
    assert counts["aten::copy_"] <= 5 * CONFIG.num_layers
    assert sum(counts.values()) < 90 * CONFIG.num_layers + 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"motion_score_B": torch.zeros(3)}, "2 prompts need as many motion scores"),
        (
            {"text_lengths_B": torch.tensor([4])},
            "2 prompts need as many motion scores and text lengths",
        ),
        (
            {"text_lengths_B": torch.tensor([4, 0])},
            r"text lengths \[4, 0\] must lie between 1 and the 4 rows",
        ),
        ({"text_lengths_B": torch.tensor([4, 5])}, "between 1 and the 4 rows"),
        (
            {"prefix_codes_BK": torch.zeros(2, 4, dtype=torch.long)},
            "4 codes are no whole number of frames",
        ),
        (
            {"prefix_codes_BK": torch.zeros(1, 3, dtype=torch.long)},
            r"prefix codes of shape \(1, 3\)",
        ),
        (
            {"prefix_codes_BK": torch.zeros(2, 13, dtype=torch.long)},
            r"\(5 frames\) do not fit 2 prompts and num_frames = 3",
        ),
        ({"prefix_codes_BK": torch.tensor([[0, 1, 2], [3, 20, 4]])}, "code 20 at index 1"),
        ({"text_BLD": torch.zeros(2, 4, 5)}, "text_dim = 12"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, changes, message):
    prompts = some_prompts(2)
    with pytest.raises(ValueError, match=message):
        sample_tokens(
            model, Prompts(**(vars(prompts) | changes)), 3, TokenSamplingConfig(), seeds=[0, 1]
        )


def test_seeds_or_draw_but_not_both_nor_too_few(model):
    with pytest.raises(ValueError, match="either seeds"):
        sample_tokens(model, some_prompts(1), 1, TokenSamplingConfig())
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        sample_tokens(model, some_prompts(2), 1, TokenSamplingConfig(), seeds=[0])


def test_a_video_longer_than_the_model_is_refused(model):
    with pytest.raises(ConfigError, match="max_positions = 60"):
        sample_tokens(model, some_prompts(1), 30, TokenSamplingConfig(), seeds=[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3, "top_p": 0.5}, "exclude each other"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"temperature": 0}, "temperature"),
        ({"guidence": 2}, "did you mean 'guidance'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(TokenSamplingConfig, settings)


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws(model):
    """float32 matmuls: logits differ by rounding only, far less than needed for another draw."""
    prompts = some_prompts(3, length=6, text_lengths_B=torch.tensor([6, 1, 4]))
    config = TokenSamplingConfig(guidance=2.0)
    expected = sample_tokens(model, prompts, 4, config, seeds=[0, 1, 2]).codes_BK
    assert torch.equal(
        sample_tokens(model.cuda(), prompts, 4, config, seeds=[0, 1, 2]).codes_BK.cpu(), expected
    )
