"""What a run was started with: the code, as it was on that day, and the environment around it.

A requeued job runs this code, whatever has happened to the working tree since.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from landiff.configs.files import PRIVATE, remove_dir, temporary_name, write_text
from landiff.configs.paths import IMPORT_ROOT
from landiff.configs.secrets import redact_variables

FOLDERS = ("landiff", "configs", "data_pipeline", "model_zoo", "training", "launchers")
SHOWN = (
    "CUDA",
    "NCCL",
    "SLURM",
    "OMP",
    "HF_",
    "TORCH",
    "PYTHON",
    "PATH",
    "LD_",
    "VIRTUAL_ENV",
    "CONDA",
)


def copy_code(target: Path, root: Path = IMPORT_ROOT) -> None:
    """Copy the packages that are running now to `target`; a copy that is there already is replaced."""
    temporary = temporary_name(target.with_name(f"{target.name}.new"))
    shutil.rmtree(temporary, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(root / "landiff", temporary / "landiff", ignore=ignored)  # follows links
    if target.exists():
        remove_dir(target)
    os.rename(temporary, target)


def describe_code(root: Path = IMPORT_ROOT) -> tuple[str, str]:
    """(one line on where the code comes from, its difference to the commit; empty when there is none)."""
    if not (root / ".git").exists():
        return f"installed landiff-pretrain {package_version()} in {root}", ""
    commit = git(root, "rev-parse", "HEAD").strip()
    dirty = git(root, "status", "--porcelain", "--", *FOLDERS)
    line = f"git {commit}" + (" with changes, see code.diff" if dirty else "")
    return line, f"{dirty}\n{git(root, 'diff', 'HEAD', '--', *FOLDERS)}" if dirty else ""


def write_snapshot(folder: Path) -> str:
    """Code, its origin and the environment into the job folder; returns the origin."""
    origin, difference = describe_code()
    copy_code(folder / "code")
    write_text(folder / "code.txt", origin + "\n")
    write_text(folder / "code.diff", difference)
    write_text(folder / "environment.txt", environment_text(), PRIVATE)
    return origin


def environment_text() -> str:
    """Python, packages and the variables that matter, secrets redacted."""
    relevant = {name: value for name, value in os.environ.items() if name.startswith(SHOWN)}
    variables = [f"{name}={value}" for name, value in sorted(redact_variables(relevant).items())]
    packages = sorted(
        f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()
    )
    return "\n".join(
        [
            f"host {socket.gethostname()}",
            f"python {platform.python_version()} {sys.executable}",
            f"platform {platform.platform()}",
            "",
            *variables,
            "",
            *dict.fromkeys(packages),
            "",
        ]
    )


def package_version() -> str:
    try:
        return importlib.metadata.version("landiff-pretrain")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def git(root: Path, *words: str) -> str:
    """Output of a git command, or "" where git has nothing to say."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        return ""
