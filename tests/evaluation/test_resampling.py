"""Intervals: do they cover, do they keep groups together, are they paired and reproducible?"""

import math
import random

import pytest
import torch

from qadapter.evaluation.intervals import wilson
from qadapter.evaluation.resampling import mean_intervals, paired_difference, rate_interval, t_quantile


@pytest.mark.parametrize("n", [5, 12, 60])
def test_intervals_of_paired_differences_cover_the_truth(n):
    generator = torch.Generator().manual_seed(n)
    runs, truth = 400, 0.3
    items = torch.randn(runs, n, generator=generator)  # shared by both columns of a run
    base = items + 0.5 * torch.randn(runs, n, generator=generator)
    policy = items + truth + 0.5 * torch.randn(runs, n, generator=generator)
    intervals = [mean_intervals((policy - base)[run : run + 1], seed=run)[0] for run in range(runs)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals) / runs
    assert 0.92 <= covered <= 0.985  # 0.95 ± 3 standard errors of 400 runs
    widths = [interval.high - interval.low for interval in intervals]
    unpaired = [interval.high - interval.low for interval in mean_intervals(base)]
    assert sum(widths) < 0.8 * sum(unpaired)  # the items' own differences cancel


def test_pairs_of_one_prompt_are_no_independent_evidence():
    generator = torch.Generator().manual_seed(0)
    runs, prompts, copies = 300, 20, 4
    effects = torch.randn(runs, prompts, 1, generator=generator).expand(-1, -1, copies)
    values = (effects + 0.1 * torch.randn(runs, prompts, copies, generator=generator)).flatten(1)
    groups = [prompt for prompt in range(prompts) for _ in range(copies)]

    def covered(groups):
        found = (mean_intervals(values[run : run + 1], groups, seed=run)[0] for run in range(runs))
        return sum(interval.low <= 0 <= interval.high for interval in found) / runs

    assert 0.91 <= covered(groups) <= 0.985
    assert covered(None) < 0.75


def test_rates_of_grouped_outcomes_are_wider_and_cover():
    generator = torch.Generator().manual_seed(1)
    groups = [prompt for prompt in range(25) for _ in range(4)]
    covered = 0
    for _ in range(400):
        outcomes = (torch.rand(25, generator=generator) < 0.7).double().repeat_interleave(4).tolist()
        grouped = rate_interval(outcomes, groups)
        covered += grouped.low <= 0.7 <= grouped.high
    assert 0.91 <= covered / 400 <= 0.99
    assert grouped.n == 100
    assert grouped.high - grouped.low > rate_interval(outcomes).high - rate_interval(outcomes).low


@pytest.mark.parametrize("rate", [0.5, 0.8])
@pytest.mark.parametrize(("prompts", "pairs"), [(3, 20), (5, 20), (10, 10)])
def test_rates_of_few_prompts_with_many_pairs_cover(prompts, pairs, rate):
    """By normal quantiles they covered 74% to 93%."""
    generator = random.Random(2)
    groups = [prompt for prompt in range(prompts) for _ in range(pairs)]
    rates, differences = 0, 0
    for _ in range(400):

        def drawn():
            chances = [generator.betavariate(rate / 0.45, (1 - rate) / 0.45) for _ in range(prompts)]
            return [float(generator.random() < chances[prompt]) for prompt in groups]

        first, second = drawn(), drawn()
        interval, change = rate_interval(first, groups), paired_difference(first, second, groups=groups)
        rates += interval.low <= rate <= interval.high
        differences += change.low <= 0 <= change.high
    assert 0.91 <= rates / 400 <= 1
    assert 0.93 <= differences / 400 <= 1


def test_rates_without_groups_are_wilson_intervals():
    outcomes = [1.0, 0.0, 0.5, 1.0, 1.0]
    assert rate_interval(outcomes) == wilson(3.5, 5)
    assert rate_interval(outcomes, "abcde").low == pytest.approx(wilson(3.5, 5).low)
    assert rate_interval([1.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3])[1:3] == wilson(4, 4)[1:3]
    assert math.isnan(rate_interval([]).value)


def test_figures_do_not_depend_on_what_else_is_computed():
    values = torch.randn(5, 11, generator=torch.Generator().manual_seed(2))
    together = mean_intervals(values)
    assert [mean_intervals(row.unsqueeze(0))[0] for row in values] == together
    assert mean_intervals(values, seed=1) != together


def test_the_interval_is_that_of_its_own_resamples_counted_in_plain_loops():
    values = [0.3, -1.2, 2.5, 0.0, 0.7, -0.1, 4.0]
    draws = torch.randint(7, (2000, 7), generator=torch.Generator().manual_seed(5)).tolist()
    means = sorted(sum(values[index] for index in draw) / 7 for draw in draws)
    mean, wider = sum(values) / 7, t_quantile(6) / 1.959963984540054 * math.sqrt(7 / 6)
    (interval,) = mean_intervals(torch.tensor([values], dtype=torch.float64), seed=5)
    assert interval.low == pytest.approx(mean - wider * (mean - means[50]), abs=1e-12)
    assert interval.high == pytest.approx(mean + wider * (means[1949] - mean), abs=1e-12)


def test_resamples_of_groups_of_any_size_are_means():
    (interval,) = mean_intervals(torch.full((1, 6), 3.0), [0, 0, 0, 1, 2, 2])
    assert interval[:3] == pytest.approx((3.0, 3.0, 3.0))


def test_two_groups_are_as_wide_as_their_only_degree_of_freedom():
    """Their resamples reach from one group to the other, made wider by t / z and √(n / (n − 1)) of two groups."""
    half = 12.7062 / 1.959964 * math.sqrt(2)
    for values, groups in (([0.0, 2.0], None), ([0.0, 0.0, 0.0, 2.0, 2.0, 2.0], "aaabbb")):
        (interval,) = mean_intervals(torch.tensor([values]), groups)
        assert interval[:3] == pytest.approx((1.0, 1.0 - half, 1.0 + half), rel=1e-5)


def test_groups_never_count_for_more_than_their_observations():
    """Within each prompt one pair is won and one lost, as by an adapter that prefers an answer's position."""
    outcomes, prompts = [1.0, 0.0] * 10, [number // 2 for number in range(20)]
    assert rate_interval(outcomes, prompts) == rate_interval(outcomes)
    assert paired_difference(outcomes, outcomes[::-1], groups=prompts) == paired_difference(outcomes, outcomes[::-1])


def test_differences_of_rates_stay_within_one():
    assert paired_difference([1, 1, 1], [0, 0, 0]).high == 1.0
    assert paired_difference([0, 0, 0], [1, 1, 1]).low == -1.0


def test_too_few_observations_have_no_bounds():
    (one,) = mean_intervals(torch.tensor([[2.0]]))
    assert (one.value, one.n) == (2.0, 1)
    assert math.isnan(one.low)
    (none,) = mean_intervals(torch.empty(1, 0))
    assert math.isnan(none.value)
    (constant,) = mean_intervals(torch.zeros(1, 7))
    assert constant[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_quantiles_of_the_t_distribution(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-3)  # tables have three digits


def test_pairs_of_a_single_prompt_count_as_one():
    outcomes = [1.0] * 15 + [0.0] * 5
    assert rate_interval(outcomes, [0] * 20)[1:3] == wilson(0.75, 1)[1:3]
    # Two prompts that disagree entirely say next to nothing, whatever the number of pairs.
    assert rate_interval([1.0] * 50 + [0.0] * 50, [0] * 50 + [1] * 50)[1:3] == pytest.approx(wilson(1, 2)[1:3], abs=0.1)
    assert rate_interval(outcomes, range(20)) == pytest.approx(rate_interval(outcomes))
