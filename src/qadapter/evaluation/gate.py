"""The gate: limits on what a customisation may cost and must gain, and whether measured figures keep them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qadapter.errors import ConfigError

# Of the process that ran an audit, by its verdict.
EXIT_CODES = {"passes": 0, "no limits": 0, "fails": 1}
EXIT_COULD_NOT_RUN = 2

# Where KL is measured: part of the results, and its name for people.
KL_PARTS = (("chosen", "chosen answers"), ("neutral", "neutral text"), ("instructions", "the base's own answers"))


@dataclass(frozen=True)
class Limits:
    """What an adapter has to keep to; None for no limit.

    Args:
        max_kl: KL(policy ‖ base) in nats a token, on every set of texts that is measured.
        max_drop: {task: percentage points by which its score may fall}.
        min_accuracy: share of held-out pairs to be ranked as they should, against the base.
        confident: the whole 95% interval has to keep each limit, not the estimate alone, which where the truth lies at
            the limit keeps it every other time.

    Raises:
        ConfigError: a limit out of its range.
    """

    max_kl: float | None = None
    max_drop: Mapping[str, float] = field(default_factory=dict)
    min_accuracy: float | None = None
    confident: bool = False

    def __post_init__(self) -> None:
        numbers = [("--max-kl", self.max_kl, 0.0, math.inf), ("--min-accuracy", self.min_accuracy, 0.0, 1.0)]
        numbers += [(f"--max-drop {task}", value, 0.0, 100.0) for task, value in self.max_drop.items()]
        for name, value, low, high in numbers:
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f"{low:g} or above"
                raise ConfigError(f"{name} = {value}: must be {bounds}.")


def parse_drops(entries: Sequence[str]) -> dict[str, float]:
    """{"lambada": 1.0} from ["lambada=1.0"].

    Raises:
        ConfigError: an entry of another form, or a task named twice.
    """
    drops: dict[str, float] = {}
    for entry in entries:
        task, equals, points = entry.rpartition("=")
        try:
            value = float(points)
        except ValueError:
            equals = ""
            value = math.nan
        if not equals or not task:
            raise ConfigError(f"--max-drop {entry!r}: write TASK=POINTS, such as lambada=1.0.")
        if task in drops:
            raise ConfigError(f"--max-drop names {task!r} twice.")
        drops[task] = value
    return drops


def figures_of(results: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """What was measured on a part of the results; chosen answers lie under the pairs."""
    return results["pairs"]["chosen"] if part == "chosen" else results[part]


def kl_figures(results: Mapping[str, Any], column: str) -> dict[str, dict[str, Any]]:
    """{name for people: KL interval} of every set of texts that was measured; sweeps leave out the base's answers."""
    there = [(part, title) for part, title in KL_PARTS if part == "chosen" or part in results]
    return {title: figures_of(results, part)["columns"][column]["kl"] for part, title in there}


def check(results: Mapping[str, Any], column: str, limits: Limits) -> list[dict[str, Any]]:
    """One entry a limit: quantity, limit, measured interval, whether it passes, and whether the call is close.

    The estimate decides, or with `limits.confident` the whole interval. A call is close where the interval holds the
    limit: more items would settle it. A figure that could not be measured does not pass.
    """
    entries = []
    if limits.max_kl is not None:
        for title, interval in kl_figures(results, column).items():
            entries.append(
                _entry(f"KL on {title}", "at most", limits.max_kl, "nats a token", interval, limits.confident)
            )
    for task, points in limits.max_drop.items():
        fall = drop(results, task, column)
        what = f"drop on {task}" if is_rate(results["tasks"][task]) else (
            f"drop on {task}, whose metric {results['tasks'][task]['metric']!r} is no rate"
        )  # fmt: skip
        entries.append(_entry(what, "at most", points, "percentage points", fall, limits.confident))
    if limits.min_accuracy is not None:
        accuracy = results["pairs"]["columns"][column]["accuracy"]
        least = limits.min_accuracy
        entries.append(_entry("held-out pair accuracy", "at least", least, "", accuracy, limits.confident))
    return entries


def keeps(interval: Mapping[str, Any], relation: str, limit: float, confident: bool) -> bool:
    """Whether a figure is "at most" or "at least" a limit: its estimate or, if `confident`, its whole interval."""
    most = relation == "at most"
    value = interval["value"]
    if confident and value is not None:
        value = interval["high" if most else "low"]
    return value is not None and (value <= limit if most else value >= limit)


def drop(results: Mapping[str, Any], task: str, column: str) -> dict[str, Any]:
    """By how many percentage points a task's score fell, with its paired interval; negative for a rise.

    Of a score that is no rate no points are known: its figures are None.

    Raises:
        ConfigError: the task was not run.
    """
    if task not in results["tasks"]:
        raise ConfigError(f"--max-drop {task}: no such task was run; the results have {sorted(results['tasks'])}.")
    figures = results["tasks"][task]
    if not is_rate(figures):
        return {"value": None, "low": None, "high": None, "n": figures["n"]}
    difference = figures["differences"][column]
    sign = -100 if figures["higher_is_better"] else 100
    fall = {key: _points(difference[key], sign) for key in ("value", "low", "high")}
    low, high = (fall["high"], fall["low"]) if sign < 0 else (fall["low"], fall["high"])
    return {"value": fall["value"], "low": low, "high": high, "n": figures["n"]}


def is_rate(figures: Mapping[str, Any]) -> bool:
    """Whether all scores of a benchmark are shares."""
    values = [entry["value"] for entry in figures["columns"].values()]
    return all(value is None or 0 <= value <= 1 for value in values)


def _points(share: float | None, sign: int) -> float | None:
    """Percentage points, without the rounding of binary shares: 35 of 500 items are 7, not 7.000000000000001."""
    return None if share is None else round(sign * share, 9) + 0.0


def _entry(
    quantity: str, relation: str, limit: float, unit: str, interval: Mapping[str, Any], confident: bool
) -> dict[str, Any]:
    low, high = interval["low"], interval["high"]
    close = low is None or high is None or low <= limit <= high
    return {
        "quantity": quantity,
        "relation": relation,
        "limit": limit,
        "unit": unit,
        "value": interval["value"],
        "low": low,
        "high": high,
        "n": interval["n"],
        "passes": keeps(interval, relation, limit, confident),
        "close": close,
    }


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """ "passes", "fails", or "no limits" where none was given."""
    if not entries:
        return "no limits"
    return "passes" if all(entry["passes"] for entry in entries) else "fails"
