"""Figures of held-out pairs from known log-probabilities."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_policy

from qadapter import QAdapterConfig
from qadapter.config import PRESETS
from qadapter.evaluation.columns import BASE, Column
from qadapter.evaluation.drift import BaseTokens, TextDrift, TokenDrift, measure_texts
from qadapter.evaluation.preferences import (
    PairDrift,
    Temperatures,
    accuracy_at_equal_length,
    by_category,
    calibration,
    paired,
    preference_figures,
)
from qadapter.evaluation.subjects import Subject
from qadapter.evaluation.texts import Text


def side(base, policy):
    """An answer with given log-probabilities of its tokens."""
    base, policy = torch.tensor(base), torch.tensor(policy)
    nothing = torch.zeros_like(base)
    return TextDrift(BaseTokens(base, *[nothing] * 2), {"policy": TokenDrift(policy, *[nothing] * 5)})


# (base, policy) of the chosen, then of the rejected answer.
PAIRS = [
    PairDrift.of(side([-1.0, -2.0], [-1.0, -1.0]), side([-1.0], [-1.5])),  # gained on both sides
    PairDrift.of(side([-3.0], [-4.0]), side([-1.0, -1.0], [-1.0, -1.0])),  # lost
    PairDrift.of(side([-2.0], [-2.0]), side([-1.0, -4.0, -1.0], [-4.0, -1.0, -1.0])),  # the same
]
TEMPERATURES = Temperatures(0.5, 0.2)
COMMON = {BASE: TEMPERATURES, "policy": TEMPERATURES}


def test_margins_of_a_pair():
    pair = PAIRS[0]
    assert pair.margin("policy") == pytest.approx(-2.0 + 1.5)
    assert pair.token_margin("policy") == pytest.approx(-1.0 + 1.5)
    assert pair.log_ratio_margin("policy") == pytest.approx((-2.0 + 3.0) - (-1.5 + 1.0))
    assert pair.reward_margin("policy", TEMPERATURES) == pytest.approx(0.5 * -0.5 - 0.2 * -2.0)
    chosen, rejected = (0.5 * -1.0 + 0.2 * 1.0) + 0.5 * (0.5 * -1.0 + 0.2 * 2.0), 0.5 * -1.5 + 0.2 * 1.0
    assert pair.reward_margin("policy", Temperatures(0.5, 0.2, gamma=0.5)) == pytest.approx(chosen - rejected)
    assert pair.reward_margin("policy", Temperatures(0.5, 0.2, 0.5, discount_floor=1.0)) == pytest.approx(
        pair.reward_margin("policy", TEMPERATURES)
    )
    assert pair.reward_margin("policy", Temperatures(0.5, 0.2, length_normalised=True)) == pytest.approx(
        (0.5 * -2.0 + 0.2 * 3.0) / 2 - (0.5 * -1.5 + 0.2 * 1.0)
    )
    assert pair.length_difference == 1


@pytest.mark.parametrize("name", PRESETS)
def test_margins_of_rewards_are_differences_of_the_returns_that_are_trained(name):
    policy = tiny_policy(config=QAdapterConfig.preset(name))
    texts = [Text([3, 4, 5], [6, 7, 8, 9]), Text([3, 4, 5], [10, 11])]
    (pair,) = paired(measure_texts(policy, texts, [Column("policy")]))

    def returned(text):
        ids = torch.tensor([[*text.context, *text.answer]])
        answer = torch.arange(ids.shape[1]).unsqueeze(0) >= len(text.context)
        return policy.score(ids, torch.ones_like(ids), answer).returns.item()

    temperatures = Subject("", policy, None).temperatures(Column("policy"))
    expected = returned(texts[0]) - returned(texts[1])
    assert pair.reward_margin("policy", temperatures) == pytest.approx(expected, abs=1e-5)


def test_figures_of_pairs():
    figures = preference_figures(PAIRS, COMMON)
    assert list(figures) == [BASE, "policy"]
    assert figures["policy"]["accuracy"].value == 0.5  # won, lost, tied
    assert figures["policy"]["prefers_chosen"].value == pytest.approx(1 / 3 + 0.5 / 3)
    assert figures["policy"]["prefers_chosen_summed"].value == pytest.approx(1 / 3)
    gains = [pair.token_margin("policy") - pair.token_margin(BASE) for pair in PAIRS]
    assert figures["policy"]["token_margin_gain"].value == pytest.approx(sum(gains) / 3)


def test_the_base_is_at_chance_by_definition():
    figures = preference_figures(PAIRS, COMMON)[BASE]
    assert figures["accuracy"] == figures["accuracy_at_equal_length"] == (0.5, 0.5, 0.5, 3)
    assert figures["token_margin_gain"][:3] == (0.0, 0.0, 0.0)


def test_a_column_without_temperatures_has_no_rewards():
    figures = preference_figures(PAIRS, {BASE: TEMPERATURES, "policy": None})
    assert figures[BASE]["reward_accuracy"].n == 3
    assert math.isnan(figures["policy"]["reward_accuracy"].value)
    assert calibration(None) == {"ece": None, "expected": None, "n": 0, "bins": None}


def test_accuracy_at_equal_length_sees_through_a_preference_for_length():
    generator = random.Random(0)
    differences = [generator.uniform(-4, 12) for _ in range(600)]  # the chosen one is mostly longer
    wins = [float(generator.random() < 1 / (1 + math.exp(-difference / 3))) for difference in differences]
    assert sum(wins) / 600 > 0.7
    controlled = accuracy_at_equal_length(wins, differences)
    assert controlled.low < 0.5 < controlled.high


def test_accuracy_at_equal_length_keeps_what_length_does_not_explain():
    generator = random.Random(1)
    differences = [generator.uniform(-9, 9) for _ in range(400)]
    wins = [float(generator.random() < 0.8) for _ in differences]
    controlled = accuracy_at_equal_length(wins, differences)
    assert controlled.low < 0.8 < controlled.high


def test_accuracy_at_equal_length_is_the_maximum_of_the_posterior():
    wins, differences = [1.0, 1.0, 0.0, 0.5, 1.0], [3, -1, -4, 2, 5]
    scale = math.sqrt(sum(d * d for d in differences) / 5)

    def posterior(a, b):
        total = -(a * a + b * b) / (2 * 3.0**2)
        for y, d in zip(wins, differences, strict=True):
            p = 1 / (1 + math.exp(-(a + b * math.tanh(d / scale))))
            total += y * math.log(p) + (1 - y) * math.log(1 - p)
        return total

    grid = [step / 100 for step in range(-300, 301, 4)]
    best = max((posterior(a, b), a) for a in grid for b in grid)[1]
    ours = accuracy_at_equal_length(wins, differences).value
    assert math.log(ours / (1 - ours)) == pytest.approx(best, abs=0.04)  # the grid's step


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-4000, 4000)), min_size=1, max_size=40))
def test_accuracy_at_equal_length_is_always_a_rate(rows):
    wins, differences = zip(*rows, strict=True)
    interval = accuracy_at_equal_length(wins, differences)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_calibration_of_margins_that_are_right_as_often_as_they_say():
    generator = random.Random(2)
    margins = []
    for _ in range(4000):
        size = abs(generator.gauss(0, 1.5))
        margins.append(size if generator.random() < 1 / (1 + math.exp(-size)) else -size)
    measured = calibration(margins)
    assert measured["ece"] < 0.03
    assert measured["expected"] < 0.03
    few = [calibration(margins[start : start + 60]) for start in range(0, 3000, 60)]
    assert sum(one["ece"] for one in few) == pytest.approx(sum(one["expected"] for one in few), rel=0.1)
    assert sum(row["n"] for row in measured["bins"]) == measured["n"] == 4000
    assert calibration([10 * margin for margin in margins])["ece"] > 0.15  # too sure of itself


def test_calibration_of_ties_and_of_nothing():
    assert calibration([0.0, 0.0])["ece"] == 0.0
    assert math.isnan(calibration([])["ece"])
    assert math.isnan(calibration([])["expected"])
    assert calibration([900.0])["bins"][0]["confidence"] == 1.0


def test_accuracy_by_category():
    figures = by_category(PAIRS, ["a", None, "a"], "policy")
    assert list(figures) == ["a"]
    assert figures["a"]["accuracy"].value == 0.75
    assert figures["a"]["accuracy"].n == 2


def test_repeating_every_pair_of_a_prompt_does_not_narrow_intervals():
    wins, differences, copies = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [3, -2, 5, -1, 2, -4, -3], 11
    groups = [index for index in range(7) for _ in range(copies)]
    once = accuracy_at_equal_length(wins, differences)
    often = accuracy_at_equal_length(
        [wins[index] for index in groups], [differences[index] for index in groups], groups
    )
    # The prior weighs less among more pairs, hence not exactly as wide.
    assert often.high - often.low > 0.95 * (once.high - once.low)

    pairs = [PAIRS[0]] * 8 + [PAIRS[1]] * 8
    groups = [0] * 8 + [1] * 8
    in_category = by_category(pairs, ["a"] * 16, "policy", groups)["a"]["accuracy"]
    assert in_category.high - in_category.low > 0.5
    (row,) = calibration([0.3] * 8, [0] * 8)["bins"]
    (single,) = calibration([0.3])["bins"]
    assert (row["low"], row["high"]) == (single["low"], single["high"])
