import copy

import pytest
from data_examples import CHATML, LAST_TURN, LLAMA, STRICT, THINKING, chat_pair, plain_pair
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer

from qadapter.data import TokenisationReport, check_preferences, load_preference_dataset, tokenise_preferences
from qadapter.data.encoding import EncodedPair
from qadapter.data.tokenisation import Limits, fit_prompt
from qadapter.errors import ConfigError, DataError

CHATS = [chat_pair(f"Question {number}?", f"Paris {number}.", f"No {number}!") for number in range(7)]
PLAIN = [plain_pair(number) for number in range(7)]
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def words(prompt, chosen, rejected):
    """A plain pair of one-letter words for the word-level tokenizer."""
    return {"prompt": " ".join(prompt), "chosen": " ".join(chosen), "rejected": " ".join(rejected)}


def test_every_pair_gives_three_lists_of_ids(chatml):
    tokenised, report = tokenise_preferences(Dataset.from_list(CHATS), chatml)
    assert tokenised.column_names == COLUMNS
    assert len(tokenised) == 7
    assert chatml.decode(tokenised[3]["chosen_ids"]) == "Paris 3.<|im_end|>"
    assert report == TokenisationReport(rows=7, kept=7)
    assert report.summary() == "7 rows, 7 kept"


def test_any_known_layout_is_accepted(chatml):
    raw = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS]
    expected, _ = tokenise_preferences(Dataset.from_list(CHATS), chatml)
    assert tokenise_preferences(Dataset.from_list(raw), chatml)[0].to_list() == expected.to_list()


def test_the_tokenised_dataset_leaves_no_cache_files(chatml, write_lines):
    tokenised, _ = tokenise_preferences(load_preference_dataset(write_lines(CHATS)), chatml)
    assert tokenised.cache_files == []


def test_plain_text_is_a_user_message_where_there_is_a_template(chatml, make_tokenizer):
    as_chat = [chat_pair(row["prompt"], row["chosen"], row["rejected"]) for row in PLAIN]
    expected, _ = tokenise_preferences(Dataset.from_list(as_chat), chatml)
    assert tokenise_preferences(Dataset.from_list(PLAIN), chatml)[0].to_list() == expected.to_list()
    bare, _ = tokenise_preferences(Dataset.from_list(PLAIN), make_tokenizer(adds="<s> $A"))
    assert bare[0]["prompt_ids"][0] == make_tokenizer().bos_token_id


def test_plain_text_stays_plain_without_a_template(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenised, _ = tokenise_preferences(Dataset.from_list(PLAIN), tokenizer)
    assert tokenizer.decode(tokenised[2]["prompt_ids"]) == "prompt 2"
    assert tokenizer.decode(tokenised[2]["chosen_ids"]) == "good 2</s>"


def test_a_chat_needs_a_template(make_tokenizer):
    with pytest.raises(DataError, match="no chat template; use an instruction-tuned model"):
        tokenise_preferences(Dataset.from_list(CHATS), make_tokenizer())


def test_text_without_prompts_is_plain_text_after_bos(make_tokenizer, write_lines):
    path = write_lines(
        [{"chosen": "Big.", "rejected": "Old."}, {"chosen": "Paris is big.", "rejected": "Paris is old."}]
    )
    tokenizer = make_tokenizer(adds="<s> $A")
    tokenised, _ = tokenise_preferences(load_preference_dataset(path), tokenizer)
    assert tokenised[0]["prompt_ids"] == [tokenizer.bos_token_id]
    assert tokenised[1]["prompt_ids"] == tokenizer("Paris is")["input_ids"]
    assert tokenizer.decode(tokenised[1]["chosen_ids"]) == " big.</s>"


@pytest.mark.parametrize("beside", [{"prompt": ""}, {}])
def test_text_without_prompts_is_no_chat(chatml, beside):
    rows = [{**beside, "chosen": "Paris is big.", "rejected": "Paris is old."}]
    with pytest.raises(DataError, match="row 1: the prompt is empty; a chat needs a user message: fill a column"):
        tokenise_preferences(Dataset.from_list(rows), chatml)


def test_templates_of_which_none_is_the_default_are_refused(make_tokenizer):
    tokenizer = make_tokenizer({"chat": CHATML, "rag": CHATML})
    with pytest.raises(DataError, match="the chat templates chat, rag, and none is named default"):
        tokenise_preferences(Dataset.from_list(CHATS), tokenizer)
    tokenizer.chat_template["default"] = CHATML
    assert tokenise_preferences(Dataset.from_list(CHATS), tokenizer)[1].kept == len(CHATS)


def test_a_prompt_that_its_answer_changes_is_dropped_with_the_reason(make_tokenizer):
    with_system = chat_pair() | {"prompt": [{"role": "system", "content": "Be brief."}, *chat_pair()["prompt"]]}
    _, report = tokenise_preferences(Dataset.from_list([CHATS[0], with_system]), make_tokenizer(LAST_TURN))
    assert report.dropped == {"prompt changed by its answer": [2]}
    assert "put that text into the user's message" in report.why["prompt changed by its answer"]
    with pytest.raises(
        DataError, match=r"writes the prompt's end \('Be brief\. .*put that text into the user's message, else give"
    ):
        tokenise_preferences(Dataset.from_list([with_system]), make_tokenizer(LAST_TURN))


def test_prompts_are_cut_at_the_left_for_both_sides_alike(word_level):
    rows = [words("abcdef", "abc", "de"), words("abc", "ab", "f")]
    tokenised, report = tokenise_preferences(Dataset.from_list(rows), word_level, max_length=9)
    # Nine tokens less the longer answer and its end leave five of the six prompt tokens.
    assert [word_level.decode(row["prompt_ids"]) for row in tokenised] == ["b c d e f", "a b c"]
    assert word_level.decode(tokenised[0]["chosen_ids"]) == "a b c </s>"
    assert word_level.decode(tokenised[0]["rejected_ids"]) == "d e </s>"
    assert report.truncated_prompts == [1]


def test_a_cut_prompt_keeps_its_bos(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA)
    whole, _ = tokenise_preferences(Dataset.from_list(CHATS), tokenizer)
    cut, report = tokenise_preferences(Dataset.from_list(CHATS), tokenizer, max_prompt_length=5)
    for before, after in zip(whole, cut, strict=True):
        assert after["prompt_ids"] == before["prompt_ids"][:1] + before["prompt_ids"][-4:]
        assert after["chosen_ids"] == before["chosen_ids"]
    assert report.truncated_prompts == [1, 2, 3, 4, 5, 6, 7]
    assert report.summary() == "7 rows, 7 kept, 7 prompts truncated"


def test_rows_whose_answer_leaves_no_room_for_the_prompt_are_dropped_not_cut(word_level):
    rows = [words("a", "abc", "de"), words("a", "b", "abcd"), words("a", "abcde", "a")]
    tokenised, report = tokenise_preferences(Dataset.from_list(rows), word_level, max_length=5)
    assert len(tokenised) == 1
    assert report.dropped == {"answer too long": [2, 3]}
    assert report.summary() == "3 rows, 1 kept, 2 dropped (answer too long: 2)"


@given(
    prompt=st.lists(st.integers(2, 9), max_size=9),
    bos=st.booleans(),
    answers=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    max_length=st.none() | st.integers(2, 20),
    max_prompt_length=st.none() | st.integers(2, 9),
)
def test_a_fitting_prompt_is_the_longest_suffix_that_fits(prompt, bos, answers, max_length, max_prompt_length):
    prompt_ids = [1] * bos + prompt
    encoded = EncodedPair(prompt_ids, [5] * answers[0], [6] * answers[1])
    try:
        fitted = fit_prompt(encoded, Limits(max_length, max_prompt_length), bos=1)
    except DataError:
        assert not prompt_ids or max_length - max(answers) < min(1 + bos, len(prompt_ids))
        return
    room = min(max_length - max(answers) if max_length else 99, max_prompt_length or 99)
    assert len(fitted) == min(len(prompt_ids), room)
    assert fitted[:bos] == [1] * bos
    assert fitted[bos:] == prompt[len(prompt) - (len(fitted) - bos) :]


def test_answers_of_the_same_tokens_are_dropped(word_level):
    rows = [words("a", "xy", "zz"), words("a", "b", "c")]  # x, y and z are unknown words
    tokenised, report = tokenise_preferences(Dataset.from_list(rows), word_level)
    assert report.dropped == {"identical tokens": [1]}
    assert len(tokenised) == 1


def test_conversations_that_the_template_refuses_are_dropped(make_tokenizer):
    refused = chat_pair() | {"prompt": chat_pair()["prompt"] * 2}
    tokenised, report = tokenise_preferences(Dataset.from_list([CHATS[0], refused]), make_tokenizer(STRICT))
    assert report.dropped == {"refused by template": [2]}
    assert len(tokenised) == 1


def test_nothing_left_is_an_error_with_an_example(word_level):
    rows = [words("a", "xy", "zz")]
    with pytest.raises(DataError, match=r"no pair is left.*identical tokens: 1\); row 1: both answers are the same"):
        tokenise_preferences(Dataset.from_list(rows), word_level)


def test_unstable_templates_are_reported(make_tokenizer):
    _, report = tokenise_preferences(Dataset.from_list(CHATS[:2]), make_tokenizer(THINKING))
    assert report.unstable_prompts == [1, 2]
    assert report.summary() == "2 rows, 2 kept, 2 prompts shortened to the part both sides share"


UNSPACED = [
    ("Why?", "Since.", "No idea", True),
    ("Why", " Since.", "x", True),  # one of the answers
    ("Why? ", "Since.", "No.", False),
    ("Why?\n", "Since.", "No.", False),
    ("Why?", " Since.", "\nNo.", False),
    ("print(", "x)", "y)", False),
    ("东", "西", "南", False),
]


def test_prompts_that_run_into_their_answers_are_reported(write_lines):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row[:3], strict=True)) for row in UNSPACED]
    wrong = [number for number, row in enumerate(UNSPACED, 1) if row[3]]
    bytewise = byte_tokenizer()
    _, report = tokenise_preferences(Dataset.from_list(rows), bytewise)
    assert report.unspaced == wrong
    assert report.unspaced_warning.startswith("2 prompts run into an answer with no space between")
    checked = check_preferences(write_lines(rows), bytewise)
    assert checked.tokenisation.unspaced == wrong
    assert checked.ok


def test_where_a_tokenizer_or_template_puts_a_space_none_is_missed(word_level, chatml):
    for tokenizer in (word_level, chatml):
        _, report = tokenise_preferences(Dataset.from_list([words("a", "b", "c")]), tokenizer)
        assert (report.unspaced, report.unspaced_warning) == ([], None)


def test_a_row_that_is_no_pair_is_named(chatml):
    rows = [*CHATS, CHATS[0] | {"rejected": []}]
    with pytest.raises(DataError, match="row 8: rejected holds no answer"):
        tokenise_preferences(Dataset.from_list(rows), chatml)


def test_an_answer_of_several_messages_is_refused(chatml):
    rows = [CHATS[0] | {"chosen": CHATS[0]["chosen"] + CHATS[1]["prompt"] + CHATS[1]["chosen"]}]
    with pytest.raises(DataError, match="row 1: the chosen answer has 3 messages"):
        tokenise_preferences(Dataset.from_list(rows), chatml)


def test_a_stream_gives_the_same_rows_and_its_report_fills_as_it_goes(word_level, write_lines):
    rows = [words("abcdef", "abc", "de"), words("a", "x", "y"), words("a", "b", "c")]
    path = write_lines(rows)
    expected, whole = tokenise_preferences(load_preference_dataset(path), word_level, max_length=9)
    stream, report = tokenise_preferences(load_preference_dataset(path, streaming=True), word_level, max_length=9)
    assert report == TokenisationReport()
    for _ in range(2):  # each pass starts the report anew
        assert list(stream) == expected.to_list()
        assert report == whole


def test_the_tokenizer_is_left_as_it_was(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA, adds="<s> $A")
    before = copy.deepcopy(tokenizer.init_kwargs), tokenizer("a b").input_ids
    tokenise_preferences(Dataset.from_list(CHATS), tokenizer, max_length=20)
    assert (tokenizer.init_kwargs, tokenizer("a b").input_ids) == before


@pytest.mark.parametrize("dataset", [CHATS, DatasetDict(train=Dataset.from_list(CHATS))])
def test_anything_but_a_dataset_is_refused(chatml, dataset):
    with pytest.raises(DataError, match="give one split as a Dataset"):
        tokenise_preferences(dataset, chatml)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_prompt_length": 0}])
def test_impossible_options_are_refused(chatml, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        tokenise_preferences(Dataset.from_list(CHATS), chatml, **options)


@pytest.mark.parametrize("kind", [None, "pandas", "numpy", "torch", "arrow"])
def test_the_format_of_a_dataset_changes_no_ids_and_hidden_columns_stay_hidden(chatml, kind):
    expected, _ = tokenise_preferences(Dataset.from_list(CHATS), chatml)
    noted = Dataset.from_list([row | {"tools": "none of them"} for row in CHATS])
    shown = noted.with_format(kind, columns=["prompt", "chosen", "rejected"])
    assert tokenise_preferences(shown, chatml)[0].to_list() == expected.to_list()


def test_a_transform_makes_the_rows_and_leaves_their_tokens_alone(word_level):
    """The stored columns may have other names, and its own would make nothing of tokens."""
    rows = [{"q": "a b", "good": "c d e", "bad": "d e f"}, {"q": "c", "good": "a b", "bad": "b c"}]

    def pairs(batch):
        sides = ("prompt", "q"), ("chosen", "good"), ("rejected", "bad")
        return {name: [text.upper().lower()[:3] for text in batch[stored]] for name, stored in sides}

    made = [{"prompt": "a b", "chosen": "c d", "rejected": "d e"}, {"prompt": "c", "chosen": "a b", "rejected": "b c"}]
    tokenised, _ = tokenise_preferences(Dataset.from_list(rows).with_transform(pairs), word_level)
    assert tokenised.column_names == COLUMNS
    assert [tokenised[0], tokenised[1]] == tokenise_preferences(Dataset.from_list(made), word_level)[0].to_list()
