"""What did not work, by rules: a judge near chance, methods that gain nothing, answers that fall apart."""

from collections.abc import Iterator, Sequence

from benchmarks.experiments.curves import DRIFTS, GAINS, Draws
from benchmarks.experiments.measure import STRENGTH
from benchmarks.experiments.methods import TITLES
from benchmarks.experiments.summary import Variant, point_figures, variant_areas
from benchmarks.experiments.yardsticks import GAIN_TITLES, Settings, measured_gains
from qadapter.evaluation.intervals import wilson

BABBLE = 0.1  # of the sequences of four words of a policy's answers
CHANCE, NO_GAIN, LOOPS = "the judge is near chance", "a variant gains nothing by some gain", "answers repeat themselves"


def failure_lines(settings: Settings) -> Iterator[str]:
    """What did not work, by rules: a judge near chance, methods that gain nothing, answers that fall apart."""
    found = {place: list(failures(variants)) for place, variants in settings.items()}
    kinds = [(place, kind) for place, lines in found.items() for kind, _ in lines]
    if not kinds:
        return
    counts = {kind: len({place for place, own in kinds if own == kind}) for _, kind in kinds}
    told = "; ".join(f"{kind} in {count}" for kind, count in counts.items())
    yield f"**What did not work**, of {len(settings)} settings of all suites: {told}.\n"
    yield "<details><summary>In which</summary>\n"
    for (suite, setting), lines in found.items():
        yield from (f"- {suite}, {setting}: {line}" for _, line in lines)
    yield "\n</details>\n"


def failures(variants: Sequence[Variant]) -> Iterator[tuple[str, str]]:
    """Of a setting: what kind it is, and a sentence."""
    first = variants[0].results[0]
    accuracy, pairs = first["judge"]["held_out_accuracy"], first["data"]["held_out_pairs"]
    right = wilson(accuracy * pairs, pairs)
    gains = measured_gains(variants)
    if right.low <= 0.5 and "score" in gains:
        yield (
            CHANCE,
            (
                f"the judge ranks {accuracy:.3f} [{right.low:.3f}, {right.high:.3f}] of {pairs} held-out pairs right, "
                "which may be chance: judged samples say little here."
            ),
        )
    for gain in gains:
        weak = []
        for variant in variants:
            whole, _ = variant_areas(variant, "dial", GAINS[gain], DRIFTS["kl"], Draws())
            if whole.interval[1] < 0.001:
                weak.append(f"{TITLES[variant.method]} ({variant.label})")
        if weak:
            told = f"no gain by {GAIN_TITLES[gain]} (the interval of the area reaches 0): {'; '.join(weak)}."
            yield NO_GAIN, told
    for variant in variants:
        points = variant.results[0]["points"]
        strengths = sorted(p["value"] for p in points if p["dial"] == STRENGTH and "samples" in p)
        repetition = {s: (point_figures(variant, STRENGTH, s) or {}).get("sample repetition", 0) for s in strengths}
        for strength, repeated in repetition.items():
            if repeated > max(BABBLE, 2 * repetition[strengths[0]]):  # the smallest strength's: nearly the base's habit
                name = TITLES[variant.method]
                yield (
                    LOOPS,
                    (
                        f"{name} ({variant.label}) repeats itself from strength {strength:g} on: {repeated:.0%} of its "
                        "sequences of four words."
                    ),
                )
                break
