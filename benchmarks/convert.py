"""Peak memory and speed of `landiff convert` on a synthetic checkpoint, one fresh process per cell.

    python benchmarks/convert.py                      256 MB, seconds
    python benchmarks/convert.py --megabytes 4096     as large as the released language model in bfloat16

Growth is the peak resident memory of the process above what it had after converting a model of 1 MB. It should stay near
the largest tensor and the parts it is made of; `--check` fails beyond four times the largest tensor and 64 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Ways = tuple[tuple[str, str], ...]
MODELS: dict[str, Ways] = {
    "lm": (("zoo", "release"), ("release", "zoo"), ("zoo", "megatron"), ("megatron", "zoo"), ("zoo", "transformers")),
    "transformer": (("zoo", "deepspeed"), ("deepspeed", "diffusers"), ("diffusers", "release"), ("release", "zoo")),
}
MEGABYTE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the synthetic checkpoint")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--check", action="store_true", help="fail where memory grows too much")
    parser.add_argument("--quick", action="store_true", help="all of it in one process, for the growth alone")
    parser.add_argument("--only", choices=["lm", "transformer"], help="one of the two models")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # kind, source, format, target: this process's cell
    args = parser.parse_args()
    if args.one:
        kind, source, format, target = args.one
        print(json.dumps(measure(kind, source, format, Path(target), args.megabytes)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        kinds = {kind: ways for kind, ways in MODELS.items() if args.only in (None, kind)}
        if args.quick:
            quick(Path(name), args.megabytes, kinds)
        else:
            table(Path(name), args.megabytes, kinds, args.check)


def quick(folder: Path, megabytes: int, kinds: dict[str, Ways]) -> None:
    """Every way in this process, whose peak can only rise. Exits where it rises too much."""
    for size in (1, megabytes):  # first what is imported and cached once
        for kind, ways in kinds.items():
            written, before = {"numbers": ""}, peak()
            for number, (first, format) in enumerate((("numbers", "zoo"), *ways)):
                parts = synthetic(kind, size) if first == "numbers" else opened(kind, Path(written[first]), size)
                written[format] = str(write(parts, kind, format, folder / f"{size}-{kind}" / f"{number}-{format}"))
            largest = max(m.numel() * m.itemsize / MEGABYTE for m in synthetic(kind, size)[0].tensors.meta.values())
            if size > 1:
                print(f"{kind}: the peak grew by {peak() - before:.1f} MB over {len(ways) + 1} conversions of {size} MB; largest tensor {largest:.1f} MB")
                limit(kind, "all", "ways", peak() - before, largest)


def limit(kind: str, first: str, format: str, growth: float, largest: float) -> None:
    if growth > 4 * largest + 64:
        sys.exit(f"{kind}, {first} -> {format}: the peak grew by {growth:.0f} MB; the largest tensor has {largest:.0f} MB")


def table(folder: Path, megabytes: int, kinds: dict[str, Ways], check: bool) -> None:
    print(f"{'model':<12} {'from':<13} {'to':<13} {'size MB':>8} {'largest MB':>11} {'growth of peak MB':>18} {'MB/s':>7}")
    for kind, ways in kinds.items():
        written = {"numbers": "numbers"}
        for number, (first, format) in enumerate((("numbers", "zoo"), *ways)):
            target = folder / kind / f"{number}-{format}"
            command = [sys.executable, __file__, "--megabytes", str(megabytes), "--one", kind, written[first], format, str(target)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            written[format] = result["path"]
            print(f"{kind:<12} {first:<13} {format:<13} {result['size']:>8.0f} {result['largest']:>11.1f} {result['growth']:>18.1f} "
                  f"{result['size'] / result['seconds']:>7.0f}", flush=True)
            if check:
                limit(kind, first, format, result["growth"], result["largest"])


def measure(kind: str, source: str, format: str, target: Path, megabytes: int) -> dict[str, float | str]:
    """Convert once; sizes and growth of the peak in MB."""
    write(synthetic(kind, 1), kind, format, target.with_name(f"{target.name}-warm-up"))  # all imports, all caches
    before, started = peak(), time.monotonic()
    parts = synthetic(kind, megabytes) if source == "numbers" else opened(kind, Path(source), megabytes)
    path = write(parts, kind, format, target)
    seconds = time.monotonic() - started
    sizes = [m.numel() * m.itemsize / MEGABYTE for part in (*parts, *opened(kind, path, megabytes)) for m in part.tensors.meta.values()]
    return {"path": str(path), "size": sum(sizes) / 2, "largest": max(sizes), "growth": peak() - before, "seconds": seconds}


def write(parts: list, kind: str, format: str, target: Path) -> Path:
    from model_zoo.convert.formats import export_to_zoo, write_target

    if format == "zoo":
        return export_to_zoo(target, {kind: kind}, parts, {})[0].path
    write_target(target, format, parts, {})
    return target


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def models(megabytes: int):
    """A preset whose language model and whose main transformer have about this size in float32."""
    from model_zoo.config import DiffusionConfig, LMConfig, ModelConfig, TransformerConfig

    width = 2048 if megabytes >= 2048 else 512
    layers = max(1, round(megabytes * MEGABYTE / 4 / (16 * width * width)))
    lm = LMConfig(hidden_size=width, ffn_size=4 * width, num_layers=layers, num_heads=8, text_dim=64)
    main = TransformerConfig(hidden_size=width, num_heads=8, num_layers=layers, latent_frames=3, latent_height=4, latent_width=4,
                             time_embed_dim=64, text_length=4, text_dim=64)
    return ModelConfig(lm=lm, diffusion=DiffusionConfig(transformer=main, control_layers=1))


def synthetic(kind: str, megabytes: int) -> list:
    """A part whose tensors are made when asked for."""
    import torch

    from model_zoo.convert.lazy import LazyTensors
    from model_zoo.convert.parts import Part, build_meta

    preset = models(megabytes)
    config = preset.lm if kind == "lm" else preset.diffusion.transformer
    meta = build_meta(kind, config)
    return [Part(kind, config, LazyTensors(meta, lambda name: torch.full(meta[name].shape, 0.5)))]


def opened(kind: str, path: Path, megabytes: int) -> list:
    from model_zoo.convert.formats import Options, open_source

    return [part for part in open_source(path, Options(models(megabytes))).parts if part.kind == kind]


if __name__ == "__main__":
    main()
