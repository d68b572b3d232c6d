"""Training speed of the diffusion model: the trainer's DeepSpeed path against plain torch.

    python -m benchmarks.diffusion --preset nano
    python -m benchmarks.diffusion --preset landiff --layers 8 --samples 1 --stage 2

Both train the same weights on the same batch in one process, with alternating steps, so that other
load on the machine affects both. Both draw their noise on the host and move the batch, as the
trainer does. In bf16 the plain side keeps float32 parameters and uses autocast.

MFU is the floating-point operations that the model needs (6 per weight and token plus full
attention, with backward and without recomputation), divided by those of the fastest matmul measured
here in the same precision.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from landiff.model_zoo.config import ScheduleConfig, TransformerConfig
from landiff.training import distributed, optim
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.model import build_phase_model
from landiff.training.diffusion.step import Objective


@dataclass(frozen=True)
class Row:
    """Row of the table.

    step_s: seconds of the fastest step.
    loss: loss of the first step, which must be equal on both sides.
    """

    method: str
    step_s: float
    loss: float


def sequence_length(model: TransformerConfig) -> int:
    """Text rows and video tokens of a clip."""
    patches = (model.latent_height // model.patch_size) * (model.latent_width // model.patch_size)
    return model.text_length + model.latent_frames * patches


def step_flops(model: TransformerConfig, samples: int) -> float:
    """Operations of a step of phase `main`: matmuls of all layers, full attention, backward."""
    length = sequence_length(model)
    dim = model.hidden_size
    patch = model.latent_channels * model.patch_size**2
    per_block = 12 * dim**2 * length + 12 * dim * model.time_embed_dim + 2 * dim * length**2
    ends = 2 * (length - model.text_length) * patch * dim + model.text_length * model.text_dim * dim
    return 3 * samples * 2 * (model.num_layers * per_block + ends)


def train_config(
    transformer: TransformerConfig,
    schedule: ScheduleConfig,
    folder: Path,
    samples: int,
    precision: str,
    **changes: Any,
) -> DiffusionTrainConfig:
    """A config whose steps train `transformer` on one micro-batch of `samples` clips."""
    values: dict[str, Any] = {
        "run": folder,
        "zoo": folder,
        "phase": "main",
        "loop": {"steps": 1000},
        "optim": {"lr": 1e-4, "fused": True},
        "data": {
            "manifest": "none",
            "global_batch_size": samples,
            "micro_batch_size": samples,
        },
        "model": {"transformer": transformer.model_dump(), "control_layers": 1},
        "schedule": schedule.model_dump(),
        "precision": precision,
        "text_column": "text",
    }
    return load(DiffusionTrainConfig, {**values, **changes})


def make_batch(config: DiffusionTrainConfig) -> Batch:
    """A global batch of one micro-batch with random latents and text states."""
    model = config.model.transformer
    draw = torch.Generator().manual_seed(0)
    shape = (model.latent_frames, model.latent_channels, model.latent_height, model.latent_width)
    meta = sample_meta("0")
    samples = []
    for i in range(config.data.micro_batch_size):
        latents = torch.randn(shape, generator=draw).bfloat16()
        text = torch.randn(model.text_length, model.text_dim, generator=draw).bfloat16()
        columns = {config.latents_column: latents, config.text_column: text}
        samples.append(Sample(f"{i}", 0, i, i, meta, columns))
    return Batch(step=0, global_batch_size=len(samples), micro_batches=(tuple(samples),))


class Plain:
    """The same module with torch's AdamW and autocast."""

    def __init__(self, config: DiffusionTrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model = build_phase_model(config).to(device)
        self.objective = Objective(config, device)
        self.optimizer = optim.adamw(self.model.named_parameters(), config.optim, self.device)

    def step(self, batch: Batch) -> Tensor:
        """One optimizer step. Returns the loss."""
        self.optimizer.zero_grad()
        with autocast(self.config.precision, self.device):
            inputs = self.objective.inputs(batch.micro_batches[0])
            loss = self.objective.loss(self.model, inputs).loss
        loss.backward()
        optim.clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        rate = optim.learning_rate(self.config.optim, batch.step, self.config.loop.steps)
        optim.set_rate_and_decay(self.optimizer, rate, self.config.optim.weight_decay)
        self.optimizer.step()
        return loss.detach()


def measure(config: DiffusionTrainConfig, world: distributed.World, repeats: int) -> list[Row]:
    """Times the steps of both sides in turns. The fastest step counts, as for the matmul."""
    from landiff.training.diffusion.engine import build_engine

    batch = make_batch(config)
    plain = Plain(config, world.device)
    engine = build_engine(config, world)
    steps = {
        "plain torch": lambda: plain.step(batch),
        "DeepSpeed": lambda: engine.train_step(batch).loss,
    }
    losses = {name: float(step()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, world.device))
    return [Row(name, min(times[name]), losses[name]) for name in steps]


def table(rows: list[Row], samples: int, flops: float, peak: float) -> str:
    """The printed table. samples and flops are those of a step, peak that of the matmul."""
    lines = [
        f"{'method':<12} {'ms/step':>9} {'samples/s':>10} {'TFLOP/s':>8} {'MFU':>6} "
        f"{'of plain':>9} {'first loss':>11}"
    ]
    for row in rows:
        rate = flops / row.step_s
        lines.append(
            f"{row.method:<12} {1e3 * row.step_s:>9.1f} {samples / row.step_s:>10.2f} "
            f"{rate / 1e12:>8.3f} {rate / peak:>6.1%} {rows[0].step_s / row.step_s:>8.2f}x "
            f"{row.loss:>11.4f}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano", help=PRESETS)
    parser.add_argument("--layers", type=int, help="number of blocks; default: as in the preset")
    parser.add_argument("--samples", type=int, default=8, help="clips of a step")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2, help="ZeRO stage")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA, else fp32"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activation recomputation on both sides"
    )
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
    preset = load_preset(options.preset)
    layers = options.layers or preset.diffusion.transformer.num_layers
    transformer = preset.diffusion.transformer.model_copy(update={"num_layers": layers})
    with distributed.start() as world, tempfile.TemporaryDirectory() as folder:
        precision = options.precision or default_precision(world.device)
        config = train_config(
            transformer,
            preset.schedule,
            Path(folder),
            options.samples,
            precision,
            optim={"lr": 1e-4, "fused": options.fused},
            zero={"stage": options.stage},
            recompute=options.recompute,
        )
        rows = measure(config, world, options.repeats)
        peak = matmul_peak(world.device, dtype_of(precision))
    print(
        f"{options.preset}: {layers} layers, {precision}, ZeRO-{options.stage}, {options.samples} "
        f"clips of {sequence_length(transformer)} tokens a step; {device_name(world.device)}; "
        f"fastest matmul {peak / 1e12:.3f} TFLOP/s"
    )
    print(table(rows, options.samples, step_flops(transformer, options.samples), peak))


if __name__ == "__main__":
    main()
