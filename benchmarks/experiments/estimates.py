"""A figure with its 95% interval over held-out prompts and training seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

Array = np.ndarray
Interval = tuple[float, float, float]
NORMAL = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and over settings where it is pooled; estimates of the same draws and seeds can be combined.

    Args:
        draws: the mean under each resample of the prompts, (resamples + 1,); row 0 has the prompts as they are.
        seeds: for each setting the figure of each seed.

    Raises:
        ValueError: estimates of different seeds are added.
    """

    draws: Array
    seeds: tuple[Mapping[int, float], ...]

    def __add__(self, other: Estimate) -> Estimate:
        """The sum, seed by seed."""
        if [own.keys() for own in self.seeds] != [theirs.keys() for theirs in other.seeds]:
            raise ValueError(f"seeds differ: {self.seeds} and {other.seeds}")
        pairs = zip(self.seeds, other.seeds, strict=True)
        return Estimate(
            self.draws + other.draws, tuple({seed: own[seed] + theirs[seed] for seed in own} for own, theirs in pairs)
        )

    def __rmul__(self, factor: float) -> Estimate:
        """So many times the figure."""
        scaled = ({seed: factor * figure for seed, figure in own.items()} for own in self.seeds)
        return Estimate(factor * self.draws, tuple(scaled))

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, seed by seed."""
        return self + -1 * other

    @property
    def value(self) -> float:
        """The estimate itself."""
        return float(self.draws[0])

    @property
    def interval(self) -> Interval:
        """The estimate and its interval.

        Prompts by the bootstrap's percentiles; seeds by their unbiased variance, since resampling two or three of them
        shows only a half or two thirds of it; both widened as Student's t asks at the degrees of freedom that
        Satterthwaite gives their sum. One seed: over the prompts alone.
        """
        finite = self.draws[1:][np.isfinite(self.draws[1:])]
        if not len(finite):
            return self.value, np.nan, np.nan
        parts = [(np.var([*own.values()], ddof=1) / len(own) / len(self.seeds) ** 2, len(own) - 1)
                 for own in self.seeds if len(own) > 1]  # fmt: skip
        of_seeds = sum(part for part, _ in parts)
        quantile = NORMAL
        if of_seeds > 0:
            freedom = (finite.var() + of_seeds) ** 2 / sum(part**2 / count for part, count in parts)
            quantile = float(stats.t.ppf(0.975, freedom))
        low, high = (max(0.0, side) for side in np.array([-1, 1]) * (np.percentile(finite, [2.5, 97.5]) - self.value))
        below, above = (np.hypot(side * quantile / NORMAL, quantile * np.sqrt(of_seeds)) for side in (low, high))
        return self.value, self.value - float(below), self.value + float(above)


def seed_mean(rows: Mapping[int, Array]) -> Estimate:
    """The mean over seeds of a figure under the same resamples of the prompts, each (resamples + 1,)."""
    return Estimate(np.mean([*rows.values()], 0), ({seed: float(row[0]) for seed, row in rows.items()},))


def mean_of_halves(one: Estimate, other: Estimate) -> Estimate:
    """The mean of two figures from halves of the prompts, of other seeds where each half chose another variant."""
    if [own.keys() for own in one.seeds] == [own.keys() for own in other.seeds]:
        return 0.5 * (one + other)
    return Estimate(0.5 * (one.draws + other.draws), (*one.seeds, *other.seeds))


def mean_of_settings(found: list[Estimate]) -> Estimate:
    """The mean of what was resampled in several settings: their prompts differ, so each is resampled by itself."""
    orders = [np.random.default_rng(place).permutation(len(one.draws) - 1) + 1 for place, one in enumerate(found)]
    draws = [np.append(one.draws[0], one.draws[order]) for one, order in zip(found, orders, strict=True)]
    return Estimate(np.mean(draws, 0), tuple(seeds for one in found for seeds in one.seeds))
