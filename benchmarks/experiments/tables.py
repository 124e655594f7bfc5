"""The tables of the results page."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.ablations import ABLATIONS
from benchmarks.experiments.contests import OWN, against_rival, gains_at, variant_difference
from benchmarks.experiments.curves import DRIFTS, GAINS, Draws, Measure, curve, drift_for, gain_at
from benchmarks.experiments.measure import STRENGTH
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.summary import (
    FORMS,
    RIVAL,
    MethodArea,
    Variant,
    dial_points,
    form_gain,
    limit_of,
    point_figures,
    reach,
    variant_areas,
)
from benchmarks.experiments.yardsticks import GAIN_TITLES, bracketed, measured_gains

LEVELS = (0.04, 0.12, 0.25, 1.0)  # shares of the drift limit


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, and the empty one that ends it."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def area_table(
    gain: str, drift: str, found: Sequence[Variant], rows: Sequence[MethodArea], figures: dict[str, Any]
) -> Iterator[str]:
    """The methods by area, the largest first; differences from DPO on the seeds that both have."""
    compared = against_rival(found, GAINS[gain], DRIFTS[drift])
    seeds = {method: seed_range([v for v in found if v.method == method]) for method in {v.method for v in found}}
    lines = []
    for row in sorted(rows, key=lambda row: -row.whole.value):
        whole, lower = row.whole.interval, row.lower.interval
        one = compared.get((row.method, row.form))
        cells = [TITLES[row.method], FORMS[row.form], seeds[row.method]]
        cells += [bracketed(whole), bracketed(lower)]
        against = None if one is None else {"whole": negated(one.whole), "lower": negated(one.lower)}
        cells += ["–", "–"] if against is None else [bracketed(against["whole"]), bracketed(against["lower"])]
        lines.append([*cells, "; ".join(row.chosen) or "–"])
        figures[f"{row.method} {row.form}"] = {"whole": whole, "lower": lower, "against_dpo": against}
    yield f"Gain: {GAINS[gain].name}. Drift: {DRIFTS[drift].name}.\n"
    yield from table(
        ("method", "form", "seeds", "area", "lower half", "area − DPO's", "lower half − DPO's", "chosen knob"), lines
    )


def seed_range(found: Sequence[Variant]) -> str:
    """How many seeds the variants have: 3, or 1–3 where some have fewer than others."""
    counts = {len(variant.seeds) for variant in found}
    return "–".join(map(str, sorted({min(counts), max(counts)})))


def negated(values: tuple[float, float, float]) -> tuple[float, float, float]:
    """The interval of minus the quantity."""
    value, low, high = values
    return -value, -high, -low


def best_variants(found: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> list[Variant]:
    """Each method's variant of the largest area, the best method first."""
    best: dict[str, tuple[float, Variant]] = {}
    for variant in found:
        value = variant_areas(variant, "dial", gain, drift, draws)[0].value
        if variant.method not in best or value > best[variant.method][0]:
            best[variant.method] = (value, variant)
    return [variant for _, variant in sorted(best.values(), key=lambda pair: -pair[0])]


def mean_curve(variant: Variant, form: str, gain: Measure, drift: Measure, draws: Draws) -> tuple[Any, Any]:
    """Drift and gain at each setting of the dial, mean over prompts and seeds."""
    curves = [
        curve(dial_points(result, form), result["data"]["groups"], gain, drift, draws) for result in variant.results
    ]
    return tuple(np.mean([one[axis][0] for one in curves], 0) for axis in (0, 1))


def equal_lines(found: Sequence[Variant], gain: str, draws: Draws) -> Iterator[str]:
    """Gain at equal drift, drift at equal gain, of each method's best variant."""
    measures = GAINS[gain], DRIFTS["kl"]
    limit = found[0].results[0]["cell"]["setting"]["drift_limit"]
    levels = [share * limit for share in LEVELS]
    best = best_variants(found, *measures, draws)
    curves = {variant: mean_curve(variant, "dial", *measures, draws) for variant in best}
    rival = next((curves[variant] for variant in best if variant.method == RIVAL), None)
    half = gain_at(*rival, limit / 4) if rival is not None else 0.0
    yield (
        f"Each method's variant of the largest area: gain ({GAINS[gain].name}) at equal drift"
        + (f", and the drift at DPO's gain at a quarter of the limit ({half:.3f}).\n" if half > 0 else ".\n")
    )
    columns = [f"at {level:.3g} nats" for level in levels] + ["drift for DPO's gain"] * (half > 0)
    rows = []
    for variant, values in curves.items():
        cells = [f"{TITLES[variant.method]}, {variant.label}", str(len(variant.seeds))]
        cells += [bracketed(gains_at(variant, *measures, level, draws).interval) for level in levels]
        if half > 0:
            reached = drift_for(*values, half)
            cells.append("not reached" if reached is None else f"{reached:.4f}")
        rows.append(cells)
    yield from table(["method", "seeds", *columns], rows)


def ablation_table(
    names: Sequence[str], found: Sequence[Variant], usual: Mapping[str, Any], draws: Draws
) -> Iterator[str]:
    """The variants of each ablation, and how their areas differ from those of what they change, on common seeds."""
    gains, rows = measured_gains(found), []

    def variant_of(method: str, options: Mapping[str, Any]) -> Variant | None:
        changed = {key: value for key, value in options.items() if not is_usual(key, value, usual)}
        return next((v for v in found if (v.method, v.named_options) == (method, changed)), None)

    for name in names:
        unchanged = variant_of(*ABLATIONS[name][0]) if name == "default" else variant_of(OWN, {})
        for method, options in ABLATIONS[name]:
            variant = variant_of(method, options)
            if variant is None:
                continue
            label = ", ".join(f"{key} = {value}" for key, value in options.items()) or "defaults"
            cells = [name, TITLES[method], label, str(len(variant.seeds))]
            for gain in gains:
                measures = GAINS[gain], DRIFTS["kl"]
                cells.append(bracketed(variant_areas(variant, "dial", *measures, draws)[0].interval))
                same = unchanged is None or variant is unchanged
                value = None if same else variant_difference(variant, unchanged, *measures)
                cells.append("–" if value is None else bracketed(value))
            rows.append(cells)
    if rows:
        yield (
            "Ablations of the preset `undiscounted` (those named `default`: of the default): areas against KL along "
            "the dial, and the distance to its, up to the drift that both were measured to.\n"
        )
        columns = [column for gain in gains for column in (f"area: {gain}", "− its")]
        yield from table(["ablation", "method", "variant", "seeds", *columns], rows)


def is_usual(name: str, value: Any, usual: Mapping[str, Any]) -> bool:
    """Whether an option of an ablation asks for the training that the suite has anyway."""
    return name.startswith("training.") and usual[name.removeprefix("training.")] == value


def variant_table(found: Sequence[Variant], draws: Draws) -> Iterator[str]:
    """Every variant at full strength, and its areas on all prompts (no choice made)."""
    points = [(variant, point_figures(variant, STRENGTH, 1.0)) for variant in found]
    names = list(dict.fromkeys(name for _, figures in points for name in figures or ()))
    wanted = ["accuracy", "margin_gain", "nll_change", "kl", "score gain", "sample win", "sample kl", "sample words",
              "sample finished", "sample repetition"]  # fmt: skip
    columns = [name for name in wanted if name in names]
    columns += [name for name in names if name.endswith((" loss_change", " prefers change", " margin change"))]
    gains = measured_gains(found)
    areas = f", with its areas of {' and '.join(gains)} against KL" if gains else ""
    yield f"At full strength (means; every variant){areas}:\n"
    rows = []
    for variant, figures in points:
        cells = [TITLES[variant.method], variant.label, str(len(variant.results))]
        cells += ["–" if figures is None or name not in figures else f"{figures[name]:.4g}" for name in columns]
        for gain in gains:
            cells.append(bracketed(variant_areas(variant, "dial", GAINS[gain], DRIFTS["kl"], draws)[0].interval))
        rows.append(cells)
    yield from table(["method", "options", "seeds", *columns, *(f"area: {gain}" for gain in gains)], rows)


# Name and head of the column, and the drifts of the table, of each further form.
FORM_TABLES = {
    "scaled": ("The scale of the weights (WiSE-FT)", "scale", ("kl",)),
    "thresholded": ("A threshold on the dial", "threshold", ("kl", "kl-prose")),
}


def form_tables(found: Sequence[Variant], draws: Draws) -> Iterator[str]:
    """The further forms beside the dial: areas of the same adapters, and their difference."""
    for form, (title, head, drifts) in FORM_TABLES.items():
        pairs = [(gain, v) for gain in measured_gains(found) for v in found if form_gain(v, form, GAINS[gain])]
        differences = f"{head} − dial", f"lower half: {head} − dial"
        for drift in drifts if pairs else ():
            rows = []
            for gain, variant in pairs:
                measures = GAINS[gain], DRIFTS[drift], draws
                dial, other = (variant_areas(variant, name, *measures) for name in ("dial", form))
                values = dial[0], other[0], other[0] - dial[0], other[1] - dial[1]
                cells = [gain, TITLES[variant.method], variant.label, str(len(variant.seeds))]
                rows.append([*cells, *(bracketed(value.interval) for value in values)])
            yield f"{title} beside the dial, on the same adapters: areas against {DRIFTS[drift].name}.\n"
            yield from table(("gain by", "method", "options", "seeds", "dial", head, *differences), rows)


def threshold_table(found: Sequence[Variant], draws: Draws) -> Iterator[str]:
    """What else a threshold changes at an equal KL on answers: the gains, and the KL on prose; where both get there."""
    variants = [variant for variant in found if form_gain(variant, "thresholded", DRIFTS["kl-prose"])]
    if not variants:
        return
    columns = {GAIN_TITLES[gain]: GAINS[gain] for gain in measured_gains(found)}
    columns |= {"KL on prose": DRIFTS["kl-prose"]}
    yield (
        "At an equal KL on held-out answers, without → with the threshold; a dash where not every seed's largest "
        "strength gets so far:\n"
    )
    rows = []
    for variant in variants:
        for share in LEVELS:
            level, cells = share * limit_of(variant.results[0], DRIFTS["kl"]), []
            for name, measure in columns.items():
                digits = 5 if name == "KL on prose" else 3
                cells.append(
                    " → ".join(
                        f"{gains_at(variant, measure, DRIFTS['kl'], level, draws, form).value:.{digits}f}"
                        if reach([variant], form, measure, DRIFTS["kl"]) >= level
                        else "–"
                        for form in ("dial", "thresholded")
                    )
                )
            rows.append([TITLES[variant.method], variant.label, f"{level:.3g}", *cells])
    yield from table(["method", "options", "KL on answers", *columns], rows)


def task_table(found: Sequence[Variant]) -> Iterator[str]:
    """Benchmarks: differences from the base, mean over seeds."""
    tasks = sorted({task for variant in found for result in variant.results for task in result["tasks"]})
    if not tasks:
        return
    points = dict.fromkeys(
        point
        for variant in found
        for result in variant.results
        for figures in result["tasks"].values()
        for point in figures["differences"]
    )
    columns = [(task, point) for task in tasks for point in points]
    rows = []
    for variant in found:
        cells = [TITLES[variant.method], variant.label]
        for task, point in columns:
            values = [
                result["tasks"][task]["differences"][point]["value"]
                for result in variant.results
                if task in result["tasks"]
            ]
            cells.append(f"{np.mean(values):+.3f}" if values else "–")
        rows.append(cells)
    yield "Benchmarks, difference from the base (mean over seeds):\n"
    yield from table(["method", "options", *(f"{task}, {point}" for task, point in columns)], rows)
