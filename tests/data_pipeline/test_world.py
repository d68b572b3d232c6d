"""The shapes world and its judge: what videos show is what their labels say, and is found again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.synthetic.judge import Rates, chance, interval, judge, keeps, rates
from landiff.data_pipeline.synthetic.pair_judge import both_right, judge_pair, match
from landiff.data_pipeline.video.codec import write_mp4
from landiff.launchers.cli import main
from landiff.launchers.data.shapes import read_videos

HELD_OUT = world.labels(held_out=True)
SEEN = world.labels(held_out=False)


def test_held_out_combinations_leave_every_pair_of_values_in_training():
    assert (len(HELD_OUT), len(SEEN), len(set(world.HELD_OUT))) == (54, 306, 9)
    for first, second in itertools.combinations(world.ATTRIBUTES, 2):
        pairs = {(label[first], label[second]) for label in SEEN}
        assert len(pairs) == len(world.VALUES[first]) * len(world.VALUES[second])


def test_a_caption_states_its_label_and_nothing_else_does():
    for label in SEEN + HELD_OUT:
        assert world.parse_caption(world.caption(label)) == label
    assert world.parse_caption("A grey rabbit stands on a green meadow.") is None
    assert world.parse_caption("A red cube moves right slowly over a grey ground.") is None


@pytest.fixture(scope="module")
def true_videos() -> list[tuple[world.Label, np.ndarray]]:
    found = []
    for index, label in enumerate(HELD_OUT[::11]):
        found.append((label, world.video(label, (0, world.TRUE_HELD_OUT, index))))
    return found


def judged(videos: list[tuple[world.Label, np.ndarray]]) -> Rates:
    verdicts = [judge(frames).found for _, frames in videos]
    return rates([label for label, _ in videos], verdicts)


def test_the_judge_finds_all_attributes_of_true_videos(true_videos):
    found = judged(true_videos)
    assert found.all_right == 1.0
    assert set(found.unsaid.values()) == {0.0}
    assert found.confusion["color"]["red"]["red"] == sum(
        label["color"] == "red" for label, _ in true_videos
    )


def test_the_judge_finds_them_under_noise_and_at_half_size(true_videos):
    noisy = []
    for index, (label, frames) in enumerate(true_videos):
        noise = np.random.default_rng(index).normal(0, 20, frames.shape)
        noisy.append((label, np.clip(frames + noise, 0, 255).astype(np.uint8)))
    assert judged(noisy).all_right == 1.0
    assert judged([(label, frames[:, ::2, ::2]) for label, frames in true_videos]).all_right == 1.0


def test_the_judge_says_nothing_of_an_empty_or_a_still_video(true_videos):
    label, frames = true_videos[0]
    empty = judge(np.full_like(frames, 128)).found
    assert empty == {**dict.fromkeys(world.ATTRIBUTES), "ground": "grey"}
    still = judge(np.broadcast_to(frames[:1], frames.shape)).found
    assert still == {**label, "direction": None, "speed": None}


def test_shuffled_labels_have_rates_near_chance():
    found = rates(HELD_OUT * 4, HELD_OUT * 4)
    assert found.all_right == 1.0
    for name, rate in chance().items():
        # Held-out labels are unbalanced, red above all: shuffled rates are a little over chance.
        assert found.shuffled[name] < rate + 0.25
    low, high = interval(0.9, 216)
    assert (round(low, 3), round(high, 3)) == (0.853, 0.933)


def test_make_and_score_from_the_command_line(tmp_path: Path, capsys):
    out = tmp_path / "world"
    words = ["shapes", "make", "--out", str(out), "--clips", "2", "--true-clips", "2"]
    assert main(words) == 0
    captions = (out / "train" / "captions.jsonl").read_text().splitlines()
    assert len(captions) == 2
    assert len((out / "prompts-heldout.jsonl").read_text().splitlines()) == 216
    written = (out / "train" / "00001.mp4").stat().st_mtime_ns
    assert main(words) == 0
    assert (out / "train" / "00001.mp4").stat().st_mtime_ns == written
    assert main([*words, "--seed", "1"]) == 2
    labels = str(out / "labels-true-heldout.jsonl")
    result = tmp_path / "rates.json"
    words = ["--videos", str(out / "true-heldout"), "--labels", labels, "--out", str(result)]
    details = tmp_path / "details.jsonl"
    assert main(["shapes", "score", *words, "--details", str(details)]) == 0
    assert len(details.read_text().splitlines()) == 2
    assert json.loads(result.read_text())["right"]["all"] == 1.0
    assert "2 videos" in capsys.readouterr().out
    codec = tmp_path / "codec.safetensors"
    clips = str(out / "train")
    words = ["fit-codec", "--clips", clips, "--out", str(codec), "--channels", "4"]
    assert main(words) == 0
    assert codec.stat().st_size < 20_000
    whole = codec.read_bytes()
    assert main([*words, "--limit", "1", "--whiten", "0.5"]) == 0
    assert "from 1 clips" in capsys.readouterr().out and codec.read_bytes() != whole
    assert main([*words, "--whiten", "2"]) == 2


def test_a_long_video_is_kept_if_all_its_parts_show_the_same(true_videos):
    label = true_videos[0][0]
    long = world.video(label, (0, 9, 0), num_frames=53)
    assert keeps(long, 4) == {"color": True, "shape": True, "direction": True}
    backwards = np.concatenate([long[:26], long[25::-1]])
    assert keeps(backwards, 4) == {"color": True, "shape": True, "direction": False}
    gone = np.concatenate([long[:26], np.broadcast_to(long[0, 0, 0], long[26:].shape)])
    assert not any(keeps(gone.astype(np.uint8), 4).values())


def test_score_says_how_often_chunks_show_the_same(true_videos, tmp_path: Path, capsys):
    label = true_videos[0][0]
    long = world.video(label, (0, 9, 0), num_frames=53)
    write_mp4(tmp_path / "0.mp4", long, world.FPS, crf=world.CRF)
    turned = np.concatenate([long[:26], long[25::-1]])
    write_mp4(tmp_path / "1.mp4", turned, world.FPS, crf=world.CRF)
    world.write_rows(tmp_path / "labels.jsonl", [label, label])
    words = ["--videos", str(tmp_path), "--labels", str(tmp_path / "labels.jsonl")]
    assert main(["shapes", "score", *words, "--chunks", "4"]) == 0
    text = "over 4 chunks the same, color 1.000, shape 1.000, direction 0.500, all 0.500"
    assert text in capsys.readouterr().out
    assert main(["shapes", "score", *words, "--chunks", "0"]) == 2


def test_make_writes_clips_of_several_segments(tmp_path: Path, capsys):
    words = ["shapes", "make", "--out", str(tmp_path), "--clips", "1", "--true-clips", "2"]
    assert main([*words, "--frames", "37"]) == 0
    labels = str(tmp_path / "labels-true-heldout.jsonl")
    videos = str(tmp_path / "true-heldout")
    words = ["shapes", "score", "--videos", videos, "--labels", labels, "--chunks", "2"]
    capsys.readouterr()
    assert main(words) == 0
    assert "direction 1.000, all 1.000" in capsys.readouterr().out
    (clip_THWC,) = read_videos([tmp_path / "train" / "00000.mp4"])
    assert clip_THWC.shape == (37, 64, 64, 3)


PAIRS = world.draw_pairs(8, seed=3)


@pytest.fixture(scope="module")
def pair_videos() -> list[np.ndarray]:
    videos = []
    for index, (first, second) in enumerate(PAIRS):
        generator = np.random.default_rng([0, 6, index])
        videos.append(world.draw([first, second], first["ground"], generator))
    return videos


def test_the_pair_judge_finds_both_objects_of_true_videos(pair_videos):
    for pair, frames in zip(PAIRS, pair_videos, strict=True):
        seen = judge_pair(frames)
        assert both_right(pair, match(pair, seen), len(seen)), (pair, seen)


def test_the_pair_judge_finds_what_is_wrong(pair_videos):
    first, second = PAIRS[0]
    seen = judge_pair(pair_videos[0])
    colors = [color for color in world.COLORS if color not in (first["color"], second["color"])]
    wanted = ({**first, "color": colors[0]}, second)
    matched = match(wanted, seen)
    assert matched[0]["color"] == first["color"] and matched[0]["shape"] == first["shape"]
    assert not both_right(wanted, matched, len(seen))
    alone = judge_pair(world.video(first, (0, 9, 1)))
    assert [found["color"] for found in alone] == [first["color"]]
    assert match((first, second), alone)[1] == dict.fromkeys(world.ATTRIBUTES)
    assert not both_right((first,), match((first,), seen), len(seen))


def test_score_takes_the_labels_of_pairs(tmp_path: Path, capsys):
    assert main(["shapes", "pairs", "--out", str(tmp_path), "--clips", "2"]) == 0
    labels = str(tmp_path / "labels.jsonl")
    assert main(["shapes", "score", "--videos", str(tmp_path), "--labels", labels]) == 0
    out = capsys.readouterr().out
    assert "4 videos" not in out and "1.000 of 2 videos show both objects as asked" in out


def test_pairs_show_two_objects_of_different_colours(tmp_path: Path):
    pairs = world.draw_pairs(20, seed=3)
    assert all(first["color"] != second["color"] for first, second in pairs)
    assert all(first["ground"] == second["ground"] for first, second in pairs)
    text = world.pair_caption(*pairs[0])
    assert text.count(" moves ") == 2 and text.endswith(" ground.")
    world.write_pairs(tmp_path, clips=1, size=32)
    row = json.loads((tmp_path / "labels.jsonl").read_text())
    assert len(row["objects"]) == 2
