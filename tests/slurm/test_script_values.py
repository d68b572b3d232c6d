"""How sbatch and srun read names with quotes, blanks, percent signs and backslashes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from landiff.launchers.slurm.script_values import file_pattern, sbatch_option

pytestmark = pytest.mark.slurm

NAME = 'it\'s "q" $(touch PWN) `touch PWN` #h 50% %j é漢'


def test_sbatch_and_srun_take_hostile_names_as_they_are(sandbox, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    lines = [
        "#!/bin/bash",
        *(
            f"#SBATCH {sbatch_option(option)}"
            for option in (
                f"--job-name={NAME}\\x",
                f"--chdir={folder}",
                f"--output={file_pattern(folder)}/batch.log",
            )
        ),
        'printf "%s\\n" "$SLURM_JOB_NAME"; pwd; LOG=$PWD',
        'srun --output="${LOG//%/%%}/rank_%4t.log" echo ran',
    ]
    script = folder / "job.sbatch"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run(["sbatch", "--wait", str(script)], check=True, timeout=120, capture_output=True)
    assert read(folder / "batch.log") == f"{NAME}\\x\n{folder}\n"
    assert read(folder / "rank_0000.log") == "ran\n"
    assert not list(tmp_path.rglob("PWN"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
