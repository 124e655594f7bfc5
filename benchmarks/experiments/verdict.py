"""The head of the results page: whether the goals are met, which default follows, and what did not work."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.experiments.contests import OWN, Contest, contests, pooled
from benchmarks.experiments.curves import DRIFTS, GAINS
from benchmarks.experiments.default_lines import default_lines
from benchmarks.experiments.failure_lines import failure_lines
from benchmarks.experiments.forest import Bar, forest_chart
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.suites import SUITES, make_suite
from benchmarks.experiments.summary import FORMS, RIVAL, Variant
from benchmarks.experiments.tables import table
from benchmarks.experiments.yardsticks import (
    DRIFT_TITLES,
    GAIN_TITLES,
    GOAL_GAINS,
    YARDSTICKS,
    Settings,
    bracketed,
    measured,
    measures,
    says,
)
from qadapter.plots import svg

# The heads of a contest's columns.
CONTEST = (
    "seeds", "variants", "up to", "area", "DPO's", "difference", "larger", "difference by √drift", "larger by √drift",
    "lower half ÷ DPO's", "lower half − 4/3 DPO's", "a third more",
)  # fmt: skip
# Those of a table that shows the goals alone.
GOALS = ("area", "DPO's", "difference", "larger", "lower half ÷ DPO's", "a third more")
PICTURE = "verdict.svg"


class Comparison(NamedTuple):
    """Q-Adapter against DPO in a setting by a yardstick, and the same read by √drift."""

    suite: str
    setting: str
    gain: str
    drift: str
    contest: Contest
    rooted: Contest


class DomainMean(NamedTuple):
    """The mean of a contest over so many domains, and the same read by √drift."""

    domains: int
    contest: Contest
    rooted: Contest


def can_tell(contest: Contest) -> bool:
    """Whether it can be met or lost."""
    return contest.seeds > 1 and contest.counts


INTRODUCTION = """## Verdict

Q-Adapter, its knob tuned and with the strength dial, against each rival with the same, on the seeds both have. The
goals: a larger area than every rival, and in the lower half at least a third more gain than DPO at equal drift (lower
half of Q-Adapter − 4/3 × lower half of DPO > 0).
"""
TERMS = """<details><summary>What the words in the tables mean</summary>

| in the tables | means |
|---|---|
| met | the whole interval is on the right side, on several seeds |
| one seed | the same, but it says nothing of the spread over seeds |
| not shown | the estimate is on the right side, the interval is not |
| not met | neither is |
| behind | the whole interval is on the wrong side, on several seeds |
| one seed, behind | the same on one seed |
| unlike | does not count: the rival never had Q-Adapter's training (epochs, say), or took less than half the steps |
| short | does not count: one of the two was measured to less than a tenth of the drift's limit |
| variants | how many each side chose from, Q-Adapter's / the rival's; a star: unlike |
| up to | the share of the limit that both were measured to: the areas and their halves end there |
| by √drift | lines straight in √drift join the points, by which knobs and seeds are chosen, too (seeds, variants and \
"up to" are the first reading's); where this disagrees, too few strengths were measured to tell |

</details>
"""


def verdict_lines(settings: Settings, plots: Path | None = None) -> Iterator[str]:
    """The section; nothing where no setting has Q-Adapter and a rival.

    Args:
        plots: the folder beside the page for the picture of the mean over domains; None for none.
    """
    found = {(key, yard): contests(variants, GAINS[yard[0]], DRIFTS[yard[1]])
             for key, variants in settings.items() for yard in YARDSTICKS if measured(variants, yard)}  # fmt: skip
    # A suite of nothing but ablations tunes no method: its variants are not a knob's.
    found = {place: own for place, own in found.items() if rivals(own) and not only_ablations(place[0][0])}
    if not found:
        return
    yield INTRODUCTION
    by_root = {place: in_root(settings[place[0]], *place[1]) for place in found}
    against = comparisons(found, by_root)
    yield from goal_lines("Against DPO", against)
    yield from count_table("gain by", [(GAIN_TITLES[row.gain], row) for row in against])
    folder = "results" if plots is None else plots.name
    yield from count_table("suite", [(f"[{row.suite}]({folder}/{row.suite}.md)", row) for row in against])
    means = domain_means(against)
    if plots is not None:
        yield from picture_lines(means, plots)
    yield from domain_table(means, folder)
    yield from comparison_table(against)
    yield TERMS
    yield from threshold_lines(settings, list(found), folder)
    yield from rival_table(found)
    yield from default_lines(settings)
    yield from failure_lines(settings)


def in_root(variants: Sequence[Variant], gain: str, drift: str, form: str = "dial") -> list[Contest]:
    """The same contest with DPO, read with lines between measured points that are straight in √drift."""
    pair = [variant for variant in variants if variant.method in (OWN, RIVAL)]
    return contests(pair, GAINS[gain], replace(DRIFTS[drift], root=True), form=form)


def threshold_lines(settings: Settings, places: Sequence[Any], folder: str) -> Iterator[str]:
    """Q-Adapter's dial with a threshold against DPO's without and with one, where both were measured."""
    form = "thresholded"
    with_threshold = [
        (key, yard)
        for key, yard in places
        if all(
            (own := [v for v in settings[key] if v.method == method]) and measured(own, yard, form)
            for method in (OWN, RIVAL)
        )
    ]
    if not with_threshold:
        return
    yield "### With a threshold\n"
    yield (
        "Q-Adapter's dial with a threshold of 0.1 nats ([`min_kl`](dial.md#a-threshold)), first against DPO with the "
        "plain strength dial, then against DPO's adapters with the same threshold: it is of this package, but works on "
        "any adapter. One value serves both; DPO's adapters go farther from the base at strength 1, and another value "
        "may suit them better. On which texts it was first looked at is said on the suite's page.\n"
    )
    found = {(key, yard): contests(settings[key], *measures(yard), form=form) for key, yard in with_threshold}
    by_root = {(key, yard): in_root(settings[key], *yard, form) for key, yard in with_threshold}
    for title, other in (("Against DPO with the dial", "dial"), ("Against DPO with the threshold, too", form)):
        against = comparisons(found, by_root, other)
        yield from goal_lines(title, against)
        yield from domain_table(domain_means(against), folder)
        yield from comparison_table(against)


def only_ablations(suite: str) -> bool:
    """Whether a suite has no methods beside its ablations."""
    return suite in SUITES and not make_suite(suite).knobs


def rivals(found: Sequence[Contest]) -> list[Contest]:
    """The contests with other methods, with the dial or with scaled weights."""
    others = (one for one in found if not one.other.method.startswith(OWN))
    return [one for one in others if one.other.form in ("dial", "scaled")]


def domain_means(against: Sequence[Comparison]) -> dict[tuple[str, str, str], DomainMean]:
    """Q-Adapter against DPO in the mean over the domains of DSP, where a suite has several, by suite, gain, drift."""
    parts: dict[tuple[str, str, str], list[tuple[Contest, Contest]]] = {}
    for one in against:
        if one.setting.startswith("dsp-"):
            parts.setdefault((one.suite, one.gain, one.drift), []).append((one.contest, one.rooted))
    return {
        key: DomainMean(len(domains), *(pooled(readings) for readings in zip(*domains, strict=True)))
        for key, domains in parts.items()
        if len(domains) > 1
    }


def domain_table(means: Mapping[tuple[str, str, str], DomainMean], folder: str) -> Iterator[str]:
    """The means over domains as a table: those that can tell, and folded, all of them with more columns.

    Args:
        folder: of the suites' pages.
    """
    if not means:
        return
    telling = {place: mean.contest for place, mean in means.items() if can_tell(mean.contest)}
    if telling:
        yield "**The mean over the domains of DSP**, where several seeds, like training and enough reach can tell:\n"
        rows = []
        for (suite, gain, drift), one in telling.items():
            place = [f"[{suite}]({folder}/{suite}.md)", GAIN_TITLES[gain], DRIFT_TITLES[drift]]
            goals = [*areas_of(one), says(one, one.whole), ratio_of(one), says(one, one.beyond_goal)]
            rows.append([*place, *goals])
        yield from table(("suite", "gain by", "against", *GOALS), rows)
    yield "<details><summary>The mean over the domains of DSP, all of it</summary>\n"
    yield "Seeds: the fewest of a domain.\n"
    rows = []
    for (suite, gain, drift), mean in means.items():
        place = [f"[{suite}]({folder}/{suite}.md)", str(mean.domains), GAIN_TITLES[gain], DRIFT_TITLES[drift]]
        rows.append([*place, *contest_cells(mean.contest, mean.rooted)])
    yield from table(("suite", "domains", "gain by", "against", *CONTEST), rows)
    yield "</details>\n"


def picture_lines(means: Mapping[tuple[str, str, str], DomainMean], plots: Path) -> Iterator[str]:
    """The same as a picture, of the suites with several seeds; differences as shares of DPO's area."""
    bars: dict[str, list[Bar]] = {}
    for (suite, gain, drift), mean in means.items():
        one, whole = mean.contest, mean.contest.other.whole.value
        if can_tell(one) and whole > 0:
            bar = Bar(suite, *(number / whole for number in one.whole))
            bars.setdefault(f"{GAIN_TITLES[gain]}, {DRIFT_TITLES[drift]}", []).append(bar)
    if not bars:
        return
    title = "Q-Adapter's area less DPO's, mean over the domains of DSP"
    picture = svg(forest_chart(bars, title, "difference and 95% interval, as a share of DPO's estimate"))
    (plots / PICTURE).write_text(picture, encoding="utf-8")
    yield f"![{title}, by gain and drift]({plots.name}/{PICTURE})\n"


def comparisons(
    found: Mapping[Any, Sequence[Contest]], by_root: Mapping[Any, Sequence[Contest]], form: str = "dial"
) -> list[Comparison]:
    """Q-Adapter against DPO in a form of it, in each setting by each yardstick."""
    rows = []
    for place, own in found.items():
        one, rooted = against_dpo(own, form), against_dpo(by_root[place], form)
        if one is not None and rooted is not None:
            rows.append(Comparison(*place[0], *place[1], one, rooted))
    return rows


def goal_lines(title: str, against: Sequence[Comparison]) -> Iterator[str]:
    """In how many comparisons the goals are met."""
    if not against:
        return
    words = [
        [says(one, value) for one in (row.contest, row.rooted) for value in (one.whole, one.beyond_goal)]
        for row in against
    ]
    met, behind = (
        [sum(entry == wanted for entry in column) for column in zip(*words, strict=True)]
        for wanted in ("met", "behind")
    )
    telling = sum(can_tell(row.contest) for row in against)
    places = [
        len({(row.suite, row.setting) for row, entry in zip(against, words, strict=True) if entry[0] in wanted})
        for wanted in ({"met"}, {"behind"})
    ]
    told = len({(row.suite, row.setting) for row in against if can_tell(row.contest)})
    yield (
        f"**{title}: a larger area is met in {met[0]} of {len(against)} comparisons, a third more gain in the lower "
        f"half in {met[1]} of {len(against)}; by √drift in {met[2]} and in {met[3]}. DPO's area is the larger, "
        f"outside the interval, in {behind[0]}, less than a third more gain is shown in {behind[1]}; by √drift in "
        f"{behind[2]} and in {behind[3]}. Only the {telling} comparisons with several "
        "seeds, like training and enough reach can be met or lost.**\n"
    )
    yield (
        f"Those {telling} are of {told} settings, each read by several gains and drifts of the same runs: Q-Adapter's "
        f"area is the larger by one of them or more in {places[0]} settings, DPO's in {places[1]}. Of two equal "
        f"methods about {0.025 * telling:.0f} of the {telling} would go each way by chance.\n"
    )


def count_table(title: str, against: Sequence[tuple[str, Comparison]]) -> Iterator[str]:
    """The same for each group of comparisons, named before them, of those that can tell."""
    telling = [(name, row) for name, row in against if can_tell(row.contest)]
    if not telling:
        return
    rows = []
    for group in dict.fromkeys(name for name, _ in telling):
        own = [row.contest for name, row in telling if name == group]
        words = [says(one, one.whole) for one in own]
        larger, behind = words.count("met"), words.count("behind")
        goal = [says(one, one.beyond_goal) for one in own]
        counts = (len(own), larger, len(own) - larger - behind, behind, goal.count("met"), goal.count("behind"))
        rows.append([group, *map(str, counts)])
    yield from table(
        (
            title,
            "can tell",
            "Q-Adapter's area larger",
            "neither",
            "DPO's larger",
            "a third more at small drift",
            "less",
        ),
        rows,
    )


def comparison_table(against: Sequence[Comparison]) -> Iterator[str]:
    """Every comparison."""
    if not against:
        return
    yield "<details><summary>Each comparison</summary>\n"
    rows = []
    for row in against:
        place = [row.suite, row.setting, GAIN_TITLES[row.gain], DRIFT_TITLES[row.drift]]
        rows.append([*place, *contest_cells(row.contest, row.rooted)])
    yield from table(("suite", "setting", "gain by", "against", *CONTEST), rows)
    yield "</details>\n"


def against_dpo(found: Sequence[Contest], form: str = "dial") -> Contest | None:
    """The contest with DPO in that form."""
    return next((one for one in found if (one.other.method, one.other.form) == (RIVAL, form)), None)


def contest_cells(one: Contest, rooted: Contest) -> list[str]:
    """A contest in the columns of CONTEST; `rooted` is the same one, read by √drift."""
    larger = [says(one, one.whole), bracketed(rooted.whole), says(rooted, rooted.whole)]
    goals = [ratio_of(one), bracketed(one.beyond_goal), says(one, one.beyond_goal)]
    kind = [str(one.seeds), one.values, f"{one.share:.2f}"]
    return [*kind, *areas_of(one), *larger, *goals]


def areas_of(one: Contest) -> list[str]:
    """Q-Adapter's area, the rival's, and their difference."""
    return [f"{one.own.whole.value:.3f}", f"{one.other.whole.value:.3f}", bracketed(one.whole)]


def ratio_of(one: Contest) -> str:
    """The lower half over the rival's."""
    return f"{one.ratio:.2f}" if np.isfinite(one.ratio) else "–"


def rival_table(found: Mapping[Any, Sequence[Contest]]) -> Iterator[str]:
    """Q-Adapter's area less each rival's, against KL."""
    by_rival: dict[tuple[str, ...], dict[str, Contest]] = {}
    for ((suite, setting), (gain, drift)), own in found.items():
        for one in rivals(own) if gain in GOAL_GAINS and drift == "kl" else ():
            by_rival.setdefault((suite, setting, one.other.method, one.other.form), {})[gain] = one
    gains = GOAL_GAINS
    beaten = sum(
        all(gain in row and says(row[gain], row[gain].whole) == "met" for gain in gains) for row in by_rival.values()
    )
    yield f"**A larger area than the rival by both gains: met against {beaten} of {len(by_rival)}.**\n"
    yield "<details><summary>Area − the rival's</summary>\n"
    rows = []
    for (suite, setting, method, form), row in by_rival.items():
        kinds = ((str(one.seeds), one.values, f"{one.share:.2f}") for one in row.values())
        seeds, values, shares = (", ".join(dict.fromkeys(column)) for column in zip(*kinds, strict=True))
        cells = [suite, setting, TITLES[method], FORMS[form], seeds, values, shares]
        for gain in gains:
            cells += [bracketed(row[gain].whole), says(row[gain], row[gain].whole)] if gain in row else ["–", "–"]
        rows.append(cells)
    columns = [column for gain in gains for column in (GAIN_TITLES[gain], "larger")]
    yield from table(["suite", "setting", "rival", "form", "seeds", "variants", "up to", *columns], rows)
    yield "</details>\n"
