"""Charts as PNG images: the picture of the SVG, in pixels."""

import io

import pytest

from qadapter.plots import COLOURS, HEIGHT, LEFT, WIDTH, chart

pytest.importorskip("PIL", reason="needs the extra eval")
from PIL import Image, ImageColor

from qadapter.plots_png import SCALE, png


def opened(*arguments):
    """The picture of a chart."""
    return Image.open(io.BytesIO(png(chart(*arguments)))).convert("RGB")


def inked(image, box):
    """The share of pixels in a box, in the chart's units, that are far from white."""
    part = image.crop([round(edge * SCALE) for edge in box]).convert("L")
    return sum(count for value, count in enumerate(part.histogram()) if value < 128) / (part.width * part.height)


def test_lines_run_where_the_svg_has_them():
    picture = chart({"a": [(0, 0), (1, 1), (2, 4)], "b": [(0, 4), (2, 0)]}, "T", "x")
    image = Image.open(io.BytesIO(png(picture))).convert("RGB")
    assert image.size == (WIDTH * SCALE, HEIGHT * SCALE)
    for name, colour in zip("ab", COLOURS, strict=False):
        (line,) = (shape for shape in picture.shapes if getattr(shape, "width", 0) == 2 and shape.colour == colour)
        for x, y in line.places:
            seen = image.getpixel((round(x * SCALE), round(y * SCALE)))
            assert all(abs(a - b) < 60 for a, b in zip(seen, ImageColor.getrgb(colour), strict=True)), name


@pytest.mark.parametrize(
    ("title", "x_label", "y_label", "box"),
    [
        ("Title", "", "", (LEFT, 4, LEFT + 40, 22)),
        ("", "across", "", (330, HEIGHT - 20, 375, HEIGHT - 4)),
        ("", "", "upwards", (0, 130, 20, 190)),
    ],
)
def test_texts_stand_where_they_belong(title, x_label, y_label, box):
    series = {"": [(0, 0), (1, 1)]}
    assert inked(opened(series, title, x_label, y_label), box) > 0.05
    assert inked(opened(series, "", "", ""), box) == 0


def test_a_marked_point_is_black():
    picture = chart({"a": [(0, 0), (1, 1), (2, 2)]}, "T", "x", "", {"here": (1, 1)})
    dot = next(shape for shape in picture.shapes if getattr(shape, "radius", 0) == 5)
    image = Image.open(io.BytesIO(png(picture))).convert("RGB")
    assert max(image.getpixel((round(dot.x * SCALE), round(dot.y * SCALE)))) < 60
    assert any(getattr(shape, "text", "") == "here" for shape in picture.shapes)
