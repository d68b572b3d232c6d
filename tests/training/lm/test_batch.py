"""Packing: what stands where in a row, and what is refused."""

import numpy as np
import pytest
import torch

from landiff.configs import ConfigError
from landiff.data_pipeline.loading.loader import Sample
from landiff.model_zoo import registry
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.token_layout import IGNORE, TokenLayout
from landiff.training.lm.batch import pack, pad_to, text_is_dropped
from landiff.training.lm.columns import check_lm_columns, check_lm_tokenizer
from tests.training.lm.data_set import write_data_set
from tests.training.lm.samples import tiny_config, tiny_sample


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, text_dropout=0.5)


def test_samples_lie_end_to_end_and_positions_restart(config):
    layout = TokenLayout.of(config.model)
    samples = [tiny_sample(config, index) for index in (3, 4, 5)]
    row = pack(samples, config, layout)
    rows = [
        layout.training_row(s.tensors["tokens"].numpy(), len(s.tensors["text-minilm"]))
        for s in samples
    ]
    lengths = [len(r) for r in rows]
    assert row.num_tokens == sum(lengths) and len(row.ids_N) == pad_to(sum(lengths), 8)
    assert row.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist(), len(row.ids_N)]
    assert row.cu_seqlens.dtype == torch.int32
    assert row.max_seqlen == max(lengths)
    for start, expected in zip(row.cu_seqlens.tolist(), rows, strict=False):
        part = slice(start, start + len(expected))
        assert row.ids_N[part].tolist() == expected.input_ids.tolist()
        assert row.targets_N[part].tolist() == expected.targets.tolist()
        assert row.weights_N[part].tolist() == expected.loss_weights.tolist()
        assert row.positions_N[part].tolist() == list(range(len(expected)))
    assert not row.weights_N[row.num_tokens :].any()


def test_every_condition_position_gets_exactly_one_vector(config):
    row = pack(
        [tiny_sample(config, index) for index in range(4)], config, TokenLayout.of(config.model)
    )
    places = torch.cat([row.frames_at_B, row.motion_at_B, row.text_at_M])
    assert sorted(places.tolist()) == (row.ids_N == IGNORE).nonzero().flatten().tolist()
    assert row.frames_at_B.tolist() == [start + 1 for start in row.cu_seqlens.tolist()[:4]]
    assert row.frames_B.tolist() == [1, 2, 3, 4]
    assert row.motion_score_B.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert row.grid_B2.tolist() == [[1, 2], [2, 2], [3, 2], [1, 2]]


def test_text_is_dropped_whole_by_place_in_the_run_and_not_by_row(config):
    layout = TokenLayout.of(config.model)
    samples = [tiny_sample(config, index) for index in range(6)]
    together = pack(samples, config, layout).drop_text_M
    alone = torch.cat([pack([sample], config, layout).drop_text_M for sample in samples])
    assert torch.equal(together, alone)
    for part in together.split([len(sample.tensors["text-minilm"]) for sample in samples]):
        assert part.all() or not part.any()
    assert together.any() and not together.all()
    assert not pack(samples, config, layout, train=False).drop_text_M.any()


def test_text_dropout_has_its_probability():
    dropped = sum(text_is_dropped(7, index, 0.1) for index in range(4000))
    assert 340 < dropped < 460  # 3 standard deviations of a binomial around 400
    assert [text_is_dropped(8, i, 0.1) for i in range(100)] != [
        text_is_dropped(7, i, 0.1) for i in range(100)
    ]


def test_sequence_parallel_rows_divide_by_the_ranks(tmp_path):
    config = tiny_config(tmp_path, {"tensor": 4, "sequence": True}, row_multiple=6)
    row = pack([tiny_sample(config, 0)], config, TokenLayout.of(config.model))
    assert len(row.ids_N) % 12 == 0


def changed(sample: Sample, column: str, tensor: torch.Tensor) -> Sample:
    return Sample(sample.key, 0, sample.index, 0, sample.meta, {**sample.tensors, column: tensor})


@pytest.mark.parametrize(
    ("column", "tensor", "message"),
    [
        (
            "tokens",
            torch.tensor([1] * 12 + [40]),
            "sample 000000, column tokens: code 40 at index 12 is outside the codebook of 40",
        ),
        ("tokens", torch.tensor([1] * 12), "12 codes are no whole number of frames"),
        (
            "text-minilm",
            torch.zeros(3, 21),
            r"column text-minilm holds \(3, 21\), the model takes rows of model.text_dim = 20",
        ),
        ("text-minilm", torch.zeros(17, 20), r"has 17 rows, more than model\.max_text_tokens = 16"),
        ("text-minilm", torch.zeros(0, 20), "a prompt has at least one token"),
        (
            "tokens",
            torch.ones(9 + 4 * 3, dtype=torch.int64).repeat(25),
            r"more than model\.max_positions = 512",
        ),
    ],
)
def test_samples_of_another_encoder_are_refused(config, column, tensor, message):
    with pytest.raises(ConfigError, match=message):
        pack(
            [changed(tiny_sample(config, 0), column, tensor)], config, TokenLayout.of(config.model)
        )


def test_columns_of_another_encoder_are_refused_before_training(tmp_path):
    config = tiny_config(tmp_path)
    manifest = write_data_set(tmp_path / "data", config.model, [3], 3)
    assert check_lm_columns(manifest, config, None) == []
    other = tiny_config(tmp_path, model={"pframe_tokens": 5, "text_dim": 24})
    codes, width = map(str, reversed(check_lm_columns(manifest, other, None)))
    assert "column tokens was made by test: 17 codes are no whole number of frames" in codes
    assert "states of width 20, the model takes model.text_dim = 24" in width


def test_tokens_that_exceed_the_positions_are_refused_before_training(tmp_path):
    config = tiny_config(tmp_path, model={"max_positions": 20})
    manifest = write_data_set(tmp_path / "data", config.model, [3], 3)
    (problem,) = check_lm_columns(manifest, config, None)
    assert "17 tokens for each clip" in str(
        problem
    ) and "more than model.max_positions = 20" in str(problem)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    sizes = {"codebook_size": 40, "iframe_tokens": 9, "pframe_tokens": 4, "segment_frames": 4}
    config = tiny_config(tmp_path, tokenizer="mine")
    entry = registry.export(
        config.zoo, "mine", "tokenizer", TokenizerConfig(**sizes), {"a": torch.zeros(1)}, {}
    )
    manifest = write_data_set(tmp_path / "data", config.model, [3], 3)
    (problem,) = check_lm_columns(manifest, config, entry)
    assert (
        "column 'tokens' was made by test 1111222233334444, but tokenizer = "
        f"mine@{entry.fingerprint}" in str(problem)
    )
    adopting = config.model_copy(update={"data": config.data.model_copy(update={"adopt": True})})
    assert (
        check_lm_columns(manifest, adopting, entry) == []
        and check_lm_tokenizer(config, entry) == []
    )
    sizes["codebook_size"] = 41
    other = registry.export(
        config.zoo, "mine", "tokenizer", TokenizerConfig(**sizes), {"a": torch.zeros(1)}, {}
    )
    (problem,) = check_lm_tokenizer(config, other)
    assert "set model.codebook_size, iframe_tokens" in str(problem)
