"""Speed of the token sampler: key/value cache against recomputing everything, and against the memory's speed.

    python -m benchmarks.sample_lm --preset nano
    python -m benchmarks.sample_lm --preset landiff --device cuda

A token is one drawn code of one prompt; guidance doubles the rows that a token costs. Every step of the
cached sampler reads all matmul weights and the cache so far once: those bytes per second, next to what a
plain copy reaches on the same device, say how far the sampler is from its limit. A model that fits into the
processor's caches can exceed the copy. Recomputing is timed at evenly spaced lengths and averaged.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from landiff.configs import load
from landiff.model_zoo.config import LMConfig, ModelConfig, TokenSamplingConfig
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens

COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    method: str
    batch: int
    tokens_per_s: float
    step_ms: float
    bytes_per_step: float | None  # None: the work, not the memory, is what counts


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of `work`, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device, repeats=10)


def build(config: LMConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config).to_inference(dtype)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model


def step_bytes(model: LanguageModel, rows: int, positions: float) -> float:
    """What one step has to read: weights of blocks and head, and keys and values of `positions` positions."""
    weights = sum(
        p.numel() * p.element_size()
        for m in (model.blocks, model.final_norm, model.head)
        for p in m.parameters()
    )
    config = model.config
    element = model.blocks[0].wqkv.weight.element_size()
    return weights + 2 * config.num_layers * rows * positions * config.hidden_size * element


def measure_cached(
    model: LanguageModel, batch: int, frames: int, text_length: int, guidance: float, repeats: int
) -> Row:
    device = model.head.weight.device
    prompts = Prompts(
        torch.randn(batch, text_length, model.config.text_dim, device=device),
        torch.full((batch,), 0.1),
    )
    config = TokenSamplingConfig(guidance=guidance)
    seeds = list(range(batch))
    time_s = seconds(
        lambda: sample_tokens(model, prompts, frames, config, seeds=seeds), device, repeats
    )
    steps = model.layout.num_codes(frames)
    mean_positions = (
        model.layout.first_start(text_length) + model.layout.sequence_length(frames, text_length)
    ) / 2
    rows = batch if guidance == 1 else 2 * batch
    return Row(
        "cache",
        batch,
        batch * steps / time_s,
        1e3 * time_s / steps,
        step_bytes(model, rows, mean_positions),
    )


@torch.no_grad()
def measure_recomputing(
    model: LanguageModel,
    batch: int,
    frames: int,
    text_length: int,
    guidance: float,
    repeats: int,
    lengths: int,
) -> Row:
    weight = model.blocks[0].wqkv.weight
    rows = batch if guidance == 1 else 2 * batch
    first, last = (
        model.layout.first_start(text_length),
        model.layout.sequence_length(frames, text_length),
    )
    times = []
    for index in range(lengths):
        length = first + (last - first) * (2 * index + 1) // (2 * lengths)
        x_RSD = torch.randn(
            rows, length, model.config.hidden_size, device=weight.device, dtype=weight.dtype
        )
        times.append(
            seconds(
                lambda x=x_RSD: model.logits(model.transform(x)[:, -1:]), weight.device, repeats
            )
        )
    step_s = statistics.mean(times)
    return Row("recompute", batch, batch / step_s, 1e3 * step_s, None)


def table(rows: list[Row], bandwidth: float) -> str:
    lines = [
        f"{'method':<10} {'batch':>5} {'tokens/s':>10} {'ms/step':>9} {'GB/s':>8} {'of copy':>8}"
    ]
    for row in rows:
        line = f"{row.method:<10} {row.batch:>5} {row.tokens_per_s:>10.1f} {row.step_ms:>9.2f}"
        if row.bytes_per_step is None:
            lines.append(f"{line} {'-':>8} {'-':>8}")
        else:
            rate = row.bytes_per_step / row.step_ms * 1e3
            lines.append(f"{line} {rate / 1e9:>8.2f} {rate / bandwidth:>8.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="nano", help="nano, landiff, or a model YAML of your own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--frames", type=int, help="semantic frames; default: one segment")
    parser.add_argument("--text-length", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--lengths", type=int, default=8, help="lengths at which recomputing is timed"
    )
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    source = (
        options.preset if options.preset.endswith((".yaml", ".yml")) else f"{options.preset}/model"
    )
    config = load(ModelConfig, source).lm
    frames = options.frames or config.segment_frames
    model = build(config, device, dtype)
    bandwidth = copy_bandwidth(device)
    rows = []
    for batch in options.batches:
        shape = (batch, frames, options.text_length, options.guidance, options.repeats)
        rows += [measure_cached(model, *shape), measure_recomputing(model, *shape, options.lengths)]

    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{options.preset}: {parameters / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}, {frames} frames, "
        f"{options.text_length} text tokens, guidance {options.guidance:g}; {name}; copy {bandwidth / 1e9:.1f} GB/s"
    )
    print(table(rows, bandwidth))


if __name__ == "__main__":
    main()
