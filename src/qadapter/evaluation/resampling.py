"""95% intervals of many paired figures at once, from one set of resamples, with repeated prompts kept together.

All figures of one call are resampled alike, so differences of columns are paired. Where observations come in groups
(several pairs of one prompt), whole groups are resampled: pairs of a prompt are not independent evidence.

Percentile intervals are too short for few observations, by √((n−1)/n) and by normal in place of t quantiles; they are
widened by both (Hesterberg 2015, doi 10.1080/00031305.2015.1089789, section 5.3, on the scale of the mean).
"""

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from qadapter.evaluation.intervals import RESAMPLES, Z95, Interval, wilson

# Elements of one matrix of resampled counts: 64 MiB.
COUNT_ELEMENTS = 2**23
T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469}


def mean_intervals(values: Tensor, groups: Sequence[Hashable] | None = None, seed: int = 0) -> list[Interval]:
    """The mean of each row of `values` (M, n) with its bootstrap interval.

    Args:
        groups: which observations belong together, one label an observation; None: none do.
    """
    rows, n = values.shape
    if n == 0:
        return [Interval(math.nan, math.nan, math.nan, 0)] * rows
    values = values.double()
    member = torch.arange(n) if groups is None else torch.tensor(group_numbers(groups))  # (n,), the group's number
    clusters = int(member.max()) + 1
    sums = torch.zeros(rows, clusters, dtype=torch.float64).index_add_(1, member, values)
    sizes = torch.bincount(member).double()
    means = sums.sum(1) / sizes.sum()
    if clusters == 1:
        return [Interval(float(mean), math.nan, math.nan, n) for mean in means]
    generator = torch.Generator().manual_seed(seed)
    resampled = []
    step = max(1, COUNT_ELEMENTS // clusters)
    for start in range(0, RESAMPLES, step):
        draws = torch.randint(clusters, (min(step, RESAMPLES - start), clusters), generator=generator)
        counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(
            1, draws, torch.ones(draws.shape, dtype=torch.float64)
        )
        # Summing products row by row, unlike a matrix product, does not depend on the number of figures.
        total = torch.stack([(counts * row).sum(1) for row in sums])
        resampled.append(total / (counts * sizes).sum(1))
    ordered = torch.cat(resampled, 1).sort(1).values  # (M, R)
    low, high = ordered[:, int(0.025 * RESAMPLES)], ordered[:, int(0.975 * RESAMPLES) - 1]
    wider = t_quantile(clusters - 1) / Z95 * math.sqrt(clusters / (clusters - 1))
    low, high = means - wider * (means - low), means + wider * (high - means)
    columns = zip(means.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Interval(mean, bottom, top, n) for mean, bottom, top in columns]


def rate_interval(outcomes: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """The mean of outcomes in [0, 1] with its Wilson interval, at the number of independent observations."""
    n = len(outcomes)
    if n == 0:
        return wilson(0, 0)
    total, effect = math.fsum(outcomes), design_effect(outcomes, groups)
    interval = wilson(total / effect, n / effect)  # type: ignore[arg-type]
    return Interval(total / n, interval.low, interval.high, n)


def paired_difference(
    policy: Sequence[float], base: Sequence[float], seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Interval:
    """The mean of policy − base over the same items, with its 95% interval.

    Scores of 0, ½ and 1 get the adjusted Wald interval of Bonett and Price (2012, doi 10.3102/1076998611411915): where
    few items change, as they should here, the percentile bootstrap covers far less than 95%, and it claims certainty
    when none does. Half a change counts as half an item. All other scores get the bootstrap.

    Raises:
        ValueError: sequences of different lengths.
    """
    differences = [a - b for a, b in zip(policy, base, strict=True)]
    n = len(differences)
    if n == 0 or not {*policy, *base} <= {0, 0.5, 1}:
        return mean_intervals(torch.tensor([differences], dtype=torch.float64), groups, seed)[0]
    effect = design_effect(differences, groups)
    independent = n / effect
    gained, lost = (
        (math.fsum(max(0.0, sign * change) for change in differences) / effect + 1) / (independent + 2)
        for sign in (1, -1)
    )
    centre = gained - lost
    half = Z95 * math.sqrt((gained + lost - centre**2) / (independent + 2))
    return Interval(math.fsum(differences) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def design_effect(values: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    """By how much grouped observations count less than independent ones, at least 1.

    It is the variance of the mean over groups relative to that of independent observations, times the squared ratio of
    the t quantiles of both, since few groups tell little of their own spread (Korn and Graubard 1998, Survey
    Methodology 24, 193-201); where all values are alike, or of one group, nothing but the number of groups is known.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if groups is None or len(set(groups)) == n:
        return 1.0
    deviations: dict[Hashable, float] = {}
    for group, value in zip(groups, values, strict=True):
        deviations[group] = deviations.get(group, 0.0) + value - mean
    independent = _spread(values, mean)
    clusters = len(deviations)
    if independent <= 1e-12 or clusters == 1:
        return n / clusters
    ratio = math.fsum(d * d for d in deviations.values()) / independent
    ratio *= clusters / (clusters - 1) * (n - 1) / n  # both variances unbiased
    return max(1.0, ratio * (t_quantile(clusters - 1) / t_quantile(n - 1)) ** 2)


def _spread(values: Sequence[float], mean: float) -> float:
    """The sum of squared deviations."""
    return math.fsum((value - mean) ** 2 for value in values)


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t (Abramowitz and Stegun 26.7.5; a table for up to 6 degrees of freedom)."""
    if freedom in T_QUANTILES:
        return T_QUANTILES[freedom]
    z = Z95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def group_numbers(groups: Sequence[Hashable]) -> list[int]:
    """The groups numbered in the order of their first member."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]
