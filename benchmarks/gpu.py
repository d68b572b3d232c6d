"""Speed on a GPU against its limits and against peers of the same sizes, in one table.

    make bench-gpu
    python -m benchmarks.gpu --only lm sampling
    python -m benchmarks.gpu --dry-run         # every row at toy size, on the CPU too

Rows, their limit and their peer:

    attention      each kernel, forward and backward; peak of the device; torch's own kernels
    lm             the trainer's step; 50 % MFU; Megatron-core's GPT, with Transformer Engine if it
                   is installed
    diffusion      the trainer's step; 45 % MFU; diffusers' CogVideoXTransformer3DModel
    control        the same with control branch; 45 % MFU; the step that is not compiled
    tokenizer      the trainer's step; 40 % MFU; the step that is not compiled
    fp8            the compiled steps with float8 matmuls; the same goals; the compiled steps
                   without. No rows without the package torchao or on a GPU without float8
    checkpoint     seconds that an asynchronous save stops training; 1 s
    tokens         sampling at batch 1; reading weights and cache once a token; the model itself
    latents        sampling with guidance; peak of the device; two passes in turns, as the release
    video          seconds from the text's states to frames, with language model and control branch;
                   45 s; the same without CUDA graphs and compiled blocks

On CUDA, steps of the trainers are compiled. Peers train with autocast and torch's fused AdamW. The
peak of an unknown device is that of the fastest matmul. Each group of rows has a process of its
own: an error in one, such as a lack of memory, leaves the others.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import diffusion, lm, sample_lm
from benchmarks.support.case import Case, fastest
from benchmarks.support.isolated import Report, run_groups, write_report
from benchmarks.support.models import (
    PRESETS,
    default_precision,
    device_name,
    dtype_of,
    load_preset,
    matmul_peak,
    timed,
)
from benchmarks.support.peers import diffusers_peer, megatron_peer
from benchmarks.support.rows import MeasuredStep, Row, table
from benchmarks.support.trained_zoo import TrainStep, control_engine, tokenizer_engine
from benchmarks.support.video import VideoSampler
from landiff.model_zoo.attention import Backend, attention, find_installed, prefer
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.dit import DiffusionTransformer
from landiff.model_zoo.sample.latents import SamplerOptions, sample_main_latents, seeded_noise
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training import distributed
from landiff.training.checkpoint.background import BackgroundWriter
from landiff.training.engine import Engine
from landiff.training.float8 import layers as float8
from landiff.training.float8.requirements import PACKAGE
from landiff.training.observe.flops import peak_flops

log = logging.getLogger(__name__)

LM_GOAL = 0.5  # MFU
DIFFUSION_GOAL = 0.45
TOKENIZER_GOAL = 0.4
STALL_GOAL_S = 1.0
VIDEO_GOAL_S = 45.0
TOY_LAYERS = 1
TOY_FFN_SIZE = 320  # a multiple of 16, for float8


def lm_step(case: Case, seconds: float, peer: float | None, memory: int) -> MeasuredStep:
    """A step of the language model."""
    sizes = case.sizes.lm
    length = TokenLayout.of(sizes).sequence_length(sizes.segment_frames, case.text_length)
    flops = lm.step_flops(sizes, case.samples, length)
    tokens = case.samples * length
    return MeasuredStep(tokens, "tokens/s", flops, LM_GOAL, seconds, peer, memory)


def diffusion_step(case: Case, seconds: float, peer: float | None, memory: int) -> MeasuredStep:
    """A step of the main transformer."""
    flops = diffusion.step_flops(case.sizes.diffusion.transformer, case.samples)
    return MeasuredStep(case.samples, "clips/s", flops, DIFFUSION_GOAL, seconds, peer, memory)


def compiled(case: Case) -> dict[str, Any]:
    """Changes of a training config: compiled blocks on CUDA, as in the packaged configs."""
    return {"compile_blocks": case.device.type == "cuda"}


def if_possible(name: str, measure: Callable[[], float]) -> float | None:
    """The result of `measure`; None, with a message, if it fails, so that other numbers remain."""
    try:
        return measure()
    except Exception as error:
        log.warning("%s failed: %s: %s", name, type(error).__name__, error)
        return None


def stall_seconds(engine: Engine, folder: Path, device: torch.device) -> float:
    """Seconds for which the second asynchronous save of an engine stops training."""
    writer = BackgroundWriter(device)
    writer.prepare(engine.state_files())
    seconds = 0.0
    for number in range(2):  # the first one waits until the buffer is pinned
        checkpoint = folder / f"checkpoint_{number}"
        checkpoint.mkdir()
        seconds = timed(partial(_save, writer, checkpoint, engine), device)
        answer = writer.answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
    writer.close()
    return seconds


def _save(writer: BackgroundWriter, folder: Path, engine: Engine) -> None:
    writer.begin_write(folder, engine.state_files())


@contextmanager
def measured_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the largest allocation of the block. Frees memory before."""
    gc.collect()
    if device.type != "cuda":
        yield lambda: 0
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)


def attention_rows(case: Case) -> list[Row]:
    """Each installed kernel on the diffusion transformer's sequence."""
    model = case.sizes.diffusion.transformer
    length = diffusion.sequence_length(model)
    head_dim = model.hidden_size // model.num_heads
    shape = (case.samples, length, model.num_heads, head_dim)
    leaves = []
    for _ in range(3):
        x = torch.randn(shape, device=case.device, dtype=dtype_of(case.precision))
        leaves.append(x.requires_grad_())
    flops = 3.5 * 4 * case.samples * length**2 * model.hidden_size  # the backward pass is 2.5 times
    rates = {}
    backends: list[Backend] = ["torch"]
    if case.device.type == "cuda":
        backends = sorted(find_installed())
    for backend in backends:
        prefer(backend)

        def step() -> None:
            torch.autograd.grad(attention(*leaves).sum(), leaves)

        seconds = if_possible(f"attention {backend}", lambda: fastest(step, case))
        if seconds is not None:
            rates[backend] = flops / seconds
    prefer(None)
    rows = []
    for backend, rate in rates.items():
        row = Row(
            f"attention {backend}",
            rate / 1e12,
            "TFLOP/s",
            case.peak / 1e12,
            rates.get("torch", math.nan) / 1e12,
            rate / case.peak,
        )
        rows.append(row)
    return rows


def lm_rows(case: Case) -> list[Row]:
    """The language model trainer's step, and the time that saving takes."""
    from landiff.training.lm.device import megatron_device
    from landiff.training.lm.engine import MegatronEngine

    sizes = case.sizes.lm
    length = TokenLayout.of(sizes).sequence_length(sizes.segment_frames, case.text_length)
    with tempfile.TemporaryDirectory() as folder:
        config = lm.train_config(
            sizes, Path(folder), case.samples, case.precision, **compiled(case)
        )
        batch = lm.make_batch(config, case.text_length)
        with measured_memory(case.device) as memory:
            engine = MegatronEngine(config)
            seconds = fastest(lambda: engine.train_step(batch), case)
            peak_memory = memory()
        stall = stall_seconds(engine, Path(folder), case.device)
        with megatron_device():
            peer = if_possible(
                "Megatron-core's GPT", lambda: fastest(megatron_peer(case, length), case)
            )
        engine.close()
    return [
        lm_step(case, seconds, peer, peak_memory).row("lm step", case.peak),
        Row("lm checkpoint", stall, "s", STALL_GOAL_S),
    ]


def diffusion_rows(case: Case) -> list[Row]:
    """The diffusion trainer's step in phase main, and the time that saving takes."""
    from landiff.training.diffusion.engine import build_engine

    sizes = case.sizes.diffusion.transformer
    schedule = case.sizes.schedule
    with tempfile.TemporaryDirectory() as folder:
        config = diffusion.train_config(
            sizes, schedule, Path(folder), case.samples, case.precision, **compiled(case)
        )
        batch = diffusion.make_batch(config)
        with measured_memory(case.device) as memory:
            engine = build_engine(config, case.world)
            seconds = fastest(lambda: engine.train_step(batch), case)
            peak_memory = memory()
        stall = stall_seconds(engine, Path(folder), case.device)
        peer = if_possible("diffusers' model", lambda: fastest(diffusers_peer(case), case))
    return [
        diffusion_step(case, seconds, peer, peak_memory).row("diffusion step", case.peak),
        Row("diffusion checkpoint", stall, "s", STALL_GOAL_S),
    ]


def control_rows(case: Case) -> list[Row]:
    """The diffusion trainer's step in phase control."""
    return [compiled_step_row("control step", case, control_engine, DIFFUSION_GOAL)]


def tokenizer_rows(case: Case) -> list[Row]:
    """The tokenizer trainer's step."""
    return [compiled_step_row("tokenizer step", case, tokenizer_engine, TOKENIZER_GOAL)]


def compiled_step_row(
    name: str,
    case: Case,
    make: Callable[[Case, Path, Mapping[str, Any]], tuple[TrainStep, float]],
    goal: float,
) -> Row:
    """A trainer's compiled step beside the same step without compilation.

    make: the step and its FLOPs, of a run in a folder with changes of the config.
    """
    with tempfile.TemporaryDirectory() as folder:
        with measured_memory(case.device) as memory:
            train_step, flops = make(case, Path(folder), compiled(case))
            seconds = fastest(train_step, case)
            peak_memory = memory()
        eager, _ = make(case, Path(folder), {})
        peer = if_possible("the step that is not compiled", lambda: fastest(eager, case))
    step = MeasuredStep(case.samples, "clips/s", flops, goal, seconds, peer, peak_memory)
    return step.row(name, case.peak)


def video_rows(case: Case) -> list[Row]:
    """A whole video, from the states of a text to frames."""
    with measured_memory(case.device) as memory:
        sampler = VideoSampler(case)
        peer = fastest(lambda: sampler.sample(graphs=False), case)
        if case.device.type == "cuda":
            sampler.compile_blocks()
        seconds = fastest(lambda: sampler.sample(graphs=None), case)
        return [Row("video", seconds, "s", VIDEO_GOAL_S, peer, memory=memory())]


def float8_rows(case: Case) -> list[Row]:
    """The trainers' steps with `fp8`, against the same steps without it."""
    if importlib.util.find_spec(PACKAGE) is None or not float8.is_supported(case.device):
        log.warning("no rows of fp8: %s or a device with float8 is missing", PACKAGE)
        return []
    works = [
        ("lm step fp8", lm_seconds, lm_step),
        ("diffusion step fp8", diffusion_seconds, diffusion_step),
    ]
    rows = []
    for name, measure, step in works:
        with measured_memory(case.device) as memory:
            seconds = measure(case, fp8=True)
            peak_memory = memory()
        peer = measure(case, fp8=False)
        rows.append(step(case, seconds, peer, peak_memory).row(name, case.peak))
    return rows


def lm_seconds(case: Case, *, fp8: bool) -> float:
    """Seconds of a step of the language model trainer, on CUDA with compiled blocks."""
    from landiff.training.lm.engine import MegatronEngine

    changes = {"fp8": fp8, "compile_blocks": case.device.type == "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        config = lm.train_config(
            case.sizes.lm, Path(folder), case.samples, case.precision, **changes
        )
        batch = lm.make_batch(config, case.text_length)
        engine = MegatronEngine(config)
        seconds = fastest(lambda: engine.train_step(batch), case)
        engine.close()
    return seconds


def diffusion_seconds(case: Case, *, fp8: bool) -> float:
    """Seconds of a step of the diffusion trainer, on CUDA with compiled blocks."""
    from landiff.training.diffusion.engine import build_engine

    changes = {"fp8": fp8, "compile_blocks": case.device.type == "cuda"}
    sizes = case.sizes.diffusion.transformer
    schedule = case.sizes.schedule
    with tempfile.TemporaryDirectory() as folder:
        config = diffusion.train_config(
            sizes, schedule, Path(folder), case.samples, case.precision, **changes
        )
        batch = diffusion.make_batch(config)
        engine = build_engine(config, case.world)
        return fastest(lambda: engine.train_step(batch), case)


def sampling_rows(case: Case) -> list[Row]:
    """Tokens of one prompt, and latents of one clip with guidance."""
    return [token_row(case), latent_row(case)]


def token_row(case: Case) -> Row:
    """Tokens/s at batch 1, against reading weights and cache once for each token."""
    sizes = case.sizes.lm
    model = sample_lm.build(sizes, case.device, dtype_of(case.precision))
    sampling = sample_lm.Case(1, sizes.segment_frames, case.text_length, 7.5, case.repeats)
    decoder, by_model = sample_lm.measure_cached(model, sampling)
    assert decoder.bytes_per_step is not None
    limit = sample_lm.copy_bandwidth(case.device) / decoder.bytes_per_step
    return Row("sampled tokens", decoder.tokens_per_s, "tokens/s", limit, by_model.tokens_per_s)


@torch.no_grad()
def latent_row(case: Case) -> Row:
    """Clips/s of the main transformer with guidance, against two passes in turns."""
    sizes = case.sizes.diffusion.transformer
    model = DiffusionTransformer(sizes).to(case.device, dtype_of(case.precision)).eval()
    schedule = NoiseSchedule(case.sizes.schedule)
    text_BLD = torch.randn(1, sizes.text_length, sizes.text_dim, device=case.device)
    options = SamplerOptions(num_steps=case.sampling_steps)
    shape = (sizes.latent_frames, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    latents_BTCHW = torch.randn(1, *shape, device=case.device, dtype=model.dtype)
    timestep_B = torch.tensor([500], device=case.device)

    def in_turns() -> None:
        for _ in range(case.sampling_steps):
            model(latents_BTCHW, timestep_B, torch.zeros_like(text_BLD))
            model(latents_BTCHW, timestep_B, text_BLD)

    peer = fastest(in_turns, case)
    if case.device.type == "cuda":
        model.compile_blocks()

    def sample() -> Tensor:
        return sample_main_latents(model, schedule, text_BLD, seeded_noise([0]), options=options)

    seconds = fastest(sample, case)
    flops = 2 * case.sampling_steps * diffusion.step_flops(sizes, 1) / 3  # forward only
    return Row(
        "sampled latents",
        1 / seconds,
        "clips/s",
        case.peak / flops,
        1 / peer,
        flops / seconds / case.peak,
    )


ROWS: dict[str, Callable[[Case], list[Row]]] = {
    "attention": attention_rows,
    "lm": lm_rows,
    "diffusion": diffusion_rows,
    "fp8": float8_rows,
    "control": control_rows,
    "tokenizer": tokenizer_rows,
    "sampling": sampling_rows,
    "video": video_rows,
}


def toy(sizes: ModelConfig) -> ModelConfig:
    """Sizes with one layer in each model, and an MLP of the LM that float8 can multiply."""
    changed: dict[str, Any] = sizes.model_dump()
    changed["lm"]["num_layers"] = TOY_LAYERS
    changed["lm"]["ffn_size"] = TOY_FFN_SIZE
    changed["diffusion"]["transformer"]["num_layers"] = TOY_LAYERS
    changed["diffusion"]["control_layers"] = TOY_LAYERS
    return ModelConfig.model_validate(changed)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="landiff", help=PRESETS)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--samples", type=int, default=1, help="clips of a step")
    parser.add_argument("--text-length", type=int, default=64, help="text tokens of a clip")
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # of a process of rows
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="every row with one layer of the preset nano and one repeat, on the CPU too",
    )
    return parser.parse_args(arguments)


def make_case(options: argparse.Namespace, world: distributed.World) -> Case:
    """What the options ask for, on the device of `world`."""
    sizes = toy(load_preset("nano")) if options.dry_run else load_preset(options.preset)
    precision = default_precision(world.device)
    peak = None
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device))
    return Case(
        sizes=sizes,
        world=world,
        precision=precision,
        peak=peak or matmul_peak(world.device, dtype_of(precision)),
        samples=options.samples,
        text_length=min(options.text_length, sizes.lm.max_text_tokens),
        sampling_steps=2 if options.dry_run else options.sampling_steps,
        repeats=1 if options.dry_run else options.repeats,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table. Returns 1 if a group of rows failed."""
    options = parse_arguments(arguments)
    if options.report is not None:
        measure(options)
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; --dry-run measures toy sizes on the CPU")
    command = [str(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    reports, failed = run_groups("benchmarks.gpu", command, options.only)
    rows = [row for report in reports for row in report.rows]
    if reports:
        print(reports[0].title)
        print(table(rows))
    for name, text in failed.items():
        print(f"{name} failed: {text}")
    return 1 if failed else 0


def measure(options: argparse.Namespace) -> None:
    """Measures the groups of rows in this process, and writes them to the file of the report."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    with distributed.start() as world:
        case = make_case(options, world)
        rows = []
        for name in options.only:
            rows += ROWS[name](case)
    name = "toy sizes" if options.dry_run else options.preset
    title = (
        f"{name}, {case.precision}, {case.samples} clips a step; {device_name(case.device)}; peak "
        f"{case.peak / 1e12:.3g} TFLOP/s"
    )
    write_report(options.report, Report(title, rows))


if __name__ == "__main__":
    sys.exit(main())
