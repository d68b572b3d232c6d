"""Steps and memory of sampling with int8 weights (`quantize: int8`) against float weights.

    python -m benchmarks.sample_int8
    python -m benchmarks.sample_int8 --preset landiff --rounds 3

One new token of the language model, and one step of the diffusion model with guidance (a batch of
2), untrained, computed in turns with float32, bfloat16, and int8 weights under both. The table
shows medians: of CPU time on the CPU, which other processes hardly change. `MB` are all
parameters and buffers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.support.models import PRESETS, device_name, load_preset, timed
from landiff.launchers.results.sampling.loading import in_precision
from landiff.model_zoo.config import DiffusionConfig, LMConfig
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.decode import Decoder
from landiff.model_zoo.sample.placement.quantized import plain_tensors, quantize_blocks

ROWS = [(precision, weights) for precision in ("fp32", "bf16") for weights in ("float", "int8")]
TOKENS = 32  # of one measurement, after as many positions


def build(
    cls: type[nn.Module], config: LMConfig | DiffusionConfig, precision: str, weights: str
) -> nn.Module:
    """A model as `landiff sample` loads it, with the same random weights every time."""
    torch.manual_seed(0)
    model = in_precision(cls(config), precision).eval().requires_grad_(False)
    if weights == "int8":
        quantize_blocks(model)
    return model.to(pick_device("auto"))


def megabytes(model: nn.Module) -> float:
    """Memory of all parameters and buffers."""
    tensors = [plain for tensor in model.parameters() for plain in plain_tensors(tensor)]
    return sum(tensor.nbytes for tensor in [*tensors, *model.buffers()]) / 1e6


def token_step(model: nn.Module) -> Callable[[], object]:
    """Decodes `TOKENS` tokens one by one, after a prompt of as many positions."""
    assert isinstance(model, LanguageModel)
    dtype = model.get_parameter("blocks.0.wqkv.weight").dtype
    x_BSD = torch.randn(1, 2 * TOKENS, model.config.hidden_size).to(model.head.weight.device, dtype)
    decoder = Decoder(model, 1, 2 * TOKENS)
    decoder.step(x_BSD[:, :TOKENS])

    def decode() -> None:
        decoder.length = TOKENS
        for position in range(TOKENS, 2 * TOKENS):
            decoder.step(x_BSD[:, position : position + 1])

    return decode


def sampling_step(model: nn.Module) -> Callable[[], Tensor]:
    """One forward pass with both branches of guidance."""
    assert isinstance(model, ControlledDiffusion)
    sizes = model.config.transformer
    device = pick_device("auto")
    shape = (2, sizes.latent_frames, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    latents_BTCHW = torch.randn(shape).to(device, model.dtype)
    semantic_BTCHW = torch.randn(shape).to(device, model.dtype)
    text_BLD = torch.randn(2, sizes.text_length, sizes.text_dim).to(device, model.dtype)
    timesteps_B = torch.tensor([500, 500], device=device)
    return lambda: model(latents_BTCHW, timesteps_B, text_BLD, semantic_BTCHW=semantic_BTCHW)


def seconds_of(step: Callable[[], object]) -> float:
    """Seconds of the GPU, or of CPU time of this process."""
    device = pick_device("auto")
    if device.type == "cuda":
        return timed(step, device)
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(
    models: dict[tuple[str, str], nn.Module], step_of: Callable[[nn.Module], Callable], rounds: int
) -> dict[tuple[str, str], float]:
    """Median seconds of a step of each model, which take turns."""
    steps = {row: step_of(model) for row, model in models.items()}
    seconds: dict[tuple[str, str], list[float]] = {row: [] for row in steps}
    for number in range(rounds + 1):
        for row, step in steps.items():
            duration = seconds_of(step)
            if number:  # the first warms up
                seconds[row].append(duration)
    return {row: median(values) for row, values in seconds.items()}


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="10m", help=PRESETS)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each model")
    args = parser.parse_args()
    sys.path.append(str(Path(sys.prefix) / "quantize"))  # where `make quantize` installs torchao
    preset = load_preset(args.preset)
    assert preset.lm and preset.diffusion, args.preset
    print(f"{args.preset}, {device_name(pick_device('auto'))}")
    print(
        f"{'model':<12}{'precision':<11}{'weights':<9}{'MB':>8}{'ms/step':>10}{'time':>8}{'MB':>8}"
    )
    for name, cls, config, step_of, count in (
        ("lm", LanguageModel, preset.lm, token_step, TOKENS),
        ("diffusion", ControlledDiffusion, preset.diffusion, sampling_step, 1),
    ):
        models = {row: build(cls, config, *row) for row in ROWS}
        seconds = measure(models, step_of, args.rounds)
        for precision, weights in ROWS:
            row = precision, weights
            size, time_s = megabytes(models[row]), seconds[row]
            of_size = size / megabytes(models[precision, "float"])
            of_time = time_s / seconds[precision, "float"]
            print(
                f"{name:<12}{precision:<11}{weights:<9}{size:>8.1f}{1e3 * time_s / count:>10.2f}"
                f"{of_time:>7.2f}x{of_size:>7.2f}x"
            )


if __name__ == "__main__":
    main()
