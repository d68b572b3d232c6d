"""Training speed of the language model: through Megatron, as the trainer does it, and in plain torch.

    python -m benchmarks.lm --preset nano
    python -m benchmarks.lm --preset landiff --layers 4 --samples 4 --device cuda

Both train the same weights on the same clips, one process each side, step by step in turns, so that a busy
machine disturbs both alike. The Megatron side is the whole trainer: packing on the host, one packed row, core's
DDP, schedule and optimizer. The plain side gets its tensors ready-made, as one batch without padding, since all
clips have one length. MFU: floating-point operations that the model needs (6 per weight and token, causal
attention, backward included; recomputation not), over the fastest matmul measured here in the same precision.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from landiff.configs import load
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.config import LMConfig, ModelConfig
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training import distributed, optim
from landiff.training.lm.config import LMTrainConfig


@dataclass(frozen=True)
class Row:
    method: str
    step_s: float
    loss: float  # of the first step: equal on both sides, or they don't train the same


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the fastest of a few square matmuls."""
    best = 0.0
    for size in (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = max(best, *(2 * size**3 / timed(lambda a=a, b=b: a @ b, device) for _ in range(6)))
    return best


def step_flops(config: LMConfig, samples: int, length: int) -> float:
    """What one training step needs: matmuls of blocks and head, and causal attention; forward and twice that backward."""
    per_block = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * per_block + config.hidden_size * TokenLayout.of(config).vocab_size
    attention = 2 * config.num_layers * config.hidden_size * length**2
    return 3 * samples * (2 * weights * length + attention)


def make_batch(config: LMTrainConfig, text_length: int) -> Batch:
    layout, random = TokenLayout.of(config.model), torch.Generator().manual_seed(0)
    codes = layout.num_codes(config.model.segment_frames)
    samples = []
    for i in range(config.data.micro_batch_size):
        meta = RawSample(
            key=f"{i:06d}",
            caption="-",
            source="-",
            source_sha256="",
            start_s=0,
            fps=8,
            num_frames=17,
            height=64,
            width=64,
            motion_score=0.1,
            video_sha256="",
        )
        tokens = torch.randint(0, layout.codebook_size, (codes,), generator=random).to(torch.uint16)
        text = torch.randn(text_length, config.model.text_dim, generator=random).bfloat16()
        samples.append(
            Sample(
                meta.key, 0, i, i, meta, {config.tokens_column: tokens, config.text_column: text}
            )
        )
    return Batch(step=0, global_batch_size=len(samples), micro_batches=(tuple(samples),))


class Plain:
    """The reference model with torch's AdamW; mixed precision through autocast, as plain torch code does it."""

    def __init__(self, config: LMTrainConfig, batch: Batch, device: torch.device) -> None:
        from landiff.training.lm.model import InitialWeights

        self.config, self.device = config, device
        self.model = LanguageModel(config.model).to(device)
        self.model.load_state_dict(InitialWeights(config.model, config.loop.seed))
        self.optimizer = optim.adamw(self.model.parameters(), config.optim)
        samples = list(batch.samples)
        texts = [sample.tensors[config.text_column].float() for sample in samples]
        rows = [
            self.model.layout.training_row(s.tensors[config.tokens_column].numpy(), len(t))
            for s, t in zip(samples, texts, strict=True)
        ]
        self.ids, self.targets, self.weights = (
            torch.stack([torch.from_numpy(getattr(row, name)) for row in rows]).to(device)
            for name in ("input_ids", "targets", "loss_weights")
        )
        self.text = torch.stack(texts).to(device)
        self.frames = torch.full((len(samples),), float(config.model.segment_frames), device=device)
        self.motion = torch.full((len(samples),), 0.1, device=device)

    def step(self) -> Tensor:
        half = self.config.precision == "bf16"
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            logits = self.model(self.ids, self.text, self.frames, self.motion)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), self.targets.flatten(), reduction="none"
        )
        loss = (losses * self.weights.flatten()).sum() / self.weights.sum()
        loss.backward()
        optim.clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        return loss.detach()


def measure(
    config: LMTrainConfig, text_length: int, repeats: int, device: torch.device
) -> list[Row]:
    from landiff.training.lm.engine import MegatronEngine

    batch = make_batch(config, text_length)
    plain, engine = Plain(config, batch, device), MegatronEngine(config)
    steps = {"plain torch": plain.step, "Megatron": lambda: engine.train_step(batch).loss}
    losses = {name: float(step()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    engine.close()
    return [
        Row(name, min(times[name]), losses[name]) for name in steps
    ]  # the fastest, as for the matmul


def table(rows: list[Row], tokens: int, flops: float, peak: float) -> str:
    lines = [
        f"{'method':<12} {'ms/step':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'of plain':>9} {'first loss':>11}"
    ]
    for row in rows:
        lines.append(
            f"{row.method:<12} {1e3 * row.step_s:>9.1f} {tokens / row.step_s:>10.0f} {flops / row.step_s / 1e12:>8.3f} "
            f"{flops / row.step_s / peak:>6.1%} {rows[0].step_s / row.step_s:>8.2f}x {row.loss:>11.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", default="nano", help="nano, landiff, or a model YAML of your own"
    )
    parser.add_argument(
        "--layers", type=int, help="fewer layers than the preset's, to fit one device"
    )
    parser.add_argument(
        "--samples", type=int, default=16, help="clips of a step, packed into one row"
    )
    parser.add_argument("--text-length", type=int, default=32)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA, else fp32"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activation recomputation on the Megatron side"
    )
    parser.add_argument("--layer-library", choices=["local", "te"], default="local")
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.core")

    source = (
        options.preset if options.preset.endswith((".yaml", ".yml")) else f"{options.preset}/model"
    )
    model = load(ModelConfig, source).lm
    model = model.model_copy(update={"num_layers": options.layers or model.num_layers})
    with distributed.start() as world, tempfile.TemporaryDirectory() as folder:
        precision = options.precision or ("bf16" if world.device.type == "cuda" else "fp32")
        config = load(
            LMTrainConfig,
            {
                "run": Path(folder),
                "zoo": Path(folder),
                "loop": {"steps": 1000},
                "optim": {"lr": 1e-4},
                "model": model.model_dump(),
                "data": {
                    "manifest": "none",
                    "global_batch_size": options.samples,
                    "micro_batch_size": options.samples,
                },
                "precision": precision,
                "recompute": options.recompute,
                "layers": options.layer_library,
                "text_column": "text",
                "text_dropout": 0.0,
                "vocab_multiple": 8,
            },
        )
        rows = measure(config, options.text_length, options.repeats, world.device)
        peak = matmul_peak(world.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    length = TokenLayout.of(model).sequence_length(model.segment_frames, options.text_length)
    name = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{options.preset}: {model.num_layers} layers, {precision}, {options.samples} clips of {length} positions a step; {name}; "
        f"fastest matmul {peak / 1e12:.3f} TFLOP/s"
    )
    print(table(rows, options.samples * length, step_flops(model, options.samples, length), peak))


if __name__ == "__main__":
    main()
