"""Shell completion and the version option."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from landiff.configs.paths import IMPORT_ROOT
from landiff.launchers.cli import main
from landiff.launchers.version import __version__

SHELLS = ["bash", "zsh", "fish"]


def completion_script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def bash_completions(script: str, *words: str) -> list[str]:
    """What bash offers for the last of `words` on a command line that starts with `landiff`."""
    program = (
        script
        + '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        + '_shtab_landiff landiff "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"\n'
        + "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    command = ["bash", "-c", program, "bash", "landiff", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_every_command_and_the_packaged_configs(capsys, shell):
    script = completion_script(shell, capsys)
    for word in ["precompute", "quickstart", "completion", "weights-only", "nano/diffusion-main"]:
        assert word in script


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_an_installed_shell_accepts_the_script(capsys, shell):
    script = completion_script(shell, capsys)
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_bash_completes_commands_options_choices_and_config_names(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanometre.yaml").write_text("")
    script = completion_script("bash", capsys)
    assert bash_completions(script, "prec") == ["precompute"]
    assert bash_completions(script, "train", "dif") == ["diffusion"]
    assert bash_completions(script, "convert", "--weights") == ["--weights", "--weights-only"]
    assert bash_completions(script, "convert", "--to", "mega") == ["megatron"]
    assert bash_completions(script, "shards", "--config", "nano/sh") == ["nano/shards"]
    assert bash_completions(script, "submit", "--cluster", "sand") == ["sandbox"]
    assert "nanometre.yaml" in bash_completions(script, "shards", "--config", "nano")


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bahs"])
    assert ended.value.code == 2
    assert "did you mean 'bash'" in capsys.readouterr().err


def test_version_is_printed_without_torch():
    code = (
        "import sys; from landiff.launchers.cli import main\n"
        "try:\n    main(['--version'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=IMPORT_ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == f"landiff {__version__}\n"


def test_completion_does_not_load_torch():
    code = (
        "import sys; from landiff.launchers.cli import main\n"
        "assert main(['completion', 'bash']) == 0 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=IMPORT_ROOT, check=True, capture_output=True)


def test_the_version_is_that_of_the_package_and_of_the_changelog():
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=IMPORT_ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == __version__
    assert f"## [{__version__}]" in (IMPORT_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
