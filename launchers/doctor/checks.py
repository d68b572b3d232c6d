"""`landiff doctor`: checks whether training can run on this machine.

Each check returns findings, good, warn or bad, with advice for what is not good. As the pre-flight
of a job (`--node --report DIR`) every node runs it and writes DIR/NODE.ok or DIR/NODE.bad.
"""

from __future__ import annotations

import importlib.metadata
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from landiff.configs.files import write_text
from landiff.launchers.local.children import environment

Severity = Literal["good", "warn", "bad"]
GIB = 1 << 30
WRITTEN_MIB = 16  # written to measure the speed of the disk
BUSY_MIB = 2048  # GPU memory in use from which another process is assumed
ALL_REDUCE_TIMEOUT_S = 180
# torchvision 0.15 + N is built for torch 2.N.
TORCHVISION_OFFSET = 15
OPENCV_ADVICE = (
    "opencv-python, which the extra `text` installs, needs libraries of the system: "
    "apt-get install libgl1 libglib2.0-0"
)
# Run in a process of its own, whose crash does not end the doctor
IMPORTS = """
import json, av, cv2, decord, torch, megatron.core, deepspeed, transformers
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "available": torch.cuda.is_available(),
    "devices": torch.cuda.device_count(),
    "nccl": torch.distributed.is_nccl_available(),
}))
"""


@dataclass(frozen=True)
class Requirement:
    """Versions of a distribution that are known to work: from `lowest` to below `too_high`."""

    name: str
    lowest: str
    too_high: str | None
    reason: str

    def __str__(self) -> str:
        text = f"{self.name}>={self.lowest}"
        if self.too_high:
            text += f",<{self.too_high}"
        return text

    def accepts(self, version: str) -> bool:
        """Whether `version` is in the range."""
        if numbers(version) < numbers(self.lowest):
            return False
        return self.too_high is None or numbers(version) < numbers(self.too_high)


VERSIONS = (
    Requirement("torch", "2.8", None, "attention and checkpoints need it"),
    Requirement(
        "megatron-core",
        "0.16.1",
        "0.16.2",
        "the checkpoint format and layer names are those of 0.16.1",
    ),
    Requirement("deepspeed", "0.19.8", "0.20", "ZeRO's accessors are those of 0.19.8"),
    Requirement("transformers", "5", None, "the text encoders load through it"),
    Requirement("diffusers", "0.40", None, "the CogVideoX codec loads through it"),
    Requirement("vector-quantize-pytorch", "1.32", None, "the quantizer's buffers have its names"),
    Requirement("pydantic", "2.8", None, "configs"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    level: Severity
    text: str


@dataclass(frozen=True)
class Demands:
    """What a machine must have."""

    gpus: int = 0
    disk_gib: float = 5.0
    shm_gib: float = 0.5
    open_files: int = 1024
    clock_s: float = 2.0
    all_reduce_ranks: int = 2
    """0: the bandwidth is not checked."""
    imports: bool = True
    """Whether torch and the engines are imported, which takes about 3 s."""


def examine(folder: Path, demands: Demands) -> list[Finding]:
    """Run all checks. `folder` is on the disk that runs are written to.

    Ranks are started only if their GPUs are there: on a machine without them each would take memory
    of the CPU.
    """
    gpus = check_gpus(demands.gpus)
    findings = [
        *check_python(),
        *check_versions(installed_versions()),
        *check_torchvision(),
        *check_disk(folder, demands.disk_gib),
        *check_shared_memory(demands.shm_gib),
        *check_open_files(demands.open_files),
        *check_clock(folder, demands.clock_s),
        *gpus,
    ]
    if demands.imports:
        findings += check_imports()
    lacks_gpus = any(finding.level == "bad" for finding in gpus)
    if demands.all_reduce_ranks > 1 and not lacks_gpus:
        findings += check_all_reduce(demands.all_reduce_ranks)
    return findings


def require(check: str, passes: bool, text: str, advice: str, level: Severity = "bad") -> Finding:
    """A finding that is good if `passes`, else of `level` with `advice`."""
    if passes:
        return Finding(check, "good", text)
    return Finding(check, level, f"{text}; {advice}")


# -------------------------------------------------------------------- software


def check_python() -> list[Finding]:
    """Version of Python."""
    text = f"{platform.python_version()} at {sys.executable}"
    return [require("python", sys.version_info >= (3, 11), text, "3.11 or newer is needed")]


def installed_versions() -> dict[str, str]:
    """Versions of the distributions of VERSIONS that are installed."""
    found = {}
    for requirement in VERSIONS:
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    found = []
    for part in version.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        found.append(int(digits or 0))
    return tuple(found)


def check_versions(installed: Mapping[str, str]) -> list[Finding]:
    """Distributions that are missing, and versions that are known not to work."""
    findings = []
    for requirement in VERSIONS:
        version = installed.get(requirement.name)
        advice = f"pip install '{requirement}'"
        if version is None:
            text = f"{requirement.name} is missing: {advice}"
            findings.append(Finding("versions", "bad", text))
        elif not requirement.accepts(version):
            text = f"{requirement.name} {version}: {requirement.reason}; {advice}"
            findings.append(Finding("versions", "bad", text))
    if findings:
        return findings
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    return [Finding("versions", "good", shown)]


def check_torchvision() -> list[Finding]:
    """Whether torchvision, if installed, is built for this torch.

    Otherwise transformers and diffusers fail at import with a misleading message.
    """
    try:
        vision = importlib.metadata.version("torchvision")
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []
    same_release = numbers(vision)[1] - numbers(torch)[1] == TORCHVISION_OFFSET
    same_build = vision.partition("+")[2] == torch.partition("+")[2]
    if same_release and same_build:
        return []
    text = (
        f"torchvision {vision} is not built for torch {torch}; "
        "nothing here needs it: pip uninstall torchvision"
    )
    return [Finding("torchvision", "bad", text)]


def check_imports() -> list[Finding]:
    """Whether decoders, OpenCV and engines can be imported, and whether torch finds the GPUs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORTS],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        text = f"a package cannot be imported: {lines[-1]}"
        if "/cv2/" in done.stderr:
            text += f"; {OPENCV_ADVICE}"
        return [Finding("imports", "bad", text)]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    cuda = found["cuda"]
    if cuda and not found["available"]:
        text = (
            f"torch {found['torch']} is built for CUDA {cuda} and finds no device; "
            "is the driver new enough?"
        )
        return [Finding("imports", "warn", text)]
    nccl = "yes" if found["nccl"] else "no"
    text = f"torch {found['torch']}, CUDA {cuda or 'no'}, {found['devices']} device(s), NCCL {nccl}"
    return [Finding("imports", "good", text)]


# -------------------------------------------------------------------- machine


def check_disk(folder: Path, needed_gib: float) -> list[Finding]:
    """Free space, and whether a file can be written."""
    free = shutil.disk_usage(folder).free / GIB
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            started = time.perf_counter()
            file.write(os.urandom(1 << 20) * WRITTEN_MIB)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN_MIB / (time.perf_counter() - started)
    except OSError as error:
        return [Finding("disk", "bad", f"{folder} cannot be written: {error.strerror}")]
    text = f"{free:.1f} GiB free in {folder}, writes {speed:.0f} MiB/s"
    return [require("disk", free >= needed_gib, text, f"{needed_gib:g} GiB are needed")]


def check_shared_memory(needed_gib: float) -> list[Finding]:
    """Free space in /dev/shm, which NCCL and data loaders use. Containers give it 64 MiB."""
    if not Path("/dev/shm").is_dir():
        return [Finding("shared memory", "bad", "/dev/shm is not mounted")]
    free = shutil.disk_usage("/dev/shm").free / GIB
    text = f"{free:.2f} GiB free in /dev/shm"
    advice = f"below {needed_gib:g} GiB NCCL may fail: docker --shm-size, or empty it"
    return [require("shared memory", free >= needed_gib, text, advice, level="warn")]


def check_open_files(needed: int) -> list[Finding]:
    """Limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (hard limit {hard})"
    advice = f"{needed} are needed: ulimit -n {needed} in `setup` of the cluster file"
    return [require("open files", soft >= needed, text, advice)]


def check_clock(folder: Path, limit_s: float) -> list[Finding]:
    """Clock of this node against that of the disk's server.

    Locks compare file times, and the earliest error file is shown as the cause.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        before = time.time()
        os.utime(file.name)
        difference = os.stat(file.name).st_mtime - before
    text = f"{difference:+.2f} s against the disk"
    return [require("clock", abs(difference) <= limit_s, text, "set it by NTP")]


# -------------------------------------------------------------------- GPUs


def check_gpus(needed: int) -> list[Finding]:
    """Number of GPUs, their memory errors, and whether other processes use them."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        if needed:
            text = f"{needed} are needed and nvidia-smi is not installed"
            return [Finding("gpus", "bad", text)]
        return [Finding("gpus", "good", "none, CPU only")]
    fields = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
    answer = subprocess.run(
        [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if answer.returncode:
        return [Finding("gpus", "bad", f"nvidia-smi: {(answer.stderr or answer.stdout).strip()}")]
    return read_gpus(answer.stdout, needed)


def read_gpus(text: str, needed: int) -> list[Finding]:
    """Findings from the lines of nvidia-smi."""
    findings = []
    rows = []
    for line in filter(str.strip, text.splitlines()):
        rows.append([cell.strip() for cell in line.split(",")])
    for index, name, _total, used, errors in rows:
        gpu = f"GPU {index} ({name})"
        if errors.isdigit() and int(errors):
            problem = f"{gpu} has {errors} uncorrected memory errors"
            findings.append(Finding("gpus", "bad", problem))
        if used.isdigit() and int(used) > BUSY_MIB:
            problem = f"{gpu}: {used} MiB in use by another process"
            findings.append(Finding("gpus", "warn", problem))
    if len(rows) < needed:
        findings.append(Finding("gpus", "bad", f"{len(rows)} GPU(s), {needed} are needed"))
    if findings:
        return findings
    if not rows:
        return [Finding("gpus", "good", "none")]
    _, name, total, *_ = rows[0]
    return [Finding("gpus", "good", f"{len(rows)} x {name}, {total} MiB")]


def check_all_reduce(ranks: int) -> list[Finding]:
    """Sum and bandwidth of an all-reduce over processes of this machine.

    It reduces 4 MiB over gloo or 256 MiB over NCCL.
    """
    words = [sys.executable, "-m", "landiff.launchers.local.torchrun", "--standalone"]
    words += [f"--nproc-per-node={ranks}", "-m", "landiff.launchers.doctor.all_reduce"]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=ALL_REDUCE_TIMEOUT_S,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        text = (
            f"{ranks} processes of this node hang; "
            "check NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE and firewalls"
        )
        return [Finding("all-reduce", "bad", text)]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [Finding("all-reduce", "bad", lines[-1])]
    return [Finding("all-reduce", "good", done.stdout.strip().splitlines()[-1])]


# -------------------------------------------------------------------- reports


def report_text(findings: Sequence[Finding]) -> str:
    """One line for each finding."""
    lines = [f"{found.level:<5}{found.check:<15}{found.text}" for found in findings]
    return "\n".join(lines)


def worst(findings: Sequence[Finding]) -> Severity:
    """The worst level among the findings."""
    levels = {found.level for found in findings}
    if "bad" in levels:
        return "bad"
    return "warn" if "warn" in levels else "good"


def doctor(folder: Path, gpus: int, node: bool, report: Path | None) -> int:
    """Print the report, and write it to the folder `report`. Returns 1 if anything is bad, else 0.

    `node`: only the quick checks, for the pre-flight of a job.
    """
    ranks = max(2, gpus)
    if node and gpus < 2:
        ranks = 0
    demands = Demands(gpus=gpus, imports=not node, all_reduce_ranks=ranks)
    findings = examine(folder, demands)
    level = worst(findings)
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()  # the name for `exclude:`
    print(f"{name}: {level}\n{report_text(findings)}", flush=True)
    if report is not None:
        shown = findings
        suffix = "ok"
        if level == "bad":
            shown = [found for found in findings if found.level == "bad"]
            suffix = "bad"
        write_text(report / f"{name}.{suffix}", f"{name}:\n{report_text(shown)}\n")
    return 1 if level == "bad" else 0
