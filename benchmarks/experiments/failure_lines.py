"""What did not work, by rules: a judge near chance, methods that gain nothing, answers that fall apart."""

from collections.abc import Iterator, Sequence

from benchmarks.experiments.curves import DRIFTS, GAINS, Draws
from benchmarks.experiments.measure import STRENGTH
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.summary import Variant, point_figures, variant_areas
from benchmarks.experiments.yardsticks import GAIN_TITLES, Settings, measured_gains
from qadapter.evaluation.intervals import wilson

BABBLE = 0.1  # of the sequences of four words of a policy's answers


def failure_lines(settings: Settings) -> Iterator[str]:
    """What did not work, by rules: a judge near chance, methods that gain nothing, answers that fall apart."""
    lines = [line for (suite, setting), variants in settings.items() for line in failures(suite, setting, variants)]
    if lines:
        yield "**What did not work:**\n"
        yield from lines
        yield ""


def failures(suite: str, setting: str, variants: Sequence[Variant]) -> Iterator[str]:
    """Of a setting."""
    place = f"- {suite}, {setting}: "
    first = variants[0].results[0]
    accuracy, pairs = first["judge"]["held_out_accuracy"], first["data"]["held_out_pairs"]
    right = wilson(accuracy * pairs, pairs)
    gains = measured_gains(variants)
    if right.low <= 0.5 and "score" in gains:
        yield (
            f"{place}the judge ranks {accuracy:.3f} [{right.low:.3f}, {right.high:.3f}] of {pairs} held-out pairs "
            "right, which may be chance: judged samples say little here."
        )
    for gain in gains:
        weak = []
        for variant in variants:
            whole, _ = variant_areas(variant, "dial", GAINS[gain], DRIFTS["kl"], Draws())
            if whole.interval[1] < 0.001:
                weak.append(f"{TITLES.get(variant.method, variant.method)} ({variant.label})")
        if weak:
            yield f"{place}no gain by {GAIN_TITLES[gain]} (the interval of the area reaches 0): {'; '.join(weak)}."
    for variant in variants:
        points = variant.results[0]["points"]
        for strength in sorted(p["value"] for p in points if p["dial"] == STRENGTH and "samples" in p):
            repeated = (point_figures(variant, STRENGTH, strength) or {}).get("sample repetition", 0)
            if repeated > BABBLE:
                name = TITLES.get(variant.method, variant.method)
                yield (
                    f"{place}{name} ({variant.label}) repeats itself from strength {strength:g} on: {repeated:.0%} "
                    "of its sequences of four words."
                )
                break
