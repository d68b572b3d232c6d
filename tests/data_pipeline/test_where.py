"""Conditions on clips, weights by score, and captions that change from epoch to epoch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.loading.where import Where
from landiff.training.checks import check_data
from tests.data_pipeline.data_sets import keys_of, write_column, write_raw

SIZES = [7, 5, 8]
KEYS = [key for shard, size in enumerate(SIZES) for key in keys_of(shard, size)]
GOOD = set(KEYS[::3])  # aesthetic scores of 6, the others have 2
UNSCORED = KEYS[3]
LETTER = KEYS[0][0]
FAST = set(KEYS[:9])


def metadata(key: str) -> dict[str, object]:
    return {"motion_score": 0.5 if key in FAST else 0.05, "source": f"{key[0]}.mp4"}


def score(key: str) -> torch.Tensor:
    return torch.tensor([6.0 if key in GOOD else 2.0])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 clips with a column of scores, which lacks one clip, and texts of two captions."""
    folder = tmp_path_factory.mktemp("data")
    write_raw(folder, SIZES, meta_of=metadata)
    write_column(folder, "score-aesthetic", value=score, bad=[UNSCORED])
    for number, name in enumerate(("text-a", "text-a-short")):
        write_column(folder, name, value=lambda key, number=number: torch.tensor([float(number)]))
    write_column(folder, "text-b", encoder="other")
    write_column(folder, "tokens")
    return folder


def config(data, **values) -> DataConfig:
    return load(DataConfig, {"manifest": str(data), "global_batch_size": 6, **values})


@dataclass
class Seen:
    """What a loader returned: keys, and the first value of the text."""

    keys: list[str]
    texts: list[float]
    state: dict


def read(settings: DataConfig, steps: int, ranks: int = 1, state: dict | None = None) -> Seen:
    """`steps` global batches, read by loaders of `ranks` ranks."""
    loaders = []
    for rank in range(ranks):
        loader = Loader(settings, ["tokens", "text-a"], dp_rank=rank, dp_size=ranks)
        if state is not None:
            loader.load_state_dict(state)
        loaders.append(loader)
    keys, texts = [], []
    for _ in range(steps):
        batches = [list(loader.next_batch().samples) for loader in loaders]
        for position in range(settings.global_batch_size):
            sample = batches[position % ranks][position // ranks]
            assert set(sample.tensors) == {"tokens", "text-a"}
            keys.append(sample.key)
            texts.append(float(sample.tensors["text-a"][0]))
    state = loaders[0].state_dict()
    for loader in loaders:
        loader.close()
    return Seen(keys, texts, state)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("motion > 0.2 and aesthetic >= 4", FAST & GOOD - {UNSCORED}),
        ("not aesthetic >= 4", set(KEYS) - GOOD - {UNSCORED}),  # without a score: left out
        ("2 * aesthetic - motion > 11.7", GOOD - FAST - {UNSCORED}),
        (f"'{LETTER}' in source or 'a clip' not in caption", {k for k in KEYS if k[0] == LETTER}),
    ],
)
def test_clips_that_do_not_meet_the_condition_are_not_read(data, where, expected):
    settings = config(data, where=where, global_batch_size=len(expected) or 1)
    assert set(read(settings, 1).keys) == expected


def test_the_order_is_exact_and_resumes_on_any_number_of_ranks(data):
    settings = config(data, where="motion > 0.2 or aesthetic >= 4")
    whole = read(settings, 6)
    half = read(settings, 3, ranks=2)
    rest = read(settings, 3, ranks=3, state=half.state)
    assert half.keys + rest.keys == whole.keys
    other = config(data, where="motion < 0.2 and aesthetic < 4 or aesthetic >= 4")
    state = whole.state | {"num_samples": read(other, 1).state["num_samples"]}
    with pytest.raises(ConfigError, match=r"selection.*set data.where"):
        read(other, 1, state=state)


def test_without_a_condition_states_are_as_before(data):
    assert not {"selection", "where"} & set(read(config(data), 1).state)


def test_weights_follow_scores_through_a_blend_of_the_same_folder(data):
    good = {"manifest": str(data), "where": "aesthetic >= 4", "weight": 3.0}
    settings = config(data, where="aesthetic < 4", blend=[good])
    num_good = len(GOOD - {UNSCORED})
    num_others = len(KEYS) - 1 - num_good
    epoch = 3 * num_good + num_others
    counts = Counter(read(settings, epoch).keys)  # six epochs
    assert all(counts[key] == (18 if key in GOOD else 6) for key in counts)
    assert len(counts) == len(KEYS) - 1


def test_captions_are_chosen_by_weight_epoch_and_clip(data):
    settings = config(data, captions={"text-a": 0.75, "text-a-short": 0.25}, global_batch_size=20)
    whole = read(settings, 20)
    assert 0.69 < whole.texts.count(0.0) / 400 < 0.81  # three standard deviations
    chosen = {key: set() for key in KEYS}
    for key, text in zip(whole.keys, whole.texts, strict=True):
        chosen[key].add(text)
    assert all(len(texts) == 2 for texts in chosen.values())  # both over 20 epochs
    again = read(settings, 10, ranks=4, state=read(settings, 10, ranks=2).state)
    assert again.texts == whole.texts[200:] and again.keys == whole.keys[200:]
    assert read(config(data, global_batch_size=20), 1).texts == [0.0] * 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motion >", "not a condition at character"),
        ("motion.x > 1", "'motion.x' is not allowed"),
        ("len(caption) > 3", r"'len\(caption\)' is not allowed"),
        ("motion > 1j", "1j is not allowed"),
        ("3 > 2", "names no value"),
        ("motion ** 9 > 1", "not allowed"),
        ("x > 0 or " * 400 + "x > 1", "at most 2000"),
    ],
)
def test_mistakes_in_conditions_are_found_when_the_config_is_read(data, text, message):
    with pytest.raises(ConfigError, match=message):
        config(data, where=text)
    with pytest.raises(ConfigError, match=r"blend.0.where.*" + message):
        config(data, blend=[{"manifest": str(data), "where": text}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"where": "aestetic > 4"}, r"data.where: unknown value 'aestetic'.*mean 'aesthetic'"),
        ({"captions": {"text-b": 1.0}}, "this trainer reads text-a"),
        ({"captions": {"text-a": 1.0, "text-c": 1.0}}, "no column 'text-c'"),
        ({"captions": {"text-a": 1.0, "text-b": 1.0}}, "the same text encoder"),
    ],
)
def test_mistakes_that_the_manifest_shows_are_found_before_ranks_start(data, values, message):
    settings = config(data, **values)
    found = check_data(settings, ["tokens", "text-a"])[1]
    assert len(found) == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(str(found[0]))


def test_a_condition_without_clips_or_with_text_and_numbers_is_refused(data):
    with pytest.raises(ConfigError, match=r"data.where = 'motion > 7': none of the 20 clips"):
        read(config(data, where="motion > 7"), 1)
    with pytest.raises(ConfigError, match="data.where, clip .* caption = 'a clip called"):
        read(config(data, where="caption > 7"), 1)


def test_a_missing_score_is_not_met_however_the_condition_is_written():
    assert not Where("not x > 1")({"x": None})
    assert Where("not x > 1")({"x": 0.5})
