"""Limits: what passes, what fails, what is close, and which limits are refused."""

import math

import pytest
import torch

from qadapter.errors import ConfigError
from qadapter.evaluation.card import gate_cells
from qadapter.evaluation.gate import Limits, check, drop, keeps, parse_drops, verdict
from qadapter.evaluation.resampling import mean_intervals


def bounds(value, low, high, n=50):
    return {"value": value, "low": low, "high": high, "n": n}


TASKS = {
    "lambada": {
        "metric": "acc",
        "higher_is_better": True,
        "n": 50,
        "columns": {"base": bounds(0.6, 0.5, 0.7), "policy": bounds(0.57, 0.5, 0.7)},
        "differences": {"policy": {"value": -0.03, "low": -0.05, "high": -0.01, "mcnemar_p": 0.1}},
    },
    "errors": {
        "metric": "error",
        "higher_is_better": False,
        "n": 50,
        "columns": {"base": bounds(0.2, 0.1, 0.3), "policy": bounds(0.25, 0.1, 0.3)},
        "differences": {"policy": {"value": 0.05, "low": 0.01, "high": 0.09, "mcnemar_p": None}},
    },
    "perplexity": {
        "metric": "word_perplexity",
        "n": 50,
        "columns": {"base": bounds(20.0, 19.0, 21.0), "policy": bounds(21.0, 19.0, 22.0)},
        "differences": {"policy": {"value": 1.0, "low": 0.5, "high": 1.5, "mcnemar_p": None}},
    },
}
RESULTS = {
    "pairs": {
        "columns": {"policy": {"accuracy": bounds(0.72, 0.66, 0.78)}},
        "chosen": {"columns": {"policy": {"kl": bounds(0.04, 0.03, 0.06)}}},
    },
    "neutral": {"columns": {"policy": {"kl": bounds(0.01, 0.005, 0.02)}}},
    "instructions": {"columns": {"policy": {"kl": bounds(None, None, None)}}},
    "tasks": TASKS,
}


def test_each_set_of_texts_has_to_keep_the_limit_on_kl():
    entries = check(RESULTS, "policy", Limits(max_kl=0.05))
    assert [entry["passes"] for entry in entries] == [True, True, False]  # the last one could not be measured
    assert [entry["close"] for entry in entries] == [True, False, True]
    assert verdict(entries) == "fails"
    assert verdict(entries[:2]) == "passes"
    assert verdict([]) == "no limits"


def test_a_close_call_says_why():
    """One observation has no interval."""
    single = {**RESULTS, "neutral": {"columns": {"policy": {"kl": bounds(0.01, None, None, 1)}}}}
    chosen, neutral, *_ = check(single, "policy", Limits(max_kl=0.05))
    assert gate_cells(chosen)[2] == "passes, close: the interval holds the limit"
    assert gate_cells(neutral)[2] == "passes, close: there is no interval"


def test_accuracy_has_to_reach_its_limit():
    (entry,) = check(RESULTS, "policy", Limits(min_accuracy=0.72))
    assert entry["passes"]
    assert entry["close"]
    assert not check(RESULTS, "policy", Limits(min_accuracy=0.8))[0]["passes"]


def test_a_confident_gate_asks_for_the_whole_interval():
    kls = check(RESULTS, "policy", Limits(max_kl=0.05, confident=True))
    assert [entry["passes"] for entry in kls] == [False, True, False]  # 0.04 [0.03, 0.06], 0.01 [0.005, 0.02], unknown
    assert [entry["close"] for entry in kls] == [True, False, True]
    for limits, expected in (
        ({"min_accuracy": 0.7}, False),  # 0.72 [0.66, 0.78]
        ({"min_accuracy": 0.66}, True),
        ({"max_drop": {"lambada": 4.0}}, False),  # 3 [1, 5]
        ({"max_drop": {"lambada": 5.0}}, True),
    ):
        (entry,) = check(RESULTS, "policy", Limits(**limits, confident=True))
        assert entry["passes"] == expected, limits
    single = {**RESULTS, "neutral": {"columns": {"policy": {"kl": bounds(0.01, None, None, 1)}}}}
    assert not check(single, "policy", Limits(max_kl=0.05, confident=True))[1]["passes"]


@pytest.mark.parametrize(("skewed", "most"), [(False, 11), (True, 26)])  # 5 and 16 of 200 expected
def test_a_confident_gate_lets_hardly_ever_pass_what_breaks_its_limit(skewed, most):
    """The truth is the limit itself: the estimate keeps it every other time, the whole interval one time in forty.

    Of skewed figures (KLs whose logarithms are normal, σ = 1) the bootstrap's upper end is too low: one time in twelve.
    """
    generator = torch.Generator().manual_seed(0)
    passed = {False: 0, True: 0}
    for seed in range(200):
        if skewed:
            texts = torch.randn(1, 40, generator=generator, dtype=torch.float64).exp() * (0.05 / math.exp(0.5))
        else:
            texts = torch.rand(1, 40, generator=generator, dtype=torch.float64) * 0.1
        kl = mean_intervals(texts, seed=seed)[0]._asdict()
        for confident in passed:
            passed[confident] += keeps(kl, "at most", 0.05, confident)
    assert 75 < passed[False] < 140
    assert passed[True] <= most


def test_drops_are_in_percentage_points_with_their_interval():
    lost = drop(RESULTS, "lambada", "policy")
    assert [lost[key] for key in ("value", "low", "high")] == pytest.approx([3.0, 1.0, 5.0])
    risen = drop(RESULTS, "errors", "policy")  # more errors are a drop as well
    assert [risen[key] for key in ("value", "low", "high")] == pytest.approx([5.0, 1.0, 9.0])
    assert check(RESULTS, "policy", Limits(max_drop={"lambada": 3.5}))[0]["passes"]
    assert not check(RESULTS, "policy", Limits(max_drop={"errors": 3.5}))[0]["passes"]


def test_a_figure_at_its_limit_passes():
    """An adapter without effect has a KL of 0, and keeps every limit."""
    none = {"columns": {"policy": {"kl": bounds(0.0, 0.0, 0.0)}}}
    same = {**TASKS["lambada"], "differences": {"policy": bounds(0.0, 0.0, 0.0)}}
    results = {"pairs": {"chosen": none}, "neutral": none, "tasks": {"lambada": same}}
    entries = check(results, "policy", Limits(max_kl=0.0, max_drop={"lambada": 0.0}))
    assert [entry["quantity"] for entry in entries] == ["KL on chosen answers", "KL on neutral text", "drop on lambada"]
    assert verdict(entries) == "passes"
    assert all(entry["close"] for entry in entries)  # an interval's end is of the interval


@pytest.mark.parametrize("points", [7, 14, 28, 29, 57])  # whose hundredfold share is above the number itself or below
def test_a_drop_of_just_its_limit_passes(points):
    fallen = {**TASKS["lambada"], "differences": {"policy": bounds(-points / 100, -points / 100, -points / 100)}}
    (entry,) = check({**RESULTS, "tasks": {"lambada": fallen}}, "policy", Limits(max_drop={"lambada": points}))
    assert entry["passes"]
    assert entry["value"] == points


def test_a_drop_that_was_not_measured_does_not_pass():
    unknown = {**TASKS["lambada"], "differences": {"policy": bounds(None, None, None)}}
    (entry,) = check({**RESULTS, "tasks": {"lambada": unknown}}, "policy", Limits(max_drop={"lambada": 100.0}))
    assert (entry["value"], entry["passes"], entry["close"]) == (None, False, True)


def test_a_drop_of_what_is_no_rate_does_not_pass():
    """It is known only when all has been measured, which must not be lost."""
    (entry,) = check(RESULTS, "policy", Limits(max_drop={"perplexity": 100.0}))
    assert entry["quantity"] == "drop on perplexity, whose metric 'word_perplexity' is no rate"
    assert (entry["value"], entry["passes"]) == (None, False)


def test_drops_that_cannot_be_told():
    with pytest.raises(ConfigError, match=r"no such task was run; the results have \['errors', 'lambada'"):
        drop(RESULTS, "mmlu", "policy")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_kl": -0.1}, r"--max-kl = -0.1: must be 0 or above"),
        ({"max_kl": float("nan")}, "--max-kl = nan"),
        ({"min_accuracy": 70.0}, "--min-accuracy = 70.0: must be between 0 and 1"),
        ({"min_accuracy": -0.1}, "--min-accuracy = -0.1: must be between 0 and 1"),
        ({"max_drop": {"arc": -1.0}}, "--max-drop arc = -1.0: must be between 0 and 100"),
        ({"max_drop": {"arc": float("inf")}}, "--max-drop arc = inf"),
    ],
)
def test_limits_out_of_their_range_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)


def test_drops_on_the_command_line():
    assert parse_drops(["lambada=1.0", "a=b.yaml=2"]) == {"lambada": 1.0, "a=b.yaml": 2.0}
    for wrong in (["lambada"], ["=1"], ["lambada=x"], ["1.0"], [""]):
        with pytest.raises(ConfigError, match="write TASK=POINTS, such as"):
            parse_drops(wrong)
    with pytest.raises(ConfigError, match="names 'a' twice"):
        parse_drops(["a=1", "a=2"])
