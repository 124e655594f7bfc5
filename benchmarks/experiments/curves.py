"""Trade-off curves and their area under resamples of the prompts; the definitions of the results page.

A curve is what a policy reaches along its dial: points (drift, gain), the base being (0, 0). Since less is always to be
had for less, its *envelope* is the largest gain at or below a drift. Between two measured points it is a straight line
in drift: that much is to be had by answering a share of the requests at the one setting and the rest at the other,
and more than was measured is credited to nobody. But a method that drifts further at the same strengths has fewer
points below the limit, and loses more to such lines: hence a second reading, with lines straight in √drift, the shape
that gains have along a dial.

The area is the mean of the envelope over √(drift / limit) from 0 to 1, weighed on the root axis because KL grows with
the square of a small change; it has the gain's unit. Its lower half, up to a quarter of the limit, is the mean over
√(drift / limit) from 0 to ½.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GRID = 4001
# So many that the ends of an interval vary by a twenty-fifth of a standard error with the seed of the draws.
RESAMPLES = 4_000
HALVES = (0, 1)
# An answer of which a larger share of the sequences of four words are repeats gains nothing, whatever a judge of style
# says: it is a loop. Of answers at a strength of 0.25, which are nearly the base's, one in a hundred is beyond.
LOOPS = 0.3
Array = np.ndarray


@dataclass(frozen=True)
class Measure:
    """What is gained, or how far the policy drifts: a number a unit of some kind, at each point.

    Args:
        kind: "pairs", "samples" or a source of texts: units of one kind are resampled alike.
        read: from a point to its numbers; None where the point has none.
        limit: of a drift, the right end of its curves; None for the setting's own, in nats.
        root: of a drift, whether lines between measured points are straight in its root.
    """

    name: str
    kind: str
    read: Any
    limit: float | None = None
    root: bool = False


def _pairs(key: str) -> Any:
    return lambda point: point["pairs"].get(key)  # the gain without ends is younger than many results


def _samples(value: Any) -> Any:
    return lambda point: value(point["samples"]) if "samples" in point else None


def _unless_loops(value: Any) -> Any:
    def gains(found: Mapping[str, Any]) -> list[float]:
        pairs = zip(value(found), found["repetition"], strict=True)
        return [min(gain, 0.0) if repeated > LOOPS else gain for gain, repeated in pairs]

    return _samples(gains)


def _preferred(point: Mapping[str, Any]) -> list[float]:
    """Whether the policy finds a pair's chosen answer likelier, less whether the base does: 1, 0 or −1."""
    pairs = point["pairs"]
    return [own - before for own, before in zip(pairs["prefers"], pairs["base_prefers"], strict=True)]


def _forgotten(point: Mapping[str, Any]) -> list[float] | None:
    return [-change for pairs in point.get("retained", {}).values() for change in pairs["margin_gain"]] or None


def _lost(point: Mapping[str, Any]) -> list[float] | None:
    return [value for losses in point.get("lost", {}).values() for value in losses] or None


GAINS = {
    "score": Measure(
        "judge's score of samples, change",
        "samples",
        _unless_loops(lambda found: [a - b for a, b in zip(found["score"], found["base_score"], strict=True)]),
    ),
    "win": Measure(
        "win rate at equal length, minus ½",
        "samples",
        _unless_loops(lambda found: [value - 0.5 for value in found["win"]]),
    ),
    "margin": Measure("margin a token, change in nats", "pairs", _pairs("margin_gain")),
    "body": Measure("margin a token without the answers' ends, change in nats", "pairs", _pairs("body_gain")),
    "accuracy": Measure("pairs whose chosen answer is the likelier a token, change of the share", "pairs", _preferred),
}
DRIFTS = {
    "kl": Measure("KL(policy ‖ base) a token on held-out answers, nats", "pairs", _pairs("kl")),
    "kl-samples": Measure("KL(policy ‖ base) a token on the policy's own samples, nats", "samples",
                          _samples(lambda found: found["kl"])),
    "kl-prose": Measure("KL(policy ‖ base) a token on prose, nats", "prose",
                        lambda point: point["texts"].get("prose", {}).get("kl")),
    "retained": Measure("margin a token lost on the preference that the base was tuned to before, nats", "retained",
                        _forgotten, limit=0.1),
    "benchmarks": Measure("score lost on the benchmarks", "items", _lost, limit=0.04),
}  # fmt: skip


def envelope(drifts: Sequence[float], gains: Sequence[float]) -> tuple[Array, Array]:
    """Drifts in ascending order from 0, and the largest gain at or below each, from the base's 0."""
    order = np.argsort(drifts, kind="stable")
    xs = np.concatenate([[0.0], np.asarray(drifts, dtype=float)[order]])
    ys = np.concatenate([[0.0], np.asarray(gains, dtype=float)[order]])
    return xs, np.maximum.accumulate(ys)


def area(drifts: Sequence[float], gains: Sequence[float], limit: float, until: float = 1.0) -> float:
    """Mean height of the envelope over √(drift / limit) in [0, until]; flat beyond the largest drift."""
    xs, ys = envelope(drifts, gains)
    grid = np.linspace(0, 1, GRID)
    return float(_mean_height(np.interp(grid[grid <= until] ** 2, xs / limit, ys)))


def gain_at(drifts: Sequence[float], gains: Sequence[float], drift: float) -> float:
    """Height of the envelope at a drift."""
    xs, ys = envelope(drifts, gains)
    return float(np.interp(drift, xs, ys))


def drift_for(drifts: Sequence[float], gains: Sequence[float], gain: float) -> float | None:
    """The smallest drift at which the envelope reaches a gain; None if it does not."""
    xs, ys = envelope(drifts, gains)
    if gain > ys[-1]:
        return None
    index = int(np.argmax(ys >= gain))
    if index == 0:
        return 0.0
    share = (gain - ys[index - 1]) / (ys[index] - ys[index - 1])
    return float(xs[index - 1] + share * (xs[index] - xs[index - 1]))


class Draws:
    """Resampled counts of units, the same for every method, so that differences are paired.

    Row 0 is the sample itself. For each half of the units there are draws of their own: the halves choose a method's
    knob for each other. Seeds are not drawn: see estimates.py.
    """

    def __init__(self) -> None:
        self.resamples = RESAMPLES
        self._counts: dict[tuple[str, int, int | None], Array] = {}
        self.known: dict[tuple[Any, ...], Any] = {}  # what others have computed under these draws

    def counts(self, kind: str, units: int, half: int | None = None) -> Array:
        """How often each unit was drawn, (resamples + 1, units)."""
        key = (kind, units, half)
        if key not in self._counts:
            members = np.arange(units) if half is None else np.arange(half, units, 2)
            generator = np.random.default_rng([0, 1 + sum(map(ord, kind)), units, 2 if half is None else half])
            drawn = generator.integers(0, len(members), (self.resamples, len(members)))
            counts = np.zeros((self.resamples + 1, units))
            counts[0, members] = 1
            places = drawn + len(members) * np.arange(self.resamples)[:, None]
            drawn_counts = np.bincount(places.ravel(), minlength=self.resamples * len(members))
            counts[1:, members] = drawn_counts.reshape(self.resamples, len(members))
            self._counts[key] = counts
        return self._counts[key]


def means(values: Sequence[float], groups: Sequence[int] | None, counts: Array) -> Array:
    """The mean of the values under each row of counts; with groups, the counts are of groups."""
    numbers = np.asarray(values, dtype=float)
    if groups is None:
        return counts @ numbers / counts.sum(1)
    members = np.asarray(groups)
    sums = np.bincount(members, weights=numbers, minlength=counts.shape[1])
    sizes = np.bincount(members, minlength=counts.shape[1])
    return counts @ sums / (counts @ sizes)


def curve(
    points: Sequence[Mapping[str, Any]],
    groups: Sequence[int],
    gain: Measure,
    drift: Measure,
    draws: Draws,
    half: int | None = None,
) -> tuple[Array, Array]:
    """(drifts, gains), each (resamples + 1, points that have both); a drift below 0 counts as none."""
    columns: tuple[list[Array], list[Array]] = ([], [])
    for point in points:
        found = [measure.read(point) for measure in (drift, gain)]
        if any(values is None or not values for values in found):
            continue
        for column, measure, values in zip(columns, (drift, gain), found, strict=True):
            own = groups if measure.kind == "pairs" else None
            units = max(groups) + 1 if measure.kind == "pairs" else len(values)
            column.append(means(values, own, draws.counts(measure.kind, units, half)))
    drifts, gains = (np.stack(column, 1) if column else np.zeros((draws.resamples + 1, 0)) for column in columns)
    return np.maximum(drifts, 0), gains


def areas(drifts: Array, gains: Array, limit: float, root: bool = False) -> tuple[Array, Array]:
    """The area, all and lower half, in each resample; equals `area` row by row, but for its grid.

    Args:
        root: draw the lines between points straight in √drift.
    """
    order = np.argsort(drifts, 1, kind="stable")
    zeros = np.zeros((len(drifts), 1))
    xs = np.concatenate([zeros, np.take_along_axis(drifts, order, 1)], 1) / limit
    ys = np.maximum.accumulate(np.concatenate([zeros, np.take_along_axis(gains, order, 1)], 1), 1)
    return _mean_over_root(xs, ys, 1.0, root), _mean_over_root(xs, ys, 0.5, root)


def _mean_over_root(xs: Array, ys: Array, until: float, root: bool) -> Array:
    """The mean over r = √x in [0, until] of lines through (x, y), straight in x or in r, flat beyond the last point."""
    rs = np.sqrt(xs)
    starts, ends = np.minimum(rs[:, :-1], until), np.minimum(rs[:, 1:], until)
    axis = rs if root else xs
    widths = np.diff(axis, axis=1)
    # A step up at one drift has no width, and no share in the area.
    slopes = np.divide(np.diff(ys, axis=1), widths, out=np.zeros_like(widths), where=widths > 0)
    power = 1 if root else 2
    risen = (ends ** (power + 1) - starts ** (power + 1)) / (power + 1) - axis[:, :-1] * (ends - starts)
    sums = (ys[:, :-1] * (ends - starts) + slopes * risen).sum(1)
    return (sums + ys[:, -1] * (until - np.minimum(rs[:, -1], until))) / until


def _mean_height(heights: Array) -> Array:
    """The mean of functions from their values at equal steps, by the trapezoidal rule."""
    return (heights.sum(-1) - (heights[..., 0] + heights[..., -1]) / 2) / (heights.shape[-1] - 1)
