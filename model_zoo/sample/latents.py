"""Latents from text and semantic features: SDE DPM-Solver++ (2M) with dynamic guidance, and its streaming form.

Letters: B batch, T latent frames, C channels, H W latent height and width, K clean prefix frames, L text rows,
D text width, h w feature rows and columns.

Source: the sampler of CogVideoX/SAT as LanDiff uses it (arXiv 2503.04606); DPM-Solver++: arXiv 2211.01095.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.sample.sizes import num_chunks
from landiff.model_zoo.schedule import NoiseSchedule

# noise(step, shape) -> float32: step 0 is the start of the sampling, step j = 1, 2, ... what sampler step j adds
# (the last step adds none). Give one that replays recorded tensors to repeat a run elsewhere.
Noise = Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample. With `dynamic` guidance the scale moves between 1 and 1 + `guidance`."""

    num_steps: int = 50
    guidance: float = 6.0
    guidance_exponent: float = 5.0
    # What the dynamic scale is a function of. "timestep" (999 ... 19) is what the reference and diffusers' CogVideoX
    # pipeline compute: the scale jumps between its bounds. "step" (the steps left, n ... 1) rises smoothly, as the
    # formula was meant. "constant" is plain guidance by 1 + `guidance`.
    dynamic: Literal["timestep", "step", "constant"] = "timestep"


@dataclass(frozen=True)
class SamplerStep:
    step: int  # 0-based
    timestep: int
    denoised: Tensor  # guided estimate of x0
    state: Tensor  # after this step, before the prefix is put back


OnStep = Callable[[SamplerStep], Tensor | None]
Stop = Callable[[], bool]  # asked after each step: true ends the sampling with the state as it is


def guidance_scale(options: SamplerOptions, step: int, timestep: int) -> float:
    """Scale s of d = u + s * (c - u) at one step."""
    if options.dynamic == "constant":
        return 1 + options.guidance
    counter = timestep if options.dynamic == "timestep" else options.num_steps - step
    base = (options.num_steps - counter) / options.num_steps
    return 1 + options.guidance * (1 - math.cos(math.pi * base**options.guidance_exponent)) / 2


def seeded_noise(seeds: Sequence[int]) -> Noise:
    """One CPU generator per row of the batch: a row's numbers depend on its own seed, not on its neighbours or
    the device. The generators run on from one sampling to the next (the chunks of a stream)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(_step: int, shape: tuple[int, ...]) -> Tensor:
        assert shape[0] == len(generators), (shape, len(generators))
        return torch.stack(
            [torch.randn(shape[1:], generator=generator) for generator in generators]
        )

    return noise


def reference_noise(generator: torch.Generator) -> Noise:
    """Draws in the reference's number and order: two a step, of which the second counts, but one for the start and
    for the first step. A seed then gives what it gives there, on the generator's device."""

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        drawn = [
            torch.randn(shape, generator=generator, device=generator.device)
            for _ in range(1 if step < 2 else 2)
        ]
        return drawn[-1]

    return noise


def sample_latents(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    noise: Noise,
    options: SamplerOptions | None = None,
    prefix_BKCHW: Tensor | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Tensor:
    """float32 [B, T, C, H, W] scaled latents; T is the features' number of frames.

    The unconditional branch sees text of zeros and the same features. The first K frames of the result are the
    prefix, which is put back before every step. `on_step` hears of each step and may give another state to go on
    from. Raises ValueError where shapes do not fit.
    """
    options = options or SamplerOptions()
    shape = latent_shape(model, text_BLD, features_BTChw)
    result = torch.empty(0)
    with torch.no_grad():
        start = noise(0, shape).to(features_BTChw.device, torch.float32)
        assert start.shape == shape, (start.shape, shape)
        state = fix_prefix(start, prefix_BKCHW)
        semantic = model.semantic(features_BTChw)
        estimate = _guided_denoiser(model, text_BLD, semantic)
        for done in _solve(estimate, schedule, state, noise, options, prefix_BKCHW, on_step):
            result = done.state
            if stop is not None and stop():
                break
    return fix_prefix(result, prefix_BKCHW)


def stream_latents(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    noise_of_chunk: Callable[[int], Noise],
    options: SamplerOptions | None = None,
    window: int = 13,
    clean: int = 7,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Iterator[Tensor]:
    """Latents of a long clip, chunk by chunk: first `window` frames, then `window - clean` new ones each time.

    `features` are those of all segments, joined over time. Chunk i sees the frames i * (window - clean) onwards
    and continues from the last `clean` latents, reused as they are. N chunks give window + (N - 1) * (window -
    clean) latents (13 and 6: 49 + 24 (N - 1) frames of video); features past the last whole chunk are not
    used, see `num_chunks`. Joined over time the parts are the clip. The reference has no such loop; the window
    arithmetic is its streaming interface's.
    """
    total = features_BTChw.shape[1]
    chunks, window = num_chunks(total, window, clean), min(window, total)
    stride = window - clean
    last: Tensor | None = None
    for chunk in range(chunks):
        features = features_BTChw[:, chunk * stride : chunk * stride + window]
        prefix = None if last is None else last[:, -clean:] if clean else None
        last = sample_latents(
            model,
            schedule,
            text_BLD,
            features,
            noise_of_chunk(chunk),
            options,
            prefix,
            on_step,
            stop,
        )
        yield last if chunk == 0 else last[:, clean:]
        if stop is not None and stop():
            return


def latent_shape(
    model: ControlledDiffusion, text_BLD: Tensor, features_BTChw: Tensor
) -> tuple[int, ...]:
    """[B, T, C, H, W] of the latents that these conditions call for."""
    batch, num_frames, _, rows, columns = features_BTChw.shape
    if len(text_BLD) != batch:
        raise ValueError(f"{len(text_BLD)} rows of text for {batch} clips of features")
    scale = model.semantic.scale
    return (
        batch,
        num_frames,
        model.config.transformer.latent_channels,
        rows * scale,
        columns * scale,
    )


def fix_prefix(state_BTCHW: Tensor, prefix_BKCHW: Tensor | None) -> Tensor:
    """`state` with its first frames replaced by the prefix."""
    if prefix_BKCHW is None:
        return state_BTCHW
    kept = prefix_BKCHW.shape[1]
    expected = (len(state_BTCHW), kept, *state_BTCHW.shape[2:])
    if kept >= state_BTCHW.shape[1] or tuple(prefix_BKCHW.shape) != expected:
        raise ValueError(
            f"a prefix {list(prefix_BKCHW.shape)} does not fit latents {list(state_BTCHW.shape)}"
        )
    return torch.cat([prefix_BKCHW.to(state_BTCHW), state_BTCHW[:, kept:]], dim=1)


# estimate(state, timestep) -> velocities (unconditional, conditional) in float32
_Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _guided_denoiser(
    model: ControlledDiffusion, text_BLD: Tensor, semantic_BTCHW: Tensor
) -> _Estimate:
    both_text = torch.cat([torch.zeros_like(text_BLD), text_BLD])
    both_semantic = torch.cat([semantic_BTCHW, semantic_BTCHW])

    def estimate(state_BTCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        state = torch.cat([state_BTCHW, state_BTCHW]).to(model.dtype)
        timesteps = torch.full((len(state),), float(timestep), device=state.device)
        velocity = model(state, timesteps, both_text, semantic_BTCHW=both_semantic).float()
        unconditional, conditional = velocity.chunk(2)
        return unconditional, conditional

    return estimate


def _solve(
    estimate: _Estimate,
    schedule: NoiseSchedule,
    state: Tensor,
    noise: Noise,
    options: SamplerOptions,
    prefix: Tensor | None,
    on_step: OnStep | None,
) -> Iterator[SamplerStep]:
    """The solver's steps. Scalars are float64, the state float32."""
    table = schedule.sampler_table(options.num_steps)
    log_snr = [_half_log_snr(a) for a in table.alphas_sqrt]
    previous: Tensor | None = None
    for step, timestep in enumerate(table.timesteps):
        state = fix_prefix(state, prefix)
        a = table.denoiser_alphas_sqrt[step]
        unconditional, conditional = (
            a * state - math.sqrt(1 - a**2) * velocity for velocity in estimate(state, timestep)
        )
        denoised = unconditional + guidance_scale(options, step, timestep) * (
            conditional - unconditional
        )
        if step == options.num_steps - 1:
            state = denoised
        else:
            direction = denoised
            h = log_snr[step + 1] - log_snr[step]
            if previous is not None:
                # infinite after the first step, which starts from no signal at all: then the weight is 0
                weight = h / (2 * (log_snr[step] - log_snr[step - 1]))
                direction = (1 + weight) * denoised - weight * previous
            a, a_next = table.alphas_sqrt[step], table.alphas_sqrt[step + 1]
            b_next = math.sqrt(1 - a_next**2)
            keep = b_next / math.sqrt(1 - a**2) * math.exp(-h)
            fresh = b_next * math.sqrt(-math.expm1(-2 * h))
            drawn = noise(step + 1, tuple(state.shape)).to(state)
            state = keep * state - math.expm1(-2 * h) * a_next * direction + fresh * drawn
        previous = denoised
        done = SamplerStep(step=step, timestep=timestep, denoised=denoised, state=state)
        replaced = None if on_step is None else on_step(done)
        if replaced is not None:
            state, done = replaced, replace(done, state=replaced)
        yield done


def _half_log_snr(alpha_sqrt: float) -> float:
    if alpha_sqrt in (0.0, 1.0):
        return -math.inf if alpha_sqrt == 0.0 else math.inf
    return math.log(alpha_sqrt / math.sqrt(1 - alpha_sqrt**2))
