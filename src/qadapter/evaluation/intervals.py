"""95% intervals of rates, and the exact test of paired rates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate with its 95% interval, from n observations."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Interval:
    """A rate with its Wilson score interval; no observations give the whole range."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    rate = successes / n
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    # Rounding must not put the ends of rates 0 and 1 on their wrong side.
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), n)


def mcnemar_exact(policy: Sequence[float], base: Sequence[float]) -> float:
    """The two-sided exact p-value of McNemar's test: do as many items of 0/1 scores go up as go down?"""
    pairs = list(zip(policy, base, strict=True))
    up, down = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    tail = sum(math.comb(up + down, count) for count in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2 ** (up + down))
