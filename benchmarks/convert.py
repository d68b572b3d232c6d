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
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

Ways = tuple[tuple[str, str], ...]
# Every cell of the matrix; "numbers" are made up as they are written. A checkpoint "with optimizer" holds moments too, so its
# model has a third of the size; what follows it is cut anew: the other kind of optimizer, another stage and number of ranks.
MODELS: dict[str, Ways] = {
    "lm": (
        ("numbers", "zoo"),
        ("zoo", "release"),
        ("zoo", "megatron"),
        ("zoo", "transformers"),
        ("release", "zoo"),
        ("release", "megatron"),
        ("release", "transformers"),
        ("megatron", "zoo"),
        ("megatron", "transformers"),
        ("transformers", "zoo"),
        ("numbers", "megatron with optimizer"),
        ("megatron with optimizer", "megatron with optimizer"),
        ("megatron with optimizer", "transformers"),
    ),
    "transformer": (
        ("numbers", "zoo"),
        ("zoo", "release"),
        ("zoo", "deepspeed"),
        ("zoo", "diffusers"),
        ("release", "zoo"),
        ("release", "deepspeed"),
        ("release", "diffusers"),
        ("deepspeed", "zoo"),
        ("diffusers", "zoo"),
        ("diffusers", "release"),
        ("diffusers", "deepspeed"),
        ("numbers", "deepspeed with optimizer"),
        ("deepspeed with optimizer", "deepspeed with optimizer"),
        ("deepspeed with optimizer", "diffusers"),
    ),
}
OPTIMIZER = " with optimizer"
MEGABYTE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, default=256, help="size of the synthetic checkpoint"
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--check", action="store_true", help="fail where memory grows too much")
    parser.add_argument(
        "--quick", action="store_true", help="all of it in one process, for the growth alone"
    )
    parser.add_argument("--only", choices=list(MODELS), help="one of the two models")
    parser.add_argument(
        "--one", nargs=4, help=argparse.SUPPRESS
    )  # kind, source, format, target: this process's cell
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
            written, before = {"numbers": "numbers"}, peak()
            for number, (first, format) in enumerate(ways):
                path = convert(
                    kind,
                    written[first],
                    format,
                    folder / f"{size}-{kind}" / f"{number}-{format}",
                    size,
                )
                keep(written, format, path, ways[number + 1 :])
            largest = largest_of(kind, size)
            if size > 1:
                print(
                    f"{kind}: the peak grew by {peak() - before:.1f} MB over {len(ways)} conversions of {size} MB; largest tensor {largest:.1f} MB"
                )
                limit(kind, "all", "ways", peak() - before, largest)


def keep(written: dict[str, str], format: str, path: Path, later: Ways) -> None:
    """Remember where a format lies, the first time it is written; delete what no later way reads."""
    if format in written or format not in [first for first, _ in later]:
        shutil.rmtree(path)
    else:
        written[format] = str(path)
    for name in [
        name for name in written if name != "numbers" and name not in [first for first, _ in later]
    ]:
        shutil.rmtree(written.pop(name))


def limit(kind: str, first: str, format: str, growth: float, largest: float) -> None:
    if growth > 4 * largest + 64:
        sys.exit(
            f"{kind}, {first} -> {format}: the peak grew by {growth:.0f} MB; the largest tensor has {largest:.0f} MB"
        )


def table(folder: Path, megabytes: int, kinds: dict[str, Ways], check: bool) -> None:
    print(
        f"{'model':<12} {'from':<25} {'to':<25} {'written MB':>10} {'largest MB':>11} {'growth of peak MB':>18} {'CPU s':>7}"
    )
    for kind, ways in kinds.items():
        written = {"numbers": "numbers"}
        for number, (first, format) in enumerate(ways):
            target = folder / kind / f"{number}-{format}"
            command = [
                sys.executable,
                __file__,
                "--megabytes",
                str(megabytes),
                "--one",
                kind,
                written[first],
                format,
                str(target),
            ]
            result = json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            keep(written, format, Path(result["path"]), ways[number + 1 :])
            print(
                f"{kind:<12} {first:<25} {format:<25} {result['size']:>10.0f} {result['largest']:>11.1f} {result['growth']:>18.1f} "
                f"{result['seconds']:>7.0f}",
                flush=True,
            )
            if check:
                limit(kind, first, format, result["growth"], result["largest"])


def measure(
    kind: str, source: str, format: str, target: Path, megabytes: int
) -> dict[str, float | str]:
    """Convert once; sizes and growth of the peak in MB."""
    warm_up = target.with_name(f"{target.name}-warm-up")  # all imports, all caches
    first = convert(kind, "numbers", format, warm_up, 1)
    if format.endswith(OPTIMIZER):
        convert(kind, str(first), format, target.with_name(f"{target.name}-again"), 1)
    before, started = peak(), time.process_time()
    path = convert(kind, source, format, target, megabytes)
    seconds = time.process_time() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / MEGABYTE
    shutil.rmtree(warm_up)
    own = megabytes // 3 or 1 if OPTIMIZER in format + source else megabytes
    return {
        "path": str(path),
        "size": size,
        "largest": largest_of(kind, own),
        "growth": peak() - before,
        "seconds": seconds,
    }


def largest_of(kind: str, megabytes: int) -> float:
    """Of the tensors under our names; Megatron's are up to twice that: gate and up are one there."""
    return (
        max(
            meta.numel() * meta.itemsize
            for meta in synthetic(kind, megabytes)[0].tensors.meta.values()
        )
        / MEGABYTE
    )


def convert(kind: str, source: str, format: str, target: Path, megabytes: int) -> Path:
    """One way; `source` is a path or "numbers". Where it went."""
    from landiff.model_zoo.convert.known_formats import export_to_zoo, write_target

    if format.endswith(OPTIMIZER):
        return with_optimizer(kind, source, target, megabytes // 3 or 1)
    size = megabytes // 3 or 1 if OPTIMIZER in source else megabytes
    parts = synthetic(kind, size) if source == "numbers" else opened(kind, Path(source), size)
    if format == "zoo":
        return export_to_zoo(target, {kind: kind}, parts, {})[0].path
    write_target(target, format, parts, {})
    return target


def with_optimizer(kind: str, source: str, target: Path, megabytes: int) -> Path:
    """Numbers -> a checkpoint with its optimizer; such a checkpoint -> one of another layout."""
    from landiff.model_zoo.convert.formats import (
        deepspeed,
        deepspeed_write,
        megatron,
        megatron_optimizer,
    )

    target.mkdir(parents=True)
    (part,) = synthetic(kind, megabytes)
    if kind == "lm":
        plain = megatron_optimizer.MegatronLayout(
            megatron.default_padding(part.config), False, part.tensors.dtype()
        )
        if source == "numbers":
            moments = dict.fromkeys(megatron_optimizer.MOMENTS, part.tensors)
            state = megatron_optimizer.MegatronState(
                plain, part.tensors, part.tensors, moments, 5.0, ({"lr": 1e-3},)
            )
        else:
            state = megatron_optimizer.read_state(Path(source), part.config)
        layout = (
            plain
            if source == "numbers"
            else replace(
                plain, distributed=True, padded=megatron.default_padding(part.config, 1024)
            )
        )
        megatron_optimizer.write_state(target, part.config, state, layout)
        megatron.write_megatron_config(target, part.config)
        return target
    if source == "numbers":
        places = {
            name: deepspeed_write.LazyTensorPlace(part.tensors, name) for name in part.tensors
        }
        groups = (deepspeed.OptimizerGroup(tuple(places), {"lr": 1e-3}),)
        state = deepspeed.DeepSpeedState(
            2, 1, places, groups, (), {}, dict.fromkeys(deepspeed.MOMENTS, places), 5
        )
    else:
        state = deepspeed.read_deepspeed(Path(source))
    deepspeed_write.write_deepspeed(
        target,
        state,
        deepspeed_write.ZeroPartition(2, 1)
        if source == "numbers"
        else deepspeed_write.ZeroPartition(3, 4),
    )
    return target


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def models(megabytes: int):
    """A preset whose language model and whose main transformer have about this size in float32."""
    from landiff.model_zoo.config import DiffusionConfig, LMConfig, ModelConfig, TransformerConfig

    width = 2048 if megabytes >= 2048 else 512
    layers = max(1, round(megabytes * MEGABYTE / 4 / (16 * width * width)))
    lm = LMConfig(
        hidden_size=width, ffn_size=4 * width, num_layers=layers, num_heads=8, text_dim=64
    )
    main = TransformerConfig(
        hidden_size=width,
        num_heads=8,
        num_layers=layers,
        latent_frames=3,
        latent_height=4,
        latent_width=4,
        time_embed_dim=64,
        text_length=4,
        text_dim=64,
    )
    return ModelConfig(lm=lm, diffusion=DiffusionConfig(transformer=main, control_layers=1))


def synthetic(kind: str, megabytes: int) -> list:
    """A part whose tensors are made when asked for."""
    import torch

    from landiff.model_zoo.convert.lazy import LazyTensors
    from landiff.model_zoo.convert.parts import Part, build_meta

    preset = models(megabytes)
    config = preset.lm if kind == "lm" else preset.diffusion.transformer
    meta = build_meta(kind, config)
    return [Part(kind, config, LazyTensors(meta, lambda name: torch.full(meta[name].shape, 0.5)))]


def opened(kind: str, path: Path, megabytes: int) -> list:
    from landiff.model_zoo.convert.known_formats import Options, open_source

    return [
        part for part in open_source(path, Options(models(megabytes))).parts if part.kind == kind
    ]


if __name__ == "__main__":
    main()
