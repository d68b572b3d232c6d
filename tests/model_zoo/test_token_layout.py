"""The grammar, checked by hand-written sequences and by walking every length."""

import subprocess
import sys

import numpy as np
import pytest

from landiff.model_zoo.config import LMConfig, TokenizerConfig
from landiff.model_zoo.token_layout import CODE, IGNORE, TokenLayout

SMALL = TokenLayout(codebook_size=10, iframe_tokens=3, pframe_tokens=2, segment_frames=2)
EOS, BOS, SI, EI, SP, EP, PAD = range(10, 17)


def legal(table):
    return [set(np.flatnonzero(table.legal(n)).tolist()) for n in range(len(table.forced_N))]


def test_ids_follow_the_codebook():
    layout = TokenLayout.of(LMConfig())
    names = ["eos", "bos", "start_iframe", "end_iframe", "start_pframe", "end_pframe", "pad"]
    assert [getattr(layout, name) for name in names] == list(range(2048, 2055))
    assert layout.vocab_size == 2055


def test_tokenizer_and_lm_of_a_preset_speak_the_same_tokens():
    assert TokenLayout.of(TokenizerConfig()) == TokenLayout.of(LMConfig())


def test_released_lengths():
    layout = TokenLayout.of(LMConfig())
    assert layout.num_codes(13) == 330 + 12 * 74
    assert layout.body_length(13) == 1245  # 1244 of the segment, and EOS
    assert layout.sequence_length(13, 40) == 40 + 1248


def test_a_sequence_of_two_segments_written_out():
    codes = [0, 1, 2, 3, 4, 5, 6, 7]
    ids = [BOS, *[IGNORE] * 4, SI, 0, 1, 2, EI, SP, 3, 4, EP, SI, 5, 6, 7, EI, EOS]
    assert SMALL.build(codes, text_length=2).tolist() == ids
    assert SMALL.codes(ids, text_length=2).tolist() == codes
    assert SMALL.loss_mask(3, text_length=2).tolist() == [False] * 5 + [True] * 15
    assert SMALL.frame_sizes(3) == [3, 2, 3]


def test_training_row_predicts_the_next_token_and_starts_at_the_last_text_position():
    row = SMALL.training_row([0, 1, 2], text_length=2)
    assert row.input_ids.tolist() == [BOS, *[IGNORE] * 4, SI, 0, 1, 2, EI, EOS]
    assert row.targets.tolist() == [PAD] * 4 + [SI, 0, 1, 2, EI, EOS, PAD]
    assert row.loss_weights.tolist() == [0] * 4 + [1] * 6 + [0]
    assert row.positions.tolist() == list(range(len(row)))
    assert row.loss_weights.dtype == np.float32
    assert row.loss_weights.sum() == SMALL.loss_mask(1, 2).sum()


@pytest.mark.parametrize(
    "sizes", [(10, 3, 2, 2), (7, 9, 4, 4), (5, 1, 1, 1), (5, 2, 3, 3), (128, 12, 4, 5)]
)
def test_lengths_and_sequences_invert_for_every_number_of_frames(sizes):
    layout = TokenLayout(*sizes)
    for frames in range(1, 3 * layout.segment_frames + 2):
        count = layout.num_codes(frames)
        assert layout.num_frames(count) == frames
        assert sum(layout.frame_sizes(frames)) == count
        codes = np.arange(count) % layout.codebook_size
        ids = layout.build(codes, text_length=3)
        assert len(ids) == layout.sequence_length(frames, 3) and ids.dtype == np.int64
        assert (layout.codes(ids, text_length=3) == codes).all()
        row = layout.training_row(codes, text_length=3)
        predicting = row.loss_weights == 1
        assert (row.targets[predicting] == ids[layout.loss_mask(frames, 3)]).all()


def test_numbers_of_codes_between_whole_frames_are_refused():
    whole = {SMALL.num_codes(f) for f in range(1, 9)}
    for count in set(range(-1, 20)) - whole:
        with pytest.raises(ValueError, match=f"{count} codes are no whole number of frames"):
            SMALL.num_frames(count)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, 1, 10], "code 10 at index 2 is outside the codebook of 10 codes"),
        ([0, -1, 2], "code -1 at index 1"),
        ([0.0, 1.0, 2.0], "flat array of integers"),
        ([[0, 1, 2]], "flat array of integers"),
    ],
)
def test_bad_codes_are_named_with_their_place(codes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.build(codes, text_length=1)


def test_unsigned_codes_of_a_column_are_taken():
    assert SMALL.build(np.array([9, 0, 1], dtype=np.uint16), 1).tolist()[4:] == [
        SI,
        9,
        0,
        1,
        EI,
        EOS,
    ]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="text_length = 0"):
        SMALL.build([0, 1, 2], text_length=0)


def test_a_broken_sequence_is_named_with_its_place():
    ids = SMALL.build([0, 1, 2], text_length=2)
    ids[9] = SP
    with pytest.raises(ValueError, match=f"position 9 holds the id {SP} where {EI} must stand"):
        SMALL.codes(ids, text_length=2)
    with pytest.raises(ValueError, match="no whole number of frames"):
        SMALL.codes(ids[:-1], text_length=2)


def test_only_codes_are_legal_at_code_positions_and_one_id_elsewhere():
    table = SMALL.sampling_table(3)
    assert table.forced_N.tolist() == [
        SI,
        *[CODE] * 3,
        EI,
        SP,
        *[CODE] * 2,
        EP,
        SI,
        *[CODE] * 3,
        EI,
        EOS,
    ]
    assert legal(table) == [set(range(10)) if f == CODE else {f} for f in table.forced_N.tolist()]


def test_the_end_may_be_predicted_behind_the_first_segment_only():
    table = SMALL.sampling_table(5, predict_end=True)
    found = legal(table)
    ends = [n for n, ids in enumerate(found) if EOS in ids]
    starts = [n for n, f in enumerate(table.forced_N.tolist()) if f in (SI, SP)]
    assert ends == [
        *starts[3:],
        len(found) - 1,
    ]  # SI SP | SI SP | SI: the second segment's SP and what follows
    assert np.flatnonzero(table.may_end_N).tolist() == starts[3:]
    assert found[starts[3]] == {SP, EOS} and found[starts[4]] == {SI, EOS} and found[-1] == {EOS}


def test_reference_masks_are_loose_at_codes_and_ends_of_frames():
    everything = set(range(17))
    one = legal(SMALL.sampling_table(2, reference=True))
    assert one == [{SI}, *[everything] * 4, {SP}, *[everything] * 4]  # the closing EOS too
    two = legal(SMALL.sampling_table(4, reference=True))
    assert two[9] == {SI} and two[14] == {SP, EOS} and two[-1] == {EOS}


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="pframe_tokens = 0"):
        TokenLayout(10, 3, 0, 2)


def test_the_grammar_loads_without_torch():
    code = "import sys, landiff.model_zoo.token_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
