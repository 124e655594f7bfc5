"""The definitions of the results page: envelope, area, equal drift and equal gain, and resampling."""

import numpy as np
import pytest

from benchmarks.experiments.curves import (
    DRIFTS,
    GAINS,
    Draws,
    area,
    areas,
    curve,
    drift_for,
    envelope,
    gain_at,
    means,
)  # fmt: skip


def test_the_envelope_starts_at_the_base_and_never_falls():
    drifts, gains = envelope([0.4, 0.1, 0.2], [0.2, 0.3, -0.1])
    assert drifts.tolist() == [0.0, 0.1, 0.2, 0.4]
    assert gains.tolist() == [0.0, 0.3, 0.3, 0.3]


def test_a_gain_that_grows_with_the_root_of_drift_has_half_its_end_as_area():
    drifts = np.linspace(0, 0.5, 101)[1:] ** 2
    gains = [2 * drift**0.5 for drift in drifts]
    assert area(drifts, gains, 0.25) == pytest.approx(0.5, abs=1e-4)  # of a gain of 1 at the limit
    assert area(drifts, gains, 0.25, until=0.5) == pytest.approx(0.25, abs=2e-4)
    assert gain_at(drifts, gains, 0.0625) == pytest.approx(0.5)
    assert drift_for(drifts, gains, 0.5) == pytest.approx(0.0625)


def test_what_was_not_measured_is_a_share_of_what_was():
    # One point at the limit: half of the requests answered by the base halve drift and gain.
    assert gain_at([0.25], [1.0], 0.125) == pytest.approx(0.5)
    assert drift_for([0.25], [1.0], 0.5) == pytest.approx(0.125)
    # The mean of x² over x from 0 to 1, and to ½.
    assert area([0.25], [1.0], 0.25) == pytest.approx(1 / 3, abs=1e-5)
    assert area([0.25], [1.0], 0.25, until=0.5) == pytest.approx(1 / 12, abs=1e-5)


def test_a_curve_that_ends_early_is_flat_from_there_and_one_below_the_base_counts_nothing():
    assert area([0.0625], [1.0], 0.25) == pytest.approx(0.5 / 3 + 0.5, abs=1e-4)
    assert area([0.1, 0.2], [-1.0, -2.0], 0.25) == 0.0
    assert drift_for([0.1], [0.5], 0.6) is None
    assert drift_for([0.1], [0.5], 0.0) == 0.0


def test_areas_of_all_resamples_are_those_of_each():
    generator = np.random.default_rng(0)
    drifts, gains = generator.random((5, 4)), generator.normal(size=(5, 4))
    drifts[0, :2], drifts[1, 2:] = 0.0, 0.1  # points of one drift
    whole, lower = areas(drifts, gains, 0.25)
    for row in range(5):  # the twin's steps are at places of its own
        assert whole[row] == pytest.approx(area(drifts[row], gains[row], 0.25), abs=1e-3)
        assert lower[row] == pytest.approx(area(drifts[row], gains[row], 0.25, until=0.5), abs=1e-3)


def test_areas_by_the_root_are_those_of_curves_that_are_straight_in_it():
    generator = np.random.default_rng(1)
    drifts, gains = generator.random((5, 4)), generator.normal(size=(5, 4))
    whole, lower = areas(drifts, gains, 0.25, root=True)
    grid = np.linspace(0, 1, 4001)
    for row in range(5):
        xs, ys = envelope(drifts[row], gains[row])
        heights = np.interp(grid, np.sqrt(xs / 0.25), ys)
        assert whole[row] == pytest.approx(heights.mean(), abs=1e-3)
        assert lower[row] == pytest.approx(heights[:2001].mean(), abs=1e-3)


def test_means_weigh_groups_by_their_size():
    values, groups = [1.0, 2.0, 6.0], [0, 0, 1]
    counts = np.array([[1, 1], [2, 0], [1, 2]])
    assert means(values, groups, counts).tolist() == pytest.approx([3.0, 1.5, (3 + 12) / 4])


def test_draws_keep_the_halves_apart_and_are_the_same_for_every_method():
    draws, again = Draws(), Draws()
    counts = draws.counts("pairs", 7, half=1)
    assert counts[0].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert not counts[:, ::2].any()
    assert (counts.sum(1) == 3).all()
    assert np.array_equal(counts, again.counts("pairs", 7, half=1))
    assert len(np.unique(counts[1:], axis=0)) > 5


def test_the_share_of_pairs_and_what_is_lost_of_an_earlier_preference_are_read_from_the_pairs():
    pairs = {"kl": [0.1] * 4, "prefers": [1.0, 1.0, 0.0, 1.0], "base_prefers": [1.0, 0.0, 1.0, 0.0]}
    point = {"pairs": pairs, "retained": {"hh-rlhf/helpful": {"margin_gain": [-0.2, 0.1]}}}
    draws = Draws()
    drifts, gains = curve([point], [0, 1, 2, 3], GAINS["accuracy"], DRIFTS["kl"], draws)
    assert (drifts[0].tolist(), gains[0].tolist()) == ([pytest.approx(0.1)], [pytest.approx(0.25)])
    drifts, gains = curve([point, {"pairs": pairs}], [0, 1, 2, 3], GAINS["accuracy"], DRIFTS["retained"], draws)
    assert (drifts[0].tolist(), gains[0].tolist()) == ([pytest.approx(0.05)], [pytest.approx(0.25)])


def test_a_curve_leaves_out_points_without_samples():
    def point(value, sampled):
        made = {"pairs": {"kl": [value] * 3, "margin_gain": [value, value, 4 * value]}}
        if sampled:
            made["samples"] = {"score": [value, 2 * value], "base_score": [0.0, 0.0], "repetition": [0.0, 0.0]}
        return made

    draws = Draws()
    points = [point(0.1, True), point(0.2, False)]
    drifts, gains = curve(points, [0, 0, 1], GAINS["score"], DRIFTS["kl"], draws)
    assert drifts[0].tolist() == pytest.approx([0.1])
    assert gains[0].tolist() == pytest.approx([0.15])
    drifts, gains = curve(points, [0, 0, 1], GAINS["margin"], DRIFTS["kl"], draws)
    assert gains[0].tolist() == pytest.approx([0.2, 0.4])
    assert gains[1:, 0].min() < gains[0, 0] < gains[1:, 0].max()
