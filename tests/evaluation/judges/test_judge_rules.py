"""Judges: exact rules, the judges that are refused, and how verdicts become a win rate."""

import time
from pathlib import Path

import pytest

from qadapter import QAdapterError
from qadapter.evaluation.judges import Verdict, judge_all, make_judge, win_rate
from qadapter.evaluation.judges.rules import RULES
from qadapter.generation import Answer

# -- rules -----------------------------------------------------------------------------------------------------------

# (rule, an answer that satisfies it, one that does not)
RULE_EXAMPLES = [
    ("rule:house-style", "Yes. It is.", "- Yes\n- No"),
    ("rule:house-style", "Yes. It is.", Answer("Yes. It is.", finished=False)),
    ("rule:max-sentences=2", "One. Two.", "One. Two. Three."),
    ("rule:max-words=3", "one two three", "one two three four"),
    ("rule:max-words=3", "one", "   "),
    ("rule:max-words=3", "one two", Answer("one two", finished=False)),
    ("rule:max-sentences=2", "One. Two.", Answer("One. Two", finished=False)),
    ("rule:regex=^Dear \\w+,", "Dear Ann, hello", "Hello Ann"),
    ("rule:regex=a=b", "it says a=b", "it says a"),
    ("rule:json", ' {"a": [1, null]} ', '{"a": 1,}'),
    ("rule:json", "[]", "NaN"),
    ("rule:json", "[]", "[" * 100_000),
    ("rule:json", "[]", ""),
    ("rule:banned=sorry,as an AI", "No sorrystone here", "I am SORRY."),
    ("rule:banned=sorry,as an AI", "Gladly.", "Well, as an ai I cannot"),
    ("rule:banned=c++", "c is fine", "I like C++, too"),
]


@pytest.mark.parametrize(("rule", "good", "bad"), RULE_EXAMPLES)
def test_an_answer_that_satisfies_the_rule_wins_in_either_place(rule, good, bad):
    verdicts = judge_all(make_judge(rule), ["p"] * 4, [good, bad, good, bad], [bad, good, good, bad])
    assert [verdict.winner for verdict in verdicts] == ["a", "b", "tie", "tie"]
    assert [verdict.flipped for verdict in verdicts] == [None] * 4


def test_rule_verdicts_do_not_depend_on_the_order_of_answers():
    answers = ["One.", "One. Two. Three.", "", "- list", '{"a": 1}', "sorry", "Dear you, a b c d e f g"]
    pairs = [(a, b) for a in answers for b in answers]
    mirrored = {"a": "b", "b": "a", "tie": "tie"}
    for rule in {rule for rule, _, _ in RULE_EXAMPLES}:
        one = judge_all(make_judge(rule), ["p"] * len(pairs), *zip(*pairs, strict=True))
        other = judge_all(make_judge(rule), ["p"] * len(pairs), [b for _, b in pairs], [a for a, _ in pairs])
        assert [mirrored[verdict.winner] for verdict in one] == [verdict.winner for verdict in other]


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(a|b|ab)*c", "(.*a){25}$"])
def test_a_pattern_that_explodes_gives_no_verdict_within_a_bounded_time(pattern):
    start = time.process_time()  # the engine counts it, too
    (verdict,) = judge_all(make_judge(f"rule:regex={pattern}"), ["p"], ["a" * 5000 + "b"], ["b"])
    assert time.process_time() - start < 5
    # An engine clever enough to answer is welcome to.
    assert verdict.winner is None or verdict.winner in ("tie", "b")


def test_the_pattern_that_explodes_in_re_is_stopped_and_says_so():
    (verdict,) = judge_all(make_judge("rule:regex=(.*a){25}$"), ["p"], ["a" * 5000 + "b"], ["b"])
    assert verdict.winner is None
    assert "took more than 1 s" in verdict.reason


def test_an_answer_too_long_to_search_gives_no_verdict():
    (verdict,) = judge_all(make_judge("rule:regex=a"), ["p"], ["a" * 100_001], ["b"])
    assert verdict == Verdict(None, "regex=a: the answer has 100001 characters; at most 100000 are searched")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rule:nice", "rule 'nice' is unknown; the rules are house-style"),
        ("rule:max-words", "rule 'max-words' needs an argument"),
        ("rule:json=1", "takes no argument; '1' was given"),
        ("rule:max-words=0", "must be a whole number of at least 1"),
        ("rule:max-sentences=two", "must be a whole number of at least 1"),
        ("rule:banned=a,,b", "none of them empty"),
        ("rule:regex=(", "not a regular expression"),
        ("rule:regex=" + "a" * 501, "a pattern of 501 characters; at most 500"),
        ("oracle:delphi", "must be rule:NAME"),
        (
            "endpoint:http://localhost:1/v1",
            "endpoint http://localhost:1/v1: must be like http://localhost:8000/v1#my-model",
        ),
        ("endpoint:https://me:secret@judge.example/v1#m", "judge endpoint at judge.example has a user or password"),
        ("endpoint:file:///etc/passwd#m", "must be like http://localhost:8000/v1#my-model"),
        ("reward:", "the judge names no model"),
        ("reward:/no/such/folder", "judge model /no/such/folder cannot be loaded"),
    ],
)
def test_a_judge_that_cannot_work_is_refused(spec, message):
    with pytest.raises(QAdapterError) as caught:
        make_judge(spec)
    assert message in str(caught.value)


def test_numbers_of_answers_must_agree():
    with pytest.raises(QAdapterError, match="2 prompts, 1 answers a and 2 answers b"):
        judge_all(make_judge("rule:json"), ["p", "q"], ["1"], ["1", "2"])


def test_progress_counts_every_comparison():
    done = []
    judge_all(make_judge("rule:json"), ["p"] * 3, ["1"] * 3, ["{"] * 3, progress=done.append)
    assert sum(done) == 3


# -- win rate --------------------------------------------------------------------------------------------------------


def test_win_rate_counts_ties_half_and_leaves_missing_verdicts_out():
    verdicts = [Verdict("a", "")] * 3 + [Verdict("b", "")] + [Verdict("tie", "")] * 2 + [Verdict(None, "")] * 4
    result = win_rate(verdicts)
    assert result[:4] == (3, 1, 2, 4)
    assert result.rate.value == pytest.approx(4 / 6)
    assert result.rate.n == 6
    assert result.rate.low < 4 / 6 < result.rate.high
    assert result.order_bias is None


def test_missing_verdicts_alone_give_no_rate():
    result = win_rate([Verdict(None, "")] * 2)
    assert result.missing == 2
    assert result.rate.n == 0
    assert (result.rate.low, result.rate.high) == (0.0, 1.0)


def test_order_bias_is_the_share_of_flipped_verdicts():
    verdicts = [Verdict("tie", "", True), Verdict("a", "", False), Verdict("b", "", False), Verdict(None, "")]
    bias = win_rate(verdicts).order_bias
    assert bias.value == pytest.approx(1 / 3)
    assert bias.n == 3


def test_every_rule_is_documented():
    document = Path(__file__).parents[3] / "docs" / "evaluation.md"
    for text in (make_judge.__doc__, document.read_text(encoding="utf-8")):
        assert [name for name in RULES if f"rule:{name}" not in text] == []
