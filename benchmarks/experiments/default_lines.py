"""The package's default among the measured variants of Q-Adapter."""

from collections.abc import Iterator, Sequence

from benchmarks.experiments.contests import OWN, pooled_difference, variant_difference
from benchmarks.experiments.curves import DRIFTS, GAINS
from benchmarks.experiments.summary import Variant
from benchmarks.experiments.tables import table
from benchmarks.experiments.yardsticks import (
    DRIFT_TITLES,
    GAIN_TITLES,
    GOAL_GAINS,
    Settings,
    bracketed,
    measured,
    measured_gains,
    word,
)
from qadapter import QAdapterConfig
from qadapter.config import ADDED_LATER

DEFAULT_WORDS = {
    "met": "better",
    "one seed": "better on one seed, which is no ground to change it",
    "not shown": "no ground to change it",
    "not met": "the default leads",
    "behind": "the default is better",
    "one seed, behind": "the default is better on one seed",
}
DEFAULT_YARDSTICKS = tuple((gain, drift) for drift in ("kl", "kl-prose") for gain in GOAL_GAINS)


def default_of(variants: Sequence[Variant]) -> Variant | None:
    """The variant that the package's defaults give, or None."""
    own = (variant for variant in variants if variant.method == OWN)
    usual = QAdapterConfig().to_dict()
    # Results are older than some settings, as adapter folders are.
    named = (v for v in own if ADDED_LATER | v.results[0]["policy"] == usual and set(v.named_options) <= set(usual))
    return next(named, None)


def default_lines(settings: Settings) -> Iterator[str]:
    """The package's default against the best of Q-Adapter's other variants by each gain."""
    lines = []
    for (suite, setting), variants in settings.items():
        default = default_of(variants)
        others = [variant for variant in variants if variant.method.startswith(OWN) and variant is not default]
        for gain in measured_gains(variants) if default is not None else ():
            compared = [(variant_difference(other, default, GAINS[gain], DRIFTS["kl"]), other) for other in others]
            known = [(value, other) for value, other in compared if value is not None]
            if known:
                value, best = max(known, key=lambda pair: pair[0][0])
                says = DEFAULT_WORDS[word(value, len(best.seeds & default.seeds))]
                lines.append(
                    f"- {suite}, {setting}, {GAIN_TITLES[gain]}: best of {len(known)} other variants is {best.label}; "
                    f"area − the default's {bracketed(value)}: {says}."
                )
    if lines:
        yield (
            "**The default** is "
            + ", ".join(f"{name} = {value}" for name, value in QAdapterConfig().to_dict().items())
            + ". The variant of the largest area is chosen and measured on the same prompts, which flatters it. Two "
            "variants are compared up to the drift that both were measured to.\n"
        )
        yield from pooled_default_lines(settings)
        yield (
            "[Why γ = 0.95 with a floor](method.md#the-discount), and what speaks for γ = 1. β and α were chosen with "
            "γ = 1 ([ablations-small](results/ablations-small.md): one domain, the margin alone, mostly one seed).\n"
        )
        yield "<details><summary>The default beside the best other variant</summary>\n"
        yield from lines
        yield "\n</details>\n"


def pooled_default_lines(settings: Settings) -> Iterator[str]:
    """Each variant that all of a suite's domains of DSP have, against the default, in the mean over the domains."""
    suites: dict[str, list[tuple[Variant, dict[str, Variant]]]] = {}
    for (suite, setting), variants in settings.items():
        default = default_of(variants)
        if setting.startswith("dsp-") and default is not None:
            others = {v.label: v for v in variants if v.method.startswith(OWN) and v is not default}
            suites.setdefault(suite, []).append((default, others))
    rows = []
    for suite, domains in suites.items():
        labels = [label for label in domains[0][1] if all(label in others for _, others in domains)]
        for label in labels if len(domains) > 1 else ():
            pairs = [(others[label], default) for default, others in domains]
            seeds = min(len(one.seeds & other.seeds) for one, other in pairs)
            cells = [suite, str(len(domains)), label, str(seeds)]
            for gain, drift in DEFAULT_YARDSTICKS:
                known = all(measured(pair, (gain, drift)) for pair in pairs)
                value = pooled_difference(pairs, GAINS[gain], DRIFTS[drift]) if known else None
                cells += ["–", "–"] if value is None else [bracketed(value), DEFAULT_WORDS[word(value, seeds)]]
            rows.append(cells)
    if rows:
        yield (
            "Area − the default's, in the mean over the domains of DSP, up to the drift that both were measured to "
            "(seeds: the fewest that both have):\n"
        )
        titles = (f"{GAIN_TITLES[gain]} against {DRIFT_TITLES[drift]}" for gain, drift in DEFAULT_YARDSTICKS)
        columns = [column for title in titles for column in (title, "")]
        yield from table(["suite", "domains", "variant", "seeds", *columns], rows)
