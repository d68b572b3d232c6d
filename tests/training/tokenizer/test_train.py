"""The whole tokenizer trainer on data from disk: as two processes, and under SIGKILL."""

from pathlib import Path

import pytest

from landiff.configs.base import ConfigError
from landiff.configs.files import write_text
from landiff.configs.loader import dump, load
from landiff.training.checkpoint.errors import first_error
from landiff.training.observe.metrics import read_metrics
from landiff.training.run import finished_step
from landiff.training.tokenizer.__main__ import main
from landiff.training.tokenizer.config import TokenizerTrainConfig
from tests.chaos import Trainer, prove_kill_safety
from tests.distributed import nursery
from tests.training import mixed
from tests.training.mixed import IMAGE, TALL, VIDEO, write_mixed
from tests.training.tokenizer.tiny import MODEL, config, write_data


def write_config(run: Path, **changes: object) -> Path:
    """Config of a run whose data lie beside it."""
    data = {"manifest": run.parent / "data", "global_batch_size": 4, "micro_batch_size": 2}
    loop = {"steps": 24, "log_every": 1, "save_every": 2, "preview_every": 8, "async_save": False}
    path = run.with_name(f"{run.name}.yaml")
    write_text(path, dump(config(run, **{"data": data, "loop": loop} | changes)))
    return path


TOKENIZER = Trainer("landiff.training.tokenizer.__main__:main", write_config, world_size=2)


def write_curriculum(run: Path) -> Path:
    """A growing batch, then other data, another rate and a larger batch, between two saves each.

    The other data are images and videos of two sizes, in batches of equal numbers of tokens. Two of
    nine videos are held out, and validated every few steps.
    """
    other = {
        "manifest": str(run.parent / "other"),
        "buckets": [IMAGE, VIDEO, TALL],
        "balance_tokens": True,
    }
    ramp = {"start": 4, "increment": 4, "steps": 5}
    phases = [
        {"from_step": 9, "data": other, "optim": {"lr": 1e-3, "warmup_steps": 3}},
        {"from_step": 13, "data": {"global_batch_size": 12, "micro_batch_size": 3}},
    ]
    data = {"manifest": run.parent / "data", "global_batch_size": 8, "micro_batch_size": 2}
    data |= {"ramp": ramp, "validation": {"clips": ["1.mp4", "7.mp4"]}}
    loop = {"steps": 24, "log_every": 1, "save_every": 2, "preview_every": 8, "val_every": 3}
    loop["async_save"] = False  # the kills count the operations of this process
    return write_config(run, data=data, loop=loop, phases=phases)


START_TAGS = {
    f"start/{part}_s"
    for part in (
        "imports",
        "process_groups",
        "checks",
        "data",
        "model",
        "checkpoint",
        "first_batch",
        "first_step",
    )
}

CURRICULUM = Trainer("landiff.training.tokenizer.__main__:main", write_curriculum, world_size=2)


def test_killed_run_equals_uninterrupted_through_its_phases(tmp_path):
    write_data(tmp_path / "data")
    write_mixed(tmp_path / "other", {"features": mixed.features(MODEL.feature_channels)})
    report = prove_kill_safety(CURRICULUM, tmp_path, __name__, kills=10)
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [line["train/batch_size"] for line in lines] == [4] * 5 + [8] * 8 + [12] * 11
    assert not any(f"train/loss_{IMAGE}" in line for line in lines[:9])
    assert {f"train/loss_{bucket}" for bucket in (IMAGE, VIDEO, TALL)} <= set().union(*lines)
    assert [line["train/phase"] for line in lines] == [0] * 9 + [1] * 4 + [2] * 11
    validated = [line["step"] for line in lines if "val/loss" in line]
    assert validated == [3, 6, 9, 12, 15, 18, 21, 24]
    assert len(report.plans) == 10
    print(report)


@pytest.mark.long
def test_killed_run_equals_uninterrupted_at_length(tmp_path):
    write_data(tmp_path / "data")
    report = prove_kill_safety(TOKENIZER, tmp_path, __name__, kills=50, seed=1)
    assert len(report.plans) == 50
    print(report)


def test_one_and_two_processes_train_the_same_tokenizer(tmp_path):
    write_data(tmp_path / "data")
    loop = {"steps": 6, "log_every": 1}
    data = {"manifest": tmp_path / "data", "global_batch_size": 4, "micro_batch_size": 4}
    one = write_config(tmp_path / "one", loop=loop, data=data)
    two = write_config(tmp_path / "two", loop=loop)
    nursery(__name__).start(main, 1, (str(one),)).results(60)
    nursery(__name__).start(main, 2, (str(two),)).results(60)
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]
    for first, *later in lines:
        assert first.keys() >= START_TAGS
        assert not any(START_TAGS & line.keys() for line in later)
    for ours, theirs in zip(*lines, strict=True):
        for name in (
            "train/loss",
            "train/reconstruction",
            "train/commitment",
            "codebook/perplexity",
            "codebook/used_fraction",
        ):
            assert theirs[name] == pytest.approx(
                ours[name], rel=1e-3
            )  # float32 sums in another order
    assert finished_step(tmp_path / "two") == 6


def test_a_batch_that_the_ranks_do_not_divide_is_refused_before_training(tmp_path):
    write_data(tmp_path / "data")
    data = {"manifest": tmp_path / "data", "global_batch_size": 6, "micro_batch_size": 2}
    path = write_config(tmp_path / "run", data=data)
    assert nursery(__name__).start(main, 2, (str(path),)).wait(60) == [1, 1]
    assert "data.global_batch_size = 6" in first_error(tmp_path / "run").read_text()


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    write_data(tmp_path / "data")
    first = write_config(tmp_path / "run", loop={"steps": 2})
    nursery(__name__).start(main, 1, (str(first),)).results(60)
    other = write_config(
        tmp_path / "run", loop={"steps": 4}, model=MODEL.model_copy(update={"codebook_size": 32})
    )
    assert nursery(__name__).start(main, 1, (str(other),)).wait(60) == [1]
    assert "model.codebook_size = 32 (checkpoint: 16)" in first_error(tmp_path / "run").read_text()


def test_the_packaged_config_is_whole_and_an_unknown_key_names_the_nearest():
    assert load(TokenizerTrainConfig, "nano/tokenizer").model.codebook_size == 128
    with pytest.raises(ConfigError, match=r"optim\.learning_rate"):
        load(TokenizerTrainConfig, "nano/tokenizer", ["optim.learning_rate=1"])
