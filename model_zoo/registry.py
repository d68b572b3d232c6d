"""The zoo: a folder of exported weights, through which jobs exchange models.

An entry `<zoo>/<name>/<fingerprint>/` contains model.safetensors, config.json and provenance.json.
An adapter has the files of peft instead, adapter_model.safetensors and adapter_config.json, so that
peft can load its folder.
It is committed by rename and never changes. A reference to an entry is `name` (the newest entry of
that name), `name@fingerprint` (a prefix is enough) or the path of its folder.

The zoo `packaged` comes with this package and is read-only: models of the preset `shapes`, written
by `landiff zoo pack`.

Importing this module does not import torch, so that references can be checked before a job starts.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

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
from landiff.model_zoo.convert.fingerprint import examine, require_codebook
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.lora.config import PEFT_CONFIG, PEFT_WEIGHTS, AdapterConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback

WEIGHTS = "model.safetensors"
PROVENANCE = "provenance.json"
MAX_NAME_BYTES = 1 << 10  # of the file `newest`
PACKAGED = Path("packaged")  # name of the zoo in PACKAGED_FOLDER, in place of a folder
PACKAGED_FOLDER = Path(__file__).resolve().parent / "packaged"

KINDS: dict[str, type[Config]] = {
    "tokenizer": TokenizerConfig,
    "lm": LMConfig,
    "transformer": TransformerConfig,
    "diffusion": DiffusionConfig,
    "adapter": AdapterConfig,
}
"""Kind of a model -> its config class.

"transformer" is the main transformer alone, "diffusion" the main transformer with control branch
and semantic condition, "adapter" a LoRA adapter of one of the others.
"""


def weights_file(kind: str) -> str:
    """Name of the file with the weights of an entry."""
    return PEFT_WEIGHTS if kind == "adapter" else WEIGHTS


class ZooError(ConfigError):
    """Raised for references without an entry, damaged entries and entries of a wrong kind."""


class EntryCard(Config):
    """config.json of an entry."""

    kind: str = Field(
        description="Kind of the model: tokenizer, lm, transformer, diffusion or adapter."
    )
    name: str = Field(description="Name of the entry.")
    fingerprint: str = Field(description="Fingerprint of config and weights, 16 hex digits.")
    config: dict[str, Any] = Field(description="Config of the model.")


@dataclass(frozen=True)
class ZooEntry:
    """One committed entry.

    stored_config: the config as config.json contains it, which the fingerprint was computed from.
    """

    path: Path
    name: str
    kind: str
    fingerprint: str
    config: Config
    stored_config: Mapping[str, Any]

    @property
    def weights_path(self) -> Path:
        """The file with the weights."""
        return self.path / weights_file(self.kind)

    @property
    def reference(self) -> str:
        """Reference to exactly this entry."""
        return f"{self.name}@{self.fingerprint}"

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from. Raises ZooError if the file cannot be read."""
        try:
            return read_json(self.path / PROVENANCE)
        except (OSError, ConfigError) as error:
            raise ZooError(
                f"{self.path} is damaged: {PROVENANCE} cannot be read ({error})"
            ) from None

    @property
    def buckets(self) -> tuple[ClipShape, ...]:
        """The clip shapes that the model was trained on, if its training named them."""
        if not (self.path / PROVENANCE).is_file():
            return ()
        return tuple(ClipShape.parse(name) for name in self.provenance.get("buckets") or ())

    def load(self, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """All tensors, by the names of model_zoo's modules.

        Raises ConfigError for damaged files, NaN and infinity.
        """
        from landiff.model_zoo.convert.lazy import load_safetensors

        require_intact(self)
        return load_safetensors(self.weights_path, str(device))

    def load_like(
        self, wanted: Mapping[str, Tensor], device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """The same tensors in the dtypes of those in `wanted`, read one at a time."""
        require_intact(self)
        stored = self.lazy()
        tensors = {}
        for name in stored:
            dtype = wanted[name].dtype if name in wanted else None
            tensors[name] = stored[name].to(device, dtype)
        return tensors

    def lazy(self) -> LazyTensors:
        """The same tensors, each read when it is used and not verified.

        Raises ZooError if the file is missing.
        """
        if not self.weights_path.is_file():
            raise ZooError(f"{self.path} is damaged: {self.weights_path.name} is missing")
        from landiff.model_zoo.convert.lazy import read_safetensors

        return read_safetensors(self.weights_path)


def build_module(kind: str, config: Config) -> nn.Module:
    """Builds an untrained module of a kind.

    Imports the models here, because they import torch. Raises ZooError for an unknown kind.
    """
    if kind not in KINDS:
        raise ZooError(f"unknown model kind {kind!r}; known: {', '.join(KINDS)}")
    if kind == "adapter":
        raise ZooError("an adapter is no model by itself; load its base and add the adapter to it")
    assert isinstance(config, KINDS[kind]), (kind, type(config))
    if isinstance(config, TokenizerConfig):
        from landiff.model_zoo.tokenizer import SemanticTokenizer

        return SemanticTokenizer(config)
    if isinstance(config, LMConfig):
        from landiff.model_zoo.lm import LanguageModel

        return LanguageModel(config)
    if isinstance(config, TransformerConfig):
        from landiff.model_zoo.dit import DiffusionTransformer

        return DiffusionTransformer(config)
    assert isinstance(config, DiffusionConfig), (kind, type(config))
    from landiff.model_zoo.dit import ControlledDiffusion

    return ControlledDiffusion(config)


def load_model(
    entry: ZooEntry,
    device: str | torch.device = "cpu",
    cast: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Builds the module of an entry with its weights, in eval mode and without gradients.

    cast: changes the dtypes of the module in place. It is called before there are weights, which
        are then read one at a time in these dtypes, so that memory never holds both.

    Raises ConfigError for damaged files, NaN and infinity.
    """
    import torch

    with torch.device("meta"):
        model = build_module(entry.kind, entry.config)
    if cast is None:
        tensors = entry.load(device)
    else:
        cast(model)
        tensors = entry.load_like(model.state_dict(), device)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def export(
    zoo: Path,
    name: str,
    kind: str,
    config: Config,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None = None,
) -> ZooEntry:
    """Commits weights to the zoo. Exporting the same weights again returns the existing entry.

    Tensors are read and written one at a time, then hashed from the file.

    Raises UnhealthyError for NaN or infinity, OwnedError if another process is writing an entry of
    this name, ZooError for the packaged zoo.
    """
    from landiff.model_zoo.convert.lazy import LazyTensors

    assert isinstance(config, KINDS[kind]), (kind, type(config))
    check_name(name)
    if zoo == PACKAGED:
        raise ZooError(
            f"zoo = {zoo} is the read-only zoo that comes with landiff; choose another folder for "
            f"{name!r}"
        )
    if not isinstance(tensors, LazyTensors):
        tensors = LazyTensors.of(tensors)
    card = EntryCard(kind=kind, name=name, fingerprint="", config=config.model_dump(mode="json"))
    with ownership.take(zoo / name / OWNER, f"zoo entry {name} in {zoo}"):
        return _export(zoo, card, tensors, provenance, progress)


def _export(
    zoo: Path,
    card: EntryCard,
    tensors: LazyTensors,
    provenance: Mapping[str, Any],
    progress: ProgressCallback | None,
) -> ZooEntry:
    """`export` by the owner of the name. The fingerprint of the card is still empty."""
    from landiff.model_zoo.convert.lazy import read_safetensors, write_safetensors

    folder = zoo / card.name
    remove_abandoned(folder, "export")
    temporary = temporary_name(folder / "export")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fsync_dir(zoo)
    try:
        metadata = {"format": "pt", "kind": card.kind}
        weights = temporary / weights_file(card.kind)
        write_safetensors(weights, tensors, metadata, progress)
        written = read_safetensors(weights)
        fingerprint, bad = examine(card.kind, card.config, written, progress)
        if bad:
            from landiff.model_zoo.health import non_finite_error

            raise non_finite_error(bad, f"the {card.kind} to be exported as {card.name}")
        require_codebook(card.kind, written, f"the {card.kind} to be exported as {card.name}")
        final = folder / fingerprint
        if not final.exists():
            content = {
                "kind": card.kind,
                "name": card.name,
                "fingerprint": fingerprint,
                "config": card.config,
            }
            write_text(temporary / "config.json", json.dumps(content, indent=1))
            if card.kind == "adapter":
                document = AdapterConfig.model_validate(card.config).peft_document()
                write_text(temporary / PEFT_CONFIG, json.dumps(document, indent=1))
            source = {**provenance, "weights_sha256": sha256_file(weights)}
            write_text(temporary / PROVENANCE, json.dumps(source, indent=1, sort_keys=True))
            commit_dir(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_text(folder / "newest", fingerprint + "\n")
    return read_entry(final)


def check_name(name: str) -> None:
    """Raises ZooError for a text that cannot be the name of an entry."""
    if not name or "@" in name or "/" in name or name.startswith("."):
        raise ZooError(
            f"zoo name {name!r} must be non-empty, without '@' or '/', and not start with a dot"
        )


def read_entry(path: Path) -> ZooEntry:
    """Reads the entry of a folder, without its weights. Raises ZooError if it is not one."""
    try:
        card = read_json_as(EntryCard, path / "config.json")
        config = validate(KINDS[card.kind], card.config, str(path / "config.json"))
    except OSError as error:
        raise ZooError(
            f"{path} is not a zoo entry: its config.json cannot be read "
            f"({error.strerror or error}); name the folder of an entry, ZOO/NAME/FINGERPRINT"
        ) from None
    except (KeyError, ConfigError) as error:
        raise ZooError(f"{path} is not a zoo entry: {error}") from None
    return ZooEntry(path, card.name, card.kind, card.fingerprint, config, card.config)


def folder_of(zoo: Path) -> Path:
    """The folder of a zoo: the zoo itself, or that of the packaged one."""
    return PACKAGED_FOLDER if zoo == PACKAGED else zoo


def entry_folders(zoo: Path) -> list[Path]:
    """Folders of committed entries, damaged ones included, sorted by name."""
    folders = []
    for path in folder_of(zoo).glob("*/*"):
        if not path.is_dir() or path.name.startswith("."):
            continue
        files = ("config.json", WEIGHTS, PEFT_WEIGHTS)
        if any((path / name).is_file() for name in files):
            folders.append(path)
    return sorted(folders)


def entries(zoo: Path) -> list[ZooEntry]:
    """All committed entries, sorted by name. Raises ZooError if one is damaged."""
    return [read_entry(folder) for folder in entry_folders(zoo)]


def resolve(zoo: Path, reference: str, kind: str | Sequence[str] | None = None) -> ZooEntry:
    """The entry of a reference: `name`, `name@prefix` or a path.

    `kind`: the kind that it must have, or several that it may have.

    Raises ZooError if there is none, or several, or if it is not of this kind. The message lists
    the existing ones.
    """
    if "/" in reference:
        entry = read_entry(_entry_path(zoo, reference))
    else:
        entry = read_entry(_entry_folder(zoo, reference))
    kinds = [kind] if isinstance(kind, str) else kind
    if kinds is not None and entry.kind not in kinds:
        needed = " or ".join(kinds)
        raise ZooError(f"{entry.reference} is a {entry.kind}, where a {needed} is needed")
    return entry


def _entry_path(zoo: Path, reference: str) -> Path:
    """The folder that a reference with a slash names. Raises ZooError if it cannot be an entry."""
    path = Path(reference).expanduser()
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        raise ZooError(
            f"{reference!r} is a run folder; export its weights with `landiff convert {reference} "
            "--name NAME`, and name that entry"
        )
    if (path / "newest").is_file():
        raise ZooError(
            f"{reference!r} holds the entries of one name; write {path.name!r} with the zoo "
            f"{str(path.parent)!r}, or add a fingerprint: {', '.join(_fingerprints(path))}"
        )
    problem = "is not the folder of a zoo entry" if path.exists() else "does not exist"
    raise ZooError(
        f"{reference!r} {problem}; name an entry of the zoo {zoo}, or the folder of an entry. The "
        f"zoo has: {_known(zoo, path.name)}"
    )


def _known(zoo: Path, name: str) -> str:
    """End of a message about a wrong name: the names in the zoo, and the nearest of them."""
    folder = folder_of(zoo)
    names: list[str] = []
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{', '.join(names) or 'nothing yet'}{meant}"


def _fingerprints(folder: Path) -> list[str]:
    """Fingerprints of the committed entries of one name."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            found.append(path.name)
    return found


def _entry_folder(zoo: Path, reference: str) -> Path:
    """Folder of the entry that `name` or `name@prefix` refers to."""
    name, _, prefix = reference.partition("@")
    folder = folder_of(zoo) / name
    if not folder.is_dir():
        raise ZooError(f"the zoo {folder.parent} has no {name!r}; it has: {_known(zoo, name)}")
    if not prefix:
        try:
            prefix = read_text(folder / "newest", MAX_NAME_BYTES).strip()
        except FileNotFoundError:
            raise ZooError(f"{folder} holds no committed entry; export again") from None
    fingerprints = _fingerprints(folder)
    matching = [fingerprint for fingerprint in fingerprints if fingerprint.startswith(prefix)]
    if len(matching) != 1:
        raise ZooError(
            f"{reference!r} matches {len(matching)} entries of {folder}; there are: "
            f"{', '.join(fingerprints) or 'none'}"
        )
    return folder / matching[0]


def verify_entry(entry: ZooEntry) -> None:
    """Raises ConfigError unless the weights are finite and the files are those that were written.

    Compares the fingerprint and the hash of the file.
    """
    _verify_content(entry)
    if entry.provenance.get("weights_sha256") != sha256_file(entry.weights_path):
        name = entry.weights_path.name
        raise ZooError(f"{entry.path} is damaged: {name} is not the file that was written")


def require_intact(entry: ZooEntry) -> None:
    """Raises ConfigError unless config and weights are finite and those that were written.

    Called whenever an entry is used. Each process verifies an entry once, and again when the size,
    time or inode of its files change. The result is not stored on disk: a file with flipped bits
    keeps its time, the zoo may be read-only, and all weights are read anyway, the second time from
    the page cache.
    """
    files = [entry.path / "config.json", entry.weights_path]
    stamps = []
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise ZooError(f"{entry.path} is damaged: {path.name} is missing") from None
        stamps.append((status.st_size, status.st_mtime_ns, status.st_ino))
    _verify_once(entry.path.resolve(), tuple(stamps))


@lru_cache(256)
def _verify_once(path: Path, stamps: tuple[tuple[int, int, int], ...]) -> None:
    """Verifies an entry, once per process for the same path and stamps of its files."""
    _verify_content(read_entry(path))


def _verify_content(entry: ZooEntry) -> None:
    """Raises ConfigError for another fingerprint, NaN or infinity, or a collapsed codebook."""
    fingerprint, bad = examine(entry.kind, entry.stored_config, entry.lazy())
    if fingerprint != entry.fingerprint:
        raise ZooError(
            f"{entry.path} is damaged: its weights give the fingerprint {fingerprint}, "
            f"not {entry.fingerprint}"
        )
    if bad:
        from landiff.model_zoo.health import non_finite_error

        raise non_finite_error(bad, str(entry.path))
    require_codebook(entry.kind, entry.lazy(), str(entry.path))
