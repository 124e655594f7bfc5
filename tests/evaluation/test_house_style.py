"""The quickstart's house style: what is a sentence, and which answers keep to one or two plain ones."""

import pytest

from qadapter.evaluation.house_style import follows_house_style, sentence_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" \n", 0),
        ("Paris", 1),
        ("Paris.", 1),
        ("Paris. It is large", 2),
        ("Really?! Yes! Good...", 3),
        ("Pi is 3.14 and e is 2.718.", 1),
        ("See example.com for v1.2.3.", 1),
        ('"Go." She went.', 2),
        ("(It rains.) We stay. ", 2),
        ("Yes.\nNo.", 2),
        ("It costs 5 ... 7 euros.", 2),
        ("Ask Dr. Smith.", 2),  # an abbreviation counts as an end: the rule errs against the answer
    ],
)
def test_sentences_end_at_marks_before_white_space(text, count):
    assert sentence_count(text) == count


@pytest.mark.parametrize(
    "answer",
    [
        "Paris.",
        "Paris",
        "  The capital is Paris. It has two million people.  ",
        "-5 degrees is cold.",
        "The #1 rule: breathe.",
        "Use 2 * 3 = 6.",
        "Well-known - and true.",
    ],
)
def test_one_or_two_plain_sentences_follow_the_house_style(answer):
    assert follows_house_style(answer, finished=True)
    assert not follows_house_style(answer, finished=False)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  ",
        "One. Two. Three.",
        "One. Two. Three",
        "First line.\nSecond line.",
        "- Paris",
        "* Paris",
        "• Paris",
        "# Paris",
        "> Paris",
        "1. Paris",
        "2) Paris",
        "It is **Paris**.",
        "Run ```ls```.",
    ],
)
def test_more_sentences_lines_lists_and_markup_do_not(answer):
    assert not follows_house_style(answer, finished=True)
