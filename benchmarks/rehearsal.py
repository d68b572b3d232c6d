"""The whole release layout with random weights, converted and sampled on this machine.

    python -m benchmarks.rehearsal --folder /scratch/rehearsal
    python -m benchmarks.rehearsal --dry-run

Writes the files of the LanDiff release at their sizes in float32 (language model, tokenizer, both
diffusion files, VAE) and both T5-XXL encoders in bfloat16, converts the release to a zoo in
bfloat16, deletes it, and samples a video of one latent frame in two steps. Every step is a process
of its own, whose peak of resident memory is printed. Needs 40 GB of disk. `--dry-run` does the same
with small models.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from landiff.model_zoo.config import ModelConfig
    from landiff.model_zoo.convert.lazy import LazyTensors

# Nothing above imports torch: a child's peak includes that of the process which starts it.
LIMIT_GB = 20
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SMALL_VAE = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
}
SMALL_WIDTHS = {"hidden_size": 128, "num_heads": 2}
WORDS = ("a", "red", "fox", "runs", "over", "snow")


def main() -> None:
    """Prints the table of steps, or runs one of them in a child process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="folder to write in (default: temporary)")
    parser.add_argument("--dry-run", action="store_true", help="small models, seconds")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write_all(args.write, small=args.dry_run)
        return
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rehearse(Path(name), args.dry_run)


def rehearse(folder: Path, small: bool) -> None:
    """Runs all steps and prints the peak and the time of each."""
    landiff = [sys.executable, "-m", "landiff.launchers.cli"]
    write = [sys.executable, "-m", "benchmarks.rehearsal", "--write", str(folder)]
    convert = [*landiff, "convert", str(folder / "release"), "--zoo", str(folder / "zoo")]
    convert += ["--dtype", "bfloat16", "--model", str(folder / "model.yaml")]
    settings = {
        "zoo": folder / "zoo",
        "out": folder / "samples",
        "lm_text.path": folder / "flan-t5",
        "diffusion_text.path": folder / "t5",
        "codec.path": folder / "3d-vae.pt",
        "num_latent_frames": 1,
        "clean_frames": 0,
        "steps": 2,
    }
    sample = [*landiff, "sample", "--config", "landiff/sample", "--memory", f"{LIMIT_GB}GB"]
    sample += [f"{key}={value}" for key, value in settings.items()]
    sample += ["--", "a red fox runs over snow"]
    print(f"{'step':<10}{'peak GB':>10}{'seconds':>10}{'disk GB':>10}", flush=True)
    step("write", write + ["--dry-run"] * small, folder)
    step("convert", convert, folder)
    (folder / "release/CogVideoX-2b-sat/vae/3d-vae.pt").rename(folder / "3d-vae.pt")
    shutil.rmtree(folder / "release")
    peak = step("sample", sample, folder)
    (video,) = (folder / "samples").rglob("*.mp4")
    print(f"{video.name}: {video.stat().st_size} bytes")
    if peak > LIMIT_GB:
        sys.exit(f"the peak of sampling is above {LIMIT_GB} GB")


def step(name: str, command: list[str], folder: Path) -> float:
    """Runs a command. Prints a row and returns the peak of its resident memory in GB."""
    start = time.monotonic()
    with open(folder / f"{name}.log", "wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    if status:
        sys.exit(f"{name} failed:\n{(folder / f'{name}.log').read_text()[-4000:]}")
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    disk = sum(file.stat().st_size for file in files) / 1e9
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"{name:<10}{peak:>10.1f}{seconds:>10.0f}{disk:>10.1f}", flush=True)
    return peak


# ---------------------------------------------------------------- writing


def write_all(folder: Path, small: bool) -> None:
    """Writes the release, both text encoders, and the sizes of the models."""
    from landiff.configs.files import write_text
    from landiff.configs.loader import dump
    from landiff.model_zoo.convert.formats.release_set import VAE, write_release
    from landiff.model_zoo.convert.parts import Part, build_meta

    models = models_of(small)
    write_text(folder / "model.yaml", dump(models))
    parts = []
    for kind in ("lm", "tokenizer", "diffusion"):
        config = getattr(models, kind)
        parts.append(Part(kind, config, random_tensors(build_meta(kind, config))))
    vae = SMALL_VAE if small else {}
    parts.append(Part(VAE, vae, random_tensors(build_meta(VAE, vae))))
    (folder / "release").mkdir()
    write_release(folder / "release", parts)
    for name in ("flan-t5", "t5"):
        write_t5(folder / name, T5_SMALL if small else T5_XXL)


def models_of(small: bool) -> ModelConfig:
    """The sizes of the release, or narrow models on the same grids."""
    from benchmarks.support.models import load_preset

    models = load_preset("landiff")
    if not small:
        return models
    text = T5_SMALL["d_model"]
    lm = SMALL_WIDTHS | {"ffn_size": 256, "num_layers": 2, "text_dim": text}
    transformer = SMALL_WIDTHS | {"num_layers": 2, "text_dim": text}
    diffusion = models.diffusion.model_copy(
        update={
            "transformer": models.diffusion.transformer.model_copy(update=transformer),
            "control_layers": 1,
        }
    )
    return models.model_copy(
        update={
            "lm": models.lm.model_copy(update=lm),
            "tokenizer": models.tokenizer.model_copy(update=SMALL_WIDTHS | {"num_layers": 2}),
            "diffusion": diffusion,
        }
    )


def random_tensors(meta: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors that are drawn when they are read: matrices that keep the scale of their input."""
    import torch

    from landiff.model_zoo.convert.lazy import LazyTensors

    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))

    def read(name: str) -> Tensor:
        shape, dtype = meta[name].shape, meta[name].dtype
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        if len(shape) < 2:
            is_scale = name.endswith("weight") or name.rpartition(".")[2] in ("std", "cluster_size")
            return torch.full(shape, float(is_scale), dtype=dtype)
        repeats = -(-shape.numel() // noise.numel())
        drawn = noise.repeat(repeats)[: shape.numel()].view(shape)
        return (drawn / shape[1:].numel() ** 0.5).to(dtype)

    return LazyTensors(dict(meta), read)


def write_t5(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Writes a T5 encoder in bfloat16 and a tokenizer of a few words."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    from landiff.model_zoo.convert.lazy import write_safetensors

    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
    with torch.device("meta"):
        state = T5EncoderModel(config).to(torch.bfloat16).state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", random_tensors(state), {"format": "pt"})
    config.architectures = ["T5EncoderModel"]
    config.save_pretrained(folder)
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [("▁" + word, -1.0) for word in WORDS]
    T5Tokenizer(vocab=[*special, *words, ("▁", -5.0)], extra_ids=0).save_pretrained(folder)


if __name__ == "__main__":
    main()
