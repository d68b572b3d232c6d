"""Snapshot of the code and the environment that a run was started with.

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
from landiff.launchers.run.job_folder import CODE

FOLDERS = ("landiff", "configs", "data_pipeline", "model_zoo", "training", "launchers")
# Prefixes of the environment variables that are recorded
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
    """Copy the packages that run now to `target`. An earlier copy is replaced."""
    temporary = temporary_name(target.with_name(f"{target.name}.new"))
    shutil.rmtree(temporary, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    # Symbolic links are followed.
    shutil.copytree(root / "landiff", temporary / "landiff", ignore=ignored)
    if target.exists():
        remove_dir(target)
    os.rename(temporary, target)


def describe_code(root: Path = IMPORT_ROOT) -> tuple[str, str]:
    """Origin of the code on one line, and its difference to the commit; empty if there is none."""
    if not (root / ".git").exists():
        return f"installed landiff-pretrain {package_version()} in {root}", ""
    commit = git(root, "rev-parse", "HEAD").strip()
    dirty = git(root, "status", "--porcelain", "--", *FOLDERS)
    if not dirty:
        return f"git {commit}", ""
    difference = git(root, "diff", "HEAD", "--", *FOLDERS)
    return f"git {commit} with changes, see code.diff", f"{dirty}\n{difference}"


def write_snapshot(folder: Path) -> str:
    """Write code, its origin and the environment into the job folder. Returns the origin."""
    origin, difference = describe_code()
    copy_code(folder / CODE)
    write_text(folder / "code.txt", origin + "\n")
    write_text(folder / "code.diff", difference)
    write_text(folder / "environment.txt", environment_text(), PRIVATE)
    return origin


def environment_text() -> str:
    """Versions of Python and packages, and environment variables without secrets."""
    relevant = {name: value for name, value in os.environ.items() if name.startswith(SHOWN)}
    variables = [f"{name}={value}" for name, value in sorted(redact_variables(relevant).items())]
    distributions = importlib.metadata.distributions()
    packages = {f"{found.metadata['Name']}=={found.version}" for found in distributions}
    machine = [
        f"host {socket.gethostname()}",
        f"python {platform.python_version()} {sys.executable}",
        f"platform {platform.platform()}",
    ]
    return "\n".join([*machine, "", *variables, "", *sorted(packages), ""])


def package_version() -> str:
    """Version of this package."""
    try:
        return importlib.metadata.version("landiff-pretrain")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def git(root: Path, *words: str) -> str:
    """Output of a git command. Empty if the command fails or git is not installed."""
    command = ["git", "-C", str(root), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
