"""Random draws and loss of a diffusion batch: keyed by sample, not by the division of the batch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.base import NO_VARIANCE
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.training.diffusion.model import load_tokenizer
from landiff.training.diffusion.prefix import losses_after_prefix
from landiff.training.diffusion.step import (
    Objective,
    draw_prefix,
    draw_timestep,
    happens,
    timestep_block,
)
from tests.training.diffusion.tiny import config, make_zoo, sample

CPU = torch.device("cpu")


@pytest.fixture
def control(tmp_path):
    make_zoo(tmp_path)
    settings = config(tmp_path, "control", prefix__frames=[1, 2], prefix__noise=0.5)
    return Objective(settings, CPU, load_tokenizer(settings, CPU))


def test_strata_are_equal_blocks_that_cover_the_schedule():
    assert [timestep_block(p, 4, 1000) for p in range(4)] == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]
    # 1000 is no multiple of 16: 8 blocks, two samples each
    assert [timestep_block(p, 16, 1000) for p in (0, 1, 2, 15)] == [
        (0, 125),
        (0, 125),
        (125, 250),
        (875, 1000),
    ]
    assert timestep_block(6, 7, 1000) == (0, 1000)
    assert {
        timestep_block(p, 256, 1000)[1] - timestep_block(p, 256, 1000)[0] for p in range(256)
    } == {125}


def test_timesteps_fill_their_block():
    drawn = [draw_timestep(0, sample(1 + 4 * k, 4), 4, 1000) for k in range(400)]
    assert min(drawn) >= 250 and max(drawn) < 500
    assert min(drawn) < 260 and max(drawn) >= 490


def test_timesteps_of_a_power_fill_ranges_of_equal_probability():
    drawn = torch.tensor([draw_timestep(0, sample(i, 4), 4, 1000, 2.0) for i in range(2000)])
    # With a density of 3 t^2 / 1000^3, a quarter of the draws lies below 1000 / 4^(1/3).
    edges = [0, 629, 793, 908, 999]
    for position in range(4):
        block = drawn[position::4]
        low = edges[position]
        high = edges[position + 1]
        assert low <= int(block.min()) and int(block.max()) <= high
        assert int(block.max()) >= high - 10
    # The cumulative distribution, within 4 standard deviations of 2000 stratified draws at most.
    for timestep in (300, 500, 700, 900):
        share = float((drawn < timestep).float().mean())
        assert share == pytest.approx((timestep / 1000) ** 3, abs=0.02)


def test_a_power_changes_neither_noise_nor_evenly_drawn_timesteps(tmp_path):
    even = Objective(config(tmp_path), CPU)
    late = Objective(config(tmp_path, timestep_power=4.0), CPU)
    samples = [sample(i, 4) for i in range(4)]
    seed = even.config.loop.seed
    drawn = [draw_timestep(seed, item, 4, 1000) for item in samples]
    before = even.inputs(samples)
    after = late.inputs(samples)
    assert torch.equal(before.noise_BTCHW, after.noise_BTCHW)
    assert torch.equal(before.timestep_B, torch.tensor(drawn))
    assert (after.timestep_B > before.timestep_B).all()


def test_a_phase_changes_the_power(tmp_path):
    settings = config(tmp_path, timestep_power=4.0, phases=[{"from_step": 1, "timestep_power": 0}])
    assert settings.at(0).timestep_power == 4.0
    assert settings.at(1).timestep_power == 0.0


def test_a_keyed_coin_has_its_probability():
    heads = sum(happens(0, "text_dropout", sample(i, 4), 0.1) for i in range(4000))
    assert 340 < heads < 460  # 400 +- 3 standard deviations
    assert not any(happens(0, "text_dropout", sample(i, 4), 0.0) for i in range(100))
    assert all(happens(0, "text_dropout", sample(i, 4), 1.0) for i in range(100))


def test_inputs_do_not_depend_on_the_micro_batch(control):
    together = control.inputs([sample(i, 4) for i in range(4, 8)])
    for place in range(4):
        alone = control.inputs([sample(4 + place, 4)])
        for field in fields(together):
            whole, part = getattr(together, field.name), getattr(alone, field.name)
            if field.name == "features_BTchw":  # a batched matmul rounds otherwise
                torch.testing.assert_close(whole[place : place + 1], part, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(whole[place : place + 1], part), field.name


def test_the_second_epoch_sees_the_clip_under_other_noise(control):
    first, second = control.inputs([sample(1, 4)]), control.inputs([sample(9, 4)])
    assert torch.equal(first.latents_BTCHW, second.latents_BTCHW)
    assert not torch.equal(first.noise_BTCHW, second.noise_BTCHW)


def test_of_mean_and_log_variance_each_epoch_draws_another_sample(control):
    def stored(index: int, log_variance: float):
        one = sample(index, 4)
        mean = one.tensors["latents"]
        return replace(
            one,
            tensors=one.tensors
            | {"latents": torch.cat([mean, torch.full_like(mean, log_variance)], dim=1)},
        )

    mean = control.inputs([sample(1, 4)]).latents_BTCHW
    first, again, second = (
        control.inputs([stored(index, -2.0)]).latents_BTCHW for index in (1, 1, 9)
    )
    assert torch.equal(first, again) and not torch.equal(first, second)
    drawn = torch.cat([first - mean, second - mean])
    assert (
        abs(float(drawn.std()) / 2.718281828**-1 - 1) < 0.05
    )  # 4 608 draws: 0.01 is one standard deviation
    assert torch.equal(control.inputs([stored(1, NO_VARIANCE)]).latents_BTCHW, mean)


def test_dropped_text_is_zeros(tmp_path):
    objective = Objective(config(tmp_path, text_dropout=0.5), CPU)
    texts = [objective.inputs([sample(i, 4)]).text_BLD for i in range(32)]
    dropped = [not text.any() for text in texts]
    assert 0 < sum(dropped) < 32
    assert all(
        torch.equal(text[0], sample(i, 4).tensors["text-tiny"].float())
        for i, text in enumerate(texts)
        if not dropped[i]
    )


def test_prefix_frames_enter_clean_and_are_not_in_the_loss(tmp_path):
    objective = Objective(config(tmp_path), CPU)
    inputs = objective.inputs([sample(0, 4), sample(1, 4)])
    inputs = replace(inputs, prefix_B=torch.tensor([1, 0]))

    def network(noised, timestep, text):
        return torch.zeros_like(noised)

    result = objective.loss(network, inputs)
    assert torch.equal(result.noised[0, 0], inputs.latents_BTCHW[0, 0])
    assert not torch.equal(result.noised[1, 0], inputs.latents_BTCHW[1, 0])
    velocity = NoiseSchedule(objective.config.schedule).velocity(
        inputs.latents_BTCHW, inputs.noise_BTCHW, inputs.timestep_B
    )
    torch.testing.assert_close(result.per_sample[0], velocity[0, 1:].square().mean())
    torch.testing.assert_close(result.per_sample[1], velocity[1].square().mean())


def test_a_prefix_draws_its_length_from_the_list(tmp_path):
    one = config(tmp_path).prefix
    several = config(tmp_path, prefix__frames=[1, 2]).prefix
    samples = [sample(index, 4) for index in range(200)]
    fixed = [draw_prefix(3, each, one, 3) for each in samples]
    drawn = [draw_prefix(3, each, several, 3) for each in samples]
    assert set(drawn) == {0, 1, 2}
    # which samples have a prefix does not depend on its length
    assert [length > 0 for length in drawn] == [length > 0 for length in fixed]


def test_noise_on_the_prefix_has_a_level_of_its_own_for_each_sample(tmp_path):
    def inputs(**changes):
        settings = config(tmp_path, prefix__probability=1.0, **changes)
        objective = Objective(settings, CPU)
        return objective, objective.inputs([sample(i, 4) for i in range(8)])

    _, clean = inputs()
    objective, noisy = inputs(prefix__noise=0.5)
    assert torch.equal(clean.prefix_BTCHW, clean.latents_BTCHW)
    for name in ("latents_BTCHW", "noise_BTCHW", "timestep_B", "prefix_B", "text_BLD"):
        assert torch.equal(getattr(clean, name), getattr(noisy, name)), name
    levels = (noisy.prefix_BTCHW - noisy.latents_BTCHW).std(dim=(1, 2, 3, 4))
    assert len(set(levels.tolist())) == 8
    assert levels.min() > 0 and levels.max() < 0.52  # 2304 draws: std is known to 1.5 %

    def network(noised, timestep, text):
        return torch.zeros_like(noised)

    result = objective.loss(network, noisy)
    assert torch.equal(result.noised[:, :1], noisy.prefix_BTCHW[:, :1])
    assert torch.equal(result.loss, objective.loss(network, clean).loss)  # targets are clean


def test_the_loss_is_reported_by_distance_from_the_prefix(tmp_path):
    objective = Objective(config(tmp_path), CPU)
    inputs = objective.inputs([sample(i, 4) for i in range(3)])
    inputs = replace(inputs, prefix_B=torch.tensor([1, 0, 2]))

    def network(noised, timestep, text):
        return torch.zeros_like(noised)

    result = objective.loss(network, inputs)
    sums, counts = losses_after_prefix(result, inputs.prefix_B, 2)
    frames = result.per_frame
    assert counts.tolist() == [2, 1]
    assert sums.tolist() == [float(frames[0, 1] + frames[2, 2]), float(frames[0, 2])]


def test_longer_clips_give_windows_that_start_with_the_clip_unless_they_have_a_prefix(control):
    def longer(index):
        """The sample with five frames in two segments."""
        draw = torch.Generator().manual_seed(index)
        one = sample(index, 4)
        tensors = {
            "latents": torch.randn(5, 48, 4, 4, generator=draw),
            "tokens": torch.randint(0, 16, (9,), generator=draw).to(torch.uint16),
        }
        return replace(one, tensors=one.tensors | tensors)

    samples = [longer(index) for index in range(32)]
    inputs = control.inputs(samples)
    starts = set()
    for place, each in enumerate(samples):
        windows = each.tensors["latents"].unfold(0, 3, 1).movedim(-1, 1)
        matches = [torch.equal(window, inputs.latents_BTCHW[place]) for window in windows]
        start = matches.index(True)
        if not inputs.prefix_B[place]:
            assert start == 0
        starts.add(start)
        tokens = each.tensors["tokens"].long()[None]
        features = control.tokenizer.decode(tokens, 5)[0, start : start + 3]
        # a batched matmul rounds otherwise
        torch.testing.assert_close(inputs.features_BTchw[place], features, rtol=1e-5, atol=1e-6)
    assert starts == {0, 1, 2}


def test_samples_that_do_not_fit_are_refused_by_key(control, tmp_path):
    wrong = sample(0, 4)
    wrong.tensors["tokens"][2] = 16
    with pytest.raises(
        ConfigError, match=r"clip 0000 holds token 16, but the tokenizer's codebook has 16 codes"
    ):
        control.inputs([sample(1, 4), wrong])
    wrong = sample(3, 4)
    wrong.tensors["latents"] = wrong.tensors["latents"][:2]
    with pytest.raises(ConfigError, match=r"column latents of clip 0003 has shape \(2, 48, 4, 4\)"):
        control.inputs([wrong])
