"""The files of the LanDiff release (docs/specification.md §6): a set, a folder or a file of it.

llm/model.safetensors
    language model
tokenizer/model.safetensors
    tokenizer
diffusion/1/mp_rank_00_model_states.pt
    control branch, and a copy of the tokenizer
CogVideoX-2b-sat/transformer/1000/mp_rank_00_model_states.pt
    main transformer
CogVideoX-2b-sat/vae/3d-vae.pt
    VAE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from landiff.configs import Config
from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, ModelConfig, TransformerConfig
from landiff.model_zoo.convert.foreign import without_wrappers
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
LM_FILE = Path("llm/model.safetensors")
TOKENIZER_FILE = Path("tokenizer/model.safetensors")
VAE_FILE = Path("CogVideoX-2b-sat/vae/3d-vae.pt")
DIFFUSION = Path("diffusion")
COGVIDEOX = Path("CogVideoX-2b-sat/transformer")
ITERATIONS = {DIFFUSION: "1", COGVIDEOX: "1000"}
POSITION_TABLE = release_diffusion.POSITION_TABLE


# ---------------------------------------------------------------- reading


def find_files(path: Path) -> list[Path]:
    """The files of the release at or below `path`, which is any part of a set. May be empty."""
    if path.is_file():
        return [path] if path.suffix in (".pt", ".safetensors") else []
    found = [path / name for name in (LM_FILE, TOKENIZER_FILE, VAE_FILE) if (path / name).is_file()]
    for name in (Path(), DIFFUSION, COGVIDEOX, Path("transformer")):
        found += _find_shard(path / name)
    found += [path / name for name in ("3d-vae.pt", "vae/3d-vae.pt") if (path / name).is_file()]
    if not found and (path / "model.safetensors").is_file():
        found = [path / "model.safetensors"]
    return found


def _find_shard(folder: Path) -> list[Path]:
    """The file of the iteration that `latest` names, or of the only iteration. May be empty.

    Raises ConversionError for several iterations without `latest`.
    """
    if (folder / SHARD).is_file():
        return [folder / SHARD]
    if (folder / "latest").is_file():
        shard = folder / (folder / "latest").read_text(encoding="utf-8").strip() / SHARD
        return [shard] if shard.is_file() else []
    shards = sorted(folder.glob(f"[0-9]*/{SHARD}"))
    if len(shards) > 1:
        iterations = ", ".join(shard.parent.name for shard in shards)
        raise ConversionError(
            f"{folder} holds the iterations {iterations} and no file `latest`; name one of them"
        )
    return shards


def open_release(
    path: Path, models: ModelConfig, allow_missing: Sequence[str] = ()
) -> WeightSource:
    """The models in the files at `path`.

    Raises ConversionError if a file is not one of the release or does not fit `models`.
    """
    files = find_files(path)
    parts: list[Part] = []
    for parts_of_file in all_of(partial(_read, file, models, allow_missing) for file in files):
        for part in parts_of_file:
            has_tokenizer = any(other.kind == "tokenizer" for other in parts)
            if part.kind == "tokenizer" and has_tokenizer:
                continue  # the copy in the diffusion file; the tokenizer's own file comes first
            parts.append(part)
    plural = "s" if len(files) > 1 else ""
    return WeightSource(
        path,
        format="release",
        layout=f"LanDiff release, {len(files)} file{plural}",
        parts=tuple(parts),
        provenance={"files": [str(file) for file in files]},
    )


def _read(file: Path, models: ModelConfig, allow_missing: Sequence[str]) -> list[Part]:
    """The models in one file. Raises ConversionError."""
    state = without_wrappers(_read_tensors(file), str(file))
    configs: dict[str, Config] = {
        "lm": models.lm,
        "tokenizer": models.tokenizer,
        "transformer": models.diffusion.transformer,
        CONTROL: models.diffusion,
        "diffusion": models.diffusion,
    }
    tensors_by_kind = split_by_kind(state)
    if not tensors_by_kind:
        starts = sorted({".".join(name.split(".")[:2]) for name in state})
        raise ConversionError(
            f"{file} is no file of the LanDiff release: its keys start with "
            f"{', '.join(starts[:6]) or 'nothing'}{_class_beside(file)}"
        )

    def part(kind: str, tensors: LazyTensors) -> Part:
        if kind == VAE:
            return _match_vae(tensors, file, allow_missing)
        rules = TABLES["release", kind]
        return match_model(
            tensors, kind, configs[kind], rules, str(file), allow_missing=allow_missing
        )

    return all_of(partial(part, kind, tensors) for kind, tensors in tensors_by_kind.items())


def _read_tensors(file: Path) -> LazyTensors:
    """All tensors of a .safetensors or .pt file. Raises ConversionError."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    content = read_pickle(file)
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{file} holds a {type(content).__name__} instead of a mapping with the weights"
        )
    return tensors_of(content.get("module", content.get("state_dict", content)))


def _class_beside(file: Path) -> str:
    """A hint for weights in the folder of another library."""
    name = named_class(file.parent)
    if not name:
        return ""
    return f", and the config.json beside it names {name}; known are {', '.join(CLASSES)}"


def split_by_kind(state: LazyTensors) -> dict[str, LazyTensors]:
    """The models in one file by kind, each under the names of its own file. May be empty.

    Position tables and the models of other libraries are left out.
    """
    if any(name.startswith("encoder.down.") for name in state):
        return {VAE: state.only(lambda name: not name.startswith("loss"))}
    if "encoder.IFrame_latent_tokens" in state:
        return {"tokenizer": state}
    if any(name.startswith(("transformer.blocks.", "visual_embedding_model.")) for name in state):
        return {"lm": state}
    state = state.only(_is_ours)
    if any(name.startswith(release_diffusion.COGVIDEOX) for name in state):
        # CogVideoX-2B: of the other models in the file, none has a name under `model.`.
        return {"transformer": state.only(lambda name: name.startswith("model."))}
    found = {}
    rest = state.only(lambda name: not name.startswith(release_diffusion.TOKENIZER))
    has_main = any(name.startswith(release_diffusion.MAIN) for name in rest)
    if has_main:
        found["diffusion"] = rest
    elif any(name.startswith(release_diffusion.CONTROL) for name in rest):
        found[CONTROL] = rest
    else:
        return {}
    tokenizer = state.without_prefix(release_diffusion.TOKENIZER)
    if tokenizer:
        found["tokenizer"] = tokenizer
    return found


def _is_ours(name: str) -> bool:
    """Whether a tensor of a diffusion file is neither a position table nor of another model."""
    return not name.startswith(release_diffusion.OTHER_MODELS) and not name.endswith(POSITION_TABLE)


def _match_vae(state: LazyTensors, file: Path, allow_missing: Sequence[str]) -> Part:
    """The VAE, with the sizes that its shapes imply."""
    from landiff.model_zoo.frozen.cogvideox_vae import sizes_of

    rules = release_vae.release_vae_rules(release_vae.num_levels(state.meta))
    config = sizes_of(release_vae.to_diffusers(state.meta))
    return match_model(state, VAE, config, rules, str(file), allow_missing=allow_missing)


# ---------------------------------------------------------------- writing


def write_release(
    folder: Path, parts: Sequence[Part], progress: ProgressCallback | None = None
) -> None:
    """Write the parts as files of a release in `folder`."""
    by_kind = {part.kind: part for part in parts}
    if "diffusion" in by_kind:
        whole = by_kind.pop("diffusion")
        by_kind[CONTROL] = control_of(whole)
        by_kind.setdefault("transformer", main_of(whole))
    for kind, file in (("lm", LM_FILE), ("tokenizer", TOKENIZER_FILE)):
        if kind in by_kind:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            tensors = under_names_of("release", by_kind[kind])
            write_safetensors(folder / file, tensors, {"format": "pt"}, progress)
    if CONTROL in by_kind:
        tensors = _control_tensors(by_kind[CONTROL], by_kind.get("tokenizer"))
        _write_iteration(folder, DIFFUSION, tensors, progress)
    if "transformer" in by_kind:
        tensors = _main_tensors(by_kind["transformer"])
        _write_iteration(folder, COGVIDEOX, tensors, progress)
    if VAE in by_kind:
        ours = by_kind[VAE].tensors
        rules = release_vae.release_vae_rules(release_vae.num_levels(ours.meta))
        tensors = converted(ours, rules, "to_theirs")
        write_pickle(folder / VAE_FILE, tensors, _vae_content, progress)


def _control_tensors(control: Part, tokenizer: Part | None) -> LazyTensors:
    """The tensors of the diffusion file: control branch, position table, copy of the tokenizer."""
    tensors = under_names_of("release", control)
    config = control.config_as(DiffusionConfig).transformer
    table = _position_table(config, release_diffusion.CONTROL, tensors.dtype())
    tensors = tensors.joined(table)
    if tokenizer is not None:
        copy = under_names_of("release", tokenizer).with_prefix(release_diffusion.TOKENIZER)
        tensors = tensors.joined(copy)
    return tensors


def _main_tensors(main: Part) -> LazyTensors:
    """The tensors of the CogVideoX-2B file: main transformer and position table."""
    tensors = under_names_of("release", main)
    config = main.config_as(TransformerConfig)
    return tensors.joined(_position_table(config, release_diffusion.COGVIDEOX, tensors.dtype()))


def _position_table(config: TransformerConfig, prefix: str, dtype: torch.dtype) -> LazyTensors:
    """The fixed position table, which the release stores with the weights, in their dtype."""
    rows = config.latent_height // config.patch_size
    columns = config.latent_width // config.patch_size
    length = config.text_length + config.latent_frames * rows * columns
    meta = torch.empty((1, length, config.hidden_size), dtype=dtype, device="meta")

    def read(_name: str) -> Tensor:
        return release_diffusion.release_position_table(config).to(dtype)

    return LazyTensors({prefix + POSITION_TABLE: meta}, read)


def _write_iteration(
    folder: Path, model: Path, tensors: LazyTensors, progress: ProgressCallback | None
) -> None:
    """Write the only iteration of a diffusion model and the file `latest` that names it."""
    iteration = ITERATIONS[model]

    def content(fakes: Mapping[str, Tensor]) -> dict[str, object]:
        return {"module": dict(fakes), "iteration": int(iteration)}

    write_pickle(folder / model / iteration / SHARD, tensors, content, progress)
    write_text(folder / model / "latest", iteration)


def _vae_content(fakes: Mapping[str, Tensor]) -> dict[str, object]:
    """The content of the VAE's file."""
    return {"state_dict": dict(fakes)}
