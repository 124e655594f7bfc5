"""Intervals of paired differences cover the truth as often as they claim; McNemar's test against enumeration."""

import itertools
import math
import random

import pytest
import torch

from qadapter.evaluation.intervals import mcnemar_exact
from qadapter.evaluation.resampling import mean_intervals, paired_difference


@pytest.mark.parametrize(
    ("n", "gained", "lost"), [(20, 0.02, 0.06), (40, 0.0, 0.05), (40, 0.1, 0.3), (150, 0.05, 0.15)]
)
def test_paired_intervals_of_rates_cover_the_truth(n, gained, lost):
    generator, covered = random.Random(0), 0
    for _ in range(2000):
        changes = [generator.random() for _ in range(n)]
        base = [
            0 if change < gained else 1 if change < gained + lost else generator.choice((0, 1)) for change in changes
        ]
        policy = [1 - b if change < gained + lost else b for b, change in zip(base, changes, strict=True)]
        interval = paired_difference(policy, base)
        covered += interval.low <= gained - lost <= interval.high
    assert covered / 2000 > 0.94  # 0.95 less three standard errors of the simulation is 0.935


def test_the_paired_interval_of_a_table_by_hand():
    """Bonett and Price: 3 of 20 gained, 1 lost: p = 4/22 and 2/22, p₁ − p₂ ± z √((p₁ + p₂ − (p₁ − p₂)²) / 22)."""
    policy, base = [1.0] * 3 + [0.0] * 17, [0.0] * 3 + [1.0] + [0.0] * 16
    interval = paired_difference(policy, base)
    half = 1.959963984540054 * math.sqrt((6 / 22 - (2 / 22) ** 2) / 22)
    assert interval == pytest.approx((0.1, 2 / 22 - half, 2 / 22 + half, 20), abs=1e-12)


def test_paired_intervals_of_other_scores_cover_the_truth():
    generator, covered = random.Random(0), 0
    for seed in range(200):
        base = [generator.gauss(0, 3) for _ in range(50)]  # the items differ far more than the models
        policy = [b + generator.gauss(0.3, 1) for b in base]
        interval = paired_difference(policy, base, seed)
        covered += interval.low <= 0.3 <= interval.high
        assert interval.high - interval.low < 1
    assert covered / 200 > 0.9  # the percentile bootstrap has about 0.94 at n = 50; two standard errors are 0.03


def test_paired_difference_of_equal_scores_does_not_claim_certainty():
    interval = paired_difference([1, 0, 1] * 10, [1, 0, 1] * 10)
    assert interval.value == 0
    assert interval.low == pytest.approx(-interval.high)
    assert 0.01 < interval.high < 0.15
    assert mean_intervals(torch.zeros(1, 30))[0][:3] == (0, 0, 0)  # what the bootstrap would have said


def test_mcnemar_equals_the_enumeration_of_all_signs():
    for up, down in ((0, 0), (1, 0), (3, 1), (5, 5), (0, 8)):
        policy, base = [1] * up + [0] * down + [1, 0], [0] * up + [1] * down + [1, 0]
        observed = abs(up - down)
        signs = itertools.product((1, -1), repeat=up + down)
        extreme = sum(abs(sum(sign)) >= observed for sign in signs)
        assert mcnemar_exact(policy, base) == pytest.approx(extreme / 2 ** (up + down))
    assert mcnemar_exact([0] * 6000, [1] * 6000) == 0  # below the smallest float
