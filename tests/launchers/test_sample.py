"""`landiff sample`: prompts and seeds, resuming, several tasks, and what a video depends on."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from landiff.configs.base import ConfigError
from landiff.data_pipeline.video.codec import ClipDecoder, read_comment, spaced_frames
from landiff.launchers.arguments import build_parser
from landiff.launchers.cli import main
from landiff.launchers.results import sample
from landiff.launchers.results.gallery import CONTACT_SHEET, GALLERY
from landiff.launchers.results.prompts import sample_units, sample_values
from landiff.launchers.results.sample import batches, sample_videos
from landiff.launchers.results.sample_folder import SAMPLES
from landiff.launchers.results.sampling.checks import check_sample
from landiff.launchers.results.sampling.loading import load_models
from landiff.model_zoo import registry
from landiff.training.checks import Launch
from tests.launchers.random_zoo import PROMPTS, sample_config, write_random_zoo

ROOT = Path(__file__).resolve().parents[2]

KINDS = ("lm", "tokenizer", "diffusion")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Nano models with random weights."""
    folder = tmp_path_factory.mktemp("sample") / "zoo"
    return write_random_zoo(folder, buckets=["1x64x64", "17x96x64"])


@pytest.fixture(scope="module")
def undisturbed(zoo, tmp_path_factory) -> Path:
    """All prompts, one video at a time."""
    out = tmp_path_factory.mktemp("sample") / "samples"
    sample_videos(sample_config(zoo, out))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def videos(*arguments) -> torch.Tensor:
    chunks = list(sample.stream_batch(*arguments))
    return torch.cat([chunk.frames_BTHWC for chunk in chunks], dim=1)


def test_every_video_has_its_record(undisturbed, zoo):
    lines = (undisturbed / SAMPLES).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == list(PROMPTS)
    assert [record["seed"] for record in records] == [42, 1042, 2042, 3042]
    for record in records:
        inside = json.loads(read_comment(undisturbed / record["file"]))
        assert inside["prompt"] == record["prompt"] and inside["key"] == record["key"]
        for kind in KINDS:
            assert inside["settings"][kind] == registry.resolve(zoo, kind, kind).reference
        assert inside["frames"] == 17


def test_gallery_and_contact_sheet_show_every_video(undisturbed):
    page = (undisturbed / GALLERY).read_text(encoding="utf-8")
    assert page.count("<video ") == 4 and page.count("data:video/mp4;base64,") == 4
    for prompt in PROMPTS:
        assert prompt in page
    with Image.open(undisturbed / CONTACT_SHEET) as sheet:
        assert sheet.width >= 5 * 96 and sheet.height == 4 * (96 + 20)


class Killed(Exception):
    """Ends a run in the middle."""


def test_a_killed_run_resumes_with_the_same_bytes(undisturbed, zoo, tmp_path, monkeypatch):
    stream = sample.stream_batch
    calls = []

    def end_in_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Killed
        return stream(*arguments)

    monkeypatch.setattr(sample, "stream_batch", end_in_third)
    with pytest.raises(Killed):
        sample_videos(sample_config(zoo, tmp_path))
    assert len(files(tmp_path)) == 2
    unfinished = tmp_path / f".02-fox.mp4.{os.uname().nodename}.0-0.tmp"  # of a dead process
    unfinished.touch()
    sample_videos(sample_config(zoo, tmp_path))
    assert files(tmp_path) == files(undisturbed) and not unfinished.exists()
    assert len(calls) == 3 + 2
    pages = [tmp_path / GALLERY, tmp_path / CONTACT_SHEET]
    written = [path.stat().st_mtime_ns for path in pages]
    sample_videos(sample_config(zoo, tmp_path))  # nothing is left
    assert [path.stat().st_mtime_ns for path in pages] == written
    assert len(calls) == 3 + 2
    assert (tmp_path / SAMPLES).read_text().count("\n") == 4


def kills(work: Path, number: int, seed: int, *cases: str) -> int:
    """Number of kills that a run of these cases has survived."""
    command = [sys.executable, "-m", "tests.launchers.kill_sample", str(work), str(number)]
    ended = subprocess.run(
        [*command, str(seed), *cases], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return int(ended.stdout.split()[-1])


def test_killed_runs_end_with_the_bytes_of_undisturbed_ones(tmp_path):
    assert kills(tmp_path, 5, 0, "long", "few") >= 10


@pytest.mark.long
def test_two_hundred_prompts_survive_twenty_kills(tmp_path):
    (tmp_path / "long").mkdir()
    assert kills(tmp_path, 20, 1, "prompts") >= 20
    assert kills(tmp_path / "long", 40, 2, "long") >= 40


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_ten_minutes_of_video(zoo, tmp_path):
    """Resident memory of the command while it generates 400 chunks of 64 x 64 pixels.

    They have 59 MB of frames and 15 MB of latents. The allowance is for the lists of frames in the
    mp4 and of chunks in the report, and for the allocator.
    """
    command = [sys.executable, "-m", "landiff.launchers.cli", "sample", "--config", "nano/sample"]
    command += [f"zoo={zoo}", f"out={tmp_path / 'out'}", "steps=2", "num_latent_frames=1202"]
    resident: dict[int, int] = {}
    with subprocess.Popen(
        [*command, "tokens.context_segments=1", "a fox"], stdout=subprocess.DEVNULL
    ) as child:
        while child.poll() is None:
            chunks = len(list(tmp_path.glob("out/unfinished/*/chunk-*")))
            pages = Path(f"/proc/{child.pid}/statm").read_text().split()
            if chunks and len(pages) > 1:
                size = int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
                resident[chunks] = max(size, resident.get(chunks, 0))
            time.sleep(0.2)
    assert child.returncode == 0 and files(tmp_path / "out")
    early = max(size for chunks, size in resident.items() if 10 <= chunks < 60)
    late = max(size for chunks, size in resident.items() if chunks > 340)
    assert late - early < 8 << 20, (early, late)


def test_tasks_divide_the_videos_and_give_the_same_bytes(undisturbed, zoo, tmp_path):
    first = sample_videos(sample_config(zoo, tmp_path), (0, 3))
    second = sample_videos(sample_config(zoo, tmp_path), (1, 3))
    third = sample_videos(sample_config(zoo, tmp_path), (2, 3))
    assert len(first) == 2 and len(second) == len(third) == 1
    assert files(tmp_path) == files(undisturbed)
    assert (tmp_path / SAMPLES).read_text().count("\n") == 4


def test_a_video_does_not_depend_on_the_others_of_its_batch(zoo, tmp_path):
    """Bit for bit at equal batch size, for short and long prompts, also in an incomplete batch."""
    models = load_models(sample_config(zoo, tmp_path), torch.device("cpu"))
    batched = sample_config(zoo, tmp_path, batch_size=3)
    units = sample_units(batched)
    quiet = sample.UnitProgress(4, 0)
    alone = {}
    for unit in units:
        alone[unit.seed] = videos(models, batched, [unit], quiet)[0]
    orders = [[units[0], units[1], units[3]], [units[2], units[3], units[0]], [units[1], units[2]]]
    for order in orders:
        together = videos(models, batched, order, quiet)
        for unit, video_THWC in zip(order, together, strict=False):
            assert torch.equal(video_THWC, alone[unit.seed]), (unit.prompt, len(order))


def test_a_video_depends_on_the_batch_size_only_by_rounding(zoo, tmp_path):
    models = load_models(sample_config(zoo, tmp_path), torch.device("cpu"))
    quiet = sample.UnitProgress(4, 0)
    units = sample_units(sample_config(zoo, tmp_path))
    found = []
    for size in (1, 3):
        sized = sample_config(zoo, tmp_path, batch_size=size)
        found.append(videos(models, sized, units[3:4], quiet)[0])
    difference = (found[0].int() - found[1].int()).abs()
    assert int(difference.max()) <= 1  # rounding to uint8 may turn at a half


def test_a_measured_batch_size_is_recorded_and_kept(zoo, tmp_path):
    """A resumed run neither measures nor loads models, and a number other than it is refused."""
    measured = sample_config(zoo, tmp_path, batch_size="auto", prompts=PROMPTS[:2])
    sample_videos(measured)
    choice = json.loads((tmp_path / "batch-size.json").read_text())
    size = choice["batch_size"]
    assert choice["seconds_per_video"][str(size)] == min(choice["seconds_per_video"].values())
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == size
    before = files(tmp_path)
    next(tmp_path.glob("*.mp4")).unlink()
    sample_videos(measured)
    assert files(tmp_path) == before
    assert json.loads((tmp_path / "batch-size.json").read_text()) == choice
    with pytest.raises(ConfigError, match=f"batch_size = {size} there, 3 here"):
        sample_videos(measured.model_copy(update={"batch_size": 3}))


def test_another_config_is_refused_for_the_same_folder(undisturbed, zoo):
    with pytest.raises(ConfigError, match="steps = 2 there, 3 here.*another folder"):
        sample_videos(sample_config(zoo, undisturbed, steps=3))
    with pytest.raises(ConfigError, match="motion score"):
        sample_videos(sample_config(zoo, undisturbed, motion_score=0.3))
    assert len(files(undisturbed)) == 4


def test_more_prompts_and_seeds_can_be_added(undisturbed, zoo, tmp_path):
    for path in undisturbed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = files(tmp_path)
    sample_videos(sample_config(zoo, tmp_path, prompts=(*PROMPTS, "One more."), seeds=(42, 7)))
    after = files(tmp_path)
    assert before.items() <= after.items()
    assert (
        "04-one-more-seed7.mp4" in after
        and "00-a-grey-rabbit-stands-on-a-green-meadow-seed42.mp4" in after
    )


def test_size_and_frames_of_a_clip_shape_that_was_trained_on(zoo, tmp_path):
    options = {"prompts": ("a fox",), "size": "96x64", "num_latent_frames": 1}
    config = sample_config(zoo, tmp_path, **options)
    assert check_sample(config, Launch()) == []
    (name,) = sample_videos(config)
    with ClipDecoder("pyav") as decoder:
        assert decoder.decode((tmp_path / name).read_bytes()).shape == (1, 96, 64, 3)
    other = config.model_copy(update={"size": "128x64"})
    found = [str(problem) for problem in check_sample(other, Launch())]
    assert len(found) == 2 and "tokenizer@" in found[0] and "diffusion@" in found[1]
    assert all("was trained on clips of 64x64, 96x64; choose one of them" in text for text in found)


def test_size_and_frames_on_the_command_line():
    arguments = build_parser().parse_args(
        ["sample", "--config", "nano/sample", "--size", "96x64", "--frames", "17"]
    )
    arguments.prompts = []
    assert sample_values(arguments) == {"size": "96x64", "num_latent_frames": 5}
    arguments.frames = 16
    with pytest.raises(ConfigError, match="--frames 16 is not a multiple of 4 plus 1"):
        sample_values(arguments)


# -------------------------------------------------------------------- prompts


def test_schedules_come_from_files_and_options(zoo, tmp_path, capsys):
    texts = ["0: a fox", "17: key=value: 雪"]
    (tmp_path / "a.schedule").write_text("\n".join([*texts, "", "0: an owl"]), encoding="utf-8")
    (tmp_path / "a.csv").write_text('schedule,seed\n"0: a fox\n17: key=value: 雪",7\n')
    (tmp_path / "a.txt").write_text("0: a prompt")
    wanted = {0: "a fox", 17: "key=value: 雪"}
    units = sample_units(sample_config(zoo, tmp_path, prompts_file=tmp_path / "a.schedule"))
    assert [unit.texts for unit in units] == [wanted, {0: "an owl"}]
    assert units[0].prompt == "0: a fox | 17: key=value: 雪"
    units = sample_units(sample_config(zoo, tmp_path, prompts_file=tmp_path / "a.csv"))
    assert [(unit.texts, unit.seed) for unit in units] == [(wanted, 7)]
    units = sample_units(sample_config(zoo, tmp_path, prompts_file=tmp_path / "a.txt"))
    assert units[0].texts == "0: a prompt"

    words = ["sample", "--config", "nano/sample", f"zoo={zoo}", f"out={tmp_path / 'out'}"]
    words += ["steps=2", "num_latent_frames=8"]
    for wrong, message in [
        (["--at", texts[0], "--at", "29: b"], "changes at frame 29, but the video has 29 frames"),
        (["--at", texts[0], "--at", "17: b", "--at", "20: c"], "the first text has no effect"),
        (["--at", "a fox"], "does not begin with a frame number"),
        (["--at", texts[0], "a fox"], "not both"),
        (["--at", texts[0], "tokens.predict_end=true"], "leave out tokens.context_segments"),
        (["a fox", "num_latent_frames=98"], "set tokens.context_segments"),
    ]:
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    words.append("vision={kind: efficientnet-lite0}")
    assert main([*words, "--at", texts[0], "--at", texts[1]]) == 0
    record = json.loads((tmp_path / "out" / SAMPLES).read_text())
    assert record["schedule"] == {"0": "a fox", "17": "key=value: 雪"} and record["frames"] == 29
    (report,) = (tmp_path / "out" / "drift").iterdir()
    drift = json.loads(report.read_text())
    assert drift["file"] == record["file"] and report.stem == Path(record["file"]).stem
    assert [chunk["first_frame"] for chunk in drift["chunks"]] == [0, 17]
    assert drift["chunks"][1]["join_ratio"] > 0 < drift["chunks"][1]["feature_distance"]
    page = (tmp_path / "out" / GALLERY).read_text(encoding="utf-8")
    assert f"{record['file']}: 2 chunks, joins up to" in page


def test_a_video_is_continued_and_rendered_again(zoo, undisturbed, tmp_path, capsys, monkeypatch):
    """An image, a video and its tokens as conditions; tokens ahead give the same bytes later.

    Files that are too short or cannot be read are found before a model is loaded.
    """
    source = str(undisturbed / "02-a-1-fox-running-seed2042.mp4")
    out = tmp_path / "x"
    first = write_first_frame(undisturbed, tmp_path / "first.png")
    words = ["sample", "--config", "nano/sample", f"zoo={zoo}", "steps=2", PROMPTS[0]]
    vision = "vision={kind: efficientnet-lite0}"
    weights = registry.resolve(zoo, "lm", "lm").weights_path
    assert main([*words, f"out={out}", "--first-frame", first]) == 2
    assert "set vision" in capsys.readouterr().err
    monkeypatch.setattr(sample, "load_models", None)
    for wrong, message in [
        (["--first-frame", first, "--continue", source], "exclude each other"),
        (["--tokens", str(tmp_path / "none.mp4")], "No such file"),
        (["--tokens", source, "num_latent_frames=8"], r"17 frame\(s\).*29 are needed"),
        (["--continue", first], r"has 1 frame\(s\).*are needed"),
        (["--first-frame", first, "num_latent_frames=1"], "a chunk of 1 has no other"),
        (["--first-frame", str(ROOT / "setup.py")], "cannot be decoded"),
        (["--tokens", str(weights)], "is no file of tokens"),
    ]:
        assert main([*words, f"out={out}", vision, *wrong]) == 2
        assert re.search(message, capsys.readouterr().err), wrong
    monkeypatch.undo()
    rows = f'{{"prompt": "a", "tokens_from": "{source}"}}\n{{"prompt": "b"}}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    options = {"vision": {"kind": "efficientnet-lite0"}, "first_frame": first}
    units = sample_units(sample_config(zoo, out, prompts_file=tmp_path / "a.jsonl", **options))
    assert [unit.given.kind for unit in units] == ["tokens_from", "first_frame"]
    assert len(batches(units, 2)) == 2 and units[0].key != replace(units[0], given=None).key

    found = {}
    for option, path in (("--first-frame", first), ("--continue", source), ("--tokens", source)):
        out = tmp_path / option
        assert main([*words, f"out={out}", vision, option, path]) == 0
        found[option] = next(iter(files(out).values()))
        (record,) = (out / SAMPLES).read_text().splitlines()
        assert json.loads(record)["given"]["path"] == path
    assert len(set(found.values())) == 3

    capsys.readouterr()
    assert main([*words, f"out={tmp_path / 'ahead'}", "--tokens-only"]) == 0
    assert "sample loads: 2/2 models" in capsys.readouterr().out
    assert files(tmp_path / "ahead") == {}
    (tokens,) = (tmp_path / "ahead" / "tokens").iterdir()
    assert main([*words, f"out={tmp_path / 'ahead'}"]) == 0
    assert "sample loads: 3/3 models" in capsys.readouterr().out
    assert files(tmp_path / "ahead").items() <= files(undisturbed).items()
    wrong = ["--tokens", str(tokens), "num_latent_frames=8"]
    assert main([*words, f"out={tmp_path / 'again'}", *wrong]) == 2
    assert "the length they were sampled for" in capsys.readouterr().err
    assert main([*words, f"out={tmp_path / 'again'}", "--tokens", str(tokens)]) == 0
    (again,) = (tmp_path / "again").glob("*.mp4")
    assert torch.equal(frames_in(again), frames_in(undisturbed / again.name))


def write_first_frame(folder: Path, path: Path) -> str:
    """The first frame of a video of a folder as a picture."""
    Image.fromarray(spaced_frames(next(folder.glob("*.mp4")), 2)[0]).save(path)
    return str(path)


def frames_in(path: Path) -> torch.Tensor:
    return torch.from_numpy(spaced_frames(path, 17))


def test_the_command_takes_files_seeds_and_processes(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a fox\nan owl\n")
    words = ["sample", "--config", "nano/sample", f"zoo={zoo}", "steps=2"]
    with pytest.raises(SystemExit):
        main([*words, "prompts.txt"])
    assert "is a file; sample its prompts with --prompts prompts.txt" in capsys.readouterr().err
    assert main([*words, "--prompts", "prompts.txt", "--seeds", "1-2", "--dry-run"]) == 0
    assert "would sample 4 video(s)" in capsys.readouterr().out
    assert main([*words, "a fox", "--num-videos", "3", "--dry-run"]) == 0
    assert "would sample 3 video(s)" in capsys.readouterr().out
    assert main([*words, "a fox", "--memory", "1MB"]) == 2
    assert "--memory 0.0GB is too little" in capsys.readouterr().err
    for processes in ("2", "1"):  # which have nothing left to do the second time
        lines = io.TextIOWrapper(io.BytesIO("a fox\n\nan owl 🦉\n".encode()))
        monkeypatch.setattr(sys, "stdin", lines)
        assert main([*words, "--prompts", "-", "--nproc", processes]) == 0
        records = (tmp_path / "samples" / SAMPLES).read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in records] == ["a fox", "an owl 🦉"]
    assert main([*words, "--nproc", "0", "a fox"]) == 2
    assert "--nproc 0: at least one process" in capsys.readouterr().err


class Halves:
    """A diffusion model that computes the halves of a batch one after the other."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *inputs, semantic_BTCHW):
        halves = zip(*[tensor.chunk(2) for tensor in (*inputs, semantic_BTCHW)], strict=True)
        return torch.cat([self.model(*own, semantic_BTCHW=last) for *own, last in halves])


def test_two_processes_generate_one_video(zoo, undisturbed, tmp_path, capfd):
    """Each computes one branch of guidance, to the bytes of one process with halves of batches."""
    words = ["sample", "--config", "nano/sample", f"zoo={zoo}", f"out={tmp_path / 'two'}"]
    words += ["steps=2", "split_guidance=true", PROMPTS[0]]
    assert main(words) == 2 and "set --nproc 2" in capfd.readouterr().err
    assert main([*words, "--nproc", "3", "--dry-run"]) == 2
    assert main([*words, "--nproc", "2"]) == 0
    assert "second process has computed 2 rows" in capfd.readouterr().out  # one for each step

    def load(config, device, needed):
        models = load_models(config, device, needed)
        return replace(models, diffusion=Halves(models.diffusion))

    options = {"prompts": PROMPTS[:1], "split_guidance": True}
    (name,) = sample_videos(sample_config(zoo, tmp_path / "one", **options), load=load)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # A whole batch rounds otherwise, which H.264 makes larger in some pixels.
    whole = frames_in(undisturbed / name).float()
    assert (frames_in(tmp_path / "two" / name) - whole).abs().mean() < 0.2


# Stands for the official program, which needs torchvision and downloads: the same class and
# arguments, and a result file of the same form.
VBENCH = """
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

class VBench:
    def __init__(self, device, info, out):
        self.info, self.out = info, Path(out)

    def evaluate(self, videos, name, dimension_list):
        rows = []
        for entry in json.loads(Path(self.info).read_text()):
            if dimension_list[0] in entry["dimension"]:
                for number in range(5):
                    path = Path(videos) / f"{entry['prompt_en']}-{number}.mp4"
                    assert path.is_file(), path
                    rows.append({"video_path": str(path), "video_results": 0.25})
        result = {dimension_list[0]: [0.25, rows]}
        (self.out / f"{name}_eval_results.json").write_text(json.dumps(result))
"""


def test_vbench_samples_runs_and_scores_and_resumes(zoo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VBENCH)
    entries = [
        {"prompt_en": "a cat, running", "dimension": ["scene", "color"]},
        {"prompt_en": "rain", "dimension": ["color"]},
        {"prompt_en": "a slow pan", "dimension": ["temporal_style"]},
    ]
    (package / "VBench_full_info.json").write_text(json.dumps(entries))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["evaluate", "vbench", "--config", "nano/sample", "--vbench-python", str(python)]
    words += ["--dimensions", "scene,color", f"zoo={zoo}", "steps=2", "out=vbench"]
    assert main(words) == 0
    assert "quality not run, semantic not run" in capsys.readouterr().out
    assert len(files(Path("vbench/videos"))) == 10
    document = json.loads(Path("vbench/scores.json").read_text())
    assert document["results"] == {"scene": 0.25, "color": 0.25} and not document["vbench_long"]
    before = files(Path("vbench/videos"))
    assert main([*words, "out=divided", "--task", "0/2"]) == 0
    assert len(files(Path("divided/videos"))) == 5 and not Path("divided/results").exists()
    assert main([*words, "out=divided", "--nproc", "2"]) == 0
    assert files(Path("divided/videos")) == before
    assert Path("divided/scores.json").exists()
    capsys.readouterr()
    Path("vbench/results/color_eval_results.json").unlink()
    assert main(words) == 0
    assert files(Path("vbench/videos")) == before
    assert "10 of 10 videos are finished" in capsys.readouterr().out
