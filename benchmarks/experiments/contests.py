"""Two methods against each other on the seeds that both have: difference of areas, and the goal in the lower half."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.experiments.curves import Draws, Measure, curve, gain_at
from benchmarks.experiments.estimates import Estimate, Interval, mean_of_settings, seed_mean
from benchmarks.experiments.summary import (
    RIVAL,
    MethodArea,
    Variant,
    dial_points,
    forms_of,
    limit_of,
    method_area,
    reach,
    variant_areas,
)

OWN = "qadapter"
GOAL = 4 / 3  # of DPO's mean gain over the lower half: a third more
UNLIKE = "*"
SHORT = 0.1  # of the limit: two methods of which one was measured to less are not compared
FEW_STEPS = 0.5  # of the other side's: a method that was trained for fewer is no rival


@dataclass(frozen=True)
class Contest:
    """A method's area and another's under the same resamples.

    Args:
        values: how many variants each side chose from, as text: "3 / 1", with a mark where they are not `alike`.
        alike: whether the other was given the own side's training (epochs, say), and took at least half as many steps.
        share: of the drift's limit, to which both were measured and are compared; below SHORT they are not compared.
    """

    own: MethodArea
    other: MethodArea
    seeds: int
    values: str
    alike: bool = True
    share: float = 1.0

    @property
    def counts(self) -> bool:
        """Whether it says anything of the two methods."""
        return self.alike and self.share >= SHORT

    @property
    def whole(self) -> Interval:
        """Difference of the areas."""
        return (self.own.whole - self.other.whole).interval

    @property
    def lower(self) -> Interval:
        """Difference of the lower halves."""
        return (self.own.lower - self.other.lower).interval

    @property
    def beyond_goal(self) -> Interval:
        """Own lower half less 4/3 of the other's. (A ratio has no interval where the other's comes near 0.)"""
        return (self.own.lower - GOAL * self.other.lower).interval

    @property
    def ratio(self) -> float:
        """Of the lower halves; nan where the other's is not above 0."""
        return self.own.lower.value / self.other.lower.value if self.other.lower.value > 0 else np.nan


def contests(
    found: Sequence[Variant],
    gain: Measure,
    drift: Measure,
    own: str = OWN,
    form: str = "dial",
    within_reach: bool = True,
) -> list[Contest]:
    """`own`, its knob tuned and with the strength dial (or in another form), against every method and form of it.

    Both choose among what they may be `tuned_over`, on the seeds that all of these have, and Q-Adapter also among its
    variants that have these seeds after all; a method that shares none is left out. The method's own other forms are
    among the others.

    Args:
        within_reach: compare and choose no further than both were measured: what a curve does beyond its last point is
            not known.
    """
    result, draws = [], Draws()
    methods = {method: [variant for variant in found if variant.method == method]
               for method in dict.fromkeys(variant.method for variant in found)}  # fmt: skip
    for method in methods if own in methods else ():
        both = [methods[name] for name in dict.fromkeys((own, method))]
        chosen_by = drift
        if within_reach:
            reached = [tuned_over(side, gain, drift, draws) if side[0].method == OWN else side for side in both]
            chosen_by, _ = up_to_reach(reached, ("dial",) * len(both), gain, drift)
        pair = [variant for side in both for variant in tuned_over(side, gain, chosen_by, draws)]
        seeds = frozenset.intersection(*(variant.seeds for variant in pair))
        if not seeds:
            continue
        pair = [v for v in found if v in pair or (v.method == OWN and OWN in (own, method) and v.seeds >= seeds)]
        pair = [on_seeds(variant, seeds) for variant in pair]
        sides = [[variant for variant in pair if variant.method == side] for side in (own, method)]
        alike = trained_alike(sides[0], [variant for variant in found if variant.method == method])
        values = f"{len(sides[0])} / {len(sides[1])}" + UNLIKE * (not alike)
        for other in forms_of(sides[1], gain):
            if (method, other) == (own, form):
                continue
            shared, share = up_to_reach(sides, (form, other), gain, drift)
            read = shared if within_reach else drift
            areas = (method_area(of, side, gain, read, draws) for side, of in zip(sides, (form, other), strict=True))
            result.append(Contest(*areas, len(seeds), values, alike, share))
    return result


def up_to_reach(
    sides: Sequence[Sequence[Variant]], forms: Sequence[str], gain: Measure, drift: Measure
) -> tuple[Measure, float]:
    """The drift as far as some variant of each side was measured, and which share of its limit that is.

    Below a share of SHORT there is nothing to compare, and the limit stays.
    """
    limit = limit_of(sides[0][0].results[0], drift)
    reached = (reach(side, form, gain, drift) for side, form in zip(sides, forms, strict=True))
    share = min(1.0, *(far / limit for far in reached))
    return replace(drift, limit=(share if share >= SHORT else 1.0) * limit), share


def trained_alike(own: Sequence[Variant], other: Sequence[Variant]) -> bool:
    """Whether the other method was given each training of the own side (epochs, say), and at least half as many steps.

    Those of its variants count that were measured at all: which of them it may choose is another question.
    """

    def trainings(side: Sequence[Variant]) -> set[str]:
        return {json.dumps(v.results[0]["cell"]["setting"]["training"], sort_keys=True) for v in side}

    steps = [max(v.results[0]["training"]["steps"] for v in side) for side in (own, other)]
    return trainings(own) <= trainings(other) and steps[1] >= FEW_STEPS * steps[0]


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
        return rows is None or rows.value <= 0

    return [variant for variant in found if not any(beaten(variant, other) for other in covered)]


def pooled(found: Sequence[Contest]) -> Contest:
    """The mean over settings of one pair of methods."""

    def mean(side: str) -> MethodArea:
        areas: list[MethodArea] = [getattr(one, side) for one in found]
        whole, lower = (mean_of_settings([getattr(area, part) for area in areas]) for part in ("whole", "lower"))
        return MethodArea(areas[0].method, areas[0].form, whole, lower, ())

    values = ", ".join(dict.fromkeys(one.values for one in found))
    seeds, share = min(one.seeds for one in found), min(one.share for one in found)
    return Contest(mean("own"), mean("other"), seeds, values, all(one.alike for one in found), share)


def on_seeds(variant: Variant, seeds: frozenset[int]) -> Variant:
    """The variant with the results of these seeds only."""
    rows = tuple(result for result in variant.results if result["cell"]["seed"] in seeds)
    return Variant(variant.method, variant.options, rows)


def against_rival(found: Sequence[Variant], gain: Measure, drift: Measure) -> dict[tuple[str, str], Contest]:
    """{(method, form): contest of DPO with the dial against it}."""
    whole = contests(found, gain, drift, RIVAL, within_reach=False)
    return {(one.other.method, one.other.form): one for one in whole}


def variant_difference(one: Variant, other: Variant, gain: Measure, drift: Measure) -> Interval | None:
    """Difference of two variants' areas along the dial, on common seeds, up to the drift that both were measured to.

    None if they share no seed, or one was hardly measured.
    """
    rows = _difference_within_reach(one, other, gain, drift)
    return None if rows is None else rows.interval


def pooled_difference(pairs: Sequence[tuple[Variant, Variant]], gain: Measure, drift: Measure) -> Interval | None:
    """Its mean over settings, each with its pair of variants; None if it is None for a pair."""
    rows = [_difference_within_reach(*pair, gain, drift) for pair in pairs]
    known = [row for row in rows if row is not None]
    return mean_of_settings(known).interval if len(known) == len(rows) else None


def _difference_within_reach(one: Variant, other: Variant, gain: Measure, drift: Measure) -> Estimate | None:
    seeds = one.seeds & other.seeds
    if not seeds:
        return None
    read, share = up_to_reach([[on_seeds(one, seeds)], [on_seeds(other, seeds)]], ("dial", "dial"), gain, drift)
    return _resampled_difference(one, other, gain, read, Draws()) if share >= SHORT else None


def _resampled_difference(one: Variant, other: Variant, gain: Measure, drift: Measure, draws: Draws) -> Estimate | None:
    seeds = one.seeds & other.seeds
    if not seeds:
        return None
    left, right = (variant_areas(on_seeds(variant, seeds), "dial", gain, drift, draws)[0] for variant in (one, other))
    return left - right


def gains_at(
    variant: Variant, gain: Measure, drift: Measure, level: float, draws: Draws, form: str = "dial"
) -> Estimate:
    """Gain (or another drift) at a drift along the dial or in another form, mean over seeds."""
    rows = {}
    for result in variant.results:
        drifts, gains = curve(dial_points(result, form), result["data"]["groups"], gain, drift, draws)
        found = [gain_at(*row, level) for row in zip(drifts, gains, strict=True)]
        rows[result["cell"]["seed"]] = np.array(found)
    return seed_mean(rows)
