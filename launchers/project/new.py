"""`landiff new`: writes the configs of a project for one clip size."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from landiff.configs import ConfigError, load
from landiff.configs.files import write_text
from landiff.launchers.config import ShardsJobConfig
from landiff.launchers.pipeline import pipeline_stages
from landiff.launchers.project.presets import (
    PRESET_CONFIGS,
    has_config,
    packaged_presets,
    preset_config,
)
from landiff.launchers.project.sizes import (
    DECORD_REFUSES,
    ClipSizes,
    ProjectSizes,
    project_sizes,
)
from landiff.model_zoo.config import ModelConfig
from landiff.training.config import TrainConfig

SIZE = re.compile(r"(\d+)x(\d+)")
CLUSTER = """\
# Your site; docs/cluster.md explains every line. `landiff config cluster/example` prints what this
# file extends. Change what differs.
extends: cluster/example
account: my-project
constraint: h100
gpu_type: h100
default: {{partition: gpu, nodes: 1, gpus_per_node: {gpus}, cpus_per_task: 12, time: "08:00:00"}}
stages:
  lm: {{nodes: {lm_nodes}}}
  diffusion: {{nodes: {diffusion_nodes}}}
modules: [cuda/12.8]
env:
  NCCL_SOCKET_IFNAME: ib0
  HF_HOME: /shared/hf
"""
PROMPTS = """\
prompts: # best like the captions of your videos
  - A beach at night.
  - A birthday party in the garden.
"""
README = """\
# {name}

Clips of {frames} frames of {height} x {width} pixels (height x width), models of the preset
`{base}`. Created with

    {command}

The clip size is set in `shards.yaml`; the model sizes that follow from it are in `model.yaml`.
All other files extend the preset `{base}`: add the keys that you want to change. `landiff config
{base}/lm` prints the config that a file extends.

Run all commands in this folder. First check the configs:

    landiff check --preset .

To run all stages on this machine (run the same command again to resume):

    landiff quickstart --preset . --out .

To run them as SLURM jobs, edit `cluster.yaml`, then:

    landiff submit pipeline --preset . --cluster cluster.yaml --dry-run
    landiff submit pipeline --preset . --cluster cluster.yaml

To run the stages one by one:

{commands}
"""


def new_command(args: argparse.Namespace) -> int:
    """Writes the project folder and prints what to do next. Returns the exit code."""
    folder = Path(args.folder)
    written = write_project(folder, args.base, args.frames, args.size, args.source, args.captions)
    print(f"new: wrote {folder}: {', '.join(written)}")
    print(f"new: next  cd {shlex.quote(str(folder))}; landiff check --preset .")
    return 0


def write_project(
    folder: Path,
    base: str,
    frames: int | None = None,
    size: str | None = None,
    source: str | None = None,
    captions: str | None = None,
) -> list[str]:
    """Write the files of a project into the new folder `folder`. Returns their names.

    `base` is a packaged preset with a model.yaml, `size` is HEIGHTxWIDTH; frames and size are those
    of the preset unless given. `captions` is `missing_captions` of the shards. Raises ConfigError
    for sizes that do not divide and for a folder that exists.
    """
    bases = [name for name in packaged_presets() if has_config(name, "model")]
    if base not in bases:
        raise ConfigError(f"--from {base}: the presets to start from are {', '.join(bases)}")
    check_folder(folder)
    shards = load(ShardsJobConfig, f"{base}/shards")
    shape = shards.shapes[0]
    height, width = (shape.height, shape.width) if size is None else parse_size(size)
    clip = ClipSizes(shape.num_frames if frames is None else frames, height, width)
    sizes = project_sizes(clip, load(ModelConfig, f"{base}/model"))
    own = []  # options that the README repeats
    if source is None:
        source = shards.sources[0]
    else:
        if source != "packaged":
            source = str(Path(source).absolute())
        own += ["--source", source]
    if captions is not None:
        own += ["--captions", captions]
    files = {
        **config_files(base, sizes, bool(shards.buckets), source),
        "cluster.yaml": cluster_file(base),
        "README.md": readme(folder, base, sizes, own),
    }
    if captions is not None:
        files["shards.yaml"] += f"missing_captions: {captions} # of clips without a caption\n"
    folder.mkdir(parents=True)
    for name, text in files.items():
        write_text(folder / name, text)
    return list(files)


def check_folder(folder: Path) -> None:
    """Raises ConfigError unless a project can be made there and be named with --preset."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder")
    if not str(folder).isprintable():
        raise ConfigError(
            f"{str(folder)!r} holds a control character such as a line break; name another folder"
        )
    if str(folder) in packaged_presets():
        raise ConfigError(
            f"{folder} is the name of a packaged preset, which --preset {folder} would mean; name "
            "another folder"
        )


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `480x720`. Raises ConfigError."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"--size {text} must be HEIGHTxWIDTH in pixels, e.g. 480x720")
    return int(found[1]), int(found[2])


def config_files(base: str, sizes: ProjectSizes, buckets: bool, source: str) -> dict[str, str]:
    """Name and text of each config. `buckets`: the shards of the preset have buckets."""
    clip = sizes.clip
    shape = f"num_frames: {clip.num_frames}\nheight: {clip.height}\nwidth: {clip.width}\n"
    if buckets:
        shape = (
            "buckets: # another entry makes longer clips of longer shots\n"
            f"  - {{num_frames: {clip.num_frames}, height: {clip.height}, width: {clip.width}}}\n"
        )
    prefixes = f"{', '.join(str(frames) for frames in range(1, sizes.prefix + 1))}"
    diffusion = (
        "model: model.yaml#diffusion\nschedule: model.yaml#schedule\n"
        f"prefix: {{frames: [{prefixes}]}} # of {sizes.window} latent frames\n"
    )
    decoder = "decoder: pyav # decord cannot read clips of this width\n"
    if clip.width not in DECORD_REFUSES:
        decoder = ""
    own = {
        "features": decoder,
        "precompute": decoder,
        "shards": f"source: {yaml_string(source)}\n{shape}",
        "tokenizer": "model: model.yaml#tokenizer\n",
        "lm": "model: model.yaml#lm\n",
        "diffusion-main": diffusion,
        "diffusion-control": diffusion,
        "evaluate": f"schedule: model.yaml#schedule\nprefix_frames: {sizes.prefix}\n",
        "sample": (
            f"schedule: model.yaml#schedule\nnum_latent_frames: {sizes.window}\n"
            f"clean_frames: {sizes.prefix}\n"
        ),
    }
    for stem, cls in PRESET_CONFIGS.items():
        if issubclass(cls, TrainConfig):
            own[stem] += all_clips(load(cls, f"{base}/{stem}"))
    if has_config(base, "world"):
        own["sample"] += PROMPTS
    stems = list(PRESET_CONFIGS)
    if has_config(base, "latents"):
        stems.insert(stems.index("precompute"), "latents")
        own["latents"] = decoder
    files = {"model.yaml": model_file(base, sizes)}
    for stem in stems:
        files[f"{stem}.yaml"] = f"extends: {base}/{stem}\n{own.get(stem, '')}"
    return files


def all_clips(preset: TrainConfig) -> str:
    """Keys that make a trainer read all clips, if the preset's mixes those of its own sources."""
    if preset.data.where is None and not preset.data.blend:
        return ""
    return "data: {where: null, blend: []} # all clips\n"


def model_file(base: str, sizes: ProjectSizes) -> str:
    """Text of model.yaml: what follows from the clips, each number once."""
    clip = sizes.clip
    rows, columns = clip.grid
    latent_height, latent_width = clip.latent_size
    return f"""\
# Sizes that follow from the clips in shards.yaml, {clip.num_frames} frames of {clip.height} x \
{clip.width}.
# `landiff check` compares them; other sizes are those of {base}/model.
extends: {base}/model
tokenizer:
  grid_height: {rows} # height / 16
  grid_width: {columns} # width / 16
  iframe_tokens: &iframe_tokens {sizes.iframe_tokens}
  pframe_tokens: &pframe_tokens {sizes.pframe_tokens}
  segment_frames: &segment_frames {sizes.window}
lm:
  iframe_tokens: *iframe_tokens
  pframe_tokens: *pframe_tokens
  segment_frames: *segment_frames
  max_positions: {sizes.max_positions}
diffusion:
  transformer:
    latent_frames: *segment_frames # of (frames - 1) / 4 + 1 = {clip.latent_frames} of a clip
    latent_height: {latent_height} # height / 8
    latent_width: {latent_width} # width / 8
    spatial_interpolation: {sizes.spatial_interpolation:g} # rows of patches / 16
"""


def yaml_string(text: str) -> str:
    """A string for a YAML file, quoted if it holds more than letters, digits, and / . _ -."""
    if re.fullmatch(r"[\w/.-]*[A-Za-z/][\w/.-]*", text):
        return text
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def cluster_file(base: str) -> str:
    """Text of cluster.yaml, with ranks among which the batches of the preset can be divided."""
    if base == "landiff":
        return CLUSTER.format(gpus=8, lm_nodes=4, diffusion_nodes=8)
    return CLUSTER.format(gpus=2, lm_nodes=1, diffusion_nodes=1)


def readme(folder: Path, base: str, sizes: ProjectSizes, own: Sequence[str]) -> str:
    """Text of README.md, with all commands in order. `own`: further options of `landiff new`."""
    clip = sizes.clip
    lines = []
    place = f"{Path(preset_config(str(folder), 'lm')).parent}/"
    for stage in pipeline_stages(str(folder), None):
        words = [word.replace(place, "") for word in stage.command]
        lines.append(f"    landiff {shlex.join(words)}")
    size = f"{clip.height}x{clip.width}"
    command = ["landiff", "new", folder.name, "--frames", str(clip.num_frames)]
    command += ["--size", size, "--from", base, *own]
    return README.format(
        name=folder.name,
        frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
        base=base,
        command=shlex.join(command),
        commands="\n".join(lines),
    )
