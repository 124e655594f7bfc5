"""Wilson's interval of a rate."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapter.evaluation.intervals import wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R: prop.test(successes, n, correct = FALSE)
        (0, 10, 0.0, 0.2775328),
        (5, 10, 0.2365931, 0.7634069),
        (8, 10, 0.4901625, 0.9433178),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_equals_known_values(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval == pytest.approx((successes / n, low, high, n), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 7), (3.5, 11), (15, 148), (147, 148)])
def test_wilsons_ends_are_the_rates_that_the_score_test_just_rejects(successes, n):
    """Wilson (1927): |rate − p| = z √(p (1 − p) / n) at both ends p."""
    interval = wilson(successes, n)
    for end in (interval.low, interval.high):
        assert abs(interval.value - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / n))


def test_wilson_without_observations_knows_nothing():
    value, *rest = wilson(0, 0)
    assert math.isnan(value)
    assert rest == [0.0, 1.0, 0]


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_holds_its_rate_and_stays_a_rate(case):
    halves, n = case
    interval = wilson(halves / 2, n)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize("n", [11, 40])
def test_wilson_covers_rates_about_95_times_in_100(n):
    """Averaged over all rates: for a single rate the coverage of whole numbers jumps."""
    generator = random.Random(7)
    trials = 4000
    covered = 0
    for _ in range(trials):
        rate = generator.random()
        interval = wilson(sum(generator.random() < rate for _ in range(n)), n)
        covered += interval.low <= rate <= interval.high
    assert covered / trials == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors
