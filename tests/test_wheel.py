"""The wheel, installed outside the source: it contains everything, configs and clips included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the unpacked wheel, beside packages named `configs` and `training`.

    Its dependencies are those of this environment.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True
    )
    for name in ("configs", "training"):  # other distributions with our folders' names
        package = folder / "site" / name
        package.mkdir()
        (package / "__init__.py").write_text(f"raise ImportError('{name} of another project')\n")
    return folder / "site"


def landiff(installed: Path, workdir: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = (
        "import sys; from landiff.launchers import cli; "
        "assert cli.__file__.startswith(sys.argv.pop(1)); sys.exit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(installed), *words],
        cwd=workdir,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_holds_configs_clips_and_attribution(installed):
    assets = installed / "landiff" / "data_pipeline" / "assets"
    assert "Blender Foundation" in (assets / "ATTRIBUTION.txt").read_text()
    assert len(list(assets.rglob("*.mp4"))) >= 40
    assert not (installed / "tests").exists()


def test_the_wheel_holds_the_packaged_weights(installed, tmp_path):
    verified = landiff(installed, tmp_path, "zoo", "verify", "--zoo", "packaged").splitlines()
    assert [line.split()[0] for line in verified] == ["diffusion", "lm", "tokenizer"]
    provenance = installed / "landiff" / "model_zoo" / "packaged" / "PROVENANCE.md"
    assert "Apache License" in provenance.read_text()


def test_the_wheel_cuts_its_own_clips(installed, tmp_path):
    assert "nano/lm" in landiff(installed, tmp_path, "config")
    assert "69 samples" in landiff(installed, tmp_path, "shards", "--config", "nano/shards")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_wheel_runs_the_quickstart(installed, tmp_path):
    assert "next steps" in landiff(installed, tmp_path, "quickstart", "--out", "here")
    assert list((tmp_path / "here" / "samples").glob("*.mp4"))
