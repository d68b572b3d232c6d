"""Statistics of codes against hand-computed values."""

import math

import numpy as np
import pytest
import torch

from landiff.model_zoo.evaluate.codebook import code_entropy, codebook_use, count_codes
from landiff.model_zoo.evaluate.conditions import frequency_baseline


def test_codes_of_any_shape_are_counted():
    codes = torch.tensor([[0, 1, 1], [3, 1, 0]])
    assert count_codes(codes, 5).tolist() == [2, 3, 0, 1, 0]


def test_perplexity_counts_equally_frequent_codes():
    perplexity, used = codebook_use(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    assert float(perplexity) == pytest.approx(2.0)
    assert float(used) == 0.5


def test_one_code_has_perplexity_one():
    perplexity, used = codebook_use(count_codes(torch.zeros(5, dtype=torch.int64), 8).float())
    assert float(perplexity) == 1.0
    assert float(used) == 1 / 8


def test_entropy_is_in_nats_and_in_the_dtype_of_the_counts():
    entropy = code_entropy(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert entropy.dtype == torch.float64
    assert float(entropy) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_frequency_baseline_is_the_entropy_of_all_codes(dtype):
    codes_BK = np.array([[0, 1], [1, 1]], dtype=dtype)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert frequency_baseline(codes_BK, 4) == pytest.approx(expected, abs=1e-15)
