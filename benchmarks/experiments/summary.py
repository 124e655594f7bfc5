"""From results files to the figures of the page: variants, and areas of methods with their knob tuned."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.experiments.curves import HALVES, Array, Draws, Measure, areas, curve
from benchmarks.experiments.estimates import Estimate, mean_of_halves, seed_mean
from benchmarks.experiments.measure import SCALE, STRENGTH, THRESHOLD
from qadapter.errors import DataError

Result = dict[str, Any]
KNOB = "knob"
FORMS = {
    "dial": "with the strength dial",
    "scaled": "with scaled weights (WiSE-FT)",
    "thresholded": "with the strength dial and a threshold",
    KNOB: "by its own knob alone",
}
# Forms that only some settings measure, by the dial of their points.
FURTHER_FORMS = {"scaled": SCALE, "thresholded": THRESHOLD}
RIVAL = "dpo"


@dataclass(frozen=True, eq=False)
class Variant:
    """A method with its options, trained with one or more seeds."""

    method: str
    options: str
    results: tuple[Result, ...]

    @property
    def seeds(self) -> frozenset[int]:
        """Those that it was trained with."""
        return frozenset(result["cell"]["seed"] for result in self.results)

    @property
    def named_options(self) -> dict[str, Any]:
        """The options by name."""
        return json.loads(self.options)

    @property
    def label(self) -> str:
        """Options as text: beta = 10."""
        return ", ".join(f"{name} = {_short(value)}" for name, value in self.named_options.items()) or "defaults"


@dataclass(frozen=True)
class MethodArea:
    """A method's area, all and lower half, and the variants that the two halves chose."""

    method: str
    form: str
    whole: Estimate
    lower: Estimate
    chosen: tuple[str, ...]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_setting(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the name of their setting; training that was changed by an option counts as an option.

    Raises:
        DataError: a name stands for several settings (another base, dtype, size), whose cells are no seeds of one.
    """
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        found[result["cell"]["setting"]["name"]].append(result)
    for name, own in found.items():
        first = own[0]["cell"]["setting"]
        kept = [key for key in first if key not in ("training", "prepared_by")]  # the latter goes with the former
        for result in own[1:]:
            other = result["cell"]["setting"]
            differing = [key for key in kept if first[key] != other.get(key)]
            if differing:
                raise DataError(
                    f"{own[0]['file']} and {result['file']} are both of the setting {name} but differ in "
                    f"{', '.join(differing)}: keep such results in folders of their own (--results)."
                )
    return dict(found)


def variants(results: Sequence[Result], usual: Mapping[str, Any] | None = None) -> list[Variant]:
    """The variants among the results of a setting, each with all of its seeds, in order of method and options.

    Args:
        usual: the training from which differences are told; None for the commonest one.
    """
    commonest = usual or _commonest_training(results)
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        training = result["cell"]["setting"]["training"]
        changes = {f"training.{name}": value for name, value in training.items() if value != commonest[name]}
        options = json.dumps({**result["cell"]["options"], **changes}, sort_keys=True)
        found[result["cell"]["method"], options].append(result)
    return [
        Variant(method, options, tuple(sorted(rows, key=lambda row: row["cell"]["seed"])))
        for (method, options), rows in sorted(found.items())
    ]


def _commonest_training(results: Sequence[Result]) -> dict[str, Any]:
    counts: dict[str, int] = defaultdict(int)
    for result in results:
        counts[json.dumps(result["cell"]["setting"]["training"], sort_keys=True)] += 1
    return json.loads(max(counts, key=lambda text: counts[text]))


def dial_points(result: Result, form: str) -> list[dict[str, Any]]:
    """The points of a form: along the dial, at full strength, or of a further form (scaled weights have that, too)."""
    points = [point for point in result["points"] if point["dial"] == STRENGTH]
    if form == "dial":
        return points
    full = [point for point in points if point["value"] == 1.0]
    if form == KNOB:
        return full
    further = [point for point in result["points"] if point["dial"] == FURTHER_FORMS[form]]
    return [*full, *further] if form == "scaled" else further


def limit_of(result: Result, drift: Measure) -> float:
    """The right end of the curves."""
    return drift.limit or result["cell"]["setting"]["drift_limit"]


def reach(found: Sequence[Variant], form: str, gain: Measure, drift: Measure) -> float:
    """How far along a drift the gain was measured of some variant in a form, of each of its seeds."""

    def farthest(result: Result) -> float:
        points = [point for point in dial_points(result, form) if gain.read(point)]
        return max((float(np.mean(values)) for values in map(drift.read, points) if values), default=0.0)

    return max(min(map(farthest, variant.results)) for variant in found)


def variant_areas(
    variant: Variant, form: str, gain: Measure, drift: Measure, draws: Draws, half: int | None = None
) -> tuple[Estimate, Estimate]:
    """The area of a variant's curve, all and lower half, mean over seeds."""
    key = (variant, form, gain, drift, half)
    if key not in draws.known:
        rows = {
            result["cell"]["seed"]: _result_areas(result, form, gain, drift, draws, half) for result in variant.results
        }
        whole, lower = (seed_mean({seed: row[part] for seed, row in rows.items()}) for part in (0, 1))
        draws.known[key] = whole, lower
    return draws.known[key]


def _result_areas(
    result: Result, form: str, gain: Measure, drift: Measure, draws: Draws, half: int | None
) -> tuple[Array, Array]:
    """Those of one seed; kept apart, since a variant is made anew for each choice of seeds."""
    key = (id(result), form, gain, drift, half)
    if key not in draws.known:
        curves = curve(dial_points(result, form), result["data"]["groups"], gain, drift, draws, half)
        found = areas(*curves, limit_of(result, drift), drift.root)
        draws.known[key] = result, found  # with the result, so that its id stays its own
    return draws.known[key][1]


def method_areas(found: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> list[MethodArea]:
    """Each method in each form, its knob chosen on one half of the prompts and measured on the other."""
    rows = []
    for method in dict.fromkeys(variant.method for variant in found):
        own = [variant for variant in found if variant.method == method]
        rows += [method_area(form, own, gain, drift, draws) for form in forms_of(own, gain)]
    return rows


def forms_of(own: Sequence[Variant], gain: Measure) -> Iterator[str]:
    """The forms in which a method was measured."""
    yield "dial"
    yield from (form for form in FURTHER_FORMS if any(form_gain(variant, form, gain) for variant in own))
    if len(own) > 1 and frozenset.intersection(*(variant.seeds for variant in own)):
        yield KNOB


def method_area(form: str, own: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> MethodArea:
    """A method, its variants given, in one form."""
    return (_knob_alone if form == KNOB else _tuned)(form, own, gain, drift, draws)


def form_gain(variant: Variant, form: str, gain: Measure) -> bool:
    """Whether the gain was measured in a further form: at a scale of the weights but 1, say."""
    dial = FURTHER_FORMS[form]
    points = (point for result in variant.results for point in result["points"] if point["dial"] == dial)
    return any(gain.read(point) is not None for point in points)


def _tuned(form: str, own: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> MethodArea:
    table = {half: [variant_areas(variant, form, gain, drift, draws, half) for variant in own] for half in HALVES}
    best = {half: int(np.argmax([whole.value for whole, _ in table[half]])) for half in HALVES}
    one, other = (table[half][best[1 - half]] for half in HALVES)
    whole, lower = (mean_of_halves(*part) for part in zip(one, other, strict=True))
    chosen = tuple(dict.fromkeys(own[best[half]].label for half in HALVES))
    return MethodArea(own[0].method, form, whole, lower, chosen)


def _knob_alone(form: str, own: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> MethodArea:
    """The curve through a method's variants at full strength, on the seeds of all of them: nothing is chosen."""
    rows = {}
    for seed in sorted(frozenset.intersection(*(variant.seeds for variant in own))):
        of_seed = [next(row for row in variant.results if row["cell"]["seed"] == seed) for variant in own]
        curves = [curve(dial_points(row, form), row["data"]["groups"], gain, drift, draws) for row in of_seed]
        drifts, gains = (np.concatenate([c[axis] for c in curves], 1) for axis in (0, 1))
        rows[seed] = areas(drifts, gains, limit_of(own[0].results[0], drift), drift.root)
    whole, lower = (seed_mean({seed: row[part] for seed, row in rows.items()}) for part in (0, 1))
    return MethodArea(own[0].method, form, whole, lower, ())


def number_of_seeds(results: Sequence[Result]) -> int:
    """How many different seeds there are."""
    return len({result["cell"]["seed"] for result in results})


def point_figures(variant: Variant, dial: str, value: float) -> dict[str, float] | None:
    """Means over units and seeds of everything at one setting of a dial; None where it was not measured."""
    rows: list[Mapping[str, float]] = []
    for result in variant.results:
        point = next((p for p in result["points"] if p["dial"] == dial and p["value"] == value), None)
        if point is None:
            return None
        rows.append(_flat(point))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _flat(point: Mapping[str, Any]) -> dict[str, float]:
    flat = {name: float(np.mean(values)) for name, values in point["pairs"].items()}
    for name, figures in point["texts"].items():
        flat |= {f"{name} {key}": float(np.mean(values)) for key, values in figures.items()}
    for name, figures in point["retained"].items():
        flat[f"{name} prefers change"] = float(np.mean(figures["prefers"]) - np.mean(figures["base_prefers"]))
        flat[f"{name} margin change"] = float(np.mean(figures["margin_gain"]))
    if "samples" in point:
        found = point["samples"]
        flat |= {f"sample {key}": float(np.mean(found[key])) for key in found if found[key]}
        flat["score gain"] = flat["sample score"] - flat["sample base_score"]
    return flat
