"""docs/results.md and its plots, from results files alone: nothing on the page is typed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.cells import read_results
from benchmarks.experiments.contests import OWN
from benchmarks.experiments.curves import DRIFTS, GAINS, LOOPS, RESAMPLES, Draws
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.suites import SUITES, make_suite
from benchmarks.experiments.summary import (
    RIVAL,
    Variant,
    by_setting,
    limit_of,
    method_areas,
    number_of_seeds,
    variants,
)
from benchmarks.experiments.tables import (
    ablation_table,
    area_table,
    best_variants,
    equal_lines,
    form_tables,
    mean_curve,
    table,
    task_table,
    threshold_table,
    variant_table,
)
from benchmarks.experiments.verdict import verdict_lines
from benchmarks.experiments.yardsticks import YARDSTICKS, measured, measured_gains
from qadapter.errors import DataError
from qadapter.evaluation.part_store import jsonable
from qadapter.modeling.builtin_model import BUILTIN_MODEL, GGUF_REVISION
from qadapter.new_folders import write_ordered_json
from qadapter.plots import line_chart

# (gain, drift) of the folded tables; those of the verdict stand in front of them.
FURTHER = (("accuracy", "kl"),)
SERIES_A_PLOT = 6
LEGEND = 24  # characters
PLACES = ("--data", "--work", "--results", "--threads")  # of files on the machine that ran: no matter to a reader
HEAD = """# Results

Made by `python -m benchmarks.experiments report{places}` from the files in `{results}`:
every figure and plot comes from them.
The verdict over all suites comes first. Then [what was run](#what-was-run), each suite with a page of its tables and
curves; the terms (area, lower half, seeds, brackets) are defined at the end: [How to read it](#how-to-read-it).
"""
BACK = "[The verdict, and how to read the tables](../{page})\n"
DEFINITIONS = """## How to read it

A trade-off curve holds (drift, gain) points along the strength dial, the base being (0, 0). The area is the mean height
of its envelope (the largest gain at or below a drift) over √(drift / limit) from 0 to 1, in the gain's unit; a curve
that ends before the limit is flat from there. The lower half is the same over drifts up to a quarter of the limit: the
mean gain at equal small drift. No area is below 0, since the base is always there to fall back on. A variant's area is
the mean of its seeds' areas. In the verdict two methods are compared, and a rival's values of its knob that have fewer
seeds ruled out, up to the drift that some variant of each was measured to with every seed, where that is less than the
limit; so are two variants.

Between measured points the envelope is a straight line in drift, which answering a share of the requests at each of the
two strengths reaches. Along a dial gains grow about with √drift, so that such lines credit too little between points
far apart, and least to a method that passes the limit at a small strength. "By √drift" joins the same points by lines
straight in √drift, which credits what was not measured. Where strengths were measured densely, the second is nearer to
the whole curve (benchmarks/LOG.md).

Gains: the change of the judge's score on sampled answers; its win rate against the base's answers at equal length,
less ½ (figures up to 2026-11-28 were cut at blanks alone: words joined by line breaks counted as one); the change of
log-prob(chosen) − log-prob(rejected) a token on held-out pairs (margin), and the same without the answers' ends. By the
first two an answer of which more than {loops:.0%} of the sequences of four words are repeats gains nothing (what it
loses stays): judges of style like loops. (Of answers at a strength of 0.25, nearly the base's, about one in a hundred
is such a loop.) The largest of several noisy gains is too high, the more so the more points lie below the limit: with
no gain on either side, a method that drifts half as fast would lead by about a hundredth.
Drifts: KL(policy ‖ base) a token on the held-out pairs, on prose, on the policy's own samples; and the score that
benchmarks lost, up to 0.04.

Options of Q-Adapter change its preset `undiscounted`, the package's default until 2026-11-29: `beta = 10` has γ = 1.

A method's knob is chosen on one half of the prompts (every other one) and measured on the other, both ways round; where
there is nothing to choose, too. The runs are the same in both halves, so that a side that chose among more variants is
flattered by the luck of its seeds: of equal methods with four variants against one, by a hundredth or two where seeds
differ by a third of the gain, as by judged samples; by margin they hardly differ. "Dial" is the strength
dial z_b + λ (z̃ − z_b), given to every method (on a DPO LoRA it is DeRa); "scaled" averages weights with the base's
(WiSE-FT); "by its own knob alone" is the curve through the knob's values at full strength.

Brackets are 95% intervals over held-out prompts (bootstrap, {resamples:,} resamples, the same for all methods) and over
seeds (their unbiased variance; both by Student's t, with Satterthwaite's degrees of freedom). With one seed they are
over prompts alone. Many comparisons stand on this page, and nothing is corrected for that; nor are they
independent: several gains and drifts are read from one run, and threshold-small trains anew on discount-small's pairs.
The default's discount was chosen by areas on the four domains of DSP in discount-small; longer-small and
threshold-small judge it on other answers and pairs of the same domains, and HH-RLHF, terse and capitals had no
part in that choice.
"""


def write_report(results: Path, output: Path) -> None:
    """Write the page; in a folder of its name a page for each suite, the plots, and the figures as JSON.

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
    settings = {
        (name, setting): variants(own, usual_training(name, setting))
        for name, (found, _) in suites.items()
        for setting, own in by_setting(found).items()
    }
    index = suite_table({name: found for name, (found, _) in suites.items()}, plots.name)
    source = "/".join(results.parts[-3:])
    places = "" if output.stem == "results" else f" --results {source} --output {'/'.join(output.parts[-2:])}"
    write_page(
        output,
        [
            HEAD.format(results=source, places=places),
            *verdict_lines(settings, plots),
            "## What was run\n",
            *index,
            DEFINITIONS.format(resamples=RESAMPLES, loops=LOOPS),
        ],
    )
    figures: dict[str, Any] = {}
    for name, (found, folder) in suites.items():
        lines = [f"# Results: {name}\n", BACK.format(page=output.name), *suite_lines(name, found, folder)]
        for (suite, setting), own in settings.items():
            if suite == name:
                lines += setting_lines(name, setting, own, plots, figures.setdefault(name, {}).setdefault(setting, {}))
        write_page(plots / f"{name}.md", lines)
    write_ordered_json(plots / "figures.json", jsonable(figures))


def write_page(path: Path, lines: Sequence[str]) -> None:
    """Write the lines as a page."""
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def suite_table(suites: Mapping[str, Sequence[dict[str, Any]]], folder: str) -> Iterator[str]:
    """Every suite with its page: what it asks, and how much of it there is."""
    rows = []
    for name, found in suites.items():
        purpose = make_suite(name).purpose if name in SUITES else ""
        hours = sum(sum(result["seconds"].values()) for result in found) / 3600
        numbers = [str(len(by_setting(found))), str(len(found)), str(number_of_seeds(found)), f"{hours:.1f}"]
        rows.append([f"[{name}]({folder}/{name}.md)", purpose, *numbers])
    yield from table(("suite", "what", "settings", "cells", "seeds", "hours"), rows)


def usual_training(suite: str, setting: str) -> dict[str, Any] | None:
    """The training of a suite's setting; None for one that is not known."""
    known = make_suite(suite).settings if suite in SUITES else ()
    return next((asdict(one.training) for one in known if one.name == setting), None)


def suite_lines(name: str, results: Sequence[dict[str, Any]], folder: Path) -> Iterator[str]:
    """The head of a suite's section: what was run, on what, for how long."""
    if name in SUITES:
        yield make_suite(name).purpose + "\n"
    notes = folder / "notes.md"
    if notes.exists():
        yield notes.read_text(encoding="utf-8")
    seconds = [sum(result["seconds"].values()) for result in results]
    where = [result["provenance"] for result in results]
    versions = sorted({f"{name} {value}" for one in where for name, value in one["versions"].items()})
    devices = sorted({f"{one['device']} ({one['device_type']}, {counted(one['threads'], 'thread')})" for one in where})
    dates = sorted(one["date"][:16].replace("T", " ") for one in where)
    yield (
        f"{counted(len(results), 'cell')}, {sum(seconds) / 3600:.2f} hours in all ({np.median(seconds):.0f} s a cell "
        f"in the median), {dates[0]} to {dates[-1]} UTC; on {'; '.join(devices)}; "
        f"commit {', '.join(sorted({str(one['commit']) for one in where}))}; {', '.join(versions)}.\n"
    )
    yield "\n".join(f"    {command}" for command in sorted({shown_command(one["command"]) for one in where})) + "\n"


def shown_command(command: str) -> str:
    """The command without the options that say where files lie on the machine."""
    words, shown = iter(command.split()), []
    for word in words:
        if word in PLACES:
            next(words, None)
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            shown.append(word)
    return " ".join(shown)


def counted(number: int, noun: str) -> str:
    """1 cell, 2 cells."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def setting_lines(
    suite: str, setting: str, found: Sequence[Variant], plots: Path, figures: dict[str, Any]
) -> Iterator[str]:
    """The section of a setting: methods by area, variants at full strength, plots."""
    draws = Draws()

    def compared(gain: str, drift: str) -> Iterator[str]:
        """Areas and curves of a gain against a drift."""
        rows = method_areas(found, GAINS[gain], DRIFTS[drift], draws)
        yield from area_table(gain, drift, found, rows, figures.setdefault(f"{gain} against {drift}", {}))
        yield from plot_lines(suite, setting, gain, drift, found, draws, plots)

    yield f"## {setting}\n"
    yield described(found)
    ablations = make_suite(suite).ablations if suite in SUITES else ()
    if ablations:
        yield from ablation_table(ablations, found, usual_training(suite, setting) or {}, draws)
    for yardstick in YARDSTICKS:
        if measured(found, yardstick):
            yield from compared(*yardstick)
    for gain in measured_gains(found):
        yield from equal_lines(found, gain, draws)
    further = [yardstick for yardstick in FURTHER if measured(found, yardstick)]
    if further:
        yield "<details><summary>Other gains and drifts</summary>\n"
        for yardstick in further:
            yield from compared(*yardstick)
        yield "</details>\n"
    yield from form_tables(found, draws)
    yield from threshold_table(found, draws)
    yield from variant_table(found, draws)
    yield from task_table(found)


def described(found: Sequence[Variant]) -> str:
    """The data, the base, the judge and the seeds of a setting."""
    results = [result for variant in found for result in variant.results]
    plain = (v for v in found if not any(name.startswith("training.") for name in v.named_options))
    first = next(plain, found[0]).results[0]
    data, judge, setting = first["data"], first["judge"], first["cell"]["setting"]
    training, base = setting["training"], first["base"]
    copied = ", a dequantised 4-bit copy" if base["revision"] == GGUF_REVISION else ""
    name = (BUILTIN_MODEL if base["name"] == "builtin" else base["name"]) + copied
    prepared = f", tuned to {setting['prepared']} first" if setting["prepared"] else ""
    seeds = number_of_seeds(results)
    fewer = {TITLES[v.method]: len(v.seeds) for v in found if len(v.seeds) < seeds}
    says = "One seed: nothing is known of the spread over seeds." if seeds == 1 else f"{seeds} seeds"
    if fewer:
        says += f", but fewer for {', '.join(f'{name} ({count})' for name, count in fewer.items())}"
    return (
        f"{setting['pairs']} on {name} (weights {str(base['fingerprint'])[:12]}, {setting['dtype']}{prepared}). "
        f"{data['train_pairs']} training pairs of at most {setting['max_length']} tokens, {training['epochs']:g} "
        f"epochs of {training['pairs_a_step']} pairs a step, LoRA of rank {training['lora_r']} on "
        f"{training['lora_layers']} layers. Measured on {data['held_out_pairs']} held-out pairs and {data['prompts']} "
        f"sampled prompts. Judge: {judge['name']}; it ranks {judge['held_out_accuracy']:.3f} of the held-out pairs "
        f"right. Drift limit {setting['drift_limit']:g} nats a token. {says.removesuffix('.')}.\n"
    )


def plot_lines(
    suite: str, setting: str, gain: str, drift: str, found: Sequence[Variant], draws: Draws, plots: Path
) -> Iterator[str]:
    """The curves of each method's best variant (by area, on all prompts) as SVG, Q-Adapter and DPO in every plot."""
    best = best_variants(found, GAINS[gain], DRIFTS[drift], draws)
    always = [variant for method in (OWN, RIVAL) for variant in best if variant.method == method]
    others = [variant for variant in best if variant not in always]
    size = SERIES_A_PLOT - len(always)
    for number, start in enumerate(range(0, max(1, len(others)), size), 1):
        series = {}
        for variant in [*always, *others[start : start + size]]:
            title = TITLES[variant.method]
            label = f"{title}, {variant.label}"
            curve = mean_curve(variant, "dial", GAINS[gain], DRIFTS[drift], draws)
            series[label if len(label) <= LEGEND else title] = up_to(
                *curve, limit_of(variant.results[0], DRIFTS[drift])
            )
        name = f"{suite}-{setting}-{gain}-{drift}{'' if number == 1 else f'-{number}'}.svg"
        text = line_chart(series, f"{setting}: gain against drift", DRIFTS[drift].name, GAINS[gain].name)
        (plots / name).write_text(text, encoding="utf-8")
        yield f"![{setting}: {gain} against {drift}]({name})\n"


def up_to(drifts: Sequence[float], gains: Sequence[float], limit: float) -> list[tuple[float, float]]:
    """The points of a curve from the base to the limit, where its line is cut."""
    points = sorted([(0.0, 0.0), *zip(map(float, drifts), map(float, gains), strict=True)])
    inside = [point for point in points if point[0] <= limit]
    if len(inside) < len(points):
        inside.append((limit, float(np.interp(limit, *zip(*points, strict=True)))))
    return inside
