"""Import rules of the project, checked on the source."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["configs", "model_zoo", "data_pipeline", "training", "launchers"]
"""In the order of the layers: a package imports itself and the packages before it."""
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_FILES = sorted([*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
READS_ENVIRONMENT = {"training/distributed.py", "configs/ownership.py"}
"""Beside launchers. The owner of a lock is a process with the SLURM job around it."""
MOST_MODULES = 14  # in one folder


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, at any level of the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(module: str) -> str:
    """`training` of `landiff.training.run`; "" for a module of another project."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "landiff" else ""


def test_there_is_source():
    assert len(FILES) > 40


def test_the_import_name_covers_every_package():
    links = {path.name for path in (ROOT / "landiff").iterdir() if path.is_symlink()}
    assert links == set(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / "landiff" / package).resolve() == ROOT / package


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_packages_are_imported_through_landiff_only(path):
    bare = [module for module in imports(path) if module.partition(".")[0] in PACKAGES]
    assert not bare, f"{relative(path)} imports {bare}; write landiff.{bare[0]}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_layers(path):
    place = path.relative_to(ROOT).parts
    for module in imports(path):
        target = package_of(module)
        if target in PACKAGES:
            allowed = PACKAGES.index(target) <= PACKAGES.index(place[0])
            assert allowed, f"{relative(path)} imports {module}"
        if place[0] == "data_pipeline" and target == "model_zoo":
            assert place[1] == "precompute", f"{relative(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_engines_stay_in_their_packages(path):
    place = path.relative_to(ROOT).parts[:2]
    for module in imports(path):
        root = module.split(".")[0]
        if root == "megatron":
            assert place == ("training", "lm"), f"{relative(path)} imports {module}"
        if root == "deepspeed":
            assert place == ("training", "diffusion"), f"{relative(path)} imports {module}"
        if root == "flash_attn":
            assert relative(path) == "model_zoo/attention.py", f"{relative(path)} imports {module}"
        if module.startswith("landiff.training.lm"):
            assert place != ("training", "diffusion"), f"{relative(path)} imports {module}"
        if module.startswith("landiff.training.diffusion"):
            assert place != ("training", "lm"), f"{relative(path)} imports {module}"


def test_environment_is_read_in_few_places():
    for path in FILES:
        name = relative(path)
        if name in READS_ENVIRONMENT or name.startswith("launchers/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or node.attr not in {"environ", "getenv"}:
                continue
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            assert owner != "os", f"{name}:{node.lineno} reads os.{node.attr}"


def test_arguments_are_parsed_in_launchers_only():
    for path in FILES:
        if not relative(path).startswith("launchers/"):
            roots = [module.split(".")[0] for module in imports(path)]
            assert "argparse" not in roots, relative(path)


def test_no_folder_holds_too_many_modules():
    for folder in {path.parent for path in FILES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{folder.relative_to(ROOT)}: {len(modules)} modules"


def test_the_public_api_is_there_and_loads_no_torch():
    code = (
        "import sys, landiff\n"
        "assert landiff.__version__ and landiff.load_config and landiff.zoo.ZooEntry\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert 'LanDiffPipeline' in dir(landiff)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_config_files_load_without_torch():
    names = [
        relative(path)[:-3].replace("/", ".") for path in FILES if path.stem.endswith("config")
    ]
    modules = [f"landiff.{name}" for name in names]
    assert len(modules) >= 7
    code = (
        f"import sys\nfor module in {modules!r}: __import__(module)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def imported_at_start(module: str) -> set[str]:
    """Dotted names that importing a module of ours imports, through modules of ours."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        place = ROOT.joinpath(*name.split(".")[1:])
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not name.startswith("landiff.") or not path.exists():
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                left += [f"{node.module}.{alias.name}" for alias in node.names]
                left.append(str(node.module))
    return found


def test_sampling_imports_large_libraries_only_for_the_encoders_it_uses():
    """diffusers alone takes five seconds to import."""
    found = imported_at_start("landiff.launchers.results.sample")
    assert {"torch", "landiff.model_zoo.dit"} <= found
    roots = {name.split(".")[0] for name in found}
    assert not roots & {"diffusers", "transformers", "megatron", "deepspeed"}


def test_help_is_instant():
    """In seconds of CPU time, which other tests on the same cores do not change much."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = [sys.executable, "-m", "landiff.launchers.cli", "--help"]
        done = subprocess.run(words, check=True, cwd=ROOT, capture_output=True, text=True)
        assert "landiff quickstart" in done.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5
