"""Pages of the documentation site that are made when it is built.

* configuration.md: every config key, from the config classes;
* contributing.md and changelog.md: the files of the repository's root;
* api/*.md: one page per package, for mkdocstrings.

The project must be importable where mkdocs runs: `make docs` uses the editable install.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation

from landiff.configs.base import Config
from landiff.configs.reference import ConfigKey, all_sections, config_keys, section_name
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.launchers.config import (
    EvaluateConfig,
    SampleConfig,
    ShardsJobConfig,
    VideoMetricsConfig,
)
from landiff.launchers.slurm.cluster_config import ClusterConfig
from landiff.model_zoo.config import ModelConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, type[Config]] = {
    "landiff shards": ShardsJobConfig,
    "landiff precompute": PrecomputeConfig,
    "landiff train tokenizer": TokenizerTrainConfig,
    "landiff train lm": LMTrainConfig,
    "landiff train diffusion": DiffusionTrainConfig,
    "landiff sample": SampleConfig,
    "landiff evaluate": EvaluateConfig,
    "landiff evaluate videos": VideoMetricsConfig,
    "Model presets": ModelConfig,
    "Cluster files": ClusterConfig,
}
INTRODUCTION = """\
# Configuration reference

Every key of every config. `landiff config` lists the packaged configs, and any key can be set on
the command line: `optim.lr=3e-4`. A key whose type is a link is a section with keys of its own:
`loop.steps` is the key `steps` of the section [Loop](#loop). Where a key takes one of several
sections, `kind` selects it.
"""

PACKAGES = ("configs", "model_zoo", "data_pipeline", "training", "launchers")
IMPORT_PREFIX = "landiff."  # what stands before a package's name in an import
NOT_API = {"__init__", "__main__"}

ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"configuration.md": configuration_page(), **api_pages()}
    for source, name in ROOT_PAGES.items():
        pages[name] = root_page(ROOT / source)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Removes links to files outside the documentation folder, and keeps their text."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Fails for a page that the navigation does not list, API pages excepted."""
    listed = {page.file.src_uri for page in nav.pages}
    missing = []
    for file in files.documentation_pages():
        if file.src_uri not in listed and not file.src_uri.startswith("api/"):
            missing.append(file.src_uri)
    if missing:
        raise PluginError(f"the nav of mkdocs.yml does not list {', '.join(missing)}")
    return nav


def root_page(path: Path) -> str:
    """A document of the root as a page: its links are relative to docs/."""
    return path.read_text(encoding="utf-8").replace("](docs/", "](")


def configuration_page() -> str:
    """All config classes as tables: commands first, then the sections that they use."""
    parts = [INTRODUCTION]
    for command, cls in COMMANDS.items():
        parts.append(f"## {command}\n\n{class_text(cls)}")
    parts.append("## Sections")
    for cls in sections():
        parts.append(f"### {section_name(cls)}\n\n{class_text(cls)}")
    return "\n\n".join(parts) + "\n"


def sections() -> list[type[Config]]:
    """Section classes of all commands, by name."""
    found = all_sections(list(COMMANDS.values()))
    return sorted(found, key=section_name)


def class_text(cls: type[Config]) -> str:
    """What the class is, and a table of its keys."""
    rows = [table_row(key) for key in config_keys(cls, section_link)]
    header = "| key | type | default | meaning |\n|---|---|---|---|\n"
    return f"{first_paragraph(cls)}\n\n{header}" + "\n".join(rows)


def first_paragraph(cls: type[Config]) -> str:
    """The first paragraph of a class's docstring."""
    return (cls.__doc__ or "").strip().split("\n\n")[0]


def section_link(cls: type[Config]) -> str:
    """Link to the table of a section."""
    name = section_name(cls)
    return f"[{name}](#{name.lower()})"


def table_row(key: ConfigKey) -> str:
    """One row of a table of keys."""
    cells = [f"`{key.name}`", key.type, key.default, key.meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def api_pages() -> dict[str, str]:
    """{page: text} with one page for each folder of modules, and an index."""
    pages = {}
    entries = []
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            modules = api_modules(folder)
            if modules:
                name = ".".join(folder.relative_to(ROOT).parts)
                pages[f"api/{name}.md"] = api_page(name, modules)
                entries.append(f"* [`{IMPORT_PREFIX}{name}`]({name}.md)")
    pages["api/index.md"] = "# API reference\n\n" + "\n".join(entries) + "\n"
    return pages


def api_modules(folder: Path) -> list[str]:
    """Dotted names of the modules in a folder, without the import prefix."""
    names = [path.stem for path in sorted(folder.glob("*.py")) if path.stem not in NOT_API]
    package = ".".join(folder.relative_to(ROOT).parts)
    return [f"{package}.{name}" for name in names]


def api_page(package: str, modules: list[str]) -> str:
    """Page of one package: its modules, as mkdocstrings renders them."""
    parts = [f"# {IMPORT_PREFIX}{package}"]
    for module in modules:
        parts.append(f"::: {IMPORT_PREFIX}{module}")
    return "\n\n".join(parts) + "\n"
