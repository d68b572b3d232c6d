"""Peak memory and time of `landiff sample` with each `offload`, in processes of their own.

    python -m benchmarks.sample_memory
    python -m benchmarks.sample_memory --hidden 2048 --precision bf16

Models of the nano preset with more width, random weights, one video of two sampling steps. `base`
is the peak of a process that has imported everything and loaded no part. On a GPU the peak is that
of the device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.support.models import load_preset
from landiff.configs import load
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.sample import sample_videos
from landiff.model_zoo import registry
from landiff.model_zoo.device import pick_device

OFFLOADS = ("base", "none", "model", "group", "sequential", "disk")
HEADS = 16


@torch.no_grad()
def write_zoo(folder: Path, hidden: int) -> None:
    """Exports wide nano models with random weights."""
    preset = load_preset("nano")
    assert preset.lm and preset.tokenizer and preset.diffusion
    wide = {"hidden_size": hidden, "num_heads": HEADS}
    transformer = preset.diffusion.transformer.model_copy(update=wide)
    configs = {
        "lm": preset.lm.model_copy(update=wide | {"ffn_size": hidden * 8 // 3 // 8 * 8}),
        "tokenizer": preset.tokenizer.model_copy(update=wide | {"num_layers": 4}),
        "diffusion": preset.diffusion.model_copy(update={"transformer": transformer}),
    }
    for kind, config in configs.items():
        torch.manual_seed(0)
        model = registry.build_module(kind, config)
        for name, buffer in model.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(True)
            elif name.endswith("embed"):  # the codebook
                buffer.normal_()
        entry = registry.export(folder, kind, kind, config, model.state_dict(), {})
        print(f"{kind}: {entry.weights_path.stat().st_size / 1e6:.0f} MB")


def measure(zoo: Path, offload: str, precision: str) -> None:
    """Prints megabytes at the peak and seconds of one run, in this process."""
    config = load(SampleConfig, "nano/sample").model_dump()
    start = time.perf_counter()
    if offload != "base":
        with tempfile.TemporaryDirectory() as out:
            config |= {"zoo": zoo, "out": Path(out), "prompts": ("a fox",), "steps": 2}
            config |= {"offload": offload, "precision": precision}
            sample_videos(SampleConfig(**config))
    seconds = time.perf_counter() - start
    # Not ru_maxrss, which a child inherits from the process that starts it.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    if pick_device("auto").type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    print(f"result {peak:.0f} {seconds:.1f}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the models")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--measure", nargs=2, metavar=("ZOO", "OFFLOAD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.measure[1], args.precision)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_zoo(Path(folder), args.hidden)
        print(f"{'offload':<10}{'peak MB':>10}{'seconds':>10}", flush=True)
        for offload in OFFLOADS:
            words = ["--measure", folder, offload, "--precision", args.precision]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.sample_memory", *words],
                capture_output=True,
                text=True,
                check=True,
            )
            _, peak, seconds = done.stdout.splitlines()[-1].split()
            print(f"{offload:<10}{peak:>10}{seconds:>10}", flush=True)


if __name__ == "__main__":
    main()
