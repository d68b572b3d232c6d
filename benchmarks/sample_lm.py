"""Speed of token sampling: with the decoder, with the model's own cache, and without a cache.

    python -m benchmarks.sample_lm --preset nano
    git worktree add ../old dde0a06 && python -m benchmarks.sample_lm --baseline ../old
    python -m benchmarks.sample_lm --preset landiff --device cuda

A token is one drawn code of one prompt; with guidance it costs two rows. Every cached step reads
all matmul weights and the cache so far once. These bytes per second, relative to a plain copy on
the same device, show how far the sampler is from its limit. A model that fits into the CPU's caches
can exceed the copy. Sampling without cache is timed at evenly spaced lengths and averaged.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.support.models import PRESETS, device_name, load_preset, timed
from landiff.model_zoo.config import LMConfig, TokenSamplingConfig
from landiff.model_zoo.lm import KVCache, LanguageModel
from landiff.model_zoo.sample import tokens
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens
from landiff.training.replace import replaced

COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Case:
    """What is sampled. frames: semantic frames of a video."""

    batch: int
    frames: int
    text_length: int
    guidance: float
    repeats: int

    @property
    def rows(self) -> int:
        """Rows of the model, twice the batch under guidance."""
        if self.guidance == 1:
            return self.batch
        return 2 * self.batch


@dataclass(frozen=True)
class Row:
    """Row of the table. bytes_per_step is None if the step is not bound by memory."""

    method: str
    batch: int
    tokens_per_s: float
    step_ms: float
    bytes_per_step: float | None


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work` after one warm-up run."""
    times = [timed(work, device) for _ in range(repeats + 1)]
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device, repeats=10)


def build(config: LMConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """An untrained model for inference."""
    with torch.device("meta"):
        model = LanguageModel(config).to_inference(dtype)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model


def block_weight(model: LanguageModel) -> torch.Tensor:
    """A weight whose device and dtype are those of the matrix products."""
    return model.get_parameter("blocks.0.wqkv.weight")


def step_bytes(model: LanguageModel, rows: int, positions: float) -> float:
    """Bytes that a step reads: weights of blocks and head, keys and values of `positions`."""
    weights = 0
    for module in (model.blocks, model.final_norm, model.head):
        weights += sum(
            parameter.numel() * parameter.element_size() for parameter in module.parameters()
        )
    config = model.config
    element = block_weight(model).element_size()
    return weights + 2 * config.num_layers * rows * positions * config.hidden_size * element


def baseline_sampler(
    folder: Path, model: LanguageModel, prompts: Prompts, case: Case
) -> Callable[[], Tensor]:
    """The sampler of a worktree of commit dde0a06, whose modules are called `model_zoo`."""
    sys.path.insert(0, str(folder))
    config = importlib.import_module("model_zoo.config")
    sampler = importlib.import_module("model_zoo.sample.tokens")
    old = importlib.import_module("model_zoo.lm").LanguageModel(
        config.LMConfig(**model.config.model_dump(include=set(config.LMConfig.model_fields)))
    )
    assert Path(sampler.__file__ or "").is_relative_to(folder), sampler.__file__
    old.load_state_dict(model.state_dict())
    old.to_inference(block_weight(model).dtype).to(model.head.weight.device)
    options = config.TokenSamplingConfig(guidance=case.guidance)
    old_prompts = sampler.Prompts(prompts.text_BLD, prompts.motion_score_B)
    seeds = list(range(case.batch))

    def sample() -> Tensor:
        return sampler.sample_tokens(old, old_prompts, case.frames, options, seeds=seeds).codes_BK

    return sample


def cache_of_model(model: LanguageModel, rows: int, capacity: int, _padding: object) -> KVCache:
    """A cache for the model itself in place of a decoder."""
    return model.new_cache(rows, capacity)


def measure_cached(model: LanguageModel, case: Case, baseline: Path | None = None) -> list[Row]:
    """Samples whole videos in turns: with the decoder, with the model itself, as a baseline.

    baseline: worktree of commit dde0a06.
    """
    device = model.head.weight.device
    prompts = Prompts(
        torch.randn(case.batch, case.text_length, model.config.text_dim, device=device),
        torch.full((case.batch,), 0.1),
    )
    config = TokenSamplingConfig(guidance=case.guidance)
    seeds = list(range(case.batch))

    def sample() -> Tensor:
        return sample_tokens(model, prompts, case.frames, config, seeds=seeds).codes_BK

    def sample_with_model() -> Tensor:
        with replaced(tokens, "new_cache", cache_of_model):
            return sample()

    ways = {"decoder": sample, "model": sample_with_model}
    if baseline is not None:
        ways["baseline"] = baseline_sampler(baseline, model, prompts, case)
    for way in ways.values():
        way()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(case.repeats):
        for name, way in ways.items():
            times[name].append(timed(way, device))
    steps = model.layout.num_codes(case.frames)
    first = model.layout.first_start(case.text_length)
    last = model.layout.sequence_length(case.frames, case.text_length)
    rows = []
    for name in ways:
        time_s = min(times[name])
        rows.append(
            Row(
                method=name,
                batch=case.batch,
                tokens_per_s=case.batch * steps / time_s,
                step_ms=1e3 * time_s / steps,
                bytes_per_step=step_bytes(model, case.rows, (first + last) / 2),
            )
        )
    return rows


@torch.no_grad()
def measure_recomputing(model: LanguageModel, case: Case, lengths: int) -> Row:
    """Times single steps without cache at `lengths` evenly spaced lengths."""
    weight = block_weight(model)
    first = model.layout.first_start(case.text_length)
    last = model.layout.sequence_length(case.frames, case.text_length)
    times = []
    for index in range(lengths):
        length = first + (last - first) * (2 * index + 1) // (2 * lengths)
        shape = (case.rows, length, model.config.hidden_size)
        x_RSD = torch.randn(shape, device=weight.device, dtype=weight.dtype)

        def step(x_RSD: torch.Tensor = x_RSD) -> object:
            return model.logits(model.transform(x_RSD)[:, -1:])

        times.append(seconds(step, weight.device, case.repeats))
    step_s = statistics.mean(times)
    return Row("recompute", case.batch, case.batch / step_s, 1e3 * step_s, None)


def table(rows: list[Row], bandwidth: float) -> str:
    """The printed table. bandwidth is that of the copy."""
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


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    default_device = "cpu"
    if torch.cuda.is_available():
        default_device = "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano", help=PRESETS)
    parser.add_argument("--device", default=default_device)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on CUDA, else float32",
    )
    parser.add_argument("--frames", type=int, help="semantic frames; default: one segment")
    parser.add_argument("--text-length", type=int, default=32, help="text tokens of a prompt")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument(
        "--baseline", type=Path, help="worktree of commit dde0a06, whose sampler is timed in turns"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--lengths", type=int, default=8, help="lengths at which steps without cache are timed"
    )
    return parser.parse_args()


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    device = torch.device(options.device)
    dtype = torch.float32
    if options.dtype:
        dtype = getattr(torch, options.dtype)
    elif device.type == "cuda":
        dtype = torch.bfloat16
    config = load_preset(options.preset).lm
    frames = options.frames or config.segment_frames
    model = build(config, device, dtype)
    bandwidth = copy_bandwidth(device)
    rows = []
    for batch in options.batches:
        case = Case(batch, frames, options.text_length, options.guidance, options.repeats)
        rows += measure_cached(model, case, options.baseline)
        rows.append(measure_recomputing(model, case, options.lengths))

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.preset}: {parameters / 1e6:.1f} M parameters, "
        f"{str(dtype).removeprefix('torch.')}, {frames} frames, {options.text_length} text tokens, "
        f"guidance {options.guidance:g}; {device_name(device)}; copy {bandwidth / 1e9:.1f} GB/s"
    )
    print(table(rows, bandwidth))


if __name__ == "__main__":
    main()
