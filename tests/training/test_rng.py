"""Keyed random draws."""

import torch

from landiff.model_zoo import keyed_random
from landiff.training import rng


def test_a_key_depends_on_every_part_and_on_nothing_else():
    keys = [
        keyed_random.key(0, "noise", 1, 2),
        keyed_random.key(1, "noise", 1, 2),
        keyed_random.key(0, "drop", 1, 2),
        keyed_random.key(0, "noise", 2, 1),
        keyed_random.key(0, "noise", 12),
    ]
    assert len(set(keys)) == 5
    assert all(0 <= key < 2**63 for key in keys)
    # runs resume across versions of this project
    assert keyed_random.key(0, "noise", 1, 2) == 8206195150748915899


def test_equal_keys_draw_equally_whatever_was_drawn_before():
    first = torch.randn(5, generator=keyed_random.generator(3, "noise", 1))
    torch.randn(100)
    assert torch.equal(torch.randn(5, generator=keyed_random.generator(3, "noise", 1)), first)


def test_seeded_keys_the_global_generator_and_puts_it_back():
    before = torch.get_rng_state()
    with rng.seeded(0, "weights"):
        first = torch.nn.Linear(3, 3).weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    with rng.seeded(0, "weights"):
        assert torch.equal(torch.nn.Linear(3, 3).weight, first)
