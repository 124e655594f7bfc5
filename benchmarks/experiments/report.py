"""docs/results.md and its plots, from results files alone: nothing on the page is typed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.cells import read_results
from benchmarks.experiments.curves import DRIFTS, GAINS, Draws, Measure, curve, drift_for, gain_at, interval
from benchmarks.experiments.measure import STRENGTH
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.suites import SUITES
from benchmarks.experiments.summary import (
    FORMS,
    RIVAL,
    MethodArea,
    Variant,
    by_setting,
    dial_points,
    differences,
    method_areas,
    number_of_seeds,
    point_figures,
    variant_areas,
    variants,
)
from qadapter.errors import DataError
from qadapter.evaluation.part_store import jsonable, write_ordered_json
from qadapter.plots import line_chart

# (gain, drift) of the tables, the judged one first.
COMPARISONS = (("score", "kl"), ("win", "kl"), ("margin", "kl"), ("margin", "kl-prose"), ("score", "kl-samples"))
LEVELS = (0.04, 0.12, 0.4, 1.0)  # shares of the drift limit
SERIES_A_PLOT = 6
HEAD = """# Results

Generated from the files in `{results}` by `python -m benchmarks.experiments report`; every figure and plot comes from
them. Brackets are 95% intervals over held-out prompts and seeds (bootstrap, the same resamples for all methods).

{definitions}

A method's knob is chosen on one half of the prompts and measured on the other, both ways round. "Dial" is the strength
dial z_b + λ (z̃ − z_b), given to every method (on a DPO LoRA it is DeRa); "scaled" averages weights with the base's
(WiSE-FT). Differences are from DPO with the dial.
"""
DEFINITIONS = """A trade-off curve holds (drift, gain) points, the base being (0, 0). The area is the mean height of its
envelope (the largest gain at or below a drift) over √(drift / limit) from 0 to 1; it has the gain's unit. The lower
half is that over drifts up to a quarter of the limit."""


def write_report(results: Path, output: Path) -> None:
    """Write the page, the plots beside it in a folder of its name, and the figures as JSON.

    Raises:
        DataError: there is no results file.
    """
    folders = sorted(folder for folder in results.iterdir() if folder.is_dir()) if results.is_dir() else []
    suites = {folder.name: (list(read_results(folder)), folder) for folder in folders}
    suites = {name: found for name, found in suites.items() if found[0]}
    if not suites:
        raise DataError(f"{results} holds no results file: run a suite first.")
    plots = output.parent / output.stem
    plots.mkdir(parents=True, exist_ok=True)
    shown = results if not results.is_absolute() else Path(*results.parts[-3:])
    lines = [HEAD.format(results=shown, definitions=DEFINITIONS)]
    figures: dict[str, Any] = {}
    for name, (found, folder) in suites.items():
        lines += suite_lines(name, found, folder, plots, figures.setdefault(name, {}))
    output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    write_ordered_json(plots / "figures.json", jsonable(figures))


def suite_lines(
    name: str, results: Sequence[dict[str, Any]], folder: Path, plots: Path, figures: dict[str, Any]
) -> Iterator[str]:
    """The section of a suite."""
    yield f"## {name}\n"
    if name in SUITES:
        yield SUITES[name]().purpose + "\n"
    notes = folder / "notes.md"
    if notes.exists():
        yield notes.read_text(encoding="utf-8")
    yield from run_lines(results)
    for setting, found in by_setting(results).items():
        yield from setting_lines(name, setting, found, plots, figures.setdefault(setting, {}))


def run_lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was run, on what, for how long."""
    seconds = [sum(result["seconds"].values()) for result in results]
    where = [result["provenance"] for result in results]
    versions = sorted({f"{name} {value}" for one in where for name, value in one["versions"].items()})
    devices = sorted({f"{one['device']} ({one['device_type']}, {one['threads']} threads)" for one in where})
    commits = sorted({str(one["commit"]) for one in where})
    dates = sorted(one["date"] for one in where)
    yield (
        f"{len(results)} cells, {number_of_seeds(results)} seeds, {sum(seconds) / 3600:.2f} hours in all "
        f"({np.median(seconds):.0f} s a cell in the median), {dates[0]} to {dates[-1]}; on {'; '.join(devices)}; "
        f"commit {', '.join(commits)}; {', '.join(versions)}.\n"
    )
    for command in sorted({one["command"] for one in where}):
        yield f"    {command}\n"


def setting_lines(
    suite: str, setting: str, results: Sequence[dict[str, Any]], plots: Path, figures: dict[str, Any]
) -> Iterator[str]:
    """The section of a setting: methods by area, variants at full strength, plots."""
    first = results[0]
    data, judge, described = first["data"], first["judge"], first["cell"]["setting"]
    prepared = f" tuned to {described['prepared']} first" if described["prepared"] else ""
    yield f"### {setting}\n"
    yield (
        f"{described['pairs']} on {first['base']['name']}{prepared}: {data['train_pairs']} training pairs, "
        f"{described['training']['epochs']:g} epochs, measured on {data['held_out_pairs']} held-out pairs and "
        f"{data['prompts']} sampled prompts. Judge: {judge['name']}; it ranks {judge['held_out_accuracy']:.3f} of the "
        f"held-out pairs right. Drift limit {described['drift_limit']:g} nats a token.\n"
    )
    found = variants(results)
    draws = Draws(number_of_seeds(results))
    for gain, drift in COMPARISONS:
        rows = method_areas(found, GAINS[gain], DRIFTS[drift], draws)
        yield from area_table(gain, drift, rows, figures.setdefault(f"{gain} against {drift}", {}))
        yield from plot_lines(suite, setting, gain, drift, found, draws, plots)
    yield from equal_lines(found, draws)
    yield from variant_table(found, draws)
    yield from task_table(found)


def area_table(gain: str, drift: str, rows: Sequence[MethodArea], figures: dict[str, Any]) -> Iterator[str]:
    """The methods by area, the largest first."""
    compared = differences(rows)
    yield f"Gain: {GAINS[gain].name}. Drift: {DRIFTS[drift].name}.\n"
    yield "| method | form | area | lower half | area − DPO's | lower half ÷ DPO's | chosen knob |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: -row.whole[0]):
        whole, lower = interval(row.whole), interval(row.lower)
        against = compared.get((row.method, row.form))
        cells = [TITLES.get(row.method, row.method), FORMS[row.form], _bracketed(whole), _bracketed(lower)]
        own = row.method == RIVAL and row.form == "dial"
        cells += ["–", "–"] if against is None or own else [_bracketed(against["whole"]), _bracketed(against["ratio"])]
        yield "| " + " | ".join([*cells, "; ".join(row.chosen) or "–"]) + " |"
        figures[f"{row.method} {row.form}"] = {"whole": whole, "lower": lower, "against_dpo": against}
    yield ""


def plot_lines(
    suite: str, setting: str, gain: str, drift: str, found: Sequence[Variant], draws: Draws, plots: Path
) -> Iterator[str]:
    """The curves of each method's best variant (by area, on all prompts) as SVG."""
    best = best_variants(found, GAINS[gain], DRIFTS[drift], draws)
    limit = found[0].results[0]["cell"]["setting"]["drift_limit"]
    for start in range(0, len(best), SERIES_A_PLOT):
        series = {}
        for variant in best[start : start + SERIES_A_PLOT]:
            drifts, gains = mean_curve(variant, "dial", GAINS[gain], DRIFTS[drift], draws)
            order = np.argsort(drifts)
            points = [(0.0, 0.0), *((float(drifts[i]), float(gains[i])) for i in order if drifts[i] <= 2 * limit)]
            series[f"{TITLES.get(variant.method, variant.method)}, {variant.label}"[:34]] = points
        name = f"{suite}-{setting}-{gain}-{drift}{'' if start == 0 else f'-{start // SERIES_A_PLOT + 1}'}.svg"
        title = f"{setting}: {GAINS[gain].name}"
        (plots / name).write_text(line_chart(series, title, DRIFTS[drift].name), encoding="utf-8")
        yield f"![{setting}: {gain} against {drift}]({plots.name}/{name})\n"


def best_variants(found: Sequence[Variant], gain: Measure, drift: Measure, draws: Draws) -> list[Variant]:
    """Each method's variant of the largest area, the best method first."""
    best: dict[str, tuple[float, Variant]] = {}
    for variant in found:
        value = float(variant_areas(variant, "dial", gain, drift, draws)[0][0])
        if variant.method not in best or value > best[variant.method][0]:
            best[variant.method] = (value, variant)
    return [variant for _, variant in sorted(best.values(), key=lambda pair: -pair[0])]


def mean_curve(variant: Variant, form: str, gain: Measure, drift: Measure, draws: Draws) -> tuple[Any, Any]:
    """Drift and gain at each setting of the dial, mean over prompts and seeds."""
    curves = [
        curve(dial_points(result, form), result["data"]["groups"], gain, drift, draws) for result in variant.results
    ]
    return tuple(np.mean([one[axis][0] for one in curves], 0) for axis in (0, 1))


def equal_lines(found: Sequence[Variant], draws: Draws) -> Iterator[str]:
    """Gain at equal drift, drift at equal gain, of each method's best variant."""
    gain, drift = COMPARISONS[0]
    limit = found[0].results[0]["cell"]["setting"]["drift_limit"]
    levels = [share * limit for share in LEVELS]
    best = best_variants(found, GAINS[gain], DRIFTS[drift], draws)
    curves = {variant: mean_curve(variant, "dial", GAINS[gain], DRIFTS[drift], draws) for variant in best}
    rival = next((curves[variant] for variant in best if variant.method == RIVAL), None)
    half = gain_at(*rival, limit / 4) if rival is not None else None
    yield "Best variants: gain (judge's score) at equal drift, and drift at DPO's gain at a quarter of the limit.\n"
    yield "| method | " + " | ".join(f"at {level:.3g} nats" for level in levels) + " | drift for that gain |"
    yield "|---" * (len(levels) + 2) + "|"
    for variant, values in curves.items():
        reached = drift_for(*values, half) if half is not None else None
        cells = [f"{TITLES.get(variant.method, variant.method)}, {variant.label}"]
        cells += [f"{gain_at(*values, level):.3f}" for level in levels]
        yield "| " + " | ".join([*cells, "–" if reached is None else f"{reached:.4f}"]) + " |"
    yield ""


def variant_table(found: Sequence[Variant], draws: Draws) -> Iterator[str]:
    """Every variant at full strength, and its areas on all prompts (no choice made)."""
    rows = [(variant, point_figures(variant, STRENGTH, 1.0)) for variant in found]
    names = list(dict.fromkeys(name for _, figures in rows for name in figures or ()))
    wanted = ["accuracy", "margin_gain", "nll_change", "kl", "score gain", "sample win", "sample kl", "sample words",
              "sample finished", "sample repetition"]  # fmt: skip
    columns = [name for name in wanted if name in names]
    columns += [name for name in names if name.endswith((" loss_change", " prefers change", " margin change"))]
    yield "At full strength (means; every variant), with its areas of score and margin against KL:\n"
    yield "| method | options | seeds | " + " | ".join(columns) + " | area: score | area: margin |"
    yield "|---" * (len(columns) + 5) + "|"
    for variant, figures in rows:
        cells = [TITLES.get(variant.method, variant.method), variant.label, str(len(variant.results))]
        cells += ["–" if figures is None or name not in figures else f"{figures[name]:.4g}" for name in columns]
        for gain in ("score", "margin"):
            cells.append(_bracketed(interval(variant_areas(variant, "dial", GAINS[gain], DRIFTS["kl"], draws)[0])))
        yield "| " + " | ".join(cells) + " |"
    yield ""


def task_table(found: Sequence[Variant]) -> Iterator[str]:
    """Benchmarks: differences from the base, mean over seeds."""
    tasks = sorted({task for variant in found for result in variant.results for task in result["tasks"]})
    if not tasks:
        return
    columns = [(task, point) for task in tasks for point in ("strength=0.5", "strength=1")]
    yield "Benchmarks, difference from the base:\n"
    yield "| method | options | " + " | ".join(f"{task}, {point}" for task, point in columns) + " |"
    yield "|---" * (len(columns) + 2) + "|"
    for variant in found:
        cells = [TITLES.get(variant.method, variant.method), variant.label]
        for task, point in columns:
            values = [
                result["tasks"][task]["differences"][point]["value"]
                for result in variant.results
                if task in result["tasks"]
            ]
            cells.append(f"{np.mean(values):+.3f}" if values else "–")
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _bracketed(values: tuple[float, float, float]) -> str:
    value, low, high = values
    return "–" if not np.isfinite(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"
