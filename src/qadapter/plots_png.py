"""Charts as PNG images, for slides and model cards; needs Pillow, which the extra `eval` installs."""

import io

from PIL import Image, ImageDraw, ImageFont

from qadapter.plots import GRID, LEFT, RIGHT, WIDTH, Box, Chart, Dot, Label, Line, Rule

# Pixels a unit of the chart, and how much larger it is drawn first: Pillow's own lines have jagged edges.
SCALE, OVERSAMPLING = 2, 2
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # of the baseline


def png(picture: Chart) -> bytes:
    """The chart as a PNG file of twice its size in pixels."""
    factor = SCALE * OVERSAMPLING
    image = Image.new("RGB", (WIDTH * factor, picture.height * factor), "white")
    draw = ImageDraw.Draw(image)
    for shape in picture.shapes:
        match shape:
            case Line(places, colour, width):
                path = [(x * factor, y * factor) for x, y in places]
                draw.line(path, fill=colour, width=round(width * factor), joint="curve")
            case Rule(y):
                draw.line([LEFT * factor, y * factor, (WIDTH - RIGHT) * factor, y * factor], GRID, factor)
            case Dot(x, y, radius, colour):
                draw.circle((x * factor, y * factor), radius * factor, fill=colour)
            case Box(x, y, size, colour):
                draw.rectangle([x * factor, y * factor, (x + size) * factor, (y + size) * factor], fill=colour)
            case Label():
                _write(image, shape, factor)
    content = io.BytesIO()
    image.resize((WIDTH * SCALE, picture.height * SCALE), Image.Resampling.LANCZOS).save(content, "PNG", optimize=True)
    return content.getvalue()


def _write(image: Image.Image, label: Label, factor: int) -> None:
    font = ImageFont.load_default(label.size * factor)
    stroke = factor / 8 if label.bold else 0  # the font that comes with Pillow has one weight
    if not label.upright:
        place = label.x * factor, label.y * factor
        draw = ImageDraw.Draw(image)
        draw.text(place, label.text, label.colour, font, ANCHORS[label.anchor], stroke_width=stroke)
        return
    # Written on an image of its own, which is turned; the label's place is then the middle of the text's right edge.
    width, height = round(font.getlength(label.text)), round(1.5 * label.size * factor)
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).text((0, label.size * factor), label.text, 255, font, "ls")
    turned = mask.rotate(90, expand=True)
    corner = round((label.x - label.size) * factor), round(label.y * factor - width / 2)
    image.paste(label.colour, (*corner, corner[0] + turned.width, corner[1] + turned.height), turned)
