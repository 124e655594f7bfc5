"""What a gain is held against, whether it was measured, and the words for a difference."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.experiments.contests import SHORT, Contest
from benchmarks.experiments.curves import DRIFTS, GAINS, Measure
from benchmarks.experiments.estimates import Interval
from benchmarks.experiments.summary import Variant, dial_points

# Judged samples, also at equal length, and margin, against drift on the answers and on other texts, and, where that was
# measured, against what is lost of the preference that the base was tuned to before, and on benchmarks.
YARDSTICKS = (
    ("score", "kl"),
    ("win", "kl"),
    ("margin", "kl"),
    ("body", "kl"),
    ("score", "kl-samples"),
    ("score", "kl-prose"),
    ("win", "kl-prose"),
    ("margin", "kl-prose"),
    ("score", "retained"),
    ("margin", "retained"),
    ("score", "benchmarks"),
    ("margin", "benchmarks"),
)
GOAL_GAINS = ("score", "margin")
ROUNDING = 1e-9  # what equal areas may differ by
GAIN_TITLES = {
    "score": "judged samples",
    "win": "judged samples at equal length",
    "margin": "margin",
    "body": "margin without ends",
}
TABLE_GAINS = ("score", "margin", "body")
DRIFT_TITLES = {
    "kl": "KL",
    "kl-samples": "KL on its samples",
    "kl-prose": "KL on prose",
    "retained": "earlier preference",
    "benchmarks": "benchmarks",
}
Settings = Mapping[tuple[str, str], Sequence[Variant]]  # by suite and setting


def measures(yardstick: tuple[str, str]) -> tuple[Measure, Measure]:
    """Its gain and its drift."""
    return GAINS[yardstick[0]], DRIFTS[yardstick[1]]


def measured(variants: Sequence[Variant], yardstick: tuple[str, str], form: str | None = None) -> bool:
    """Whether each seed of each variant has a point with both: some yardsticks are younger than some results.

    Args:
        form: of the points; None for all points.
    """
    return all(
        any(
            all(measure.read(point) for measure in measures(yardstick))
            for point in (result["points"] if form is None else dial_points(result, form))
        )
        for variant in variants
        for result in variant.results
    )


def measured_gains(variants: Sequence[Variant]) -> list[str]:
    """The gains of the tables that were measured together with the KL."""
    return [gain for gain in TABLE_GAINS if measured(variants, (gain, "kl"))]


def word(value: Interval, seeds: int) -> str:
    """Whether a difference is above 0, outside the spread over prompts and seeds."""
    estimate, low, high = value
    if low > ROUNDING:
        return "met" if seeds > 1 else "one seed"
    if high < -ROUNDING:
        return "behind" if seeds > 1 else "one seed, behind"
    return "not shown" if estimate > ROUNDING else "not met"


def says(one: Contest, value: Interval) -> str:
    """The word for a difference of a contest; "short" or "unlike" where it does not count."""
    if not one.counts:
        return "short" if one.share < SHORT else "unlike"
    return word(value, one.seeds)


def bracketed(values: Interval) -> str:
    """Estimate [low, high]; a dash for what is no number."""
    value, low, high = (round(number, 3) + 0.0 for number in values)  # no minus before a nought
    return "–" if not np.isfinite(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
