"""The host waits for no device between the steps of the samplers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from landiff.model_zoo.config import LMConfig, ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.latents import SamplerOptions, sample_latents, seeded_noise
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens
from landiff.model_zoo.schedule import NoiseSchedule
from tests.model_zoo.tiny_diffusion import TINY, randomize

LM = LMConfig(
    codebook_size=20,
    iframe_tokens=6,
    pframe_tokens=4,
    segment_frames=4,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    ffn_size=96,
    max_positions=128,
    text_dim=12,
    max_text_tokens=6,
    micro_hidden_size=16,
    micro_frequency_dim=8,
)
FRAMES = 12
WARM_UP = 20  # positions, after which steps of all numbers of tokens were captured


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Context in which an operator that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draw_latents(device: str, num_steps: int, on_step=None) -> None:
    """Samples with control branch and guidance."""
    torch.manual_seed(0)
    model = ControlledDiffusion(TINY).eval()
    randomize(model)
    model.to(device)
    text = torch.randn(1, 5, 12, device=device)
    features = torch.randn(1, 3, 8, 2, 3, device=device)
    options = SamplerOptions(num_steps=num_steps)
    schedule = NoiseSchedule(ScheduleConfig())
    sample_latents(
        model, schedule, text, features, seeded_noise([1]), options=options, on_step=on_step
    )


def draw_tokens(device: str, lengths: tuple[int, ...], progress=None) -> None:
    """Samples prompts of some lengths with guidance."""
    model = LanguageModel(LM).eval().requires_grad_(False).to(device)
    batch = len(lengths)
    prompts = Prompts(
        torch.randn(batch, 6, 12, device=device),
        torch.full((batch,), 0.1, device=device),
        torch.tensor(lengths),
    )
    config = TokenSamplingConfig(guidance=2.0, top_p=0.9)
    seeds = list(range(batch))
    sample_tokens(model, prompts, FRAMES, config, seeds=seeds, progress=progress)


def reads(work, *arguments) -> int:
    """How often a call copies a number from a tensor, for which a GPU would be waited for."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work("cpu", *arguments)
    counts = {event.key: event.count for event in found.key_averages()}
    return counts.get("aten::_local_scalar_dense", 0) + counts.get("aten::nonzero", 0)


def test_a_step_of_the_latent_sampler_reads_nothing():
    assert reads(draw_latents, 2) == reads(draw_latents, 5)


@pytest.mark.gpu
def test_the_latent_sampler_does_not_wait_between_its_steps():
    def on_step(step) -> None:
        if step.step == 0:
            torch.cuda.set_sync_debug_mode("error")

    with waiting_raises():
        torch.cuda.set_sync_debug_mode("default")  # the first step allocates and checks
        draw_latents("cuda", 4, on_step)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(6,), (6, 3)])
def test_tokens_are_sampled_without_waiting(lengths):
    def progress(done: int, total: int) -> None:
        strict = WARM_UP <= done < total - 1
        torch.cuda.set_sync_debug_mode("error" if strict else "default")

    with waiting_raises():
        torch.cuda.set_sync_debug_mode("default")
        draw_tokens("cuda", lengths, progress)


def test_sampling_a_token_reads_nothing(monkeypatch):
    numbers = []
    for frames in (6, FRAMES):
        monkeypatch.setattr("tests.model_zoo.test_sample_waits.FRAMES", frames)
        numbers.append(reads(draw_tokens, (6, 3)))
    assert numbers[0] == numbers[1]
