"""Training speed of the diffusion model: through DeepSpeed, as the trainer does it, and in plain torch.

    python -m benchmarks.diffusion --preset nano
    python -m benchmarks.diffusion --preset landiff --layers 8 --samples 1 --stage 2

Both train the same weights on the same batch in one process, step by step in turns, so that a busy machine
disturbs both alike. Both draw their noise on the host and move the batch, as the trainer does. In bf16 the plain
side keeps float32 parameters and uses autocast. MFU: floating-point operations that the model needs (6 per
weight and token, full attention, backward included; recomputation not), over the fastest matmul measured here
in the same precision.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile

import torch

from benchmarks.lm import matmul_peak, timed
from landiff.configs import load
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.config import ModelConfig, TransformerConfig
from landiff.training import distributed, optim
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.model import build_phase_model
from landiff.training.diffusion.step import Objective

META = RawSample(
    key="0",
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


def sequence_length(model: TransformerConfig) -> int:
    patches = (model.latent_height // model.patch_size) * (model.latent_width // model.patch_size)
    return model.text_length + model.latent_frames * patches


def step_flops(model: TransformerConfig, samples: int) -> float:
    """What one step of phase main needs: matmuls of blocks, input and output, and full attention; thrice the forward."""
    length, dim, patch = (
        sequence_length(model),
        model.hidden_size,
        model.latent_channels * model.patch_size**2,
    )
    blocks = model.num_layers * (
        12 * dim**2 * length + 12 * dim * model.time_embed_dim + 2 * dim * length**2
    )
    ends = 2 * (length - model.text_length) * patch * dim + model.text_length * model.text_dim * dim
    return 3 * samples * 2 * (blocks + ends)


def make_batch(config: DiffusionTrainConfig) -> Batch:
    model, draw = config.model.transformer, torch.Generator().manual_seed(0)
    latents = (model.latent_frames, model.latent_channels, model.latent_height, model.latent_width)
    samples = tuple(
        Sample(
            f"{i}",
            0,
            i,
            i,
            META,
            {
                config.latents_column: torch.randn(latents, generator=draw).bfloat16(),
                config.text_column: torch.randn(
                    model.text_length, model.text_dim, generator=draw
                ).bfloat16(),
            },
        )
        for i in range(config.data.micro_batch_size)
    )
    return Batch(step=0, global_batch_size=len(samples), micro_batches=(samples,))


class Plain:
    """The same module under torch's AdamW."""

    def __init__(self, config: DiffusionTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = build_phase_model(config).to(device)
        self.objective = Objective(config, device)
        self.optimizer = optim.adamw(self.model.parameters(), config.optim)

    def step(self, batch: Batch) -> torch.Tensor:
        half = self.config.precision == "bf16"
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss = self.objective.loss(
                self.model, self.objective.inputs(batch.micro_batches[0])
            ).loss
        loss.backward()
        optim.clip_gradients(self.model.parameters(), self.config.optim.clip_grad)
        optim.set_learning_rate(
            self.optimizer,
            optim.learning_rate(self.config.optim, batch.step, self.config.loop.steps),
        )
        self.optimizer.step()
        return loss.detach()


def measure(
    config: DiffusionTrainConfig, world: distributed.World, repeats: int
) -> dict[str, tuple[float, float]]:
    """By method: seconds of the fastest step, loss of the first (equal, or they don't train the same)."""
    from landiff.training.diffusion.engine import build_engine

    batch, plain, engine = (
        make_batch(config),
        Plain(config, world.device),
        build_engine(config, world),
    )
    steps = {
        "plain torch": lambda: plain.step(batch),
        "DeepSpeed": lambda: engine.train_step(batch).loss,
    }
    losses = {name: float(step()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(timed(step, world.device))
    return {name: (min(times[name]), losses[name]) for name in steps}


def table(rows: dict[str, tuple[float, float]], samples: int, flops: float, peak: float) -> str:
    lines = [
        f"{'method':<12} {'ms/step':>9} {'samples/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'of plain':>9} {'first loss':>11}"
    ]
    plain_s = rows["plain torch"][0]
    for name, (step_s, loss) in rows.items():
        lines.append(
            f"{name:<12} {1e3 * step_s:>9.1f} {samples / step_s:>10.2f} {flops / step_s / 1e12:>8.3f} "
            f"{flops / step_s / peak:>6.1%} {plain_s / step_s:>8.2f}x {loss:>11.4f}"
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
    parser.add_argument("--samples", type=int, default=8, help="clips of a step")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3], default=2, help="ZeRO stage")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA, else fp32"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activation checkpointing, on both sides"
    )
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()

    source = (
        options.preset if options.preset.endswith((".yaml", ".yml")) else f"{options.preset}/model"
    )
    preset = load(ModelConfig, source)
    layers = options.layers or preset.diffusion.transformer.num_layers
    transformer = preset.diffusion.transformer.model_copy(update={"num_layers": layers})
    with distributed.start() as world, tempfile.TemporaryDirectory() as folder:
        precision = options.precision or ("bf16" if world.device.type == "cuda" else "fp32")
        config = load(
            DiffusionTrainConfig,
            {
                "run": folder,
                "zoo": folder,
                "phase": "main",
                "loop": {"steps": 1000},
                "optim": {"lr": 1e-4},
                "data": {
                    "manifest": "none",
                    "global_batch_size": options.samples,
                    "micro_batch_size": options.samples,
                },
                "model": {"transformer": transformer.model_dump(), "control_layers": 1},
                "schedule": preset.schedule.model_dump(),
                "zero": {"stage": options.stage},
                "precision": precision,
                "recompute": options.recompute,
                "text_column": "text",
            },
        )
        rows = measure(config, world, options.repeats)
        peak = matmul_peak(world.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    name = (
        torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{options.preset}: {layers} layers, {precision}, ZeRO-{options.stage}, {options.samples} clips of "
        f"{sequence_length(transformer)} tokens a step; {name}; fastest matmul {peak / 1e12:.3f} TFLOP/s"
    )
    print(table(rows, options.samples, step_flops(transformer, options.samples), peak))


if __name__ == "__main__":
    main()
