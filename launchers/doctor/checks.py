"""`landiff doctor`: will training run on this machine? Each check says good, warn or bad, and the way out.

As a job's pre-flight (`--node --report DIR`) every node runs it and leaves DIR/<node>.ok or DIR/<node>.bad.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from landiff.configs.files import write_text
from landiff.launchers.local.children import environment

Severity = Literal["good", "warn", "bad"]
GIB = 1 << 30
# (distribution, lowest, first too high, why)
VERSIONS = (
    ("torch", "2.8", None, "attention and checkpoints need it"),
    (
        "megatron-core",
        "0.16.1",
        "0.16.2",
        "the checkpoint format and layer names are those of 0.16.1",
    ),
    ("deepspeed", "0.19.8", "0.20", "ZeRO's accessors are those of 0.19.8"),
    ("transformers", "5", None, "the text encoders load through it"),
    ("diffusers", "0.40", None, "the CogVideoX codec loads through it"),
    ("vector-quantize-pytorch", "1.32", None, "the quantiser's buffers are named as there"),
    ("pydantic", "2.8", None, "configs"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    level: Severity
    text: str


@dataclass(frozen=True)
class Demands:
    """What a machine has to have."""

    gpus: int = 0
    disk_gib: float = 5.0
    shm_gib: float = 0.5
    open_files: int = 1024
    clock_s: float = 2.0
    all_reduce_ranks: int = 2  # 0: no bandwidth check
    imports: bool = True  # start torch: some 3 s


def examine(folder: Path, demands: Demands) -> list[Finding]:
    """All checks; `folder` is on the disk that runs are written to."""
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        lambda: check_versions(installed_versions()),
        check_torchvision,
        lambda: check_disk(folder, demands.disk_gib),
        lambda: check_shared_memory(demands.shm_gib),
        lambda: check_open_files(demands.open_files),
        lambda: check_clock(folder, demands.clock_s),
        lambda: check_gpus(demands.gpus),
    ]
    if demands.imports:
        checks.append(check_imports)
    if demands.all_reduce_ranks > 1:
        checks.append(lambda: check_all_reduce(demands.all_reduce_ranks))
    return [finding for check in checks for finding in check()]


def check_python() -> list[Finding]:
    level: Severity = "good" if sys.version_info >= (3, 11) else "bad"
    return [
        Finding(
            "python",
            level,
            f"{platform.python_version()} at {sys.executable}"
            + ("" if level == "good" else "; 3.11 or newer is needed"),
        )
    ]


def installed_versions() -> dict[str, str]:
    """By the names of VERSIONS; what is missing is left out."""
    found = {}
    for name, *_ in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def check_versions(installed: Mapping[str, str]) -> list[Finding]:
    """Versions that are known not to work."""
    findings = []
    for name, lowest, too_high, why in VERSIONS:
        version = installed.get(name)
        wanted = f"{name}>={lowest}" + (f",<{too_high}" if too_high else "")
        if version is None:
            findings.append(
                Finding("versions", "bad", f"{name} is missing: pip install '{wanted}'")
            )
        elif numbers(version) < numbers(lowest) or (
            too_high and numbers(version) >= numbers(too_high)
        ):
            findings.append(
                Finding("versions", "bad", f"{name} {version}: {why}; pip install '{wanted}'")
            )
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    return findings or [Finding("versions", "good", shown)]


def check_torchvision() -> list[Finding]:
    """A torchvision built for another torch breaks transformers and diffusers at import, with a riddle for a message."""
    try:
        vision, torch = (
            importlib.metadata.version("torchvision"),
            importlib.metadata.version("torch"),
        )
    except importlib.metadata.PackageNotFoundError:
        return []
    local = (vision.partition("+")[2], torch.partition("+")[2])
    fits = numbers(vision)[1] - numbers(torch)[1] == 15 and local[0] == local[1]
    return (
        []
        if fits
        else [
            Finding(
                "torchvision",
                "bad",
                f"torchvision {vision} beside torch {torch}: another build; nothing here needs it: pip uninstall torchvision",
            )
        ]
    )


def check_disk(folder: Path, wanted_gib: float) -> list[Finding]:
    """Room, and does a file that was written come back?"""
    free = shutil.disk_usage(folder).free / GIB
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            started = time.perf_counter()
            file.write(os.urandom(1 << 20) * 16)
            file.flush()
            os.fsync(file.fileno())
            speed = 16 / (time.perf_counter() - started)
    except OSError as error:
        return [Finding("disk", "bad", f"{folder} cannot be written: {error.strerror}")]
    level: Severity = "good" if free >= wanted_gib else "bad"
    return [
        Finding(
            "disk",
            level,
            f"{free:.1f} GiB free in {folder}, writes {speed:.0f} MiB/s"
            + ("" if level == "good" else f"; {wanted_gib:g} GiB are wanted"),
        )
    ]


def check_shared_memory(wanted_gib: float) -> list[Finding]:
    """NCCL and data loaders talk through /dev/shm; containers give it 64 MiB unless told otherwise."""
    if not Path("/dev/shm").is_dir():
        return [Finding("shared memory", "bad", "/dev/shm is not mounted")]
    free = shutil.disk_usage("/dev/shm").free / GIB
    level: Severity = "good" if free >= wanted_gib else "warn"
    return [
        Finding(
            "shared memory",
            level,
            f"{free:.2f} GiB free in /dev/shm"
            + (
                ""
                if level == "good"
                else f"; below {wanted_gib:g} GiB NCCL may fail: docker --shm-size, or empty it"
            ),
        )
    ]


def check_open_files(wanted: int) -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level: Severity = "good" if soft >= wanted else "bad"
    return [
        Finding(
            "open files",
            level,
            f"{soft} (hard limit {hard})"
            + (
                ""
                if level == "good"
                else f"; {wanted} are wanted: ulimit -n {wanted} in `setup` of the cluster file"
            ),
        )
    ]


def check_clock(folder: Path, limit_s: float) -> list[Finding]:
    """This node against the disk's server: file times and the order of error files rely on it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        before = time.time()
        os.utime(file.name)
        apart = os.stat(file.name).st_mtime - before
    level: Severity = "good" if abs(apart) <= limit_s else "bad"
    return [
        Finding(
            "clock",
            level,
            f"{apart:+.2f} s against the disk" + ("" if level == "good" else "; set it by NTP"),
        )
    ]


def check_gpus(wanted: int) -> list[Finding]:
    """How many there are, and whether each is free of errors and of other people's processes."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return (
            [Finding("gpus", "bad", f"{wanted} are wanted and there is no nvidia-smi")]
            if wanted
            else [Finding("gpus", "good", "none; CPU alone")]
        )
    fields = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    answer = subprocess.run(
        [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if answer.returncode:
        return [Finding("gpus", "bad", f"nvidia-smi: {(answer.stderr or answer.stdout).strip()}")]
    return read_gpus(answer.stdout, wanted)


def read_gpus(text: str, wanted: int) -> list[Finding]:
    """Findings from nvidia-smi's lines."""
    findings = []
    rows = [
        [cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()
    ]
    for index, name, _total, used, errors in rows:
        if errors.isdigit() and int(errors):
            findings.append(
                Finding(
                    "gpus", "bad", f"GPU {index} ({name}) has {errors} uncorrected memory errors"
                )
            )
        if used.isdigit() and int(used) > 2048:
            findings.append(
                Finding("gpus", "warn", f"GPU {index} ({name}): {used} MiB in use by somebody else")
            )
    if len(rows) < wanted:
        findings.append(Finding("gpus", "bad", f"{len(rows)} GPU(s), {wanted} are wanted"))
    return findings or [
        Finding("gpus", "good", f"{len(rows)} x {rows[0][1]}, {rows[0][2]} MiB" if rows else "none")
    ]


def check_imports() -> list[Finding]:
    """Do the engines start here? In a process of its own, whose crash costs nothing."""
    code = (
        "import json, torch, megatron.core, deepspeed, transformers\n"
        "print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count(), torch.distributed.is_nccl_available()]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    if done.returncode:
        return [
            Finding(
                "imports",
                "bad",
                f"an engine does not import: {done.stderr.strip().splitlines()[-1]}",
            )
        ]
    version, cuda, available, count, nccl = json.loads(done.stdout.strip().splitlines()[-1])
    if cuda and not available:
        return [
            Finding(
                "imports",
                "warn",
                f"torch {version} is built for CUDA {cuda} and sees no device; is the driver new enough?",
            )
        ]
    return [
        Finding(
            "imports",
            "good",
            f"torch {version}, CUDA {cuda or 'no'}, {count} device(s), NCCL {'yes' if nccl else 'no'}",
        )
    ]


def check_all_reduce(ranks: int) -> list[Finding]:
    """Two or more processes of this machine add 4 MiB (gloo) or 256 MiB (NCCL); the right sum, and how fast."""
    words = [
        sys.executable,
        "-m",
        "landiff.launchers.local.torchrun",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "-m",
        "landiff.launchers.doctor.all_reduce",
    ]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=180,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return [
            Finding(
                "all-reduce",
                "bad",
                f"{ranks} processes of this node hang; look at NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE and firewalls",
            )
        ]
    if done.returncode:
        return [
            Finding(
                "all-reduce",
                "bad",
                (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
            )
        ]
    return [Finding("all-reduce", "good", done.stdout.strip().splitlines()[-1])]


# -------------------------------------------------------------------- reports


def report_text(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{f.level:<5}{f.check:<15}{f.text}" for f in findings)


def worst(findings: Sequence[Finding]) -> Severity:
    levels = {f.level for f in findings}
    return "bad" if "bad" in levels else "warn" if "warn" in levels else "good"


def doctor(folder: Path, gpus: int, node: bool, report: Path | None) -> int:
    """Print the report; 0 unless something is bad. `node`: the quick checks, for every node of a job."""
    demands = Demands(
        gpus=gpus,
        imports=not node,
        all_reduce_ranks=gpus if node and gpus > 1 else 0 if node else max(2, gpus),
    )
    findings = examine(folder, demands)
    level, name = (
        worst(findings),
        os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    )  # as `exclude:` wants it
    print(f"{name}: {level}\n{report_text(findings)}", flush=True)
    if report is not None:
        shown = findings if level != "bad" else [f for f in findings if f.level == "bad"]
        write_text(
            report / f"{name}.{'bad' if level == 'bad' else 'ok'}",
            f"{name}:\n{report_text(shown)}\n",
        )
    return 1 if level == "bad" else 0
