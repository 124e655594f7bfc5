"""Two methods against each other on the seeds that both have: difference of areas, and the goal in the lower half."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.experiments.curves import Array, Draws, Measure, curve, gain_at, interval
from benchmarks.experiments.summary import (
    RIVAL,
    MethodArea,
    Variant,
    dial_points,
    method_areas,
    seed_mean,
    variant_areas,
)

OWN = "qadapter"
GOAL = 4 / 3  # of DPO's mean gain over the lower half: a third more
UNLIKE = "*"
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Contest:
    """A method's area and another's under the same resamples.

    Args:
        values: how many variants each side chose from, as text: "3 / 1", with a mark where their training differs.
    """

    own: MethodArea
    other: MethodArea
    seeds: int
    values: str

    @property
    def whole(self) -> Interval:
        """Difference of the areas."""
        return interval(self.own.whole - self.other.whole)

    @property
    def lower(self) -> Interval:
        """Difference of the lower halves."""
        return interval(self.own.lower - self.other.lower)

    @property
    def beyond_goal(self) -> Interval:
        """Own lower half less 4/3 of the other's. (A ratio has no interval where the other's comes near 0.)"""
        return interval(self.own.lower - GOAL * self.other.lower)

    @property
    def ratio(self) -> float:
        """Of the lower halves; nan where the other's is not above 0."""
        return float(self.own.lower[0] / self.other.lower[0]) if self.other.lower[0] > 0 else np.nan


def contests(
    found: Sequence[Variant],
    gain: Measure,
    drift: Measure,
    own: str = OWN,
    read_by: Measure | None = None,
    form: str = "dial",
) -> list[Contest]:
    """`own`, its knob tuned and with the strength dial (or in another form), against every method and form of it.

    Both choose among what they may be `tuned_over`, on the seeds that all of these have, and Q-Adapter also among its
    variants that have these seeds after all; a method that shares none is left out. The method's own other forms are
    among the others.

    Args:
        read_by: the drift of the areas, where the same variants and seeds are to be read in another way.
    """
    result, draws = [], Draws()
    methods = {method: tuned_over([v for v in found if v.method == method], gain, drift, draws)
               for method in dict.fromkeys(variant.method for variant in found)}  # fmt: skip
    for method in methods if own in methods else ():
        pair = methods[own] + (methods[method] if method != own else [])
        seeds = frozenset.intersection(*(variant.seeds for variant in pair))
        if not seeds:
            continue
        pair = [v for v in found if v in pair or (v.method == OWN and OWN in (own, method) and v.seeds >= seeds)]
        pair = [on_seeds(variant, seeds) for variant in pair]
        rows = method_areas(pair, gain, read_by or drift, draws)
        first = next(row for row in rows if row.method == own and row.form == form)
        others = [row for row in rows if row is not first and row.method == method]
        result += [Contest(first, row, len(seeds), knob_values(pair, own, method)) for row in others]
    return result


def knob_values(pair: Sequence[Variant], own: str, other: str) -> str:
    """How many variants the two methods choose from; UNLIKE marks sides that were not trained alike."""
    counts, trainings = [], []
    for method in (own, other):
        variants = [variant for variant in pair if variant.method == method]
        counts.append(str(len(variants)))
        trainings.append({json.dumps(v.results[0]["cell"]["setting"]["training"], sort_keys=True) for v in variants})
    return " / ".join(counts) + UNLIKE * (trainings[0] != trainings[1])


def tuned_over(found: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> list[Variant]:
    """The variants of a method that it may choose its knob from.

    Of Q-Adapter's, one that lacks seeds which another has is left out: it shall cost no seed. A rival's is left out
    only where the other one's area is the larger on the seeds they share: the first seeds have then chosen, as one
    tunes a knob before repeating. Otherwise it stays, and costs the contest those seeds.
    """
    most = max(len(variant.seeds) for variant in found)
    covered = [variant for variant in found if len(variant.seeds) == most]

    def beaten(variant: Variant, other: Variant) -> bool:
        if not other.seeds > variant.seeds:
            return False
        rows = _resampled_difference(variant, other, gain, drift, draws) if variant.method != OWN else None
        return rows is None or rows[0] <= 0

    return [variant for variant in found if not any(beaten(variant, other) for other in covered)]


def pooled(found: Sequence[Contest]) -> Contest:
    """The mean over settings of one pair of methods."""

    def mean(side: str) -> MethodArea:
        areas: list[MethodArea] = [getattr(one, side) for one in found]
        whole = mean_of_settings([area.whole for area in areas])
        lower = mean_of_settings([area.lower for area in areas])
        return MethodArea(areas[0].method, areas[0].form, whole, lower, ())

    values = ", ".join(dict.fromkeys(one.values for one in found))
    return Contest(mean("own"), mean("other"), min(one.seeds for one in found), values)


def mean_of_settings(rows: Sequence[Array]) -> Array:
    """The mean of what was resampled in several settings: their prompts differ, so each is resampled by itself."""
    orders = [np.random.default_rng(place).permutation(len(row) - 1) + 1 for place, row in enumerate(rows)]
    return np.mean([np.append(row[0], row[order]) for row, order in zip(rows, orders, strict=True)], 0)


def on_seeds(variant: Variant, seeds: frozenset[int]) -> Variant:
    """The variant with the results of these seeds only."""
    rows = tuple(result for result in variant.results if result["cell"]["seed"] in seeds)
    return Variant(variant.method, variant.options, rows)


def against_rival(found: Sequence[Variant], gain: Measure, drift: Measure) -> dict[tuple[str, str], Contest]:
    """{(method, form): contest of DPO with the dial against it}."""
    return {(one.other.method, one.other.form): one for one in contests(found, gain, drift, RIVAL)}


def variant_difference(one: Variant, other: Variant, gain: Measure, drift: Measure) -> Interval | None:
    """Difference of two variants' areas along the dial, on the seeds that both have; None if they share none."""
    rows = _resampled_difference(one, other, gain, drift, Draws())
    return None if rows is None else interval(rows)


def pooled_difference(pairs: Sequence[tuple[Variant, Variant]], gain: Measure, drift: Measure) -> Interval | None:
    """Its mean over settings, each with its pair of variants; None if a pair shares no seed."""
    rows = [_resampled_difference(*pair, gain, drift, Draws()) for pair in pairs]
    known = [row for row in rows if row is not None]
    return interval(mean_of_settings(known)) if len(known) == len(rows) else None


def _resampled_difference(one: Variant, other: Variant, gain: Measure, drift: Measure, draws: Draws) -> Array | None:
    seeds = one.seeds & other.seeds
    if not seeds:
        return None
    left, right = (variant_areas(on_seeds(variant, seeds), "dial", gain, drift, draws)[0] for variant in (one, other))
    return left - right


def gains_at(variant: Variant, gain: Measure, drift: Measure, level: float, draws: Draws, form: str = "dial") -> Array:
    """Gain (or another drift) at a drift along the dial or in another form, in each resample, mean over seeds."""
    rows = []
    for result in variant.results:
        drifts, gains = curve(dial_points(result, form), result["data"]["groups"], gain, drift, draws)
        rows.append(np.array([gain_at(*row, level) for row in zip(drifts, gains, strict=True)]))
    return seed_mean(rows, draws)
