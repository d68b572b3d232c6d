"""Keys of random draws: runs and columns on disk depend on their values."""

import torch

from landiff.data_pipeline.precompute.producers import clip_noise
from landiff.model_zoo import keyed_random


def test_keys_have_the_values_of_earlier_versions():
    assert keyed_random.key(0, "noise", 1, 2) == 8206195150748915899
    assert keyed_random.key(0, "latents", "a") == 8609102264519863641


def test_precompute_uses_keyed_draws():
    expected = torch.randn(2, 3, generator=keyed_random.generator(7, "latents", "clip/1"))
    assert torch.equal(clip_noise(7, "clip/1", (2, 3)), expected)


def test_noise_of_a_clip_has_the_values_of_earlier_versions():
    expected = [-0.9979974627494812, -0.6456149220466614, -1.1070482730865479]
    assert clip_noise(0, "a", (3,)).tolist() == expected
