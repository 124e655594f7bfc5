import pytest
from data_examples import chat_pair, plain_pair
from datasets import Dataset

from qadapter.data import load_preference_dataset, train_eval_split
from qadapter.data.splits import pairs_of_trained_prompts
from qadapter.errors import ConfigError, DataError

# 4 pairs a prompt, as in DSP.
PAIRS = Dataset.from_list([plain_pair(number, prompt=f"prompt {number // 4}") for number in range(44)])


def prompts(dataset):
    return set(dataset["prompt"])


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.01])
def test_no_prompt_stands_on_both_sides_and_no_row_is_lost(fraction):
    train, held_out = train_eval_split(PAIRS, eval_fraction=fraction)
    assert not prompts(train) & prompts(held_out)
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, PAIRS))
    assert len(held_out) > 0


def test_the_size_is_met_as_far_as_prompts_allow():
    assert len(train_eval_split(PAIRS, eval_fraction=0.3)[1]) == 12
    assert len(train_eval_split(PAIRS, eval_fraction=0.5)[1]) == 20


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_held_out_than_asked_for_whichever_prompt_comes_first(seed):
    """Half of the rows have one prompt; some seed ranks it first."""
    rows = [plain_pair(number, prompt=f"prompt {max(number, 20)}") for number in range(40)]
    assert 0 < len(train_eval_split(Dataset.from_list(rows), eval_fraction=0.1, seed=seed)[1]) <= 4


def test_the_split_depends_on_the_prompts_and_the_seed_not_on_the_order():
    first = train_eval_split(PAIRS, eval_fraction=0.27, seed=5)[1]
    again = train_eval_split(PAIRS.shuffle(seed=1), eval_fraction=0.27, seed=5)[1]
    other = train_eval_split(PAIRS, eval_fraction=0.27, seed=6)[1]
    assert prompts(first) == prompts(again) != prompts(other)


def test_rows_keep_their_order():
    train, held_out = train_eval_split(PAIRS, eval_fraction=0.27)
    order = PAIRS["chosen"][:]
    assert list(train["chosen"]) == [text for text in order if text in set(train["chosen"])]
    assert list(held_out["chosen"]) == [text for text in order if text in set(held_out["chosen"])]


def test_chats_are_split_by_their_messages():
    chats = Dataset.from_list([chat_pair(f"question {n // 2}", f"good {n}", f"bad {n}") for n in range(14)])
    train, held_out = train_eval_split(chats, eval_fraction=0.3)
    assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in held_out}
    assert len(held_out) == 4


def test_held_out_pairs_of_trained_prompts_are_counted_whether_text_or_chats():
    chats = Dataset.from_list([chat_pair(f"prompt {number}", "good", "bad") for number in (3, 3, 20)])
    assert pairs_of_trained_prompts(PAIRS, chats) == 2
    assert pairs_of_trained_prompts(*train_eval_split(PAIRS, eval_fraction=0.27)) == 0


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(DataError, match="all rows have the same prompt"):
        train_eval_split(PAIRS.select(range(4)), eval_fraction=0.5)


@pytest.mark.parametrize("fraction", [0, 1.0])
def test_impossible_fractions_are_refused(fraction):
    with pytest.raises(ConfigError, match="eval_fraction"):
        train_eval_split(PAIRS, eval_fraction=fraction)


def test_a_stream_is_refused(write_lines):
    stream = load_preference_dataset(write_lines([plain_pair(1)]), streaming=True)
    with pytest.raises(DataError, match="load it without streaming"):
        train_eval_split(stream, eval_fraction=0.1)


def test_raw_columns_are_refused():
    with pytest.raises(DataError, match="no prompt column among question"):
        train_eval_split(Dataset.from_list([{"question": "a"}]), eval_fraction=0.1)
