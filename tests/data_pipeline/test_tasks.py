import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.configs.ownership import OwnedError, take
from landiff.data_pipeline.format.schema import RawSample
from landiff.data_pipeline.format.shards import ShardError, read_manifest, read_sidecar
from landiff.data_pipeline.ingest.job import (
    ShardsStatus,
    finalize_raw_shards,
    make_shards,
    make_task_shards,
    status,
)
from landiff.data_pipeline.ingest.plan import rows as plan_rows
from landiff.data_pipeline.ingest.plan.shard_plan import ShardPlan
from landiff.data_pipeline.ingest.shard_maker import TooManyRejectedClips
from landiff.data_pipeline.synthetic.shapes import moving_shape, write_videos
from landiff.data_pipeline.video.codec import write_mp4
from tests.data_pipeline.ingest_helpers import (
    ROOT,
    contents,
    parts_of,
    read_rows,
    shards_config,
    write_rows,
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos of two spans each."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, 12, num_frames=20, height=48, width=64)
    return folder


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("made")
    make_shards(shards_config(videos), data)
    return data


def test_tasks_on_one_folder_make_the_bytes_of_one_job(
    videos: Path, made: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    job = shards_config(videos).model_dump(mode="json") | {"data": str(data)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "job.json").rename(tmp_path / "job.yaml")  # JSON is YAML
    command = [
        sys.executable,
        "-m",
        "landiff.launchers.cli",
        "shards",
        "--config",
        str(tmp_path / "job.yaml"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    tasks = [[*command, "--task", f"{number}/3"] for number in (0, 1, 2, 1)]  # task 1 twice
    running = [
        subprocess.Popen(task, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for task in tasks[:2] + tasks[3:]
    ]
    outputs = [process.communicate()[0] for process in running]
    first, *same = [process.returncode for process in running]
    assert first == 0
    # the second owner of a task is refused, unless the first was done
    assert sorted(same) in ([0, 0], [0, 2])
    assert (
        "task 0/3 made 2 shards, 0 were finished before, of 6 in all; rejected: none" in outputs[0]
    )
    early = subprocess.run(
        [*command, "finalize"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert early.returncode == 2
    assert "lacks 2 of 6 shards" in early.stderr
    array = environment | {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "5",
        "SLURM_ARRAY_TASK_COUNT": "3",
    }
    subprocess.run(command, cwd=tmp_path, env=array, check=True, capture_output=True)
    counted = subprocess.run(
        [*command, "status"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "6 of 6 shards" in counted.stdout
    subprocess.run(
        [*command, "finalize"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    assert contents(data) == contents(made)


def test_a_task_has_one_owner(videos: Path, tmp_path: Path) -> None:
    with take(tmp_path / ".task-1-of-3.owner", "the task"):
        with pytest.raises(
            OwnedError,
            match=rf"task 1/3 of the shards in {tmp_path} is in use by process {os.getpid()} of",
        ):
            make_task_shards(shards_config(videos), tmp_path, (1, 3))
        assert (
            make_task_shards(shards_config(videos), tmp_path, (0, 3)).made == 2
        )  # the others work
    assert make_task_shards(shards_config(videos), tmp_path, (1, 3)).made == 2


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Five videos and a damaged one, and what becomes of them."""
    folder, data = tmp_path_factory.mktemp("few"), tmp_path_factory.mktemp("few_made")
    rows = write_videos(folder, 5, num_frames=10, height=32, width=32).read_text()
    (folder / "bad.mp4").write_bytes(b"no video" * 1000)
    (folder / "captions.jsonl").write_text(
        rows + json.dumps({"file": "bad.mp4", "caption": "bad"}) + "\n"
    )
    make_shards(shards_config(folder, samples_per_shard=2), data)
    return folder, data


LONG = (pytest.mark.long, pytest.mark.timeout(7200))


# All: every place of one job; of three tasks, and by the clock, 200
@pytest.mark.parametrize(
    ("kills", "tasks"),
    [(12, 1), (8, 3), pytest.param(10_000, 1, marks=LONG), pytest.param(200, 3, marks=LONG)],
)
def test_killed_inside_writes_fsyncs_links_and_renames_it_ends_with_the_same_bytes(
    few: tuple[Path, Path], tmp_path: Path, kills: int, tasks: int
) -> None:
    folder, made = few
    (tmp_path / "config.yaml").write_text(
        shards_config(folder, samples_per_shard=2, job={"workers": 1}).model_dump_json()
    )
    command = [
        "-m",
        "tests.data_pipeline.kill_shards",
        str(tmp_path / "config.yaml"),
        str(made),
        str(tmp_path),
        str(kills),
        str(tasks),
    ]
    job = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert job.returncode == 0, job.stderr
    done, places = map(int, job.stdout.split())
    assert done == min(kills, places)
    assert places > 80


def test_parts_of_tasks_are_even_and_hold_every_shard_once(made: Path) -> None:
    plan = plan_of(made)
    for of in (1, 2, 4, 7):
        parts = [plan.entries_of((number, of)) for number in range(of)]
        names = [entry.name for entry in itertools.chain(*parts)]
        assert sorted(names) == [entry.name for entry in plan.entries]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_task_that_does_not_exist_is_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task 3/3: the number must lie between 0 and 2"):
        make_task_shards(shards_config(videos), tmp_path / "data", (3, 3))


def test_status_tells_how_far_all_tasks_are(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "VIDEOS_PER_CHUNK", 1)
    settings = shards_config(videos)
    seen = []

    class Stopped(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        seen.append((done, total, what))
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        make_task_shards(settings, tmp_path, (0, 1), stop)
    assert seen == [(number, 12, "probing videos") for number in range(1, 6)]
    assert status(settings, tmp_path) == ShardsStatus(videos=12, probed=4)
    make_task_shards(settings, tmp_path, (0, 2))
    assert status(settings, tmp_path) == ShardsStatus(
        videos=12, probed=12, shards=6, finished=3, clips=24, finished_clips=12
    )


def test_nothing_planned_can_not_be_finalized(videos: Path, tmp_path: Path) -> None:
    assert status(shards_config(videos), tmp_path) is None
    with pytest.raises(ShardError, match="nothing is planned"):
        finalize_raw_shards(shards_config(videos), tmp_path)


# ---------------------------------------------------------------------------------------- the plan


def plan_of(data: Path) -> ShardPlan:
    (path,) = (data / "plan").glob("*.json")
    return ShardPlan(path)


def probe_files(data: Path) -> dict[str, int]:
    """Name -> modification time of the files of probes."""
    return {path.name: path.stat().st_mtime_ns for path in (data / "plan").glob("looks-*")}


def test_second_start_reads_no_video(videos: Path, made: Path, tmp_path: Path) -> None:
    source, data = tmp_path / "videos", tmp_path / "data"
    shutil.copytree(videos, source)
    make_shards(shards_config(source), data)
    before = read_manifest(data)
    for path in source.glob("*.mp4"):  # same size and modification time, but no video any more
        found = path.stat()
        path.write_bytes(bytes(found.st_size))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert make_shards(shards_config(source), data) == before


def test_touched_video_is_probed_again_and_only_its_neighbours(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = tmp_path / "videos", tmp_path / "data"
    shutil.copytree(videos, source)
    monkeypatch.setattr(plan_rows, "VIDEOS_PER_CHUNK", 1)
    make_shards(shards_config(source), data)
    before = probe_files(data)
    manifest = read_manifest(data)
    assert len(before) == 12
    os.utime(source / "shape_00003.mp4", (1, 1))
    assert make_shards(shards_config(source), data).shards == manifest.shards
    after = probe_files(data)
    assert len(after) == 13
    assert after.items() > before.items()


def test_half_of_a_plan_is_made_again(videos: Path, made: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(made, data)
    whole = plan_of(data)
    whole.path.unlink()
    whole.path.with_suffix(".jsonl").write_bytes(b"half a li")
    make_shards(shards_config(videos), data)
    assert contents(data) == contents(made)


def test_planned_shard_is_read_without_the_others(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "plan", tmp_path / "plan")
    plan = plan_of(tmp_path)
    entry = plan.entries[3]
    path = plan.path.with_suffix(".jsonl")
    data = bytearray(path.read_bytes())
    expected = plan.read_shard(entry)
    data[: entry.offset] = bytes(entry.offset)
    data[entry.offset + entry.size :] = b""
    path.write_bytes(data)
    assert plan.read_shard(entry) == expected
    keys = [span.key for span in expected.spans]
    assert keys == list(parts_of(made / "raw" / "000003.tar"))


# ----------------------------------------------------------------------------------------- buckets


def test_each_clip_goes_to_the_bucket_nearest_to_it_and_shards_hold_one(tmp_path: Path) -> None:
    source = tmp_path / "videos"
    sizes = {
        "wide": (36, 64, 30),
        "tall": (64, 36, 30),
        "brief": (40, 40, 12),
        "square": (64, 64, 30),
    }
    rows = []
    for number, (name, (height, width, frames)) in enumerate(sizes.items()):
        write_mp4(
            source / f"{name}.mp4",
            moving_shape(number, num_frames=frames, height=height, width=width).frames,
            8,
        )
        rows.append({"file": f"{name}.mp4", "caption": name})
    write_rows(source / "captions.jsonl", rows)
    shapes = [(17, 36, 64), (17, 64, 36), (9, 36, 64), (9, 48, 48), (17, 48, 48)]
    buckets = [
        {"num_frames": frames, "height": height, "width": width} for frames, height, width in shapes
    ]
    changes = {
        "num_frames": None,
        "height": None,
        "width": None,
        "buckets": buckets,
        "max_spans": 3,
    }
    manifest = make_shards(shards_config(source, **changes), tmp_path / "data")
    found: dict[str, list[str]] = {}
    for entry in manifest.shards:
        for parts in parts_of(tmp_path / "data" / "raw" / f"{entry.name}.tar").values():
            meta = RawSample.model_validate_json(parts["json"])
            assert f"{meta.num_frames}x{meta.height}x{meta.width}" == entry.bucket
            found.setdefault(meta.caption, []).append(f"{entry.bucket} {meta.start_s:g}")
    # the longest that fits, then a shorter one in what is left
    assert {name: sorted(places) for name, places in found.items()} == {
        "wide": ["17x36x64 0", "9x36x64 2.125"],
        "tall": ["17x64x36 0", "9x48x48 2.125"],
        "square": ["17x48x48 0", "9x48x48 2.125"],
        "brief": ["9x48x48 0"],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"buckets": [{"num_frames": 9, "height": 32, "width": 32}]},
            "num_frames, height, width and buckets exclude each other",
        ),
        ({"height": None}, "num_frames, height and width are required, or a list of buckets"),
        (
            {
                "num_frames": None,
                "height": None,
                "width": None,
                "buckets": [{"num_frames": 9, "height": 31, "width": 32}],
            },
            "must be even",
        ),
    ],
)
def test_shape_must_be_said_once(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shards_config("packaged", **changes)


# ------------------------------------------------------------------------- quarantine and refusals


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty good rows and seven damaged files, one of them twice."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = read_rows(write_videos(folder, 20, num_frames=10, height=32, width=32))
    for number in range(7):
        (folder / f"bad{number}.mp4").write_bytes(b"not a video " * (400 + number))
    rows[5:5] = [
        {"file": f"bad{number}.mp4", "caption": "x"} for number in (0, 1, 2, 3, 4, 5, 6, 0)
    ]
    write_rows(folder / "captions.jsonl", rows)
    return folder


def test_damaged_files_are_kept_with_their_reason(mixed: Path, tmp_path: Path) -> None:
    manifest = make_shards(shards_config(mixed, max_bad_fraction=1.0), tmp_path)
    assert manifest.reject_counts == {"shards/invalid_data": 8}
    found = set()
    for parts in parts_of(tmp_path / "rejected" / "000001.tar").values():
        entry = json.loads(parts["json"])
        found.add((entry["key"], entry["reason"], entry["path"]))
        assert parts["mp4"] == (mixed / entry["key"]).read_bytes()
    assert found == {(f"bad{n}.mp4", "invalid_data", str(mixed / f"bad{n}.mp4")) for n in range(7)}


def test_quarantine_has_a_limit_and_can_be_off(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for path in mixed.iterdir():
        shutil.copy2(path, tmp_path / "videos")
    (tmp_path / "videos" / "bad3.mp4").write_bytes(bytes(2 << 20))
    make_shards(
        shards_config(tmp_path / "videos", max_bad_fraction=1.0, quarantine={"max_mb": 1}),
        tmp_path / "one",
    )
    assert len(read_sidecar(tmp_path / "one" / "rejected" / "000001.tar").index) == 6
    make_shards(
        shards_config(tmp_path / "videos", max_bad_fraction=1.0, quarantine={"max_mb": 0}),
        tmp_path / "none",
    )
    assert not (tmp_path / "none" / "rejected").exists()


def test_too_many_damaged_clips_stop_the_job(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TooManyRejectedClips,
        match=r"8 of 28 clips .* are damaged, more than max_bad_fraction = 0\.2\. "
        r"Fix the cause, or raise",
    ):
        make_shards(shards_config(mixed), tmp_path / "data")
    assert not list((tmp_path / "data" / "raw").glob("*.tar"))
    # the limit is not part of the content
    make_shards(shards_config(mixed, max_bad_fraction=0.5), tmp_path / "data")


def test_clips_that_turn_out_damaged_while_made_stop_the_job_too(tmp_path: Path) -> None:
    source = tmp_path / "videos"
    write_videos(source, 24, num_frames=40, height=64, width=64)
    for number in range(12):  # whole for the index, broken in the pictures
        path = source / f"shape_{number:05d}.mp4"
        data = bytearray(path.read_bytes())
        start = data.find(b"mdat") + 60
        data[start : len(data) - 10] = bytes(len(data) - 10 - start)
        path.write_bytes(data)
    with pytest.raises(TooManyRejectedClips, match="of 24 clips"):
        make_shards(shards_config(source, max_spans=1), tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()
    notes = []
    manifest = make_shards(
        shards_config(source, max_spans=1, max_bad_fraction=1.0),
        tmp_path / "data",
        lambda done, total, note: notes.append((done, note)),
    )
    assert (manifest.num_samples, sum(manifest.reject_counts.values())) == (12, 12)
    (reason,) = manifest.reject_counts
    assert notes[-1] == (24, f"clips; rejected: 12 {reason.removeprefix('shards/')}")
    assert [entry.samples for entry in manifest.shards] == [0, 0, 0, 4, 4, 4]
    assert len(list((tmp_path / "data" / "rejected").glob("*.tar"))) == 3
