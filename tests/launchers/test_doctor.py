"""What the doctor says of good and bad machines."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from landiff.launchers.cli import main
from landiff.launchers.doctor import checks as doctor

GOOD = {
    "torch": "2.13.0+cpu",
    "megatron-core": "0.16.1",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "diffusers": "0.42.1",
    "vector-quantize-pytorch": "1.32.0",
    "pydantic": "2.14.3",
}


def test_this_machine_passes_the_quick_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = tmp_path / "report"
    assert main(["doctor", "--node", "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert all(
        check in out
        for check in ("python", "versions", "disk", "shared memory", "open files", "clock", "gpus")
    )
    assert [path.suffix for path in report.iterdir()] == [".ok"]


def test_a_machine_with_fewer_gpus_than_asked_for_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--node", "--gpus", "3"]) != 0
    assert "3 are needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.5.1"}, "torch 2.5.1"),
        ({"megatron-core": "0.17.0"}, "megatron-core 0.17.0"),
        ({"deepspeed": "0.20.1"}, "deepspeed 0.20.1"),
        ({"transformers": None}, "transformers is missing"),
    ],
)
def test_versions_that_clash_are_named_with_the_way_out(change, says):
    installed = {name: version for name, version in (GOOD | change).items() if version}
    (finding,) = doctor.check_versions(installed)
    assert finding.level == "bad" and says in finding.text and "pip install" in finding.text


def test_libraries_that_opencv_lacks_are_named_with_the_way_out(tmp_path, monkeypatch):
    package = tmp_path / "cv2"
    package.mkdir()
    error = "libxcb.so.1: cannot open shared object file: No such file or directory"
    (package / "__init__.py").write_text(f"raise ImportError({error!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.check_imports()
    assert finding.level == "bad"
    assert error in finding.text and "apt-get install libgl1 libglib2.0-0" in finding.text


def test_ranks_of_one_machine_meet_although_its_name_has_no_address(tmp_path, monkeypatch):
    names = "import socket\nsocket.getfqdn = lambda name='': 'no-such-host.invalid'\n"
    (tmp_path / "sitecustomize.py").write_text(names)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "ALL_REDUCE_TIMEOUT_S", 60)
    (finding,) = doctor.check_all_reduce(2)
    assert finding.level == "good", finding.text


def test_known_good_versions_pass():
    assert [f.level for f in doctor.check_versions(GOOD)] == ["good"]


def test_bad_gpus_are_named():
    text = "0, NVIDIA H100, 81559, 3, 0\n1, NVIDIA H100, 81559, 40000, 2\n"
    found = doctor.read_gpus(text, needed=4)
    assert [f.level for f in found] == ["bad", "warn", "bad"]
    assert (
        "GPU 1" in found[0].text
        and "2 uncorrected" in found[0].text
        and "2 GPU(s), 4 are needed" in found[2].text
    )
    assert [f.level for f in doctor.read_gpus("0, NVIDIA H100, 81559, 3, [N/A]\n", needed=1)] == [
        "good"
    ]


def test_too_few_open_files_are_bad():
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert [f.level for f in doctor.check_open_files(soft + 1)] == ["bad"] and [
        f.level for f in doctor.check_open_files(soft)
    ] == ["good"]


def test_a_full_disk_and_a_missing_one_are_bad(tmp_path):
    assert doctor.check_disk(tmp_path, 1e9)[0].level == "bad"
    assert doctor.check_disk(Path("/proc"), 0)[0].level == "bad"


@pytest.mark.long
def test_all_checks_with_a_real_all_reduce(tmp_path):
    found = doctor.examine(tmp_path, doctor.Demands())
    assert doctor.worst(found) != "bad", doctor.report_text(found)
    assert "gloo, 2 ranks" in next(f.text for f in found if f.check == "all-reduce")
