import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qadapter.data import PreferenceCollator
from qadapter.errors import ConfigError, DataError

PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10, 11, 12, 13]},
    {"prompt_ids": [14, 15], "chosen_ids": [16], "rejected_ids": [17]},
]


def test_chosen_rows_come_first_and_rejected_rows_follow_in_the_same_order():
    batch = PreferenceCollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 0],
        [7, 8, 0, 0, 0, 0],
        [14, 15, 16, 0, 0, 0],
        [1, 2, 3, 6, 0, 0],
        [7, 9, 10, 11, 12, 13],
        [14, 15, 17, 0, 0, 0],
    ]
    assert batch["completion_mask"].int().tolist() == [
        [0, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 3, 4, 6, 3]
    assert [batch[name].dtype for name in batch] == [torch.long, torch.long, torch.bool]


IDS = st.lists(st.integers(1, 99), min_size=1, max_size=11)


@given(
    pairs=st.lists(st.fixed_dictionaries(dict.fromkeys(PAIRS[0], IDS)), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 1, 7, 8]),
)
def test_the_ids_come_back_whatever_the_padding(pairs, side, multiple):
    batch = PreferenceCollator(0, padding_side=side, pad_to_multiple_of=multiple)(pairs)
    rows = [(pair["prompt_ids"], pair[answer]) for answer in ("chosen_ids", "rejected_ids") for pair in pairs]
    for row, (prompt, answer) in enumerate(rows):
        ids, attended, completed = (batch[name][row] for name in ("input_ids", "attention_mask", "completion_mask"))
        assert ids[attended.bool()].tolist() == prompt + answer
        assert ids[completed].tolist() == answer
        assert (ids[~attended.bool()] == 0).all()
        padded = attended if side == "right" else attended.flip(0)
        assert padded.tolist() == sorted(padded.tolist(), reverse=True)
    width = batch["input_ids"].shape[1]
    assert 0 <= width - max(len(prompt) + len(answer) for prompt, answer in rows) < (multiple or 1)
    assert width % (multiple or 1) == 0


def test_a_pad_token_that_is_the_end_token_does_not_hide_the_end():
    batch = PreferenceCollator(pad_token_id=5)(PAIRS[:1])
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_token_id": None}, r"set tokenizer\.pad_token"),
        ({"pad_token_id": 0, "padding_side": "middle"}, "'right' or 'left'"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceCollator(**options)


def test_rows_that_are_not_tokenised_are_refused():
    with pytest.raises(DataError, match=r"lack prompt_ids, chosen_ids, rejected_ids \(found prompt\)"):
        PreferenceCollator(0)([{"prompt": "a"}])


def test_an_empty_batch_is_refused():
    with pytest.raises(DataError, match="at least one pair"):
        PreferenceCollator(0)([])
