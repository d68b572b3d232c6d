"""Checks of the configs that only some presets have: `world.yaml` and `latents.yaml`.

Torch-free. `presets.FURTHER_CONFIGS` says what they are; the order of their stages is in
launchers/pipeline.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from landiff.configs import ConfigError
from landiff.configs.documents import read_json
from landiff.configs.loader import nearest_name
from landiff.configs.problems import Problem
from landiff.data_pipeline.precompute.config import PrecomputeConfig, TokensColumn
from landiff.launchers.config import ShardsJobConfig, WorldConfig
from landiff.launchers.project.names import columns_read

WORLD = PurePath("world")
TRAIN = WORLD / "train"
TRUE = (WORLD / "true-heldout", WORLD / "true-seen")
"""Folders that the stage `world` writes: training clips, and clips that nothing is trained on."""


def check_further(
    configs: Mapping[str, Any], workdir: Path, left: Collection[str]
) -> list[Problem]:
    """Whether the world and the latents fit the stages that use them.

    Any: configs by stem, as far as they could be read. workdir: the folder in which the stages run.
    left: stems of the stages that are not skipped.
    """
    texts: list[str] = []
    if "world" in left:
        if "shards" in configs:
            texts += world_problems(configs["world"], configs["shards"])
        texts += earlier_world_problems(configs["world"], workdir)
    if "latents" in left:
        texts += latents_problems(configs)
    return [Problem(text) for text in texts]


def without_made_sources(config: ShardsJobConfig) -> ShardsJobConfig:
    """The config without the sources that the stage `world` writes, which need not exist yet."""
    made = (TRAIN, *TRUE)
    given = tuple(source for source in config.sources if PurePath(source) not in made)
    return config.model_copy(update={"source": given})


# -------------------------------------------------------------------- world


def world_problems(world: WorldConfig, shards: ShardsJobConfig) -> list[str]:
    """Whether the shards are made from the training clips of the world, and can be."""
    # Imported here, because it loads PyAV.
    from landiff.data_pipeline.synthetic.world import FPS, NUM_FRAMES

    found = []
    sources = [PurePath(source) for source in shards.sources]
    if TRAIN not in sources:
        inside = [str(source) for source in sources if WORLD in source.parents]
        meant = nearest_name(inside[0], [str(TRAIN)]) if inside else ""
        found.append(
            f"shards.source = {', '.join(shards.sources)} does not read {TRAIN}, the clips that "
            f"world.yaml makes{meant}; add it, or delete world.yaml"
        )
    for source in sources:
        if source in TRUE:
            found.append(
                f"shards.source names {source}, whose clips measure the models and must not be "
                f"trained on; name {TRAIN}"
            )
    seconds = NUM_FRAMES / FPS
    if all(shape.num_frames / shards.fps > seconds for shape in shards.shapes):
        shapes = ", ".join(shape.name for shape in shards.shapes)
        most = int(shards.fps * seconds)
        found.append(
            f"shards makes clips of {shapes} at {shards.fps:g} fps, but those of world.yaml last "
            f"{seconds:g} s, so that all are rejected; set shards.num_frames to at most {most}, or "
            "delete world.yaml"
        )
    if world.clips < 2 and set(sources) == {TRAIN}:
        found.append(f"world.clips = {world.clips}, but evaluate compares at least 2 clips")
    return found


def earlier_world_problems(world: WorldConfig, workdir: Path) -> list[str]:
    """Whether the folder holds clips that were made with other numbers."""
    path = workdir / WORLD / "world.json"
    if not path.is_file():
        return []
    try:
        made = read_json(path)
    except ConfigError as error:
        return [str(error)]
    found = []
    for key, value in world.model_dump().items():
        if made.get(key) != value:
            found.append(
                f"world.{key} = {value}, but {path.parent} was made with {made.get(key)}; set it "
                "back, or choose another folder with --out"
            )
    return found


# -------------------------------------------------------------------- latents


def latents_problems(configs: Mapping[str, Any]) -> list[str]:
    """Whether the columns of latents.yaml are those that stages read. Any: configs by stem."""
    latents: PrecomputeConfig = configs["latents"]
    shards: ShardsJobConfig | None = configs.get("shards")
    found = []
    if shards is not None and latents.data != shards.data:
        found.append(f"latents.data = {latents.data}, but shards.data = {shards.data}; set alike")
    for name, column in latents.columns.items():
        key = f"latents.columns.{name}"
        if isinstance(column, TokensColumn):
            found.append(
                f"{key} needs the tokenizer, which is trained while latents are computed; move it "
                "to precompute.yaml"
            )
        for stem in ("features", "precompute"):
            other = configs[stem].columns.get(name) if stem in configs else None
            if other is not None and other != column:
                keys = ", ".join(different_keys(column, other))
                found.append(f"{key} and {stem}.columns.{name} differ in {keys}; set them alike")
    known = list(latents.columns)
    main = configs.get("diffusion-main")
    for name in missing(main.columns if main is not None else (), known):
        found.append(
            f"diffusion-main reads the column {name}, but starts after latents, which does not "
            f"make it{nearest_name(name, known)}; add it to latents.yaml"
        )
    if not {"features", "precompute", "lm"} <= set(configs):
        return found
    later = [*configs["features"].columns, *configs["precompute"].columns]
    for name in missing(columns_read(configs["lm"], [*later, *known]), later):
        if name in known:
            found.append(
                f"lm reads the column {name}, but does not wait for latents, which makes it; add "
                "it to precompute.yaml too"
            )
    return found


def missing(columns: Iterable[str], known: Iterable[str]) -> list[str]:
    """The columns that are not known."""
    return [name for name in columns if name not in set(known)]


def different_keys(first: Any, second: Any) -> list[str]:
    """Names of the fields in which two columns differ. Any: two configs of columns."""
    ours = first.model_dump()
    theirs = second.model_dump()
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
