"""The LanDiff release on disk (specification §6): a whole set, one of its folders, or one of its files.

llm/model.safetensors                                        language model
tokenizer/model.safetensors                                  tokenizer
diffusion/1/mp_rank_00_model_states.pt                       control branch (and a copy of the tokenizer)
CogVideoX-2b-sat/transformer/1000/mp_rank_00_model_states.pt main transformer
CogVideoX-2b-sat/vae/3d-vae.pt                               VAE
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from landiff.configs.files import write_text
from landiff.model_zoo.config import ModelConfig, TransformerConfig
from landiff.model_zoo.convert.foreign import prepared
from landiff.model_zoo.convert.formats import release_diffusion, release_vae
from landiff.model_zoo.convert.formats.diffusers_folder import CLASSES, named_class
from landiff.model_zoo.convert.lazy import (
    LazyTensors,
    ProgressCallback,
    converted,
    read_safetensors,
    write_safetensors,
)
from landiff.model_zoo.convert.parts import (
    CONTROL,
    TABLES,
    VAE,
    Part,
    WeightSource,
    control_of,
    main_of,
    match_model,
    under_names_of,
)
from landiff.model_zoo.convert.pickles import read_pickle, tensors_of, write_pickle
from landiff.model_zoo.convert.rules import ConversionError, all_of

SHARD = "mp_rank_00_model_states.pt"
LM_FILE, TOKENIZER_FILE = Path("llm/model.safetensors"), Path("tokenizer/model.safetensors")
DIFFUSION, COGVIDEOX = Path("diffusion"), Path("CogVideoX-2b-sat/transformer")
VAE_FILE = Path("CogVideoX-2b-sat/vae/3d-vae.pt")
ITERATIONS = {DIFFUSION: "1", COGVIDEOX: "1000"}
POSITION_TABLE = release_diffusion.POSITION_TABLE


def find_files(path: Path) -> list[Path]:
    """The release's files at or below `path`, which may be any part of the set. Empty where there are none."""
    if path.is_file():
        return [path] if path.suffix in (".pt", ".safetensors") else []
    found = [path / name for name in (LM_FILE, TOKENIZER_FILE, VAE_FILE) if (path / name).is_file()]
    for name in (Path(), DIFFUSION, COGVIDEOX, Path("transformer")):
        found += _iteration(path / name)
    found += [path / name for name in ("3d-vae.pt", "vae/3d-vae.pt") if (path / name).is_file()]
    single = path / "model.safetensors"
    return found or ([single] if single.is_file() else [])


def _iteration(folder: Path) -> list[Path]:
    """The one shard of the iteration that `latest` names, or of the only one there is."""
    if (folder / SHARD).is_file():
        return [folder / SHARD]
    if (folder / "latest").is_file():
        shard = folder / (folder / "latest").read_text(encoding="utf-8").strip() / SHARD
        return [shard] if shard.is_file() else []
    shards = sorted(folder.glob(f"[0-9]*/{SHARD}"))
    if len(shards) > 1:
        raise ConversionError(
            f"{folder} holds the iterations {', '.join(s.parent.name for s in shards)} and no file `latest`; name one"
        )
    return shards


def open_release(
    path: Path, models: ModelConfig, allow_missing: Sequence[str] = ()
) -> WeightSource:
    """Raises ConversionError where a file is none of the release's, or does not fit `models`."""
    files = find_files(path)
    parts: list[Part] = []
    for part in itertools.chain(
        *all_of(partial(_read, file, models, allow_missing) for file in files)
    ):
        if part.kind == "tokenizer" and any(other.kind == "tokenizer" for other in parts):
            continue  # the file of its own comes first; this is the copy inside the diffusion file
        parts.append(part)
    return WeightSource(
        path,
        "release",
        f"LanDiff release, {len(files)} file{'s' if len(files) > 1 else ''}",
        tuple(parts),
        provenance={"files": [str(file) for file in files]},
    )


def _read(file: Path, models: ModelConfig, allow_missing: Sequence[str]) -> list[Part]:
    content = {} if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{file} holds a {type(content).__name__} where a mapping with the weights is needed"
        )
    if file.suffix == ".safetensors":
        state = read_safetensors(file)
    else:
        state = tensors_of(content.get("module", content.get("state_dict", content)))
    state = prepared(state, str(file))
    configs = {
        "lm": models.lm,
        "tokenizer": models.tokenizer,
        "transformer": models.diffusion.transformer,
        CONTROL: models.diffusion,
        "diffusion": models.diffusion,
    }
    known = _sorted_by_kind(state)
    if not known:
        raise ConversionError(
            f"{file} is no file of the LanDiff release: its keys start with "
            f"{', '.join(sorted({'.'.join(name.split('.')[:2]) for name in state})[:6]) or 'nothing'}"
            f"{_class_beside(file)}"
        )

    def part(kind: str, tensors: LazyTensors) -> Part:
        if kind == VAE:
            return _vae(tensors, file, allow_missing)
        return match_model(
            tensors, kind, configs[kind], TABLES["release", kind], str(file), allow_missing
        )

    return all_of(partial(part, kind, tensors) for kind, tensors in known.items())


def _class_beside(file: Path) -> str:
    """What a folder of another library says it holds."""
    name = named_class(file.parent)
    return (
        f", and the config.json beside it names {name}; known are {', '.join(CLASSES)}"
        if name
        else ""
    )


def _sorted_by_kind(state: LazyTensors) -> dict[str, LazyTensors]:
    """The models inside one file, each under the names of its own file; without position tables and other models."""
    if any(name.startswith("encoder.down.") for name in state):
        return {VAE: state.only(lambda name: not name.startswith("loss"))}
    if "encoder.IFrame_latent_tokens" in state:
        return {"tokenizer": state}
    if any(name.startswith(("transformer.blocks.", "visual_embedding_model.")) for name in state):
        return {"lm": state}
    kept = state.only(
        lambda name: (
            not name.startswith(release_diffusion.OTHER_MODELS)
            and not name.endswith(POSITION_TABLE)
        )
    )
    if any(name.startswith(release_diffusion.COGVIDEOX) for name in kept):
        # the public file is the main transformer's: of other models in it, only those under `model.` would be ours
        return {"transformer": kept.only(lambda name: name.startswith("model."))}
    copy = kept.without_prefix(release_diffusion.TOKENIZER)
    rest = kept.only(lambda name: not name.startswith(release_diffusion.TOKENIZER))
    if not any(
        name.startswith((release_diffusion.CONTROL, release_diffusion.MAIN)) for name in rest
    ):
        return {}
    whole = any(name.startswith(release_diffusion.MAIN) for name in rest)
    return {("diffusion" if whole else CONTROL): rest} | ({"tokenizer": copy} if copy else {})


def _vae(state: LazyTensors, file: Path, allow_missing: Sequence[str]) -> Part:
    from landiff.model_zoo.frozen.cogvideox_vae import sizes_of

    table = release_vae.release_vae_rules(release_vae.num_levels(state.meta))
    config = sizes_of(release_vae.to_diffusers(state.meta))
    return match_model(state, VAE, config, table, str(file), allow_missing)


# ---------------------------------------------------------------- writing


def write_release(
    folder: Path, parts: Sequence[Part], progress: ProgressCallback | None = None
) -> None:
    """The parts as a set of the release's files in `folder`."""
    by_kind = {part.kind: part for part in parts}
    if "diffusion" in by_kind:
        whole = by_kind.pop("diffusion")
        by_kind[CONTROL] = control_of(whole)
        by_kind.setdefault("transformer", main_of(whole))
    for kind, file in (("lm", LM_FILE), ("tokenizer", TOKENIZER_FILE)):
        if kind in by_kind:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(
                folder / file, under_names_of("release", by_kind[kind]), {"format": "pt"}, progress
            )
    if CONTROL in by_kind:
        state = under_names_of("release", by_kind[CONTROL])
        state = state.joined(
            _table(by_kind[CONTROL].config.transformer, release_diffusion.CONTROL, state)
        )
        if "tokenizer" in by_kind:
            copy = under_names_of("release", by_kind["tokenizer"]).with_prefix(
                release_diffusion.TOKENIZER
            )
            state = state.joined(copy)
        _write_iteration(folder / DIFFUSION, ITERATIONS[DIFFUSION], state, progress)
    if "transformer" in by_kind:
        state = under_names_of("release", by_kind["transformer"])
        state = state.joined(
            _table(by_kind["transformer"].config, release_diffusion.COGVIDEOX, state)
        )
        _write_iteration(folder / COGVIDEOX, ITERATIONS[COGVIDEOX], state, progress)
    if VAE in by_kind:
        tensors = by_kind[VAE].tensors
        state = converted(
            tensors,
            release_vae.release_vae_rules(release_vae.num_levels(tensors.meta)),
            "to_theirs",
        )
        write_pickle(folder / VAE_FILE, state, lambda fakes: {"state_dict": dict(fakes)}, progress)


def _write_iteration(
    folder: Path, iteration: str, state: LazyTensors, progress: ProgressCallback | None
) -> None:
    write_pickle(
        folder / iteration / SHARD,
        state,
        lambda fakes: {"module": dict(fakes), "iteration": int(iteration)},
        progress,
    )
    write_text(folder / "latest", iteration)


def _table(config: TransformerConfig, prefix: str, state: LazyTensors) -> LazyTensors:
    """The fixed position table, which the release stores among the weights, in their dtype."""
    rows, columns = (
        config.latent_height // config.patch_size,
        config.latent_width // config.patch_size,
    )
    shape = (1, config.text_length + config.latent_frames * rows * columns, config.hidden_size)
    name = prefix + POSITION_TABLE
    meta = {name: torch.empty(shape, dtype=state.dtype(), device="meta")}
    return LazyTensors(
        meta, lambda _name: release_diffusion.release_position_table(config).to(state.dtype())
    )
