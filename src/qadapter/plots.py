"""Line charts as SVG text, without a plotting library: small, searchable, and they go into HTML as they are.

A chart is a list of shapes, so that other renderers (plots_png.py) draw the same picture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#0e7490", "#a16207")
INK, GREY, GRID = "#111111", "#374151", "#e5e7eb"
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 66, 44  # room for a number of seven characters, whole or in half
# The legend: rows of entries between title and plot, which have room for two; with more of them a chart is higher.
# Entries are three in a row, fewer where a name is longer than that: SVG wraps nothing, and knows no width of a text.
ENTRIES_A_ROW, CHARACTER_WIDTH, AROUND_A_NAME = 3, 7, 26
ROW_HEIGHT, ROWS_WITH_ROOM = 16, 2

Point = tuple[float, float]
Points = Sequence[Point]


class Line(NamedTuple):
    """A line through points."""

    places: list[tuple[float, float]]
    colour: str
    width: float


class Rule(NamedTuple):
    """A thin horizontal line across the plot."""

    y: float


class Dot(NamedTuple):
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str


class Box(NamedTuple):
    """A filled square."""

    x: float
    y: float
    size: float
    colour: str


class Label(NamedTuple):
    """A text whose baseline starts, is centred or ends at a place; `upright` ones run from bottom to top."""

    x: float
    y: float
    text: str
    colour: str = INK
    anchor: Literal["start", "middle", "end"] = "start"
    size: int = 12
    bold: bool = False
    upright: bool = False


Shape = Line | Rule | Dot | Box | Label


@dataclass(frozen=True)
class Chart:
    """A picture as wide as WIDTH."""

    title: str
    shapes: list[Shape]
    height: int = HEIGHT


def line_chart(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str = "", marked: Mapping[str, Point] | None = None
) -> str:
    """`chart` as an SVG document."""
    return svg(chart(series, title, x_label, y_label, marked))


def chart(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str = "", marked: Mapping[str, Point] | None = None
) -> Chart:
    """A chart with one line a series; non-finite points are left out.

    Args:
        marked: points of the series that stand out, by what is written beside them.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    everything = [point for points in finite.values() for point in points] or [(0.0, 0.0), (1.0, 1.0)]
    xs, ys = ticks([x for x, _ in everything]), ticks([y for _, y in everything])

    longest = AROUND_A_NAME + CHARACTER_WIDTH * max(map(len, series), default=0)
    in_a_row = max(1, min(ENTRIES_A_ROW, (WIDTH - LEFT - RIGHT) // longest))
    height = HEIGHT + ROW_HEIGHT * max(0, math.ceil(len(series) / in_a_row) - ROWS_WITH_ROOM)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes: list[Shape] = [Label(LEFT, 18, title, size=14, bold=True)]
    for y in ys:
        _, at = place(xs[0], y)
        shapes.append(Rule(at))
        shapes.append(Label(LEFT - 8, at + 4, f"{y:.6g}", GREY, "end"))
    for x in xs:
        at, _ = place(x, ys[0])
        shapes.append(Label(at, height - BOTTOM + 18, f"{x:.6g}", GREY, "middle"))
    for index, (name, points) in enumerate(finite.items()):
        shapes += _series(name, [place(*point) for point in points], index, in_a_row)
    for text, point in (marked or {}).items():
        x, y = place(*point)
        right = x > (WIDTH + LEFT) / 2  # of the middle: the text goes to the left, where there is room
        shapes.append(Dot(x, y, 5, INK))
        shapes.append(
            Label(x + (-10 if right else 10), y + (-6 if right else 14), text, anchor="end" if right else "start")
        )
    shapes.append(Label((WIDTH + LEFT) / 2, height - 8, x_label, anchor="middle"))
    if y_label:
        shapes.append(Label(14, height - HEIGHT / 2, y_label, anchor="middle", upright=True))
    return Chart(title, shapes, height)


def _series(name: str, places: list[tuple[float, float]], index: int, in_a_row: int) -> list[Shape]:
    colour = COLOURS[index % len(COLOURS)]
    width = (WIDTH - LEFT - RIGHT) / in_a_row
    x, y = LEFT + width * (index % in_a_row), 28 + ROW_HEIGHT * (index // in_a_row)
    dots = [Dot(*at, 2.5, colour) for at in places]
    return [Line(places, colour, 2), *dots, Box(x, y, 10, colour), Label(x + 16, y + 9, name)]


def svg(picture: Chart) -> str:
    """The chart as an SVG document."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {picture.height}" role="img" '
            f'aria-label="{escape(picture.title)}" font-family="system-ui, sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{picture.height}" fill="#ffffff"/>',
            *map(_element, picture.shapes),
            "</svg>\n",
        ]
    )


def _element(shape: Shape) -> str:
    match shape:
        case Line(places, colour, width):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
        case Rule(y):
            return f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>'
        case Dot(x, y, radius, colour):
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'
        case Box(x, y, size, colour):
            return f'<rect x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}" fill="{colour}"/>'
    place = f'x="{shape.x:.1f}" y="{shape.y:.1f}"'
    if shape.upright:
        place = f'transform="translate({shape.x:.1f} {shape.y:.1f}) rotate(-90)"'
    style = f' font-weight="600" font-size="{shape.size}"' if shape.bold else ""
    return f'<text {place} text-anchor="{shape.anchor}" fill="{shape.colour}"{style}>{escape(shape.text)}</text>'


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """About `count` round numbers that enclose `values`; values that hardly differ get room around them."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-300):
        margin = max(0.5, size / 10)
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]
