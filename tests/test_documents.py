"""Documents in the repository: citations of the specification, links, metadata files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SPECIFICATION = ROOT / "docs" / "specification.md"
SUFFIXES = {".py", ".yaml", ".md"}
# Hidden folders are left out as well.
NOT_SOURCE = {"build", "dist", "runs", "site", "vbench-env", "venv"}
GENERATED = {"configuration.md", "contributing.md", "changelog.md"}  # when the site is built

CITATION = re.compile(r"§+\s?(\d+(?:\.\d+)?)")
HEADING = re.compile(r"^#{2,3} (\d+(?:\.\d+)?) \S", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def source_files() -> list[Path]:
    """All source files and documents of the repository."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        folders = path.relative_to(ROOT).parts[:-1]
        if any(name.startswith(".") or name in NOT_SOURCE for name in folders):
            continue
        if path.suffix in SUFFIXES and path.is_file():
            found.append(path)
    return found


def sections() -> list[str]:
    """Section numbers of the specification, in order."""
    return HEADING.findall(SPECIFICATION.read_text(encoding="utf-8"))


def unresolved(text: str, known: set[str]) -> list[str]:
    """Sections that `text` cites and the specification does not have."""
    return [number for number in CITATION.findall(text) if number not in known]


def documents() -> list[Path]:
    return [path for path in source_files() if path.suffix == ".md"]


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings."""
    text = CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(re.sub(r"\s+", "-", words.strip()))
    return found


def test_citations_of_the_specification_resolve():
    known = set(sections())
    cited = 0
    wrong = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        cited += len(CITATION.findall(text))
        for number in unresolved(text, known):
            wrong.append(f"{path.relative_to(ROOT)}: §{number}")
    assert not wrong, "not a section of docs/specification.md:\n" + "\n".join(wrong)
    assert cited > 50


def test_an_unknown_section_is_found():
    known = set(sections())
    missing = "99" + ".1"
    assert unresolved(f"see §4.5, §§3 and §{missing}", known) == [missing]


def test_every_section_stands_once_and_in_order():
    numbers = sections()
    as_tuples = [tuple(int(part) for part in number.split(".")) for number in numbers]
    assert as_tuples == sorted(set(as_tuples))
    assert [number for number in numbers if "." not in number] == [str(n) for n in range(10)]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path):
    text = CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path
        if name:
            linked = path.parent / name
        if linked.name in GENERATED:
            continue
        assert linked.exists(), f"{path.relative_to(ROOT)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{path.relative_to(ROOT)} links to {target}"


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2503.04606")
    assert {"type", "title", "authors"} <= set(paper)


def test_the_architecture_page_lists_the_packages():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("## Packages", 1)[1].split("```")[1]
    listed = set()
    parent = ""
    for line in tree.splitlines():
        found = re.match(r"( *)([a-z0-9_]+)/", line)
        if found is None:
            continue
        if not found[1]:
            parent = found[2]
        listed.add(parent if not found[1] else f"{parent}/{found[2]}")
    present = {"benchmarks", "tests", "docs"}
    for package in ("configs", "model_zoo", "data_pipeline", "training", "launchers"):
        present.add(package)
        for init in (ROOT / package).glob("*/__init__.py"):
            present.add(f"{package}/{init.parent.name}")
    assert listed == present


def test_the_names_in_the_glossary_exist():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    table = text.split("## Shared names in the code", 1)[1].split("\n## ", 1)[0]
    names = re.findall(r"`([A-Za-z_]+)`", table)
    source = ""
    for package in ("configs", "model_zoo", "data_pipeline", "training", "launchers"):
        for path in (ROOT / package).rglob("*.py"):
            source += path.read_text(encoding="utf-8")
    missing = []
    for name in names:
        defined = re.search(rf"(class|def) {name}\b|^{name} = ", source, re.MULTILINE)
        if name != "landiff" and not defined:
            missing.append(name)
    assert len(names) > 20 and not missing
