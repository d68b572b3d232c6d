"""The import rules of the project, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["configs", "model_zoo", "data_pipeline", "training", "launchers"]  # imports go to the left only
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, is it at module level) for every import statement of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_source():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down_only(path):
    room = path.relative_to(ROOT).parts[0]
    for module, _ in imports(path):
        target = module.split(".")[0]
        if target in ROOMS:
            assert ROOMS.index(target) <= ROOMS.index(room), f"{relative(path)} imports {module}"
        if room == "data_pipeline" and target == "model_zoo":
            # configs of encoders are plain data, which precompute's own config holds
            allowed = path.name == "precompute.py" or (path.name == "precompute_config.py" and module.startswith("landiff.model_zoo.frozen.config"))
            assert allowed, f"{relative(path)} imports {module}: only precompute.py may"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_engines_stay_in_their_rooms(path):
    place = path.relative_to(ROOT).parts[:2]
    for module, _ in imports(path):
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


def test_environment_is_read_in_three_places_only():
    for path in FILES:
        name = relative(path)
        # a lock's owner is a process with the SLURM job around it, whichever package takes the lock
        if name in ("training/distributed.py", "configs/ownership.py") or name.startswith("launchers/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
            assert not (named and isinstance(node.value, ast.Name) and node.value.id == "os"), f"{name}:{node.lineno} reads os.{node.attr}"


def test_arguments_are_parsed_in_launchers_only():
    for path in FILES:
        if not relative(path).startswith("launchers/"):
            assert not [m for m, _ in imports(path) if m.split(".")[0] == "argparse"], relative(path)


def test_config_files_load_without_torch():
    modules = [relative(p)[:-3].replace("/", ".") for p in FILES if p.name.endswith("config.py")]
    assert len(modules) >= 7
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nassert 'torch' not in sys.modules, 'torch came in'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_is_instant():
    def seconds() -> float:
        started = time.perf_counter()
        text = subprocess.run([sys.executable, "-m", "landiff.launchers.cli", "--help"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
        assert "landiff quickstart" in text
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5
