import json
import re
import shlex

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadapter.data import Format, recognise
from qadapter.data.layouts import LAYOUTS
from qadapter.data.rows import RowError
from qadapter.errors import DataError

USER = {"role": "user", "content": "What is two plus two?"}
EARLIER = {"role": "assistant", "content": "Which numbers?"}
GOOD = {"role": "assistant", "content": "Four."}
BAD = {"role": "assistant", "content": "Five."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
PLAIN = {"prompt": "Two plus two is", "chosen": " four.", "rejected": " five."}
HISTORY = "\n\nHuman: Add numbers\n\nAssistant: Which?\n\nHuman: Two and two"
HISTORY_MESSAGES = [
    {"role": "user", "content": "Add numbers"},
    {"role": "assistant", "content": "Which?"},
    {"role": "user", "content": "Two and two"},
]

EXAMPLES = {
    "dsp": (
        {
            "text": [
                "## Human:\nWhat is two plus two?\n\n## Assistant:\nFive.",
                "## Human:\nWhat is two plus two?\n\n## Assistant:\nFour.",
            ],
            "score": [0.0, 1.0],
        },
        CHAT,
    ),
    "alpaca-output": (
        {"instruction": "Add", "input": "2 and 2", "output": ["Four.", "Five."]},
        {"prompt": "Add\n2 and 2", "chosen": "Four.", "rejected": "Five."},
    ),
    "hh-rlhf": (
        {"chosen": f"{HISTORY}\n\nAssistant: Four.", "rejected": f"{HISTORY}\n\nAssistant: Five."},
        {"prompt": HISTORY_MESSAGES, "chosen": [GOOD], "rejected": [BAD]},
    ),
    "hh-rlhf-prompt": (
        {"prompt": f"{HISTORY}\n\nAssistant:", "chosen": " Four.", "rejected": " Five."},
        {"prompt": HISTORY_MESSAGES, "chosen": [GOOD], "rejected": [BAD]},
    ),
    "chat": (CHAT, CHAT),
    "ultrafeedback": (
        {
            "prompt": USER["content"],
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
        },
        CHAT,
    ),
    "messages": ({"messages": [USER], "chosen": "Four.", "rejected": "Five."}, CHAT),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": "Four."},
            "rejected": {"from": "gpt", "value": "Five."},
        },
        CHAT,
    ),
    "chat-implicit": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
    "plain": (PLAIN | {"category": "sums"}, PLAIN),
    "plain-implicit": (
        {"chosen": "Two and two is four.", "rejected": "Two and two is five."},
        {"prompt": "", "chosen": "Two and two is four.", "rejected": "Two and two is five."},
    ),
}


def test_an_object_under_prompt_that_is_no_message_is_not_the_prompt():
    row = {"prompt": {"id": 5}, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert normalise_row(row) == CHAT


def test_a_prompt_may_be_one_message():
    assert normalise_row({"prompt": USER, "chosen": "Four.", "rejected": "Five."}) == CHAT
    for column in ("prompt", "messages", "conversations"):
        row = {column: USER, "chosen": GOOD, "rejected": BAD}
        assert normalise_row(row if column == "prompt" else {**row, column: [USER]}) == CHAT


def normalise_row(row, columns=None):
    """The pair of a single row in any known layout."""
    return recognise(row, [row], columns, source="row").normalise(row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised_and_gives_the_same_pair(layout):
    row, expected = EXAMPLES[layout]
    row_format = recognise(row, [row])
    assert row_format.layout == layout
    assert row_format.normalise(row) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalised_rows_are_recognised_and_unchanged(layout):
    _, expected = EXAMPLES[layout]
    assert normalise_row(expected) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_columns_of_a_parquet_row_that_are_all_none_do_not_count(layout):
    row, expected = EXAMPLES[layout]
    assert normalise_row(dict.fromkeys(["prompt", "messages", "system", "tools"]) | row) == expected


@pytest.mark.parametrize("name", ["query", "question", "instruction"])
def test_plain_prompts_go_by_several_names(name):
    row = {name: "Two plus two is", "chosen": " four.", "rejected": " five."}
    assert normalise_row(row) == PLAIN


def test_a_system_column_makes_a_chat_with_a_first_message():
    row = {"system": "Be brief.", "question": USER["content"], "chosen": "Four.", "rejected": "Five."}
    assert normalise_row(row) == CHAT | {"prompt": [SYSTEM, USER]}


def test_an_empty_system_column_leaves_plain_text_plain():
    assert normalise_row(PLAIN | {"system": ""}) == PLAIN


def test_an_empty_system_column_does_not_hide_a_filled_system_prompt():
    assert normalise_row(CHAT | {"system": "", "system_prompt": "Be brief."}) == CHAT | {"prompt": [SYSTEM, USER]}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_columns_leaves_the_system_text_where_it_is(name):
    row = CHAT | {"good": [GOOD], name: "Be brief."}
    assert normalise_row(row, {"chosen": "good"}) == CHAT | {"prompt": [SYSTEM, USER]}
    assert normalise_row(row | {"own": "Be brief.", name: "Another"}, {"system": "own"})["prompt"] == [SYSTEM, USER]


def test_a_system_text_that_first_appears_late_is_an_error_not_ignored():
    row_format = recognise(PLAIN, [PLAIN])
    with pytest.raises(RowError, match="first rows have none"):
        row_format.normalise(PLAIN | {"system": "Be brief."})


def test_a_system_message_that_differs_from_the_system_column_is_refused():
    with pytest.raises(DataError, match="system column and the system message"):
        normalise_row(CHAT | {"prompt": [SYSTEM, USER], "system": "Be long."})


def test_the_prompt_splits_between_messages_not_inside_their_common_words():
    good, bad = ({"role": "assistant", "content": f"The sum is {word}"} for word in ("fourteen", "forty"))
    pair = normalise_row({"chosen": [USER, good], "rejected": [USER, bad]})
    assert pair == {"prompt": [USER], "chosen": [good], "rejected": [bad]}


def test_sides_may_repeat_an_explicit_prompt():
    row = {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [BAD]}
    assert normalise_row(row) == CHAT | {"prompt": [SYSTEM, USER]}


def test_a_messages_column_may_hold_the_chosen_answer_once_more():
    row = {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert normalise_row(row) == CHAT


WRITTEN = {"json": json.dumps, "indented": lambda value: json.dumps(value, indent=2), "repr": str}
WRITTEN["numpy"] = lambda value: str(np.array(value))  # what pandas writes of a Parquet file's lists


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("layout", ["chat", "ultrafeedback", "chat-implicit", "sharegpt"])
def test_messages_that_were_written_as_text_are_no_answers(layout, written):
    row, _ = EXAMPLES[layout]
    row = {name: written(value) if isinstance(value, list | dict) else value for name, value in row.items()}
    row |= {"prompt": "Add"} if layout == "sharegpt" else {}
    with pytest.raises(RowError, match="chosen is text that spells out messages .*; give them as a list") as caught:
        recognise(row, [row]).normalise(row)
    assert caught.value.reason == "messages as text"
    row = CHAT | {"prompt": "Add", "chosen": " four.", "rejected": written([GOOD])}
    with pytest.raises(RowError, match="rejected is text that spells out messages"):
        recognise(row, [row]).normalise(row)


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "admin", "content": 4}]',
        '[{"name": "a", "messages": [{"role": "user", "content": "b"}]}]',
        '{"from": "user", "to": "me"}',
        "[{role: user, content: b}]",
    ],
)
def test_other_json_is_an_answer_like_any(text):
    assert normalise_row(PLAIN | {"chosen": text}) == PLAIN | {"chosen": text}


def test_a_message_may_spell_out_messages():
    row = {**CHAT, "chosen": [GOOD | {"content": json.dumps([USER])}]}
    assert normalise_row(row) == row


def test_extra_keys_and_columns_are_left_out():
    answer = GOOD | {"weight": 1, "tool_calls": None, "function_call": {}, "reasoning_content": ""}
    row = CHAT | {"chosen": [answer], "tools": None, "id": 7}
    assert normalise_row(row) == CHAT


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "What is two"}, {"type": "text", "text": " plus two?", "image_url": None}]
    assert normalise_row(CHAT | {"prompt": [USER | {"content": parts}]}) == CHAT


@pytest.mark.parametrize("name", ["prompt", "query", "question"])
def test_an_input_that_continues_no_instruction_is_refused(name):
    row = {"chosen": " four.", "rejected": " five.", name: "Two plus two is", "input": "Which numbers?"}
    with pytest.raises(
        RowError, match="input is filled, but it continues an instruction only: .* --columns prompt=NAME"
    ):
        normalise_row(row)
    assert normalise_row(row | {"input": ""}) == PLAIN
    with pytest.warns(UserWarning, match=f"column input is not read beside --columns prompt={name}; if it"):
        assert normalise_row(row, {"prompt": name}) == PLAIN


def test_the_input_of_an_instruction_that_is_named_is_read():
    row = {"instruction": "Two plus", "input": "two is", "good": " four.", "rejected": " five."}
    columns = {"prompt": "instruction", "chosen": "good"}
    assert normalise_row(row, columns) == PLAIN | {"prompt": "Two plus\ntwo is"}
    assert normalise_row({**row, "input": None}, columns) == PLAIN | {"prompt": "Two plus"}
    assert recognise(row, [row], columns).columns_read(row) == {"instruction", "input", "good", "rejected"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_columns_of_every_layout_are_those_that_its_pair_depends_on(layout):
    row, _ = EXAMPLES[layout]
    row_format = recognise(row, [row])
    read = row_format.columns_read(row)
    assert row_format.normalise({name: row[name] for name in read}) == row_format.normalise(row)
    for name in read - {"input"}:  # which is optional
        with pytest.raises(RowError):
            row_format.normalise({other: value for other, value in row.items() if other != name})


def test_dsp_takes_the_higher_score_as_chosen():
    row, expected = EXAMPLES["dsp"]
    assert normalise_row(row | {"text": row["text"][::-1], "score": [0.9, 0.2]}) == expected


def test_columns_maps_own_names():
    row = {"my_q": "Two plus two is", "good": " four.", "bad": " five.", "prompt": "something else"}
    columns = {"prompt": "my_q", "chosen": "good", "rejected": "bad"}
    assert normalise_row(row, columns) == PLAIN


@pytest.mark.parametrize("layout", ["alpaca-output", "messages", "sharegpt", "plain", "ultrafeedback", "chat"])
def test_columns_of_the_answers_alone_leave_the_prompt_where_it_is(layout):
    row, _ = EXAMPLES[layout]
    row = {"chosen": "Four.", "rejected": "Five."} | row
    renamed = {{"chosen": "good", "rejected": "bad"}.get(name, name): value for name, value in row.items()}
    row.pop("output", None)
    assert normalise_row(renamed, {"chosen": "good", "rejected": "bad"}) == normalise_row(row)


@pytest.mark.parametrize("name", ["query", "question"])
def test_a_column_of_prompts_is_not_read_beside_the_one_that_is_named(name):
    row = PLAIN | {"my_q": "Two plus two is", name: "Another?"}
    row_format = recognise(row, [row], {"prompt": "my_q"})
    assert row_format.normalise(row) == PLAIN
    with pytest.raises(RowError, match="prompt is missing"):
        row_format.normalise(row | {"my_q": None})


def test_a_column_that_is_named_is_not_read_under_its_own_name_too():
    row = {"system": "Two plus two is", "chosen": " four.", "rejected": " five."}
    assert normalise_row(row, {"prompt": "system"}) == PLAIN


def test_an_empty_prompt_column_does_not_hide_a_filled_question():
    row = {"prompt": "", "question": "Two plus two is", "chosen": " four.", "rejected": " five."}
    assert normalise_row(row) == PLAIN
    messages = {"prompt": [], "messages": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert normalise_row(messages) == CHAT


def test_columns_reaches_into_objects():
    """The raw DSP file has one answer a domain: {"query", "responses": {"academy": ..., "normal": ...}}."""
    row = {"query": "Two plus two is", "responses": {"academy": " four.", "normal": " five."}}
    columns = {"prompt": "query", "chosen": "responses.academy", "rejected": "responses.normal"}
    assert normalise_row(row, columns) == PLAIN


def test_columns_prefers_a_name_with_a_dot_to_a_path():
    row = {"a.b": "Two plus two is", "chosen": " four.", "rejected": " five.", "a": {"b": "no"}}
    assert normalise_row(row, {"prompt": "a.b"}) == PLAIN


def test_a_hole_in_the_first_row_does_not_decide_the_layout():
    rows = [{"prompt": None, "chosen": None, "rejected": "x"}, PLAIN]
    assert recognise(PLAIN, rows) == Format("plain", chat=False)


FAULTY = {
    "no answer": [
        (CHAT, {"chosen": None}, "chosen is missing"),
        (CHAT, {"chosen": []}, "chosen holds no answer"),
        (CHAT, {"rejected": [{"role": "assistant", "content": " "}]}, "rejected holds no answer"),
        (PLAIN, {"rejected": " \n"}, "rejected holds no answer"),
        (CHAT, {"chosen": [USER]}, "chosen holds no answer"),
        (EXAMPLES["chat-implicit"][0], {"chosen": [USER, USER]}, "the assistant has to answer"),
        (EXAMPLES["hh-rlhf"][0], {"chosen": f"{HISTORY}\n\nAssistant:"}, "chosen holds no answer"),
    ],
    "identical answers": [
        (CHAT, {"rejected": [GOOD]}, "two different answers"),
        (PLAIN, {"rejected": " four."}, "two different answers"),
        (EXAMPLES["chat-implicit"][0], {"rejected": [USER, GOOD]}, "two different answers"),
    ],
    "prompts differ": [
        (EXAMPLES["chat-implicit"][0], {"rejected": [SYSTEM, BAD]}, "part after message 0"),
        (
            EXAMPLES["chat-implicit"][0],
            {"rejected": [USER, EARLIER, USER, BAD]},
            r"rejected \(4\) part after message 1",
        ),
        (EXAMPLES["ultrafeedback"][0], {"prompt": "another"}, "none of the user messages"),
        (CHAT, {"chosen": [SYSTEM, GOOD]}, "chosen repeats another prompt"),
    ],
    "several messages": [(CHAT, {"chosen": [GOOD, USER, GOOD]}, "chosen answer has 3 messages")],
    "no prompt": [
        (CHAT, {"prompt": []}, "prompt is empty"),
        (CHAT, {"prompt": None}, "prompt is missing"),
        (PLAIN, {"prompt": " "}, "prompt is empty"),
        (CHAT, {"prompt": [USER, EARLIER]}, "ends with an assistant message"),
    ],
    "wrong type": [
        (PLAIN, {"chosen": 4}, "chosen is int, text is needed"),
        (PLAIN, {"chosen": "\ud800"}, "surrogate"),
        (CHAT, {"chosen": ["Four."]}, r"chosen\[0\] is str, a message"),
        (CHAT, {"chosen": [{"role": "tool", "content": "4"}]}, "role 'tool'"),
        (CHAT, {"chosen": [GOOD | {"tool_calls": [{}]}]}, "tool calls are not supported"),
        (CHAT, {"chosen": [GOOD | {"function_call": {"name": "add"}}]}, "has function_call, .* tool calls are not"),
        (CHAT, {"chosen": [GOOD | {"reasoning_content": "2 + 2"}]}, "reasoning_content, .*; put it into the content"),
        (CHAT, {"chosen": [GOOD | {"thinking": "2 + 2"}]}, "thinking, .*; put it into the content"),
        (CHAT, {"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}, "content is list"),
        (CHAT, {"chosen": [GOOD | {"content": [{"type": "image", "text": "a"}]}]}, "content is list"),
        (CHAT, {"chosen": [GOOD | {"content": []}]}, "content is list"),
        (CHAT, {"chosen": 5}, "a list of messages is needed"),
        (EXAMPLES["hh-rlhf"][0], {"chosen": "Four."}, "does not start with"),
        (EXAMPLES["hh-rlhf-prompt"][0], {"prompt": HISTORY}, "does not end with 'Assistant:'"),
        (EXAMPLES["dsp"][0], {"score": [1, 1]}, "two different numbers"),
        (EXAMPLES["dsp"][0], {"score": [1, float("nan")]}, "two different numbers"),
        (EXAMPLES["dsp"][0], {"text": ["one"]}, "lists of two"),
        (EXAMPLES["alpaca-output"][0], {"output": ["Four."]}, r"the list \[chosen, rejected\]"),
        (EXAMPLES["alpaca-output"][0], {"history": [["a", "b"]]}, "history is not supported"),
        (EXAMPLES["plain-implicit"][0], {"prompt": "Two"}, "first rows have none"),
    ],
}


@pytest.mark.parametrize(
    ("reason", "row", "change", "message"),
    [(reason, *case) for reason, cases in FAULTY.items() for case in cases],
)
def test_a_faulty_row_is_named_with_its_rule(reason, row, change, message):
    row_format = recognise(row, [row])
    with pytest.raises(RowError, match=message) as caught:
        row_format.normalise(row | change)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PLAIN | {"prompt": 7}, "prompt is int, text is needed"),
        (PLAIN | {"chosen": 1, "rejected": -1}, "chosen is int, text is needed"),
        (CHAT | {"chat_template_kwargs": {"enable_thinking": False}}, "the prompt has chat_template_kwargs, which"),
    ],
)
def test_a_dataset_whose_known_columns_are_of_another_type_is_told_so(row, message):
    with pytest.raises(RowError, match=message):
        recognise(row, [row]).normalise(row)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_prompt_of_text_beside_messages_is_refused_until_one_is_named(name):
    row = PLAIN | {name: [USER]}
    with pytest.raises(RowError, match=f"prompt is text and {name} holds messages: .* prompt=prompt or prompt={name}"):
        normalise_row(row)
    assert normalise_row(row, {"prompt": "prompt"}) == PLAIN
    assert normalise_row(row, {"prompt": name})["prompt"] == [USER]
    assert normalise_row(row | {"prompt": ""})["prompt"] == [USER]


def test_unknown_columns_are_listed_with_the_way_out():
    row = {"topic": "sums", "winner": "Four.", "loser": "Five."}
    message = (
        "pairs.csv: .* topic, winner, loser. Name them with --columns prompt=... chosen=... rejected=...; docs/data.md"
    )
    with pytest.raises(DataError, match=message):
        recognise(row, [row], source="pairs.csv")


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("Prompt", "Chosen", "Rejected"), "prompt=Prompt chosen=Chosen rejected=Rejected"),
        (("Question", "response_chosen", "response_rejected"), "prompt=Question chosen=response_chosen rejected=resp"),
        (("user_prompt", "choosen", "rejectd"), "prompt=user_prompt chosen=choosen rejected=rejectd"),
        (("topic", "CHOSEN", "REJECTED"), "prompt=... chosen=CHOSEN rejected=REJECTED"),
    ],
)
def test_columns_of_nearly_known_names_are_proposed(names, columns):
    row = dict(zip(names, PLAIN.values(), strict=True)) | {"chosen_score": 9, "rejected_score": 1}
    with pytest.raises(DataError, match=f"Do you mean --columns {columns}") as caught:
        recognise(row, [row])
    assert len(str(caught.value)) < 300
    if "..." not in columns:
        mapping = dict(zip(("prompt", "chosen", "rejected"), names, strict=True))
        assert normalise_row(row, mapping) == PLAIN


def test_proposed_columns_can_be_pasted():
    row = {"prompt ": "Add", " chosen": "Four.", "rejected; ls": "Five."}
    with pytest.raises(DataError, match="no known preference layout") as caught:
        recognise(row, [row])
    proposed = re.search(r"--columns (.*)\? docs", str(caught.value))[1]
    assert shlex.split(proposed) == ["prompt=prompt ", "chosen= chosen", "rejected=rejected; ls"]


def test_proposed_columns_keep_those_that_were_named():
    row = {"Prompt": "Add", "good": "Four.", "Rejected": "Five."}
    with pytest.raises(DataError, match="--columns prompt=Prompt chosen=good rejected=Rejected"):
        recognise(row, [row], {"chosen": "good"})


def test_answers_beside_an_unknown_text_column_are_not_taken_for_a_dataset_without_prompts():
    row = {"topic": "Add", "chosen": "Four.", "rejected": "Five."}
    with pytest.raises(DataError, match="no known preference layout"):
        recognise(row, [row])
    columns = {"chosen": "chosen", "rejected": "rejected"}
    with pytest.warns(UserWarning, match="no prompt, .* the columns topic; .* --columns prompt=topic"):
        assert recognise(row, [row], columns).layout == "plain-implicit"


def test_a_mapping_to_a_column_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="maps prompt to 'my_q', the columns are prompt, chosen, rejected"):
        normalise_row(PLAIN, {"prompt": "my_q"})


def test_a_mapping_of_an_unknown_name_is_refused():
    with pytest.raises(DataError, match="'reward' cannot be mapped; the names are .*, and in evaluations category"):
        normalise_row(PLAIN, {"reward": "prompt"})


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match=re.escape("pairs.jsonl: the dataset is empty")):
        recognise([], [], source="pairs.jsonl")


NAMES = ["prompt", "chosen", "rejected", "system", "messages", "conversations", "instruction", "input"]
NAMES += ["output", "text", "score", "query", "role", "content", "from", "value"]
LEAVES = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=6)
LEAVES |= st.sampled_from(["user", "assistant", "\n\nHuman: a\n\nAssistant: b", "## Human:\na\n\n## Assistant:\nb"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", 3]), "content": LEAVES})
COLUMN = VALUES | st.lists(MESSAGE, max_size=3)
ROWS = st.dictionaries(st.sampled_from(NAMES), COLUMN, max_size=6)


@settings(max_examples=300)
@given(rows=st.lists(ROWS, min_size=1, max_size=3))
def test_any_rows_give_pairs_or_data_errors(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        row_format = recognise(names, rows)
    except DataError:
        return
    for row in rows:
        try:
            pair = row_format.normalise(row)
        except RowError:
            continue
        kind = list if row_format.chat else str
        assert {name: type(value) for name, value in pair.items()} == dict.fromkeys(PLAIN, kind)
        assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize("name", ["image", "images", "audio", "audios", "video", "videos", "tools", "functions"])
def test_prompts_that_are_more_than_text_are_refused_unless_the_text_alone_is_asked_for(name):
    row = PLAIN | {name: [{"path": "cat.png"}]}
    with pytest.raises(RowError, match=f"the prompt has {name}, which pairs of text cannot hold; .*--columns"):
        normalise_row(row)
    for nothing in ([], "", "[]", " null", {"path": None, "bytes": None}):
        assert normalise_row(PLAIN | {name: nothing}) == PLAIN
    assert normalise_row(row, {"prompt": "prompt"}) == PLAIN
    with pytest.raises(RowError, match="the prompt has chat_template_kwargs"):
        normalise_row(PLAIN | {"chat_template_kwargs": {"enable_thinking": False, "style": None}})
