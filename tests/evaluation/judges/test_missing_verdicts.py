"""Why verdicts are missing, told where their number is."""

from qadapter.evaluation.card import missing_lines
from qadapter.evaluation.judging import missing_reason

ENDPOINT = "endpoint:http://localhost:21999/v1#m"


def judged(*reasons, judge=ENDPOINT):
    verdicts = [{"winner": None, "reason": reason} for reason in reasons] + [{"winner": "tie", "reason": "identical"}]
    return {"judge": judge, "column": "policy", "missing": len(reasons), "verdicts": verdicts}


def test_the_commonest_reason_is_told_without_the_endpoints_address():
    down = "ConnectError: http://localhost:21999/v1 refused (attempt 4 of 4)"
    (line,) = missing_lines([judged("no reply within 60 s", down, down), judged()])
    assert line == (
        "endpoint:m on policy: 3 of 4 verdicts missing, most often (2) for: "
        "ConnectError: (address) refused (attempt 4 of 4)"
    )


def test_reasons_of_one_kind_count_together():
    misread = [f"the reply is none of FIRST, SECOND, TIE: {reply!r} (attempt 4 of 4)" for reply in ("A", "it's b")]
    assert missing_reason(judged("no reply within 60 s", *misread)) == (misread[0], 2)


def test_that_a_judge_was_given_up_is_not_why_it_failed():
    given_up = ["not asked: 8 comparisons in a row had no verdict"] * 16
    assert missing_reason(judged(*["HTTP status 503 (attempt 4 of 4)"] * 8, *given_up)) == (
        "HTTP status 503 (attempt 4 of 4)",
        8,
    )
    assert missing_reason(judged()) is None
