"""Charts as SVG: valid, escaped, and with axes that enclose what is drawn."""

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapter.plots import HEIGHT, WIDTH, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(-1e200, 1e200)


def drawn(series, title="Title", x_label="x", y_label=""):
    """The parsed chart."""
    return ElementTree.fromstring(line_chart(series, title, x_label, y_label))


def points(chart):
    """The coordinates of each line's points."""
    lines = [line.get("points").split() for line in chart.iter(f"{SVG}polyline")]
    return [[tuple(map(float, place.split(","))) for place in line] for line in lines]


def texts(chart):
    return [element.text for element in chart.iter(f"{SVG}text")]


def test_titles_and_names_are_escaped():
    nasty = """<script>alert("1" & '2')</script>"""
    chart = drawn({nasty: [(0, 0), (1, 1)]}, nasty, nasty, nasty)
    assert chart.get("aria-label") == nasty
    assert texts(chart).count(nasty) == 4
    assert [element.tag for element in chart.iter() if "script" in element.tag] == []


def test_every_series_is_a_line_in_its_own_colour_with_its_name():
    chart = drawn({"loss": [(0, 3), (1, 2)], "kl": [(0, 1), (1, 2), (2, 4)]})
    assert [len(line) for line in points(chart)] == [2, 3]
    assert len({line.get("stroke") for line in chart.iter(f"{SVG}polyline")}) == 2
    assert {"loss", "kl", "Title", "x"} <= set(texts(chart))


def test_larger_values_stand_further_right_and_higher():
    [[(x1, y1), (x2, y2), (x3, y3)]] = points(drawn({"a": [(0, 1), (1, 4), (5, 2)]}))
    assert x1 < x2 < x3
    assert y2 < y3 < y1  # SVG counts from the top


def test_points_lie_between_the_labels_of_the_axes():
    """Halfway between two ticks on paper is halfway in value."""
    chart = drawn({"a": [(0, 0), (5, 50), (10, 100)]})
    [[low, middle, high]] = points(chart)
    assert middle == pytest.approx([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2], abs=0.1)
    assert {"0", "2", "4", "6", "8", "10", "20", "100"} <= set(texts(chart))


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(math.nan, 1), (1, math.inf)]}])
def test_nothing_to_draw_gives_empty_axes(series):
    chart = drawn(series)
    assert sum(map(len, points(chart))) == 0
    assert {"0", "1"} <= set(texts(chart))


def test_points_that_are_no_numbers_are_left_out():
    chart = drawn({"a": [(0, 1), (1, math.nan), (2, 3), (3, -math.inf), (math.inf, 0)]})
    assert [len(line) for line in points(chart)] == [2]
    assert "nan" not in ElementTree.tostring(chart, encoding="unicode")


@pytest.mark.parametrize("value", [0.0, 0.6931, -3.0, 1e17, -1e17, 1e-12])
def test_a_constant_lies_in_the_middle_of_the_chart(value):
    [line] = points(drawn({"a": [(0, value), (1, value)]}))
    assert all(HEIGHT / 4 < y < 3 * HEIGHT / 4 for _, y in line)


@given(st.dictionaries(st.text("ab<&\"'é ", max_size=4), st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5), max_size=8))
def test_any_chart_is_valid_and_stays_on_its_paper(series):
    chart = drawn(series)
    left, top, width, height = map(int, chart.get("viewBox").split())
    assert (left, top, width) == (0, 0, WIDTH)
    assert height == HEIGHT if len(series) <= 6 else height > HEIGHT
    for line in points(chart):
        assert all(0 <= x <= WIDTH and 0 <= y <= height for x, y in line)


@pytest.mark.parametrize("count", [1, 6, 7, 58])
def test_the_legend_never_covers_the_plot(count):
    chart = drawn({f"task {number}": [(0, 0), (1, number)] for number in range(count)})
    top = min(y for line in points(chart) for _, y in line)
    assert max(float(box.get("y")) + 10 for box in chart.iter(f"{SVG}rect") if box.get("y")) < top


@pytest.mark.parametrize("name", ["loss", "rewards/accuracies (held out)", "llama-3.1-8b-dsp-academy-beta-10-kl"])
def test_names_in_the_legend_neither_run_into_each_other_nor_over_the_edge(name):
    chart = drawn({f"{name} {number}": [(0, 0), (1, number)] for number in range(6)})
    written = [element for element in chart.iter(f"{SVG}text") if element.text.startswith(name)]
    rows = {}
    for element in written:
        rows.setdefault(element.get("y"), []).append(float(element.get("x")))
    for starts in rows.values():  # 7 units a letter: as wide as DejaVu Sans, the widest of usual fonts, at this size
        assert all(start + 7 * len(f"{name} 0") <= end for start, end in pairwise([*starts, WIDTH]))
    assert sum(map(len, rows.values())) == 6


@pytest.mark.parametrize("largest", [10_000, 0.0125, -0.0125])
def test_numbers_on_the_axes_are_whole_and_stay_on_the_paper(largest):
    chart = drawn({"a": [(0, 0), (largest, largest)]})
    ends = {"start": (0, 1), "middle": (0.5, 0.5), "end": (1, 0)}
    for element in chart.iter(f"{SVG}text"):
        before, after = (share * 7.6 * len(element.text) for share in ends[element.get("text-anchor")])
        assert before <= float(element.get("x")) <= WIDTH - after
    assert f"{largest:g}" in texts(chart)


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_ticks_enclose_the_values_evenly_and_are_few(values):
    marks = ticks(values)
    steps = [after - before for before, after in pairwise(marks)]
    slack = 1e-6 * max(steps)  # rounding of numbers that are large against the step
    assert marks[0] <= min(values) + slack
    assert marks[-1] >= max(values) - slack
    assert min(steps) > 0.999 * max(steps) > 0
    assert 2 <= len(marks) <= 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 10], [0, 2, 4, 6, 8, 10]),
        ([0.1, 0.93], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([-3, 4], [-4, -2, 0, 2, 4]),
        ([1, 60], [0, 20, 40, 60]),
        ([0.7, 0.7], [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
    ],
)
def test_ticks_are_round_numbers(values, expected):
    assert ticks(values) == pytest.approx(expected)
