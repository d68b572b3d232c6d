"""Checks for weights that are not finite and for collapsed tokens."""

import math

import numpy as np
import pytest
import torch

from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.health import (
    CODE_VECTORS,
    CODES_STARTED,
    UnhealthyError,
    collapse,
    effective_codes,
    non_finite,
    require_distinct_codes,
    require_finite,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_lies(dtype, value):
    tensor = torch.ones(3, 5)
    tensor[1, 4] = value
    assert non_finite([("good", torch.ones(4, dtype=dtype)), ("bad", tensor.to(dtype))]) == ["bad"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_of_a_type_are_finite(dtype):
    largest = torch.full((4096,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert (
        non_finite(
            [
                ("large", largest),
                ("empty", torch.empty(0)),
                ("whole", torch.ones(2, dtype=torch.int64)),
            ]
        )
        == []
    )


def test_infinities_of_both_signs_are_found():
    assert non_finite([("both", torch.tensor([math.inf, -math.inf]))]) == ["both"]


def test_the_message_names_tensors_and_counts_the_rest():
    tensors = {f"layer.{i}": torch.tensor(math.nan) for i in range(7)}
    with pytest.raises(
        UnhealthyError,
        match=r"the lm holds NaN or infinity in layer\.0, .*layer\.4 and 2 more tensors",
    ):
        require_finite(tensors.items(), "the lm")


def test_checked_tensors_raise_when_they_are_read_in_whole_or_in_pieces():
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan])}
    lazy = LazyTensors.of(tensors)
    checked = lazy.checked("it")
    assert torch.equal(checked["good"], tensors["good"])
    with pytest.raises(UnhealthyError, match="it holds NaN or infinity in bad"):
        checked["bad"]
    in_pieces = LazyTensors(
        lazy.meta, lazy.read, lambda name: iter(tensors[name].split(1))
    ).checked("it")
    assert len(list(in_pieces.stretches("good"))) == 2
    with pytest.raises(UnhealthyError, match="bad"):
        list(in_pieces.stretches("bad"))


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ([0, 69, 0], "all of 69 tokens are code 1"),
        ([0, 998, 2], "99.8% of 1000 tokens are code 1"),
        ([40, 60], ""),
        ([1, 0], ""),
        ([0, 0], ""),
        ([3] * 16, ""),
    ],
)
def test_a_collapsed_codebook_is_told_from_one_in_use(counts, problem):
    found = collapse(np.array(counts))
    assert problem in found and bool(found) == bool(problem)


def test_effective_codes_of_known_histograms():
    assert effective_codes(np.array([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert effective_codes(np.array([7, 0])) == pytest.approx(1)


def test_equal_code_vectors_of_a_trained_tokenizer_are_refused():
    tensors = {CODE_VECTORS: torch.ones(1, 8, 4), CODES_STARTED: torch.tensor(True)}
    with pytest.raises(UnhealthyError, match="zoo/t has 8 equal code vectors in quantizer"):
        require_distinct_codes(tensors.__getitem__, "zoo/t")
    require_distinct_codes((tensors | {CODES_STARTED: torch.tensor(False)}).__getitem__, "zoo/t")
    tensors[CODE_VECTORS][0, 3, 1] = 2.0
    require_distinct_codes(tensors.__getitem__, "zoo/t")
