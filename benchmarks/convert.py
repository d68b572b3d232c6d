"""Peak memory and speed of `landiff convert` on a synthetic checkpoint, one process per conversion.

    python benchmarks/convert.py                      256 MB, seconds
    python benchmarks/convert.py --megabytes 4096     size of the released LM in bfloat16

Growth is the peak resident memory of the process above that after converting a model of 1 MB. It
should stay near the largest tensor and the parts that it is made of. `--check` fails beyond four
times the largest tensor plus 64 MB.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from landiff.configs import Config
    from landiff.model_zoo.config import ModelConfig
    from landiff.model_zoo.convert.parts import Part

Ways = tuple[tuple[str, str], ...]
# Every conversion (source, target). The source "numbers" is generated while it is written. A
# checkpoint "with optimizer" also contains moments, so its model has a third of the size.
# Converting it to itself reshards it: the other kind of optimizer, another ZeRO stage and number of
# ranks.
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


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--megabytes", type=int, default=256, help="size of the synthetic checkpoint"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder to write in; default: the temporary one"
    )
    parser.add_argument("--check", action="store_true", help="fail if memory grows too much")
    parser.add_argument(
        "--quick", action="store_true", help="all conversions in one process; measures growth only"
    )
    parser.add_argument("--only", choices=list(MODELS), help="one of the two models")
    # Kind, source, format and target of the conversion that a child process measures.
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures and prints the table, or one conversion in a child process."""
    args = parse_arguments()
    if args.one:
        kind, source, format, target = args.one
        print(json.dumps(measure(kind, source, format, Path(target), args.megabytes)))
        return
    kinds = MODELS
    if args.only:
        kinds = {args.only: MODELS[args.only]}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.quick:
            quick(Path(name), args.megabytes, kinds)
        else:
            table(Path(name), args.megabytes, kinds, args.check)


def quick(folder: Path, megabytes: int, kinds: dict[str, Ways]) -> None:
    """Runs all conversions in this process, whose peak only rises. Exits if it rises too much."""
    for kind, ways in kinds.items():
        convert_all(kind, ways, folder / f"1-{kind}", 1)  # imports and caches
    for kind, ways in kinds.items():
        before = peak()
        convert_all(kind, ways, folder / f"{megabytes}-{kind}", megabytes)
        growth = peak() - before
        largest = largest_of(kind, megabytes)
        print(
            f"{kind}: the peak grew by {growth:.1f} MB over {len(ways)} conversions of "
            f"{megabytes} MB; largest tensor {largest:.1f} MB"
        )
        limit(kind, "all", "ways", growth, largest)


def convert_all(kind: str, ways: Ways, folder: Path, megabytes: int) -> None:
    """Runs the conversions of a model one after the other."""
    written = {"numbers": "numbers"}
    for number, (source, format) in enumerate(ways):
        target = folder / f"{number}-{format}"
        path = convert(kind, written[source], format, target, megabytes)
        keep(written, format, path, ways[number + 1 :])


def keep(written: dict[str, str], format: str, path: Path, later: Ways) -> None:
    """Records the first path of each format, and deletes those that no later conversion reads."""
    sources = {source for source, _ in later}
    if format in written or format not in sources:
        shutil.rmtree(path)
    else:
        written[format] = str(path)
    for name in list(written):
        if name != "numbers" and name not in sources:
            shutil.rmtree(written.pop(name))


def limit(kind: str, source: str, format: str, growth: float, largest: float) -> None:
    """Exits if the growth is beyond four times the largest tensor plus 64 MB."""
    if growth > 4 * largest + 64:
        sys.exit(
            f"{kind}, {source} -> {format}: the peak grew by {growth:.0f} MB; the largest tensor "
            f"has {largest:.0f} MB"
        )


def table(folder: Path, megabytes: int, kinds: dict[str, Ways], check: bool) -> None:
    """Prints the table, with one process per conversion."""
    print(
        f"{'model':<12} {'from':<25} {'to':<25} {'written MB':>10} {'largest MB':>11} "
        f"{'growth of peak MB':>18} {'CPU s':>7}"
    )
    for kind, ways in kinds.items():
        written = {"numbers": "numbers"}
        for number, (source, format) in enumerate(ways):
            target = folder / kind / f"{number}-{format}"
            command = [sys.executable, __file__, "--megabytes", str(megabytes)]
            command += ["--one", kind, written[source], format, str(target)]
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(child.stdout.splitlines()[-1])
            keep(written, format, Path(result["path"]), ways[number + 1 :])
            print(
                f"{kind:<12} {source:<25} {format:<25} {result['size']:>10.0f} "
                f"{result['largest']:>11.1f} {result['growth']:>18.1f} {result['seconds']:>7.0f}",
                flush=True,
            )
            if check:
                limit(kind, source, format, result["growth"], result["largest"])


def measure(
    kind: str, source: str, format: str, target: Path, megabytes: int
) -> dict[str, float | str]:
    """Runs one conversion. Returns its path, sizes and growth of the peak in MB, CPU seconds."""
    warm_up = target.with_name(f"{target.name}-warm-up")  # for imports and caches
    first = convert(kind, "numbers", format, warm_up, 1)
    if format.endswith(OPTIMIZER):
        convert(kind, str(first), format, target.with_name(f"{target.name}-again"), 1)
    before = peak()
    started = time.process_time()
    path = convert(kind, source, format, target, megabytes)
    seconds = time.process_time() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(warm_up)
    return {
        "path": str(path),
        "size": size / MEGABYTE,
        "largest": largest_of(kind, model_megabytes(megabytes, source, format)),
        "growth": peak() - before,
        "seconds": seconds,
    }


def model_megabytes(megabytes: int, source: str, format: str) -> int:
    """Size of the model in a checkpoint of this size, a third of it beside two moments."""
    if OPTIMIZER in format + source:
        return max(1, megabytes // 3)
    return megabytes


def largest_of(kind: str, megabytes: int) -> float:
    """Size of the largest tensor under our names, in MB.

    Megatron's are up to twice as large, because gate and up are one tensor there.
    """
    meta = synthetic(kind, megabytes)[0].tensors.meta
    return max(tensor.numel() * tensor.itemsize for tensor in meta.values()) / MEGABYTE


def convert(kind: str, source: str, format: str, target: Path, megabytes: int) -> Path:
    """Runs one conversion. Returns the path that it wrote.

    source: a path or "numbers".
    """
    from landiff.model_zoo.convert.known_formats import export_to_zoo, write_target

    size = model_megabytes(megabytes, source, format)
    if format.endswith(OPTIMIZER):
        return with_optimizer(kind, source, target, size)
    if source == "numbers":
        parts = synthetic(kind, size)
    else:
        parts = opened(kind, Path(source), size)
    if format == "zoo":
        return export_to_zoo(target, {kind: kind}, parts, {})[0].path
    write_target(target, format, parts, {})
    return target


def with_optimizer(kind: str, source: str, target: Path, megabytes: int) -> Path:
    """Writes a checkpoint with optimizer state, generated or resharded from another one."""
    target.mkdir(parents=True)
    (part,) = synthetic(kind, megabytes)
    if kind == "lm":
        write_megatron(part, source, target)
    else:
        write_deepspeed(part, source, target)
    return target


def write_megatron(part: Part, source: str, target: Path) -> None:
    """A Megatron checkpoint with optimizer: a plain one, or `source` with a distributed one."""
    from landiff.model_zoo.config import LMConfig
    from landiff.model_zoo.convert.formats import megatron, megatron_optimizer

    config = part.config
    assert isinstance(config, LMConfig), config
    dtype = part.tensors.dtype()
    cut = megatron_optimizer.MegatronLayout(megatron.default_padding(config), False, dtype)
    if source == "numbers":
        moments = dict.fromkeys(megatron_optimizer.MOMENTS, part.tensors)
        state = megatron_optimizer.MegatronState(
            cut, part.tensors, part.tensors, moments, 5.0, ({"lr": 1e-3},)
        )
    else:
        state = megatron_optimizer.read_state(Path(source), config)
        padded = megatron.default_padding(config, 1024)
        cut = replace(cut, distributed=True, padded=padded)
    megatron_optimizer.write_state(target, config, state, cut)
    megatron.write_megatron_config(target, config)


def write_deepspeed(part: Part, source: str, target: Path) -> None:
    """A DeepSpeed checkpoint with optimizer: ZeRO 2 on 1 rank, or `source` as ZeRO 3 on 4 ranks."""
    from landiff.model_zoo.convert.formats import deepspeed, deepspeed_write

    if source == "numbers":
        places = {
            name: deepspeed_write.LazyTensorPlace(part.tensors, name) for name in part.tensors
        }
        groups = (deepspeed.OptimizerGroup(tuple(places), {"lr": 1e-3}),)
        state = deepspeed.DeepSpeedState(
            2, 1, places, groups, (), {}, dict.fromkeys(deepspeed.MOMENTS, places), 5
        )
        cut = deepspeed_write.ZeroPartition(2, 1)
    else:
        state = deepspeed.read_deepspeed(Path(source))
        cut = deepspeed_write.ZeroPartition(3, 4)
    deepspeed_write.write_deepspeed(target, state, cut)


def peak() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def models(megabytes: int) -> ModelConfig:
    """A preset whose language model and main transformer have about this size in float32."""
    from landiff.model_zoo.config import DiffusionConfig, LMConfig, ModelConfig, TransformerConfig

    width = 512
    if megabytes >= 2048:
        width = 2048
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


def synthetic(kind: str, megabytes: int) -> list[Part]:
    """A part whose tensors are generated when they are read."""
    import torch

    from landiff.model_zoo.convert.lazy import LazyTensors
    from landiff.model_zoo.convert.parts import Part, build_meta

    preset = models(megabytes)
    config: Config = preset.diffusion.transformer
    if kind == "lm":
        config = preset.lm
    meta = build_meta(kind, config)
    return [Part(kind, config, LazyTensors(meta, lambda name: torch.full(meta[name].shape, 0.5)))]


def opened(kind: str, path: Path, megabytes: int) -> list[Part]:
    """The parts of one kind in a checkpoint."""
    from landiff.model_zoo.convert.known_formats import Options, open_source

    parts = open_source(path, Options(models(megabytes))).parts
    return [part for part in parts if part.kind == kind]


if __name__ == "__main__":
    main()
