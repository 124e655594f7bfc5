"""The verdict as a picture: how much larger Q-Adapter's area is than DPO's, by each yardstick, with its interval."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qadapter.plots import COLOURS, GREY, GRID, INK, WIDTH, Box, Chart, Dot, Label, Line, Shape, ticks

LEFT, RIGHT, TOP, BOTTOM = 290, 34, 66, 44  # room for a yardstick's name
BAR, GAP = 15, 12  # pixels a bar, and between yardsticks
ENTRIES_A_ROW = 4
MOST = 1.5  # of DPO's area: what goes farther is cut there


class Bar(NamedTuple):
    """An estimate with its interval, of one of the series."""

    series: str
    value: float
    low: float
    high: float


def forest_chart(rows: Mapping[str, Sequence[Bar]], title: str, x_label: str) -> Chart:
    """A chart of shares (0.5 is +50%): a group of bars for each row, a colour for each series.

    Estimates beyond the sides are left out; intervals are cut there.
    """
    names = list(dict.fromkeys(bar.series for bars in rows.values() for bar in bars))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    ends = [max(-MOST, min(MOST, end)) for bars in rows.values() for bar in bars for end in bar[1:]]
    xs = ticks([0.0, *ends], 6)
    height = TOP + BOTTOM + sum(BAR * len(bars) + GAP for bars in rows.values())

    def place(x: float) -> float:
        return LEFT + (min(xs[-1], max(xs[0], x)) - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    shapes: list[Shape] = [Label(14, 18, title, size=14, bold=True)]
    for index, name in enumerate(names):
        x, y = 14 + (WIDTH - 28) / ENTRIES_A_ROW * (index % ENTRIES_A_ROW), 28 + 16 * (index // ENTRIES_A_ROW)
        shapes += [Box(x, y, 10, colours[name]), Label(x + 16, y + 9, name)]
    for x in xs:
        level = math.isclose(x, 0, abs_tol=1e-9)
        shapes.append(Line([(place(x), TOP - 4), (place(x), height - BOTTOM)], GREY if level else GRID, 1))
        shapes.append(Label(place(x), height - BOTTOM + 18, f"{x:+.0%}" if not level else "0", GREY, "middle"))
    shapes.append(Label((WIDTH + LEFT - RIGHT) / 2, height - 8, x_label, anchor="middle"))
    shapes += _groups(rows, colours, place, (xs[0], xs[-1]))
    return Chart(title, shapes, height)


def _groups(
    rows: Mapping[str, Sequence[Bar]],
    colours: Mapping[str, str],
    place: Callable[[float], float],
    sides: tuple[float, float],
) -> Iterator[Shape]:
    y = float(TOP)
    for name, bars in rows.items():
        yield Label(LEFT - 10, y + BAR * len(bars) / 2 + 4, name, INK, "end")
        for bar in bars:
            middle = y + BAR / 2
            yield Line([(place(bar.low), middle), (place(bar.high), middle)], colours[bar.series], 2)
            if sides[0] <= bar.value <= sides[1]:
                yield Dot(place(bar.value), middle, 4, colours[bar.series])
            y += BAR
        y += GAP
