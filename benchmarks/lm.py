"""Training speed of the language model: the trainer's Megatron path against plain torch.

    python -m benchmarks.lm --preset nano
    python -m benchmarks.lm --preset landiff --layers 4 --samples 4 --device cuda

Both train the same weights on the same clips in one process, with alternating steps, so that other
load on the machine affects both. The Megatron side is the whole trainer: packing on the host, one
packed row, Megatron-core's DDP, learning-rate schedule and optimizer. The plain side receives
prepared tensors, as one batch without padding, because all clips have the same length.

MFU is the floating-point operations that the model needs (6 per weight and token plus causal
attention, with backward and without recomputation), divided by those of the fastest matmul measured
here in the same precision.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support.models import (
    PRESETS,
    autocast,
    default_precision,
    device_name,
    dtype_of,
    load_preset,
    matmul_peak,
    sample_meta,
    timed,
)
from landiff.configs import load
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training import distributed, optim
from landiff.training.lm.config import LMTrainConfig


@dataclass(frozen=True)
class Row:
    """Row of the table.

    step_s: seconds of the fastest step.
    loss: loss of the first step, which must be equal on both sides.
    """

    method: str
    step_s: float
    loss: float


def step_flops(config: LMConfig, samples: int, length: int) -> float:
    """Operations of a training step: matmuls of blocks and head, causal attention, backward."""
    per_block = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * per_block + config.hidden_size * TokenLayout.of(config).vocab_size
    attention = 2 * config.num_layers * config.hidden_size * length**2
    return 3 * samples * (2 * weights * length + attention)


def train_config(
    model: LMConfig, folder: Path, samples: int, precision: str, **changes: Any
) -> LMTrainConfig:
    """A config whose steps train `model` on one packed row of `samples` clips."""
    values: dict[str, Any] = {
        "run": folder,
        "zoo": folder,
        "loop": {"steps": 1000},
        "optim": {"lr": 1e-4, "fused": True},
        "model": model.model_dump(),
        "data": {
            "manifest": "none",
            "global_batch_size": samples,
            "micro_batch_size": samples,
        },
        "precision": precision,
        "text_column": "text",
        "text_dropout": 0.0,
        "vocab_multiple": 8,
    }
    return load(LMTrainConfig, {**values, **changes})


def make_batch(config: LMTrainConfig, text_length: int) -> Batch:
    """A global batch of one micro-batch with random tokens and text states."""
    layout = TokenLayout.of(config.model)
    random = torch.Generator().manual_seed(0)
    codes = layout.num_codes(config.model.segment_frames)
    samples = []
    for i in range(config.data.micro_batch_size):
        meta = sample_meta(f"{i:06d}")
        tokens = torch.randint(0, layout.codebook_size, (codes,), generator=random).to(torch.uint16)
        text = torch.randn(text_length, config.model.text_dim, generator=random).bfloat16()
        columns = {config.tokens_column: tokens, config.text_column: text}
        samples.append(Sample(meta.key, 0, i, i, meta, columns))
    return Batch(step=0, global_batch_size=len(samples), micro_batches=(tuple(samples),))


class Plain:
    """The plain torch model with torch's AdamW and autocast."""

    def __init__(self, config: LMTrainConfig, batch: Batch, device: torch.device) -> None:
        from landiff.training.lm.model import InitialWeights

        self.config = config
        self.device = device
        self.model = LanguageModel(config.model).to(device)
        self.model.load_state_dict(InitialWeights(config.model, config.loop.seed))
        self.optimizer = optim.adamw(self.model.named_parameters(), config.optim, device)
        samples = list(batch.samples)
        texts = []
        rows = []
        for sample in samples:
            text = sample.tensors[config.text_column].float()
            tokens = sample.tensors[config.tokens_column].numpy()
            texts.append(text)
            rows.append(self.model.layout.training_row(tokens, len(text)))
        self.ids = _stacked([row.input_ids for row in rows], device)
        self.targets = _stacked([row.targets for row in rows], device)
        self.weights = _stacked([row.loss_weights for row in rows], device)
        self.text = torch.stack(texts).to(device)
        self.frames = torch.full((len(samples),), float(config.model.segment_frames), device=device)
        self.motion = torch.full((len(samples),), 0.1, device=device)

    def step(self) -> Tensor:
        """One optimizer step. Returns the loss."""
        self.optimizer.zero_grad()
        with autocast(self.config.precision, self.device):
            logits = self.model(self.ids, self.text, self.frames, self.motion)
        losses = functional.cross_entropy(
            logits.flatten(0, 1), self.targets.flatten(), reduction="none"
        )
        loss = (losses * self.weights.flatten()).sum() / self.weights.sum()
        loss.backward()
        optim.clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        return loss.detach()


def _stacked(arrays: list, device: torch.device) -> Tensor:
    return torch.stack([torch.from_numpy(array) for array in arrays]).to(device)


def measure(
    config: LMTrainConfig, text_length: int, repeats: int, device: torch.device
) -> list[Row]:
    """Times the steps of both sides in turns. The fastest step counts, as for the matmul."""
    from landiff.training.lm.engine import MegatronEngine

    batch = make_batch(config, text_length)
    plain = Plain(config, batch, device)
    engine = MegatronEngine(config)
    steps = {"plain torch": plain.step, "Megatron": lambda: engine.train_step(batch).loss}
    losses = {name: float(step()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    engine.close()
    return [Row(name, min(times[name]), losses[name]) for name in steps]


def table(rows: list[Row], tokens: int, flops: float, peak: float) -> str:
    """The printed table. tokens and flops are those of a step, peak that of the matmul."""
    lines = [
        f"{'method':<12} {'ms/step':>9} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6} "
        f"{'of plain':>9} {'first loss':>11}"
    ]
    for row in rows:
        rate = flops / row.step_s
        lines.append(
            f"{row.method:<12} {1e3 * row.step_s:>9.1f} {tokens / row.step_s:>10.0f} "
            f"{rate / 1e12:>8.3f} {rate / peak:>6.1%} {rows[0].step_s / row.step_s:>8.2f}x "
            f"{row.loss:>11.4f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano", help=PRESETS)
    parser.add_argument("--layers", type=int, help="number of blocks; default: as in the preset")
    parser.add_argument(
        "--samples", type=int, default=16, help="clips of a step, packed into one row"
    )
    parser.add_argument("--text-length", type=int, default=32, help="text tokens of a clip")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA, else fp32"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activation recomputation on the Megatron side"
    )
    parser.add_argument("--layer-library", choices=["local", "te"], default="local")
    parser.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch's fused AdamW on both sides",
    )
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    return parser.parse_args()


def main() -> None:
    """Measures and prints the table."""
    options = parse_arguments()
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    model = load_preset(options.preset).lm
    if options.layers:
        model = model.model_copy(update={"num_layers": options.layers})
    with distributed.start() as world, tempfile.TemporaryDirectory() as folder:
        precision = options.precision or default_precision(world.device)
        config = train_config(
            model,
            Path(folder),
            options.samples,
            precision,
            optim={"lr": 1e-4, "fused": options.fused},
            recompute=options.recompute,
            layers=options.layer_library,
        )
        rows = measure(config, options.text_length, options.repeats, world.device)
        peak = matmul_peak(world.device, dtype_of(precision))
    length = TokenLayout.of(model).sequence_length(model.segment_frames, options.text_length)
    print(
        f"{options.preset}: {model.num_layers} layers, {precision}, {options.samples} clips of "
        f"{length} positions a step; {device_name(world.device)}; fastest matmul "
        f"{peak / 1e12:.3f} TFLOP/s"
    )
    print(table(rows, options.samples * length, step_flops(model, options.samples, length), peak))


if __name__ == "__main__":
    main()
