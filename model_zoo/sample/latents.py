"""Sampling of latents from text and semantic features, for single chunks and for long videos.

The solver is SDE DPM-Solver++ (2M) with dynamic guidance (docs/specification.md §5.7).

Shape letters (docs/glossary.md): B batch, T latent frames, C channels, H, W height and width in
latent cells, h, w height and width in feature cells, L text rows, D width of text states.

Source: the sampler of CogVideoX/SAT as LanDiff uses it (arXiv 2503.04606); DPM-Solver++ (arXiv
2211.01095).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.device import to_device
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.sample.solvers import Solver, build_scheduler
from landiff.model_zoo.schedule import NoiseSchedule, Prediction, SamplerTable

# noise(step, shape) returns float32 standard normal numbers. Step 0 is the start of the sampling,
# step j = 1, 2, ... the noise that sampling step j adds; the last step adds none. A function that
# returns recorded tensors repeats a run of another implementation.
Noise = Callable[[int, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class SamplerOptions:
    """Options of the sampler.

    num_steps: sampling steps.
    guidance: the scale of dynamic guidance varies between 1 and 1 + `guidance`.
    guidance_exponent: exponent in the formula of `guidance_scale`.
    dynamic: what the scale is a function of. "timestep" (999 ... 19) is what the reference and
        diffusers' CogVideoX pipeline compute: the scale jumps between its bounds. "step" (the steps
        left, n ... 1) rises smoothly, as the formula was meant. "constant" is 1 + `guidance`.
    guidance_interval: part of the steps with guidance, from 0 (noise) to 1. Outside, the scale is 1
        and the unconditional pass is left out.
    guidance_rescale: part of the result that gets the standard deviation of the conditional
        estimate of x0 back, against colours that guidance saturates (arXiv 2305.08891, §3.4).
    control_guidance: what the control branch changes in the estimate of x0 is multiplied by
        1 + `control_guidance`, as for the second condition of InstructPix2Pix (arXiv 2211.09800).
        Above 0 each step runs the main transformer once more, without control branch.
    solver: "sde-dpm++" is the reference's; the others are deterministic (solvers.py).
    """

    num_steps: int = 50
    guidance: float = 6.0
    guidance_exponent: float = 5.0
    dynamic: Literal["timestep", "step", "constant"] = "timestep"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    control_guidance: float = 0.0
    solver: Solver = "sde-dpm++"


@dataclass(frozen=True)
class SamplerStep:
    """One finished step of the sampler.

    step: counted from 0.
    denoised: estimate of the clean latents [B, T, C, H, W], with guidance.
    state: latents [B, T, C, H, W] after the step, before the prefix replaces their first frames.
    """

    step: int
    timestep: int
    denoised: Tensor
    state: Tensor


# estimate(state_BTCHW, timestep, guided) returns the network's unconditional and conditional output
# in float32. Without `guided`, both are the conditional one.
_Estimate = Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
# network(state_BTCHW, timestep_B, text_BLD) returns what `TransformerConfig.prediction` names.
_Network = Callable[[Tensor, Tensor, Tensor], Tensor]

OnStep = Callable[[SamplerStep], Tensor | None]
Stop = Callable[[], bool]


def guidance_scale(options: SamplerOptions, step: int, timestep: int) -> float:
    """Scale s of one step in u + s · (c - u), with unconditional u and conditional c."""
    first, last = options.guidance_interval
    if not first <= step / options.num_steps < last:
        return 1.0
    if options.dynamic == "constant":
        return 1 + options.guidance
    counter = options.num_steps - step
    if options.dynamic == "timestep":
        counter = timestep
    base = (options.num_steps - counter) / options.num_steps
    return 1 + options.guidance * (1 - math.cos(math.pi * base**options.guidance_exponent)) / 2


def seeded_noise(seeds: Sequence[int]) -> SeededNoise:
    """Noise from one CPU generator per row of the batch."""
    return SeededNoise(seeds)


class SeededNoise:
    """Noise from one CPU generator per row of the batch.

    The numbers of a row depend on its own seed, not on other rows or the device. They are not
    repeated when the function is used again, for the next chunk of a long video.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _step: int, shape: tuple[int, ...]) -> Tensor:
        """The next numbers of all rows."""
        assert shape[0] == len(self._generators), (shape, len(self._generators))
        rows = [torch.randn(shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(rows)

    @property
    def state(self) -> Tensor:
        """The positions in the sequences of numbers, uint8 [B, bytes]."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def restore(self, state: Tensor) -> None:
        """Continues at positions that `state` returned."""
        for generator, row in zip(self._generators, state, strict=True):
            generator.set_state(row.clone())


def reference_noise(generator: torch.Generator) -> Noise:
    """Noise generated in the same number and order of calls as in the reference.

    The reference generates noise once for the start and for the first step, and twice for each
    further step, where the second is used. On the same device a seed gives the reference's numbers.
    """

    def noise(step: int, shape: tuple[int, ...]) -> Tensor:
        if step >= 2:
            torch.randn(shape, generator=generator, device=generator.device)
        return torch.randn(shape, generator=generator, device=generator.device)

    return noise


def sample_latents(
    model: ControlledDiffusion,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    features_BTChw: Tensor,
    noise: Noise,
    *,
    negative_BLD: Tensor | None = None,
    options: SamplerOptions | None = None,
    prefix_BTCHW: Tensor | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Tensor:
    """Samples scaled latents, float32 [B, T, C, H, W] with T of the features.

    The unconditional branch receives `negative_BLD` or zeros as text, and the same features.

    prefix_BTCHW: the first latent frames of the result, with a T of its own. They replace the first
        frames of the state before every step.
    on_step: called after each step. If it returns a tensor, sampling continues from that state.
    stop: called after each step. If it returns true, sampling ends with the state so far.

    Raises ValueError for shapes that do not fit.
    """
    shape = latent_shape(model, text_BLD, features_BTChw)
    with torch.no_grad():
        semantic_BTCHW = model.semantic(features_BTChw)
    both_BTCHW = torch.cat([semantic_BTCHW, semantic_BTCHW])

    def network(state_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        semantic = both_BTCHW[: len(state_BTCHW)]
        return model(state_BTCHW.to(model.dtype), timestep_B, text_BLD, semantic_BTCHW=semantic)

    options = options or SamplerOptions()
    estimate = _guided_denoiser(network, text_BLD, negative_BLD)
    if options.control_guidance:
        estimate = _away_from_main(estimate, model, text_BLD, options.control_guidance)
    return _sample(
        estimate,
        schedule,
        shape,
        noise,
        device=features_BTChw.device,
        options=options,
        prediction=model.config.transformer.prediction,
        prefix_BTCHW=prefix_BTCHW,
        on_step=on_step,
        stop=stop,
    )


def sample_main_latents(
    model: DiffusionTransformer,
    schedule: NoiseSchedule,
    text_BLD: Tensor,
    noise: Noise,
    *,
    options: SamplerOptions | None = None,
    sizes: TransformerConfig | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Samples scaled latents from text with the main transformer alone, float32 [B, T, C, H, W].

    sizes: config with the size of the latents (`TransformerConfig.sized`). None: the model's own.
    on_step: as in `sample_latents`.
    """
    config = sizes or model.config

    def network(state_BTCHW: Tensor, timestep_B: Tensor, text_BLD: Tensor) -> Tensor:
        return model(state_BTCHW.to(model.dtype), timestep_B, text_BLD)

    sides = (config.latent_height, config.latent_width)
    return _sample(
        _guided_denoiser(network, text_BLD),
        schedule,
        (len(text_BLD), config.latent_frames, config.latent_channels, *sides),
        noise,
        device=text_BLD.device,
        options=options or SamplerOptions(),
        prediction=config.prediction,
        on_step=on_step,
    )


def _sample(
    estimate: _Estimate,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    noise: Noise,
    *,
    device: torch.device,
    options: SamplerOptions,
    prediction: Prediction,
    prefix_BTCHW: Tensor | None = None,
    on_step: OnStep | None = None,
    stop: Stop | None = None,
) -> Tensor:
    """The sampler: from noise to the last state, [B, T, C, H, W]."""
    result = torch.empty(0)
    with torch.no_grad():
        start = to_device(noise(0, shape), device).float()
        assert start.shape == shape, (start.shape, shape)
        state = fix_prefix(start, prefix_BTCHW)
        if options.solver == "sde-dpm++":
            steps = _solve(
                estimate,
                schedule.sampler_table(options.num_steps),
                state,
                noise,
                options=options,
                prediction=prediction,
                prefix=prefix_BTCHW,
                on_step=on_step,
            )
        else:
            steps = _solve_with_diffusers(
                estimate,
                schedule,
                state,
                options=options,
                prediction=prediction,
                prefix=prefix_BTCHW,
                on_step=on_step,
            )
        for step in steps:
            result = step.state
            if stop is not None and stop():
                break
    return fix_prefix(result, prefix_BTCHW)


def latent_shape(
    model: ControlledDiffusion, text_BLD: Tensor, features_BTChw: Tensor
) -> tuple[int, ...]:
    """Shape [B, T, C, H, W] of the latents for these conditions.

    Raises ValueError if text and features differ in B.
    """
    batch, num_frames, _, rows, columns = features_BTChw.shape
    if len(text_BLD) != batch:
        raise ValueError(f"{len(text_BLD)} rows of text for {batch} clips of features")
    scale = model.semantic.scale
    channels = model.config.transformer.latent_channels
    return batch, num_frames, channels, rows * scale, columns * scale


def fix_prefix(state_BTCHW: Tensor, prefix_BTCHW: Tensor | None) -> Tensor:
    """`state_BTCHW` with its first frames replaced by those of the prefix.

    Raises ValueError for a prefix of another shape, or one that replaces all frames.
    """
    if prefix_BTCHW is None:
        return state_BTCHW
    length = prefix_BTCHW.shape[1]
    expected = (len(state_BTCHW), length, *state_BTCHW.shape[2:])
    if length >= state_BTCHW.shape[1] or tuple(prefix_BTCHW.shape) != expected:
        raise ValueError(
            f"a prefix {list(prefix_BTCHW.shape)} does not fit latents {list(state_BTCHW.shape)}"
        )
    return torch.cat([prefix_BTCHW.to(state_BTCHW), state_BTCHW[:, length:]], dim=1)


def _guided_denoiser(
    network: _Network, text_BLD: Tensor, negative_BLD: Tensor | None = None
) -> _Estimate:
    """The network with text, run once on a batch of both branches."""
    if negative_BLD is None:
        negative_BLD = torch.zeros_like(text_BLD)
    both_text = torch.cat([negative_BLD, text_BLD])

    def estimate(state_BTCHW: Tensor, timestep: int, guided: bool) -> tuple[Tensor, Tensor]:
        state, text = state_BTCHW, text_BLD
        if guided:
            state, text = torch.cat([state_BTCHW, state_BTCHW]), both_text
        timesteps = torch.full((len(state),), float(timestep), device=state.device)
        output = network(state, timesteps, text).float()
        if not guided:
            return output, output
        unconditional, conditional = output.chunk(2)
        return unconditional, conditional

    return estimate


def _away_from_main(
    estimate: _Estimate, model: ControlledDiffusion, text_BLD: Tensor, guidance: float
) -> _Estimate:
    """`estimate`, moved away from the output of the main transformer alone.

    Both branches move by `guidance` times what the control branch changes, so that guidance by text
    stays what it is.
    """

    def moved(state_BTCHW: Tensor, timestep: int, guided: bool) -> tuple[Tensor, Tensor]:
        unconditional, conditional = estimate(state_BTCHW, timestep, guided)
        timesteps = torch.full((len(state_BTCHW),), float(timestep), device=state_BTCHW.device)
        alone = model(state_BTCHW.to(model.dtype), timesteps, text_BLD).float()
        change = guidance * (conditional - alone)
        return unconditional + change, conditional + change

    return moved


def _solve(
    estimate: _Estimate,
    table: SamplerTable,
    state: Tensor,
    noise: Noise,
    *,
    options: SamplerOptions,
    prediction: Prediction = "velocity",
    prefix: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Iterator[SamplerStep]:
    """The steps of the solver. Scalars are float64, the state is float32."""
    previous: Tensor | None = None
    for step, timestep in enumerate(table.timesteps):
        state = fix_prefix(state, prefix)
        denoised = _denoise(
            estimate,
            state,
            step,
            timestep,
            a=table.denoiser_alphas_sqrt[step],
            options=options,
            prediction=prediction,
        )
        if step == options.num_steps - 1:
            state = denoised
        else:
            drawn = to_device(noise(step + 1, tuple(state.shape)), state.device).to(state)
            state = _next_state(
                table, step, state, denoised=denoised, previous=previous, drawn=drawn
            )
        previous = denoised
        done = SamplerStep(step=step, timestep=timestep, denoised=denoised, state=state)
        replaced = None
        if on_step is not None:
            replaced = on_step(done)
        if replaced is not None:
            state = replaced
            done = replace(done, state=replaced)
        yield done


def _denoise(
    estimate: _Estimate,
    state: Tensor,
    step: int,
    timestep: int,
    *,
    a: float,
    options: SamplerOptions,
    prediction: Prediction,
) -> Tensor:
    """Estimate of x0 with guidance.

    a: level of the signal in `state`.
    """
    scale = guidance_scale(options, step, timestep)
    unconditional, conditional = estimate(state, timestep, scale != 1)
    if prediction == "velocity":
        b = math.sqrt(1 - a**2)
        unconditional = a * state - b * unconditional
        conditional = a * state - b * conditional
    if scale == 1:
        return conditional
    denoised = unconditional + scale * (conditional - unconditional)
    if not options.guidance_rescale:
        return denoised
    axes = tuple(range(1, denoised.ndim))
    ratio = conditional.std(axes, keepdim=True) / denoised.std(axes, keepdim=True)
    return denoised * (1 + options.guidance_rescale * (ratio - 1))


def _solve_with_diffusers(
    estimate: _Estimate,
    schedule: NoiseSchedule,
    state: Tensor,
    *,
    options: SamplerOptions,
    prediction: Prediction,
    prefix: Tensor | None,
    on_step: OnStep | None,
) -> Iterator[SamplerStep]:
    """The steps of a deterministic solver. Its own state is a multiple of the network's input.

    A tensor that `on_step` returns is not used.
    """
    scheduler = build_scheduler(options.solver, schedule, options.num_steps)
    state = state * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        noised = fix_prefix(scheduler.scale_model_input(state, timestep), prefix)
        denoised = _denoise(
            estimate,
            noised,
            step,
            int(timestep),
            a=float(schedule.alphas_sqrt[int(timestep)]),
            options=options,
            prediction=prediction,
        )
        state = scheduler.step(denoised, timestep, state).prev_sample
        done = SamplerStep(step=step, timestep=int(timestep), denoised=denoised, state=state)
        if on_step is not None:
            on_step(done)
        yield done


def _next_state(
    table: SamplerTable,
    step: int,
    state: Tensor,
    *,
    denoised: Tensor,
    previous: Tensor | None,
    drawn: Tensor,
) -> Tensor:
    """State after a step that is not the last.

    previous: `denoised` of the step before, None in the first step.
    drawn: the noise to add.
    """
    a = table.alphas_sqrt[step]
    a_next = table.alphas_sqrt[step + 1]
    log_snr = _half_log_snr(a)
    h = _half_log_snr(a_next) - log_snr
    direction = denoised
    if previous is not None:
        # The first step starts without any signal, so its h is infinite and the weight 0.
        h_previous = log_snr - _half_log_snr(table.alphas_sqrt[step - 1])
        weight = h / (2 * h_previous)
        direction = (1 + weight) * denoised - weight * previous
    b_next = math.sqrt(1 - a_next**2)
    keep = b_next / math.sqrt(1 - a**2) * math.exp(-h)
    fresh = b_next * math.sqrt(-math.expm1(-2 * h))
    return keep * state - math.expm1(-2 * h) * a_next * direction + fresh * drawn


def _half_log_snr(alpha_sqrt: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, infinite at pure signal and pure noise."""
    if alpha_sqrt == 0.0:
        return -math.inf
    if alpha_sqrt == 1.0:
        return math.inf
    return math.log(alpha_sqrt / math.sqrt(1 - alpha_sqrt**2))
