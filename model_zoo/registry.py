"""The zoo on disk: `<zoo>/<name>/<fingerprint>/` holds model.safetensors, config.json and provenance.json.

An entry is committed by rename and never changes. A reference is `name` (the newest entry of that name),
`name@fingerprint` (a prefix is enough) or the path of an entry folder. It is all that jobs share besides
shards. Importing this module does not import torch, so that references can be checked before a job starts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landiff.configs import Config, ConfigError, ownership, validate
from landiff.configs.documents import read_json, read_text
from landiff.configs.files import (
    commit_dir,
    fsync_dir,
    remove_abandoned,
    sha256_file,
    temporary_name,
    write_text,
)
from landiff.configs.loader import read_json_as
from landiff.configs.ownership import OWNER
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig, TransformerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback

WEIGHTS, PROVENANCE = "model.safetensors", "provenance.json"

# kind -> config class. "transformer" is the main diffusion transformer alone; "diffusion" holds the main
# transformer, the control branch and the semantic condition.
MAX_NAME_BYTES = 1 << 10
KINDS: dict[str, type[Config]] = {
    "tokenizer": TokenizerConfig,
    "lm": LMConfig,
    "transformer": TransformerConfig,
    "diffusion": DiffusionConfig,
}


class ZooError(ConfigError):
    """A zoo reference that leads nowhere, or an entry of the wrong kind."""


class EntryCard(Config):
    """config.json of an entry."""

    kind: str
    name: str
    fingerprint: str
    config: dict[str, Any]


@dataclass(frozen=True)
class ZooEntry:
    path: Path
    name: str
    kind: str
    fingerprint: str
    config: Config
    stored_config: Mapping[str, Any]  # as config.json holds it: the fingerprint is of this

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.fingerprint}"

    @property
    def provenance(self) -> dict[str, Any]:
        try:
            return read_json(self.path / PROVENANCE)
        except (OSError, ConfigError) as error:
            raise ZooError(
                f"{self.path} is damaged: {PROVENANCE} cannot be read ({error})"
            ) from None

    def load(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """All tensors by the names of our own modules. Raises ConfigError for damage, NaN and infinity."""
        from landiff.model_zoo.convert.lazy import load_safetensors

        require_intact(self)
        return load_safetensors(self.path / WEIGHTS, str(device))

    def lazy(self) -> LazyTensors:
        """The same, read when asked for and not verified."""
        if not (self.path / WEIGHTS).is_file():
            raise ZooError(f"{self.path} is damaged: {WEIGHTS} is missing")
        from landiff.model_zoo.convert.lazy import read_safetensors

        return read_safetensors(self.path / WEIGHTS)


def build_module(kind: str, config: Config) -> nn.Module:
    """An uninitialised-or-default module of that kind (import here: the models import torch layers)."""
    if kind == "tokenizer":
        from landiff.model_zoo.tokenizer import SemanticTokenizer

        return SemanticTokenizer(config)
    if kind == "lm":
        from landiff.model_zoo.lm import LanguageModel

        return LanguageModel(config)
    if kind == "transformer":
        from landiff.model_zoo.dit import DiffusionTransformer

        return DiffusionTransformer(config)
    if kind == "diffusion":
        from landiff.model_zoo.dit import ControlledDiffusion

        return ControlledDiffusion(config)
    raise ZooError(f"unknown model kind {kind!r}; known: {', '.join(KINDS)}")


def load_model(
    entry: ZooEntry, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """The entry's module with its weights, in eval mode, gradients off."""
    import torch

    with torch.device("meta"):
        model = build_module(entry.kind, entry.config)
    model.load_state_dict(entry.load(device), strict=True, assign=True)
    model.requires_grad_(False).eval()
    return model.to(dtype) if dtype is not None else model


def weights_fingerprint(
    kind: str,
    config: Config | Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    progress: ProgressCallback | None = None,
) -> str:
    """16 hex digits over kind, config, names, dtypes, shapes and bytes: equal weights have equal names anywhere.

    `progress` is called with the megabytes that were hashed; it needs lazy tensors, which know their sizes.
    """
    import torch

    from landiff.model_zoo.convert.lazy import megabytes

    done = 0
    sizes = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    digest = hashlib.sha256(json.dumps([kind, sizes], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if progress is not None:
            progress(*megabytes(done, tensors.num_bytes), "hashing")
        done += tensor.numel() * tensor.itemsize
        del tensor  # before the next one is read
    if progress is not None:
        progress(*megabytes(done, done), "hashing")
    return digest.hexdigest()[:16]


def export(
    zoo: Path,
    name: str,
    kind: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> ZooEntry:
    """Commit weights to the zoo. Exporting the same weights again returns the entry that is there.

    Lazy tensors are read and written one at a time, then hashed from the file. Raises UnhealthyError
    for NaN or infinity, OwnedError where another process writes an entry of this name.
    """
    from landiff.model_zoo.convert.lazy import LazyTensors

    assert isinstance(config, KINDS[kind]), (kind, type(config))
    check_name(name)
    lazy = tensors if isinstance(tensors, LazyTensors) else LazyTensors.of(tensors)
    with ownership.take(zoo / name / OWNER, f"zoo entry {name} in {zoo}"):
        return _export(zoo, name, kind, config, lazy, provenance, progress)


def _export(
    zoo: Path,
    name: str,
    kind: str,
    config: Config,
    lazy: LazyTensors,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None,
) -> ZooEntry:
    """`export` for the owner of the name."""
    from landiff.model_zoo.convert.lazy import read_safetensors, write_safetensors

    remove_abandoned(zoo / name, "export")
    temporary = temporary_name(zoo / name / "export")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fsync_dir(zoo)
    try:
        write_safetensors(temporary / WEIGHTS, lazy, {"format": "pt", "kind": kind}, progress)
        written = read_safetensors(temporary / WEIGHTS)
        mark, bad = _examine(kind, config.model_dump(mode="json"), written, progress)
        if bad:
            from landiff.model_zoo.health import non_finite_error

            raise non_finite_error(bad, f"the {kind} to be exported as {name}")
        final = zoo / name / mark
        if not final.exists():
            write_text(
                temporary / "config.json",
                json.dumps(
                    {
                        "kind": kind,
                        "name": name,
                        "fingerprint": mark,
                        "config": config.model_dump(mode="json"),
                    },
                    indent=1,
                ),
            )
            made = {**provenance, "weights_sha256": sha256_file(temporary / WEIGHTS)}
            write_text(temporary / PROVENANCE, json.dumps(made, indent=1, sort_keys=True))
            commit_dir(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_text(zoo / name / "newest", mark + "\n")
    return read_entry(final)


def check_name(name: str) -> None:
    """Raise ZooError for what cannot be the name of an entry."""
    if not name or "@" in name or "/" in name or name.startswith("."):
        raise ZooError(
            f"zoo name {name!r} must be non-empty, without '@' or '/', and not start with a dot"
        )


def read_entry(path: Path) -> ZooEntry:
    try:
        card = read_json_as(EntryCard, path / "config.json")
        config = validate(KINDS[card.kind], card.config, str(path / "config.json"))
    except (OSError, KeyError, ConfigError) as error:
        raise ZooError(f"{path} is not a zoo entry: {error}") from None
    return ZooEntry(path, card.name, card.kind, card.fingerprint, config, card.config)


def entry_folders(zoo: Path) -> list[Path]:
    """Where committed entries lie, by name; whole or not."""
    folders = [path for path in zoo.glob("*/*") if path.is_dir() and not path.name.startswith(".")]
    return sorted(
        folder
        for folder in folders
        if (folder / "config.json").is_file() or (folder / WEIGHTS).is_file()
    )


def entries(zoo: Path) -> list[ZooEntry]:
    """All committed entries, by name."""
    return [read_entry(folder) for folder in entry_folders(zoo)]


def resolve(zoo: Path, reference: str, kind: str | None = None) -> ZooEntry:
    """The entry behind `name`, `name@prefix` or a path. Raises ZooError that says what there is."""
    if "/" in reference:
        entry = read_entry(Path(reference))
    else:
        name, _, prefix = reference.partition("@")
        folder = zoo / name
        names = sorted(p.name for p in zoo.iterdir() if p.is_dir()) if zoo.is_dir() else []
        if not folder.is_dir():
            raise ZooError(
                f"the zoo {zoo} has no {name!r}; it has: {', '.join(names) or 'nothing yet'}"
            )
        marks = sorted(
            p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")
        )
        if not prefix:
            try:
                prefix = read_text(folder / "newest", MAX_NAME_BYTES).strip()
            except FileNotFoundError:
                raise ZooError(f"{folder} holds no committed entry; export again") from None
        found = [m for m in marks if m.startswith(prefix)]
        if len(found) != 1:
            raise ZooError(
                f"{reference!r} matches {len(found)} entries of {folder}; there are: {', '.join(marks) or 'none'}"
            )
        entry = read_entry(folder / found[0])
    if kind is not None and entry.kind != kind:
        raise ZooError(f"{entry.reference} is a {entry.kind}, where a {kind} is needed")
    return entry


def verify_entry(entry: ZooEntry) -> None:
    """Raise ConfigError unless config and weights are finite and those that were written.

    Compares the fingerprint and the hash of the file.
    """
    _verify_content(entry)
    if entry.provenance.get("weights_sha256") != sha256_file(entry.path / WEIGHTS):
        raise ZooError(f"{entry.path} is damaged: {WEIGHTS} is not the file that was written")


def require_intact(entry: ZooEntry) -> None:
    """Raise ConfigError unless config and weights are finite and those that were written.

    Called whenever an entry is used. Each process verifies an entry once, and again when the size,
    time or inode of its files change. Nothing is remembered on disk: a file whose bytes decayed keeps
    its time, the zoo may be read-only, and the use reads all weights anyway (the second read comes
    from the page cache).
    """
    files = [entry.path / "config.json", entry.path / WEIGHTS]
    stamps = []
    for path in files:
        try:
            found = path.stat()
        except FileNotFoundError:
            raise ZooError(f"{entry.path} is damaged: {path.name} is missing") from None
        stamps.append((found.st_size, found.st_mtime_ns, found.st_ino))
    _verify_once(entry.path.resolve(), tuple(stamps))


@lru_cache(256)
def _verify_once(path: Path, stamps: tuple[tuple[int, int, int], ...]) -> None:
    _verify_content(read_entry(path))


def _verify_content(entry: ZooEntry) -> None:
    mark, bad = _examine(entry.kind, entry.stored_config, entry.lazy())
    if mark != entry.fingerprint:
        expected = entry.fingerprint
        raise ZooError(
            f"{entry.path} is damaged: its weights give {mark}, its name says {expected}"
        )
    if bad:
        from landiff.model_zoo.health import non_finite_error

        raise non_finite_error(bad, str(entry.path))


def _examine(
    kind: str,
    config: Mapping[str, Any],
    tensors: LazyTensors,
    progress: ProgressCallback | None = None,
) -> tuple[str, list[str]]:
    """Fingerprint and the names of tensors with NaN or infinity; each tensor is read once."""
    from landiff.model_zoo.convert.lazy import LazyTensors
    from landiff.model_zoo.health import non_finite

    bad: list[str] = []

    def read(name: str) -> Tensor:
        tensor = tensors.read(name)
        bad.extend(non_finite([(name, tensor)]))
        return tensor

    mark = weights_fingerprint(kind, config, LazyTensors(tensors.meta, read), progress)
    return mark, bad
