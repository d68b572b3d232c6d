"""The stand-ins for CUDA exist inside the `with` and nowhere else."""

import pytest
import torch
from megatron.core.tensor_parallel import random as core_random

from landiff.training.lm.config import LMTrainConfig  # noqa: F401 - must replace nothing
from landiff.training.lm.device import megatron_device

PATCHED = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (core_random, "_get_cuda_rng_state"),
    (core_random, "_set_cuda_rng_state"),
]


@pytest.fixture(autouse=True)
def hidden_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_cuda_means_cpu_inside_and_nothing_is_left_outside():
    originals = [getattr(owner, name) for owner, name in PATCHED]
    with megatron_device() as device:
        assert device == torch.device("cpu")
        assert torch.zeros(2, device="cuda").device == device
        assert torch.zeros(2, device=torch.cuda.current_device()).device == device
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        torch.cuda.synchronize()
    assert [getattr(owner, name) for owner, name in PATCHED] == originals
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda:0").cuda()


def test_an_exception_takes_the_stand_ins_away_too():
    original = torch.cuda.current_device
    with pytest.raises(KeyError), megatron_device():
        raise KeyError
    assert torch.cuda.current_device is original


def test_with_cuda_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    before = [getattr(owner, name) for owner, name in PATCHED]
    with megatron_device() as device:
        assert device == torch.device("cuda", 3)
        assert [getattr(owner, name) for owner, name in PATCHED] == before
        assert torch.zeros(2).type() == "torch.FloatTensor"
