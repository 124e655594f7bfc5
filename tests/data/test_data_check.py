import io
import json
import re

import pytest
from data_examples import chat_pair, plain_pair
from rich.console import Console
from transformers import AutoConfig

from qadapter.data import check_preferences, render
from qadapter.data.check import length_statistics
from qadapter.data.check_report import Example, LengthStatistics, RowProblem
from qadapter.errors import ConfigError, DataError

GOOD = [plain_pair(number) for number in range(1, 6)]
SWAPPED = {"prompt": GOOD[1]["prompt"], "chosen": GOOD[1]["rejected"], "rejected": GOOD[1]["chosen"]}
ROWS = [
    *GOOD,
    GOOD[0],  # 6: duplicate
    SWAPPED,  # 7: contradiction
    GOOD[2] | {"rejected": GOOD[2]["chosen"]},  # 8: identical answers
    GOOD[3] | {"chosen": " "},  # 9: empty answer
    "oops",  # 10
    GOOD[3] | {"chosen": None},  # 11: missing answer
]


def printed(report, **options):
    stream = io.StringIO()
    render(report, Console(file=stream, width=250, **options))
    return stream.getvalue()


def test_all_bad_rows_are_collected(write_lines):
    report = check_preferences(write_lines(ROWS))
    assert not report.ok
    assert (report.layout, report.chat, report.rows, report.pairs, report.prompts) == (
        "plain",
        False,
        11,
        7,
        5,
    )
    assert [problem.row for problem in report.errors] == [8, 9, 10, 11]
    assert report.errors[1].message.endswith("pairs.jsonl, line 9: chosen holds no answer")
    assert isinstance(report.errors[2], RowProblem)
    assert report.errors[2].reason == "unreadable"
    assert report.identical_pairs == [8]
    assert report.empty_answers == [9, 11]


def test_duplicates_and_contradictions_name_both_rows(write_lines):
    report = check_preferences(write_lines(ROWS))
    assert report.duplicates == [(6, 1)]
    assert report.contradictions == [(7, 2)]


def test_examples_name_their_rows_where_a_row_gives_several_pairs(write_lines, chatml):
    """The first pair of row 1 is dropped; its second is an example all the same, and not row 2's."""
    rows = [
        {"query": f"q{number}", "responses": {"academy": f"good {number}", "normal": rejected, "business": "b"}}
        for number, rejected in ((1, "long " * 60), (2, "n"))
    ]
    report = check_preferences(f"dsp/academy:{write_lines(rows)}", chatml, max_length=40)
    assert report.tokenisation.dropped == {"answer too long": [1]}
    shown = [(example.row, f"q{example.row}" in example.prompt) for example in report.examples]
    assert shown == [(1, True), (2, True), (2, True)]


@pytest.mark.parametrize(
    ("row", "columns", "read", "unread"),
    [
        (GOOD[0] | {"context": "x", "id": 3, "empty": None}, None, "chosen, prompt, rejected", "context, id"),
        ({"query": "a", "question": "b", "chosen": "c", "rejected": "d"}, None, "chosen, query, rejected", "question"),
        ({"system": "s", "system_prompt": "t"} | GOOD[0], None, "chosen, prompt, rejected, system", "system_prompt"),
        (
            {"query": "a", "responses": {"good": "b", "bad": "c"}, "other": {"x": "y"}},
            {"prompt": "query", "chosen": "responses.good", "rejected": "responses.bad"},
            "query, responses.bad, responses.good",
            "other",
        ),
        (GOOD[0], None, "chosen, prompt, rejected", "-"),
    ],
)
def test_the_columns_that_are_read_and_those_that_are_not_are_named(write_lines, row, columns, read, unread):
    report = check_preferences(write_lines([row]), columns=columns)
    assert f"\nread: {read}; not read: {unread}\n" in printed(report)
    assert (
        report.to_dict()["columns_unread"]
        == report.columns_unread
        == [name for name in unread.split(", ") if name != "-"]
    )


def test_clean_data_is_ok(write_lines):
    report = check_preferences(write_lines(GOOD))
    assert report.ok
    assert report.errors == report.duplicates == report.contradictions == []


def test_duplicates_alone_are_no_error(write_lines):
    assert check_preferences(write_lines([GOOD[0], GOOD[0]])).ok


def test_lengths_are_words_without_a_tokenizer(write_lines):
    rows = [GOOD[0] | {"chosen": "one two three"}, GOOD[1], GOOD[2] | {"rejected": "a b c d"}]
    report = check_preferences(write_lines(rows))
    assert report.unit == "words"
    assert report.lengths["chosen"] == LengthStatistics(2, 2, 3, 3)
    assert report.lengths["rejected"] == LengthStatistics(2, 2, 4, 4)
    assert report.chosen_longer == pytest.approx(1 / 3)


def test_words_of_a_chat_are_those_of_its_contents(write_lines):
    report = check_preferences(write_lines([chat_pair("How are you?", "Fine.", "So so.")]))
    assert [report.lengths[side].maximum for side in ("prompt", "chosen", "rejected")] == [3, 1, 2]
    assert report.examples == [Example(1, "user: How are you?\nassistant: ", "Fine.", "So so.")]


def test_percentiles_are_nearest_ranks():
    assert length_statistics(range(1, 101)) == LengthStatistics(1, 50.5, 95, 100)
    assert length_statistics([7]) == LengthStatistics(7, 7, 7, 7)
    assert length_statistics([3, 1, 2]) == LengthStatistics(1, 2, 3, 3)


def test_with_a_tokenizer_lengths_and_examples_are_what_is_trained(write_lines, chatml):
    report = check_preferences(write_lines([chat_pair("Why?", "So.", "No.")]), chatml)
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert report.examples == [Example(1, prompt, "So.<|im_end|>", "No.<|im_end|>")]
    assert report.unit == "tokens"
    assert report.lengths["chosen"].maximum == len(chatml("So.<|im_end|>").input_ids)


def test_tokenisation_is_reported_in_the_row_numbers_of_the_source(write_lines, word_level):
    rows = [
        "",
        "oops",
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    report = check_preferences(write_lines(rows), word_level)
    assert report.tokenisation is not None
    assert report.tokenisation.dropped == {"identical tokens": [3]}
    assert [example.row for example in report.examples] == [4]


@pytest.mark.parametrize(
    ("kind", "changes", "error", "warning"),
    [
        ("llama", {}, None, None),
        ("llama", {"vocab_size": 8}, "pairs hold token 8, but .* 8 rows .vocab_size.: use the tokenizer that", None),
        (
            "llama",
            {"max_position_embeddings": 3},
            None,
            "1 of 2 pairs are longer than .* 3 positions .* up to 5 tokens, so",
        ),
        (
            "gpt2",
            {"n_positions": 4},
            "1 of 2 pairs are longer than .* 4 positions .*: give --max-length 4, which",
            None,
        ),
        ("gpt2", {"n_positions": 5}, None, None),
    ],
)
def test_pairs_are_held_against_the_base(write_lines, word_level, kind, changes, error, warning):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},  # with </s> three tokens
        {"prompt": "a b", "chosen": "c", "rejected": "e f"},  # five, of which "f" is the last of the vocabulary
    ]
    config = AutoConfig.for_model(kind, **({"vocab_size": 9} | changes))
    report = check_preferences(write_lines(rows), word_level, base_config=config)
    assert report.ok is (error is None)
    for found, expected in ((report.tokenisation_error, error), (report.context_warning, warning)):
        assert (found is None) if expected is None else re.search(expected, found)
        assert found is None or found in printed(report)


def test_a_missing_chat_template_is_a_finding(write_lines, word_level):
    report = check_preferences(write_lines([chat_pair()]), word_level)
    assert not report.ok
    assert "no chat template" in report.tokenisation_error
    assert "no chat template" in printed(report)


def test_max_rows_limits_the_look(write_lines):
    report = check_preferences(write_lines(ROWS), max_rows=4)
    assert (report.rows, len(report.examples), report.ok) == (4, 3, True)


def test_the_report_is_json(write_lines, chatml):
    for report in (
        check_preferences(write_lines(ROWS)),
        check_preferences(write_lines(GOOD), chatml, max_length=50),
    ):
        as_dict = json.loads(json.dumps(report.to_dict()))
        assert as_dict["ok"] is report.ok
        assert as_dict["layout"] == "plain"


def test_what_cannot_be_looked_at_raises(write_lines, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        check_preferences(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no known preference layout"):
        check_preferences(write_lines([{"a": 1}]))
    with pytest.raises(ConfigError, match="max_rows"):
        check_preferences(write_lines(GOOD), max_rows=0)


def test_the_trained_part_is_marked_with_and_without_colour(write_lines, chatml):
    report = check_preferences(write_lines([chat_pair("Why [bold]?", "So.", "No.")]), chatml)
    plain = printed(report, no_color=True)
    assert "user\nWhy [bold]?<|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]" in plain
    assert "\x1b[1;32m[[So.<|im_end|>]]\x1b[0m" in printed(report, force_terminal=True, color_system="standard")


def test_the_printed_report_names_every_finding(write_lines):
    text = printed(check_preferences(write_lines(ROWS)))
    for finding in (
        "layout plain (plain text)",
        "11 rows, 7 pairs, 5 different prompts",
        "error: no answer: 2 rows (9, 11)",
        "line 10: not JSON",
        "warning: duplicate: 1 rows (6 and 1)",
        "warning: contradicts an earlier row: 1 rows (7 and 2)",
        "Lengths in words",
        "not ok",
    ):
        assert finding in text


def test_long_lists_and_texts_are_shortened(write_lines):
    rows = [GOOD[0] | {"chosen": "long " * 1000}] + [GOOD[0] | {"chosen": ""}] * 30
    text = printed(check_preferences(write_lines(rows)))
    assert "(2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 20 more)" in text
    assert "characters ...]" in text
    assert len(text) < 8000
