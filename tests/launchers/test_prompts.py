"""Prompts of `landiff sample`: files, standard input, seeds, and the units that they make."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from landiff.configs.base import ConfigError
from landiff.launchers.results.prompts import (
    MAX_SEED,
    SampleUnit,
    parse_seeds,
    read_prompts,
    sample_units,
    stdin_prompts,
)
from landiff.launchers.results.sample import batches
from landiff.launchers.results.sample_folder import SampleFolder
from landiff.launchers.results.sampling.processes import start
from tests.launchers.random_zoo import sample_config


def test_prompts_come_from_text_csv_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\nkey=value: 雪\r\n", encoding="utf-8")
    assert [row.prompt for row in read_prompts(tmp_path / "a.txt")] == ["a fox", "key=value: 雪"]
    (tmp_path / "a.csv").write_text(
        '\ufeffprompt,seed,motion,frames,negative\n"a, fox",7,0.2,9,blur\nan owl,,,,\n',
        encoding="utf-8",
    )
    fox, owl = read_prompts(tmp_path / "a.csv")
    assert (fox.prompt, fox.seed, fox.motion, fox.frames, fox.negative) == (
        "a, fox",
        7,
        0.2,
        9,
        "blur",
    )
    assert (owl.seed, owl.motion, owl.frames, owl.negative) == (None, None, None, "")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox", "seed": 3}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl")[0].seed == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "text\na fox\n", "prompt"),
        ("a.csv", "prompt,seed,prompt\na,1,b\n", "the header has the column 'prompt' twice"),
        ("a.csv", "prompt,seed\na,fox,3\n", "line 2 has more cells than the header"),
        ("a.csv", "prompt,seed\na fox,soon\n", "line 2.*seed"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a", "sed": 3}\n', "sed"),
        ("a.jsonl", "[1]\n", "line 1: a row is an object"),
        ("a.yaml", "a fox\n", "one of .txt, .csv, .jsonl, .schedule"),
        ("a.jsonl", '{"prompt": "a", "schedule": "0: b"}\n', "a prompt and a schedule"),
        ("a.schedule", "0: a\n\n0: b\nfox\n", "lines 3 to 4: line 2, 'fox', does not begin with"),
        ("a.schedule", "0: a\n9: \n", "lines 1 to 2: the text at frame 9 is empty"),
        ("a.schedule", "8: a\n", "the first text is at frame 8; begin with frame 0"),
        ("a.schedule", "0: a\n9: b\n9: c\n", "frame 9 follows frame 9"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as found:
        read_prompts(tmp_path / name)
    assert str(found.value).count(name) == 1


def test_lines_of_standard_input_are_prompts(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a fox\r\n\n key=value: a\n")))
    assert stdin_prompts() == ["a fox", "key=value: a"]
    with pytest.raises(ConfigError, match="standard input holds no prompt"):
        stdin_prompts()


def test_every_process_reads_all_lines_of_standard_input():
    copy = [sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != 'a fox\\nan owl\\n')"]
    children = [start(copy, os.environ, ["a fox", "an owl"]) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0-3,7") == (0, 1, 2, 3, 7)
    for wrong in ("", "a", "3-1", "1,1", "-1", "0-1000000"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(wrong)


def test_units_are_prompts_times_seeds_times_videos(tmp_path):
    units = sample_units(sample_config(tmp_path, tmp_path, seeds=(5, 10), num_videos=2))
    assert [unit.seed for unit in units[:4]] == [5, 6, 10, 11] and len(units) == 16
    with pytest.raises(ConfigError, match="twice with seed 6"):
        sample_units(sample_config(tmp_path, tmp_path, seeds=(5, 6), num_videos=2))


def test_a_seed_that_the_sampler_cannot_count_on_from_is_refused(tmp_path):
    config = sample_config(tmp_path, tmp_path, prompts=("a fox",), seed=MAX_SEED)
    assert [unit.seed for unit in sample_units(config)] == [MAX_SEED]
    with pytest.raises(ConfigError, match=f"seed {MAX_SEED + 1}, above the largest"):
        sample_units(config.model_copy(update={"num_videos": 2}))


def test_an_empty_guidance_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the range is empty"):
        sample_config(tmp_path, tmp_path, guidance_interval=(0.7, 0.3))


def test_videos_are_listed_in_the_order_of_their_prompts(tmp_path):
    """Also with 100 prompts and more, whose numbers have more digits."""
    units = [SampleUnit(number, "a fox", 7, 1) for number in (100, 11, 2)]
    folder = SampleFolder(tmp_path, {"fps": 8.0}, units)
    for unit in units:
        with folder.writing(unit, 1) as writer:
            writer.add(np.zeros((1, 16, 16, 3), np.uint8))
    found = [record["file"].partition("-")[0] for record in folder.records]
    assert found == ["02", "11", "100"]


def test_batches_hold_videos_of_one_length(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b", "frames": 8}\n{"prompt": "c", "frames": 8}\n'
    )
    units = sample_units(sample_config(tmp_path, tmp_path, prompts_file=tmp_path / "a.jsonl"))
    units.append(replace(units[-1], schedule=((0, "d"),), prompt="d"))
    found = [[unit.prompt for unit in batch] for batch in batches(units, 3)]
    assert found == [["a"], ["b", "c"], ["d"]]
