"""The head of the results page, from made-up results: common seeds, goals met and not, the default, what failed."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments.contests import (
    SHORT,
    contests,
    gains_at,
    on_seeds,
    pooled,
    pooled_difference,
    trained_alike,
    variant_difference,
)
from benchmarks.experiments.curves import DRIFTS, GAINS, Draws
from benchmarks.experiments.default_lines import pooled_default_lines
from benchmarks.experiments.estimates import Estimate, mean_of_settings, seed_mean
from benchmarks.experiments.failure_lines import LOOPS, failures
from benchmarks.experiments.forest import Bar, forest_chart
from benchmarks.experiments.report import shown_command, up_to
from benchmarks.experiments.summary import Variant, method_areas, reach, variants
from benchmarks.experiments.tables import ablation_table, is_usual, threshold_table
from benchmarks.experiments.verdict import against_dpo, verdict_lines
from benchmarks.experiments.yardsticks import YARDSTICKS, measured_gains, word
from qadapter import QAdapterConfig
from qadapter.plots import WIDTH, svg

PAIRS = 12
# The mean height of √KL over √(KL / 0.25), where straight lines in KL join the points below.
AREA = 0.2385
TRAINING = {"lora_r": 8, "lora_layers": "all"}


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """What is asserted here needs no exact intervals, and of what is measured on samples one yardstick."""
    monkeypatch.setattr("benchmarks.experiments.curves.RESAMPLES", 400)
    few = tuple(yard for yard in YARDSTICKS if yard[0] != "win" and yard[1] != "kl-samples")
    monkeypatch.setattr("benchmarks.experiments.verdict.YARDSTICKS", few)


def result(method, seed, margin, options=None, score=None, judge=0.9, lost=None, forgotten=None, loops=0.0):
    """A cell whose margin (and score) grows with √KL, its repetition with KL; pairs and seeds differ a little."""

    def gains(height, kl):
        return [height * kl**0.5 * (1 + 0.02 * (unit % 3 - 1) + 0.01 * seed) for unit in range(PAIRS)]

    points = []
    for kl in (0.01, 0.04, 0.0625, 0.25):
        point = {"dial": "strength", "value": 4 * kl, "texts": {}, "retained": {}}
        point["pairs"] = {"kl": [kl] * PAIRS, "margin_gain": gains(margin, kl)}
        scores = gains(margin if score is None else score, kl)
        point["samples"] = {"score": scores, "base_score": [0.0] * PAIRS, "repetition": [loops * kl] * PAIRS}
        point["samples"] |= {"win": [0.5 + value for value in scores], "kl": [kl] * PAIRS}
        if forgotten is not None:
            same = {"prefers": [1.0] * 5, "base_prefers": [1.0] * 5}
            point["retained"] = {"earlier": {"margin_gain": [-forgotten * kl] * 5, **same}}
        if lost is not None:
            point["lost"] = {"arc_easy": [lost * kl] * 5}
        points.append(point)
    return {
        "cell": {"setting": {"drift_limit": 0.25, "training": TRAINING}, "method": method, "options": options or {},
                 "seed": seed},
        "data": {"groups": list(range(PAIRS)), "held_out_pairs": PAIRS},
        "judge": {"held_out_accuracy": judge},
        "policy": QAdapterConfig().to_dict(),
        "training": {"steps": 24},
        "points": points,
    }  # fmt: skip


def text(results):
    return "\n".join(verdict_lines({("s", "x"): variants(results, TRAINING)}))


def test_a_third_more_gain_is_met_or_not_by_the_numbers():
    dpo = [result("dpo", seed, 1.0) for seed in (0, 1)]
    page = text([*dpo, *(result("qadapter", seed, 1.4) for seed in (0, 1))])
    assert "a larger area is met in 2 of 2 comparisons, a third more gain in the lower half in 2 of 2" in page
    assert f"| s | x | margin | KL | 2 | 1 / 1 | 1.00 | {1.4 * AREA * 1.005:.3f} | {AREA * 1.005:.3f} | 0.09" in page
    assert "| 1.40 |" in page
    page = text([*dpo, *(result("qadapter", seed, 1.2) for seed in (0, 1))])
    assert "a larger area is met in 2 of 2 comparisons, a third more gain in the lower half in 0 of 2" in page


def test_gain_is_also_held_against_what_is_lost_of_an_earlier_preference():
    """With gains as √KL, who loses a quarter at the same KL has twice the gain at equal loss."""
    own = [result("qadapter", seed, 1.0, forgotten=0.1) for seed in (0, 1)]
    page = text([*own, *(result("dpo", seed, 1.0, forgotten=0.4) for seed in (0, 1))])
    assert "| s | x | margin | earlier preference | 2 | 1 / 1 |" in page
    assert "a larger area is met in 2 of 4 comparisons, a third more gain in the lower half in 2 of 4" in page


def with_threshold(cell, margin):
    """The cell with points of another height along the dial with a threshold."""
    other = result(cell["cell"]["method"], cell["cell"]["seed"], margin)["points"]
    cell["points"] += [point | {"dial": "threshold"} for point in other]
    return cell


def test_a_threshold_is_judged_beside_the_dial_and_beside_dpos_threshold():
    seeds = (0, 1)
    dpo = [with_threshold(result("dpo", seed, 1.0), 1.3) for seed in seeds]
    assert "### With a threshold" not in text([*dpo, *(result("qadapter", seed, 1.1) for seed in seeds)])
    page = text([*dpo, *(with_threshold(result("qadapter", seed, 1.1), 1.4) for seed in seeds)])
    dial, against_dial, against_both = (
        page.split(f"**Against DPO{title}: a larger area is met in ")[1].split(" comparisons")[0]
        + page.split(f"**Against DPO{title}")[1].split("lower half in ")[1][:6]
        for title in ("", " with the dial", " with the threshold, too")
    )
    assert (dial, against_dial, against_both) == ("2 of 20 of 2", "2 of 22 of 2", "2 of 20 of 2")
    # Our threshold on its adapters is no form of the rival that the plain dial has to beat.
    assert "met against 1 of 1" in page
    part = page.split("### With a threshold")[1]
    assert f"| s | x | margin | KL | 2 | 1 / 1 | 1.00 | {1.4 * AREA * 1.005:.3f} | {AREA * 1.005:.3f} |" in part
    assert f"| s | x | margin | KL | 2 | 1 / 1 | 1.00 | {1.4 * AREA * 1.005:.3f} | {1.3 * AREA * 1.005:.3f} |" in part


def test_thresholds_are_compared_only_where_every_seed_has_them():
    seeds = (0, 1)
    own = [with_threshold(result("qadapter", seed, 1.1, lost=0.1), 1.4) for seed in seeds]
    dpo = [with_threshold(result("dpo", seed, 1.0, lost=0.1), 1.3) for seed in seeds]
    part = text([*own, *dpo]).split("### With a threshold")[1].split("**A larger area than the rival")[0]
    rows = [line for line in part.splitlines() if "| s | x |" in line]
    assert {row.split("|")[4].strip() for row in rows} == {"KL"}  # no benchmarks with a threshold
    for cell in (own[1], dpo[1]):
        one = [*own, *dpo]
        one[one.index(cell)] = {**cell, "points": [p for p in cell["points"] if p["dial"] == "strength"]}
        assert "### With a threshold" not in text(one)


def test_a_lead_that_hangs_on_the_lines_between_points_is_shown_by_both_readings():
    # Both gain as √KL does, but DPO was measured only at the limit: a straight line in KL takes a third of it away.
    dpo = [result("dpo", seed, 1.0) for seed in (0, 1)]
    for one in dpo:
        one["points"] = one["points"][-1:]
    page = text([*dpo, *(result("qadapter", seed, 1.0) for seed in (0, 1))])
    assert "met in 2 of 2 comparisons, a third more gain in the lower half in 2 of 2; by √drift in 0 and in 0." in page
    (line,) = [line for line in page.splitlines() if line.startswith("| s | x | margin | KL | 2 | 1 / 1 |")]
    assert "| met | 0.000 [0.000, 0.000] | not met |" in line
    everywhere = contests(
        variants([*dpo, result("qadapter", 0, 1.0)]), GAINS["margin"], replace(DRIFTS["kl"], root=True)
    )
    assert everywhere[0].other.whole.value == pytest.approx(0.25, rel=1e-3)  # the mean of √KL up to √0.25


def test_how_many_variants_each_side_chose_from_and_unlike_training_are_told():
    own = [result("qadapter", 0, 1.0, {"beta": beta}) for beta in (1.0, 3.0, 10.0)]
    once = result("dpo", 0, 1.0)
    once["cell"]["setting"] = {"drift_limit": 0.25, "training": TRAINING | {"epochs": 1.0}}
    assert "| s | x | margin | KL | 1 | 3 / 1 |" in text([*own, result("dpo", 0, 1.0)])
    for one in own:
        one["cell"]["setting"] = {"drift_limit": 0.25, "training": TRAINING | {"epochs": 3.0}}
    found = contests(variants([*own, once]), GAINS["margin"], DRIFTS["kl"])
    assert {one.values for one in found if one.other.method == "dpo"} == {"3 / 1*"}


def test_one_seed_is_never_enough():
    page = text([result("dpo", 0, 1.0), result("qadapter", 0, 1.4)])
    assert "met in 0 of 2 comparisons, a third more gain in the lower half in 0 of 2" in page
    assert "| one seed |" in page
    assert [word((0.1, low, 0.2), seeds) for low, seeds in ((0.05, 2), (0.05, 1), (-0.1, 2))] == [
        "met", "one seed", "not shown"
    ]  # fmt: skip
    assert word((-0.1, -0.2, 0.1), 2) == "not met"
    assert [word((-0.1, -0.2, -0.05), seeds) for seeds in (1, 2)] == ["one seed, behind", "behind"]


def test_methods_are_compared_on_the_seeds_that_both_have():
    results = [result("qadapter", seed, 1.0 + seed) for seed in (0, 1, 2)]
    found = variants([*results, result("dpo", 1, 2.0), result("sft", 7, 1.0)])
    (one,) = contests(found, GAINS["margin"], DRIFTS["kl"])
    assert (one.other.method, one.seeds) == ("dpo", 1)
    assert one.whole[0] == pytest.approx(0.0, abs=1e-9)  # seed 1 has the height 2.0, as DPO has
    assert one.ratio == pytest.approx(1.0)
    qadapter, dpo, sft = sorted(found, key=lambda variant: ["qadapter", "dpo", "sft"].index(variant.method))
    assert variant_difference(qadapter, dpo, GAINS["margin"], DRIFTS["kl"])[0] == pytest.approx(0.0, abs=1e-9)
    assert variant_difference(qadapter, sft, GAINS["margin"], DRIFTS["kl"]) is None


@pytest.mark.parametrize(
    ("method", "height", "seeds", "chosen"),
    [("dpo", 0.5, 3, "knob = 1"), ("dpo", 5.0, 1, "knob = 2"), ("qadapter", 0.5, 3, "knob = 1"),
     ("qadapter", 5.0, 3, "knob = 1")],
)  # fmt: skip
def test_a_knob_with_fewer_seeds_is_left_out_of_ours_and_of_a_rivals_if_the_first_seed_is_against_it(
    method, height, seeds, chosen
):
    other = {"qadapter": "dpo", "dpo": "qadapter"}[method]
    repeated = [result(method, seed, 1.0, {"knob": 1}) for seed in (0, 1, 2)]
    rival = [result(other, seed, 1.0) for seed in (0, 1, 2)]
    found = variants([*repeated, result(method, 0, height, {"knob": 2}), *rival])
    found = contests(found, GAINS["margin"], DRIFTS["kl"])
    (one,) = [one for one in found if (one.other.method, one.other.form) == ("dpo", "dial")]
    assert one.seeds == seeds
    assert {one.own.method: one.own, one.other.method: one.other}[method].chosen == (chosen,)


def test_ours_with_fewer_seeds_is_a_choice_where_the_contest_has_no_more():
    own = [*(result("qadapter", seed, 1.0, {"knob": 1}) for seed in (0, 1, 2)),
           *(result("qadapter", seed, 2.0, {"knob": 2}) for seed in (0, 1))]  # fmt: skip
    for seeds, values, chosen in [((0, 1), "2 / 1", "knob = 2"), ((0, 1, 2), "1 / 1", "knob = 1")]:
        found = contests(variants([*own, *(result("dpo", seed, 1.0) for seed in seeds)]), GAINS["margin"], DRIFTS["kl"])
        (one,) = [one for one in found if one.other.method == "dpo"]
        assert (one.seeds, one.values, one.own.chosen) == (len(seeds), values, (chosen,))


def test_a_rival_chooses_by_the_reading_that_it_is_read_by():
    """Its knob of one seed is the better one only if lines are straight in √KL."""
    late = result("dpo", 0, 1.0, {"knob": 2})
    late["points"] = late["points"][-1:]
    results = [*(result(method, seed, 0.9, {"knob": 1}) for method in ("qadapter", "dpo") for seed in (0, 1)), late]
    one, rooted = (
        against_dpo(contests(variants(results), GAINS["margin"], replace(DRIFTS["kl"], root=root)))
        for root in (False, True)
    )
    assert (one.seeds, one.values) == (2, "1 / 1")
    assert (rooted.seeds, rooted.values) == (1, "1 / 2")
    assert rooted.other.whole.value == pytest.approx(0.25, rel=1e-2)


def test_a_rival_chooses_as_far_as_both_were_measured():
    """Its knob of one seed is the better one only at small drifts, where alone Q-Adapter was measured."""
    early = result("dpo", 0, 1.0, {"knob": 2})
    for point in early["points"][2:]:
        point["pairs"]["margin_gain"] = [0.0] * PAIRS
    repeated = [result("dpo", seed, 0.9, {"knob": 1}) for seed in (0, 1)]
    for kl, expected in ((0.04, (1, "1 / 2")), (0.25, (2, "1 / 1"))):
        own = [until(result("qadapter", seed, 0.9), kl) for seed in (0, 1)]
        one = against_dpo(contests(variants([*repeated, early, *own]), GAINS["margin"], DRIFTS["kl"]))
        assert (one.seeds, one.values) == expected


def test_two_variants_are_compared_as_far_as_both_were_measured():
    near = [until(result("qadapter", seed, 1.0, {"knob": 1}), 0.04) for seed in (0, 1)]
    far = [result("qadapter", seed, 1.0, {"knob": 2}) for seed in (0, 1)]
    little = [until(result("qadapter", seed, 1.0, {"knob": 3}), 0.01) for seed in (0, 1)]
    one, other, least = variants([*near, *far, *little])
    value, _, _ = variant_difference(other, one, GAINS["margin"], DRIFTS["kl"])
    assert value == pytest.approx(0.0, abs=1e-9)
    assert variant_difference(other, least, GAINS["margin"], DRIFTS["kl"]) is None
    assert pooled_difference([(one, other), (other, one)], GAINS["margin"], DRIFTS["kl"])[0] == pytest.approx(0.0)


def test_comparisons_that_cannot_be_met_and_those_that_are_lost_are_counted():
    page = text([*(result("qadapter", seed, 1.0) for seed in (0, 1)), *(result("dpo", seed, 1.4) for seed in (0, 1))])
    assert "outside the interval, in 2, less than a third more gain is shown in 2; by √drift in 2 and in 2." in page
    assert "Only the 2 comparisons with several seeds" in page
    assert "Those 2 are of 1 settings," in page
    assert "in 0 settings, DPO's in 1. Of two equal methods about 0 of the 2 would go each way by chance." in page
    page = text([result("dpo", 0, 1.4), result("qadapter", 0, 1.0)])
    assert "outside the interval, in 0, less than a third more gain is shown in 0; by √drift in 0 and in 0." in page
    assert "Only the 0 comparisons" in page


def test_domains_are_pooled_and_resampled_each_by_itself():
    def contest(own):
        found = variants(
            [*(result("qadapter", seed, own) for seed in (0, 1)), result("dpo", 0, 1.0), result("dpo", 1, 1.0)]
        )
        return contests(found, GAINS["margin"], DRIFTS["kl"])[0]

    low, high = contest(1.1), contest(1.5)
    both = pooled([low, high])
    assert both.whole[0] == pytest.approx((low.whole[0] + high.whole[0]) / 2)
    assert both.seeds == 2
    same = pooled([high, high])  # two independent draws of one domain: the mean varies less than the domain does
    assert same.whole[2] - same.whole[1] < high.whole[2] - high.whole[1]

    def cells(margin):
        return variants([*(result(m, s, h) for m, h in (("qadapter", margin), ("dpo", 1.0)) for s in (0, 1))], TRAINING)

    names = {("s", "dsp-a"): cells(1.1), ("s", "dsp-b"): cells(1.5), ("s", "polite"): cells(9.0)}
    page = "\n".join(verdict_lines(names))
    assert (
        f"| [s](results/s.md) | 2 | margin | KL | 2 | 1 / 1 | 1.00 | {1.3 * AREA * 1.005:.3f} | {AREA * 1.005:.3f} |"
        in page
    )


def test_an_interval_over_seeds_is_students():
    """Prompts that do not vary: the interval of a mean of three seeds is that of three measurements."""
    heights = [0.1, 0.3, 0.2]
    value, low, high = seed_mean({seed: np.full(401, height) for seed, height in enumerate(heights)}).interval
    expected = stats.t.interval(0.95, df=2, loc=np.mean(heights), scale=stats.sem(heights))
    assert value == pytest.approx(0.2)
    assert (low, high) == pytest.approx(expected)


def test_an_interval_over_prompts_alone_is_the_bootstraps():
    draws = np.concatenate([[0.5], np.random.default_rng(0).normal(0.5, 0.1, 4000)])
    for seeds in ({0: 0.5}, {0: 0.5, 1: 0.5}):  # one seed, or seeds that agree
        assert Estimate(draws, (seeds,)).interval == pytest.approx((0.5, *np.percentile(draws[1:], [2.5, 97.5])))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Noise of prompts that all seeds share, and of two seeds in four settings, as in the mean over domains."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        own = [generator.normal(0, 0.1) + generator.normal(0, 0.1, 2) for _ in range(4)]
        rows = [[np.append(value, value + generator.normal(0, 0.1, 200)) for value in seeds] for seeds in own]
        # What a bootstrap of shared prompts draws moves all seeds alike.
        rows = [{0: seeds[0], 1: seeds[0] - seeds[0][0] + seeds[1][0]} for seeds in rows]
        _, low, high = mean_of_settings([seed_mean(seeds) for seeds in rows]).interval
        covered += low <= 0 <= high
    assert 0.93 <= covered / 400 <= 0.99


def test_combined_estimates_are_combined_seed_by_seed():
    """Two methods whose seeds move together differ by what they always differ by."""
    one = seed_mean({0: np.full(401, 1.0), 1: np.full(401, 3.0)})
    other = seed_mean({0: np.full(401, 0.5), 1: np.full(401, 2.5)})
    assert (one - other).interval == pytest.approx((0.5, 0.5, 0.5))
    assert (0.5 * (one + other)).value == pytest.approx(1.75)
    for seeds in ({0: np.full(401, 1.0)}, {0: np.full(401, 1.0), 2: np.full(401, 3.0)}):
        with pytest.raises(ValueError, match="seeds differ"):
            one + seed_mean(seeds)


def test_halves_may_choose_variants_of_other_seeds():
    """One is better on the even prompts and has three seeds, one on the odd ones and has one."""
    cells = [*(result("dpo", seed, 1.0, {"beta": 0.1}) for seed in (0, 1, 2)), result("dpo", 0, 1.0, {"beta": 0.3})]
    for cell in cells:
        for point in cell["points"]:
            own = point["pairs"]["margin_gain"]
            better = 0 if cell["cell"]["options"]["beta"] == 0.1 else 1
            point["pairs"]["margin_gain"] = [value * (1 + (unit % 2 == better)) for unit, value in enumerate(own)]
    (row,) = [row for row in areas_of(variants(cells)) if row.form == "dial"]
    assert set(row.chosen) == {"beta = 0.1", "beta = 0.3"}
    assert sorted(len(own) for own in row.whole.seeds) == [1, 3]
    value, low, high = row.whole.interval
    assert low < value < high


def test_loops_gain_nothing():
    """Answers are loops from KL 0.0625 on: what was gained before is all there is."""
    sound, loops = (result("qadapter", 0, 1.0, loops=share) for share in (0.0, 6.0))
    for gain in ("score", "win"):
        values = [[sum(GAINS[gain].read(point)) / PAIRS for point in cell["points"]] for cell in (sound, loops)]
        assert values[1][:2] == values[0][:2]
        assert values[1][2:] == [0.0, 0.0]
    worse = result("qadapter", 0, -1.0, loops=6.0)
    assert all(sum(GAINS["score"].read(point)) < 0 for point in worse["points"])


def test_samples_are_also_held_against_their_own_drift_and_compared_at_equal_length(monkeypatch):
    monkeypatch.setattr("benchmarks.experiments.verdict.YARDSTICKS", YARDSTICKS)
    page = text([result("qadapter", 0, 1.0), result("dpo", 0, 1.0)])
    assert "| s | x | judged samples at equal length | KL |" in page
    assert "| s | x | judged samples | KL on its samples |" in page


def until(cell, kl):
    """The cell measured no further than that KL."""
    cell["points"] = [point for point in cell["points"] if point["pairs"]["kl"][0] <= kl]
    return cell


def test_two_methods_are_compared_as_far_as_both_were_measured():
    dpo = [result("dpo", seed, 1.0) for seed in (0, 1)]
    own = [until(result("qadapter", seed, 1.2), 0.0625) for seed in (0, 1)]
    found = variants([*dpo, *own])
    assert reach([v for v in found if v.method == "qadapter"], "dial", GAINS["margin"], DRIFTS["kl"]) == 0.0625
    (one,) = contests(found, GAINS["margin"], DRIFTS["kl"])
    assert one.share == 0.25
    assert one.ratio == pytest.approx(1.2)
    (cut,) = contests(found, GAINS["margin"], replace(DRIFTS["kl"], limit=0.0625))
    assert one.whole == cut.whole
    (flat,) = contests(found, GAINS["margin"], DRIFTS["kl"], within_reach=False)
    assert flat.own.whole.value < 1.2 * flat.other.whole.value  # what a flat end would have cost it
    # A seed that goes less far than the others is how far the variant goes; another variant may go further.
    further = variants([*dpo, *own[:1], until(result("qadapter", 1, 1.2), 0.04)])
    assert contests(further, GAINS["margin"], DRIFTS["kl"])[0].share == pytest.approx(0.16)
    two = variants([*dpo, *own, *(result("qadapter", seed, 1.2, {"beta": 1.0}) for seed in (0, 1))])
    assert next(c for c in contests(two, GAINS["margin"], DRIFTS["kl"]) if c.other.method == "dpo").share == 1.0


def test_what_was_hardly_measured_is_not_counted():
    dpo = [result("dpo", seed, 1.0) for seed in (0, 1)]
    page = text([*dpo, *(until(result("qadapter", seed, 1.4), 0.02) for seed in (0, 1))])
    assert SHORT > 0.01 / 0.25
    assert "a larger area is met in 0 of" in page
    assert "Only the 0 comparisons" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| s | x | margin | KL |")]
    assert line.count("| short |") == 3


def test_a_rival_of_other_training_or_of_few_steps_is_not_counted():
    own = variants([result("qadapter", 0, 1.0)])
    few = result("dpo", 0, 1.0)
    few["training"] = {"steps": 11}
    assert trained_alike(own, variants([result("dpo", 0, 1.0)]))
    assert not trained_alike(own, variants([few]))
    short, long = (result("dpo", 0, 1.0, {"beta": beta}) for beta in (0.1, 0.2))
    long["cell"]["setting"] = {"drift_limit": 0.25, "training": TRAINING | {"epochs": 3.0}}
    usual = TRAINING | {"epochs": 1.0}
    short["cell"]["setting"] = {"drift_limit": 0.25, "training": usual}
    thrice = result("qadapter", 0, 1.0)
    thrice["cell"]["setting"] = long["cell"]["setting"]
    assert trained_alike(variants([thrice], usual), variants([short, long], usual))
    assert not trained_alike(variants([thrice], usual), variants([short], usual))
    # A variant that the first seed has ruled out was given a chance, too.
    weak = result("dpo", 0, 0.1, {"beta": 0.2})
    weak["cell"]["setting"] = thrice["cell"]["setting"]
    once = [result("dpo", seed, 1.0, {"beta": 0.1}) for seed in (0, 1)]
    for cell in once:
        cell["cell"]["setting"] = short["cell"]["setting"]
    own = [result("qadapter", seed, 1.4) for seed in (0, 1)]
    for cell in own:
        cell["cell"]["setting"] = thrice["cell"]["setting"]
    for cells, values in ((once, "1 / 1*"), ([*once, weak], "1 / 1")):
        (one,) = contests(variants([*own, *cells], usual), GAINS["margin"], DRIFTS["kl"])
        assert (one.values, one.seeds) == (values, 2)
    page = text([few, result("qadapter", 0, 1.4)])
    assert "| unlike |" in page
    assert "met against 0 of 1" in page


def test_the_curve_of_a_knob_is_of_one_training_seed_at_a_time():
    def full(seed, kl, margin, beta):
        point = {"dial": "strength", "value": 1.0, "pairs": {"kl": [kl] * 4, "margin_gain": [margin] * 4}}
        return {"cell": {"setting": {"drift_limit": 0.25, "training": TRAINING}, "method": "dpo",
                         "options": {"beta": beta}, "seed": seed},
                "data": {"groups": [0, 1, 2, 3]}, "points": [point]}  # fmt: skip

    both = [full(1, 0.0625, 1.0, 0.3), full(1, 0.25, 2.0, 0.1)]
    further = [full(0, 0.0625, 9.0, 0.3)]  # of a seed that the other value lacks
    (alone,) = [row for row in areas_of(variants(both)) if row.form == "knob"]
    (beside,) = [row for row in areas_of(variants([*both, *further])) if row.form == "knob"]
    assert beside.whole.value == pytest.approx(alone.whole.value)
    assert all(row.form != "knob" for row in areas_of(variants([further[0], both[1]])))


def areas_of(found):
    return method_areas(found, GAINS["margin"], DRIFTS["kl"], Draws())


def test_a_gain_at_equal_drift_has_an_interval():
    (dpo,) = variants([result("dpo", seed, 1.0) for seed in (0, 1)])
    gains = gains_at(dpo, GAINS["margin"], DRIFTS["kl"], 0.0225, Draws())
    assert gains.value == pytest.approx((0.1 + 0.1 * 0.0125 / 0.03) * 1.005)  # between KL 0.01 and 0.04
    _, low, high = gains.interval
    assert low < gains.value < high


def test_what_benchmarks_lose_is_a_drift_of_its_own():
    page = text([result("dpo", 0, 1.0, lost=0.16), result("qadapter", 0, 1.0, lost=0.04)])
    assert "| s | x | margin | benchmarks | 1 | " in page
    found = variants([result("dpo", 0, 1.0, lost=-1.0)])
    assert (
        gains_at(found[0], GAINS["margin"], DRIFTS["benchmarks"], 0.0, Draws()).value >= 0
    )  # a gain counts as no loss


def test_the_default_is_compared_with_the_best_other_variant():
    own = [
        result("qadapter", seed, height, {"beta": beta}) for seed in (0, 1) for beta, height in ((10.0, 1), (1.0, 2))
    ]
    own[1]["policy"] = own[3]["policy"] = QAdapterConfig(beta=1.0).to_dict()
    page = text([*own, result("dpo", 0, 1.0), result("dpo", 1, 1.0)])
    assert "beta = 10.0" in page
    assert "best of 1 other variants is beta = 1; area − the default's 0.240" in page
    assert ": better." in page


def test_results_from_before_a_setting_came_are_the_default_s_still():
    own = [result("qadapter", 0, height, {"beta": beta}) for beta, height in ((10.0, 1), (1.0, 2))]
    own[1]["policy"] = QAdapterConfig(beta=1.0).to_dict()
    for cell in own:
        del cell["policy"]["penalty"]
    page = text([*own, result("dpo", 0, 1.0)])
    assert "best of 1 other variants is beta = 1;" in page


def test_without_a_discount_it_is_not_the_default():
    own = [result("qadapter", 0, height, {"beta": beta}) for beta, height in ((10.0, 1), (1.0, 2))]
    for cell, beta in zip(own, (10.0, 1.0), strict=True):
        cell["policy"] = QAdapterConfig.preset("undiscounted", beta=beta).to_dict()
    page = text([*own, result("dpo", 0, 1.0)])
    assert "**The default** is" not in page


def test_variants_are_compared_with_the_default_in_the_mean_over_domains():
    def domain(height, seeds=(0, 1)):
        default = [result("qadapter", seed, 1.0) for seed in seeds]
        others = [result("qadapter", seed, height, {"gamma": 0.9}) for seed in seeds]
        for other in others:
            other["policy"] = QAdapterConfig(gamma=0.9).to_dict()
        return variants([*default, *others], TRAINING)

    settings = {("s", "dsp-a"): domain(1.2), ("s", "dsp-b"): domain(1.4), ("s", "polite"): domain(0.1)}
    (row,) = [line for line in pooled_default_lines(settings) if "gamma = 0.9" in line]
    assert row.startswith(f"| s | 2 | gamma = 0.9 | 2 | {0.3 * AREA * 1.005:.3f} [")
    assert row.count("| better |") == 2
    one = {("s", "dsp-a"): domain(1.2), ("s", "polite"): domain(0.1)}
    assert not list(pooled_default_lines(one))


def test_a_judge_at_chance_a_method_without_gain_and_babble_are_named():
    page = text([result("dpo", 0, -1.0, judge=0.6), result("qadapter", 0, 1.0, judge=0.6, loops=1.0)])
    assert "s, x: the judge ranks 0.600 [" in page
    assert "no gain by margin (the interval of the area reaches 0): DPO (defaults)." in page
    assert "Q-Adapter (defaults) repeats itself from strength 1 on: 25%" in page  # where KL, and so repetition, is 0.25
    page = text([result("dpo", 0, 1.0), result("qadapter", 0, 1.0, loops=8.0)])
    assert "Q-Adapter (defaults) repeats itself from strength 0.16 on: 32%" in page


def test_without_a_rival_there_is_no_verdict():
    assert text([result("qadapter", 0, 1.0)]) == ""


def test_an_ablation_is_compared_with_what_it_changes():
    rows = [result("qadapter", 0, 1.0), result("qadapter", 0, 1.5, {"gamma": 0.9}), result("authors", 0, 0.5)]
    lines = list(ablation_table(["gamma", "parametrisation"], variants(rows, TRAINING), TRAINING, Draws()))
    (gamma,) = [line for line in lines if "gamma = 0.9" in line]
    assert gamma.split(" | ")[-1].startswith(f"{AREA * 0.5:.3f}")
    assert sum("| Q-Adapter | defaults | 1 |" in line for line in lines) == 1
    assert is_usual("training.lora_r", 8, TRAINING)
    assert not is_usual("training.lora_r", 2, TRAINING)


def test_the_ablation_of_the_default_is_compared_with_the_default():
    default = {"gamma": 0.95, "discount_floor": 0.25}
    rows = [result("qadapter", 0, gain, o) for gain, o in ((1.0, {}), (1.5, default), (1.2, default | {"beta": 3.0}))]
    lines = ablation_table(["default"], variants(rows, TRAINING), TRAINING, Draws())
    own, changed = (line for line in lines if line.startswith("| default "))
    assert own.split(" | ")[-1] == "– |"
    assert changed.split(" | ")[-1].startswith(f"{AREA * -0.3:.3f}")


def test_a_curve_is_cut_at_the_limit():
    assert up_to([0.1, 0.3], [1.0, 2.0], 0.2) == [(0.0, 0.0), (0.1, 1.0), (0.2, pytest.approx(1.5))]
    assert up_to([0.1], [1.0], 0.2) == [(0.0, 0.0), (0.1, 1.0)]


def test_a_command_is_shown_without_the_places_of_the_machine():
    command = "python -m benchmarks.experiments run --data /some/where --suite cpu --work=/tmp/x --seeds 0"
    assert shown_command(command) == "python -m benchmarks.experiments run --suite cpu --seeds 0"


def test_gains_that_were_not_measured_are_not_spoken_of():
    points = [{"dial": "strength", "value": 1.0, "pairs": {"margin_gain": [0.1, 0.2], "kl": [0.01, 0.02]}, "texts": {}}]
    assert measured_gains([Variant("qadapter", "{}", ({"points": points},))]) == ["margin"]


def test_a_gain_that_one_seed_lacks_is_not_spoken_of():
    seeds = tuple(result("qadapter", seed, 1.0) for seed in (0, 1))
    assert "margin" in measured_gains([Variant("qadapter", "{}", seeds)])
    for point in seeds[1]["points"]:
        del point["pairs"]["margin_gain"]
    assert measured_gains([Variant("qadapter", "{}", seeds)]) == ["score"]


def test_the_picture_shows_each_mean_over_domains_as_a_share_of_dpos_area(tmp_path):
    def cells(margin):
        return variants([*(result(m, s, h) for m, h in (("qadapter", margin), ("dpo", 1.0)) for s in (0, 1))], TRAINING)

    names = {("s", "dsp-a"): cells(1.2), ("s", "dsp-b"): cells(1.2)}
    page = "\n".join(verdict_lines(names, tmp_path))
    assert f"]({tmp_path.name}/verdict.svg)" in page
    picture = (tmp_path / "verdict.svg").read_text()
    shares = {match[2]: float(match[1]) for match in re.finditer(r'x="([\d.]+)"[^>]*>([-+]?\d+%|0)<', picture)}
    dots = {float(x) for x in re.findall(r'<circle cx="([\d.]+)"', picture)}
    assert [*dots] == pytest.approx([shares["+20%"]], abs=0.2)  # 1.2 of DPO's by both gains
    assert "margin, KL<" in picture
    one_seed = {key: [on_seeds(v, frozenset({0})) for v in own] for key, own in names.items()}
    assert "verdict.svg" not in "\n".join(verdict_lines(one_seed, tmp_path))  # nothing of the spread over seeds


def test_suites_are_linked_in_the_folder_beside_the_page(tmp_path):
    rows = [with_threshold(result(m, s, h), h) for m, h in (("qadapter", 1.4), ("dpo", 1.0)) for s in (0, 1)]
    page = "\n".join(verdict_lines({("s", f"dsp-{domain}"): variants(rows, TRAINING) for domain in "ab"}, tmp_path))
    before, after = page.split("### With a threshold")
    for part in (before, after):
        assert f"| [s]({tmp_path.name}/s.md) | margin | KL |" in part
        assert f"| [s]({tmp_path.name}/s.md) | 2 | margin | KL |" in part
    assert "(results/" not in page


def test_a_picture_cuts_what_goes_beyond_its_sides():
    bars = {"row": [Bar("a", 0.1, -9.0, 9.0), Bar("a", 7.0, 6.0, 8.0)]}
    picture = svg(forest_chart(bars, "title", "share"))
    ends = [float(x) for line in re.findall(r'points="([^"]+)"', picture) for x in re.findall(r"([\d.]+),", line)]
    assert min(ends) >= 0
    assert max(ends) <= WIDTH
    assert picture.count("<circle") == 1  # the other estimate has no place


def test_a_clear_loss_on_one_seed_is_told_like_a_clear_win():
    own, dpo = ([result(method, 0, margin)] for method, margin in (("qadapter", 0.5), ("dpo", 1.0)))
    page = text([*own, *dpo])
    assert "| one seed, behind |" in page
    assert "outside the interval, in 0" in page  # nothing is lost on one seed, as nothing is met


def test_counts_by_gain_and_suite_are_of_the_comparisons_that_can_tell():
    won, lost = (
        variants([*(result(m, s, h) for m, h in (("qadapter", margin), ("dpo", 1.0)) for s in (0, 1))], TRAINING)
        for margin in (1.4, 0.5)
    )
    once = [on_seeds(variant, frozenset({0})) for variant in won]
    page = "\n".join(verdict_lines({("s", "a"): won, ("s", "b"): lost, ("t", "c"): once}))
    assert "| margin | 2 | 1 | 0 | 1 | 1 |" in page
    assert "| [s](results/s.md) | 4 | 2 | 0 | 2 | 2 |" in page
    assert "[t](results/t.md) |" not in page


def test_a_threshold_is_not_judged_where_its_dial_ends():
    """A curve that ends at a quarter of the limit says nothing of the whole limit."""

    def with_threshold(one):
        for point in one["points"]:
            point["texts"] = {"prose": {"kl": [point["value"] / 10] * 5}}
        kept = [{**point, "dial": "threshold"} for point in one["points"] if point["value"] <= 0.25]
        return {**one, "points": [*one["points"], *kept]}

    rows = list(threshold_table(variants([with_threshold(result("qadapter", 0, 1.0))], TRAINING), Draws()))
    levels = {row.split("|")[3].strip(): row for row in rows if row.startswith("| Q-Adapter")}
    assert levels["0.0625"].count("–") == 0
    assert levels["0.25"].count("→ –") == levels["0.25"].count("→") > 0


def test_loops_that_the_base_has_as_well_are_not_a_methods_failure():
    def looping(*shares):
        one = result("qadapter", 0, 1.0)
        for point, share in zip(one["points"], shares, strict=True):
            point["samples"]["repetition"] = [share] * PAIRS
        return variants([one], TRAINING)

    def told(found):
        return [line for kind, line in failures(found) if kind == LOOPS]

    assert told(looping(0.14, 0.14, 0.15, 0.2)) == []
    assert "from strength 1 on: 30%" in told(looping(0.14, 0.14, 0.15, 0.3))[0]
    assert "from strength 0.25 on: 12%" in told(looping(0.01, 0.02, 0.12, 0.3))[0]


def test_the_mean_over_domains_is_first_told_where_it_can_be_told_and_then_whole():
    won = variants([*(result(m, s, h) for m, h in (("qadapter", 1.4), ("dpo", 1.0)) for s in (0, 1))], TRAINING)
    once = [on_seeds(variant, frozenset({0})) for variant in won]
    pairs = {(name, f"dsp-{domain}"): found for name, found in (("s", won), ("t", once)) for domain in "ab"}
    first, whole = "\n".join(verdict_lines(pairs)).split(
        "<details><summary>The mean over the domains of DSP, all of it"
    )
    (row,) = [line for line in first.splitlines() if line.startswith("| [s](results/s.md) | margin | KL |")]
    assert row.count("|") == 10
    assert row.endswith("| met | 1.40 | met |")
    assert "| [t](results/t.md) | margin | KL |" not in first
    assert "| [t](results/t.md) | 2 | margin | KL | 1 |" in whole


def test_each_reading_is_judged_by_its_own_seeds():
    """By √KL the rival's knob of one seed is chosen: a loss on one seed is no loss."""
    late = result("dpo", 0, 1.0, {"knob": 2})
    late["points"] = late["points"][-1:]
    own = [result("qadapter", seed, 0.4) for seed in (0, 1)]
    page = text([*own, *(result("dpo", seed, 0.9, {"knob": 1}) for seed in (0, 1)), late])
    (line,) = [line for line in page.splitlines() if line.startswith("| s | x | margin | KL | 2 | 1 / 1 |")]
    assert "| behind |" in line
    assert "| one seed, behind |" in line
    assert "less than a third more gain is shown in 2; by √drift in 0 and in 0." in page


def test_what_q_adapter_does_not_choose_from_does_not_choose_for_the_rival():
    early = result("dpo", 0, 1.0, {"knob": 2})
    for point in early["points"][2:]:
        point["pairs"]["margin_gain"] = [0.0] * PAIRS
    repeated = [result("dpo", seed, 0.9, {"knob": 1}) for seed in (0, 1)]
    own = [until(result("qadapter", seed, 0.9), 0.04) for seed in (0, 1)]
    further = result("qadapter", 0, 0.9, {"beta": 1.0})  # it lacks a seed
    for cells in (own, [*own, further]):
        one = against_dpo(contests(variants([*repeated, early, *cells]), GAINS["margin"], DRIFTS["kl"]))
        assert one.other.whole.value > 0
        assert (one.seeds, one.values[-1]) == (1, "2")
