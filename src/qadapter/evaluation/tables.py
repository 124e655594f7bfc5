"""Measured figures as rows of text for terminal, Markdown and HTML."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qadapter.evaluation.columns import BASE
from qadapter.evaluation.gate import figures_of, is_rate

# (title, part of the results, figure, how it is written)
HEADLINE = (
    ("Held-out pairs ranked rightly, against the base", "pairs", "accuracy", "rate"),
    ("the same at equal length", "pairs", "accuracy_at_equal_length", "rate"),
    ("Chosen answer likelier, per token", "pairs", "prefers_chosen", "rate"),
    ("Chosen answer likelier, summed", "pairs", "prefers_chosen_summed", "rate"),
    ("Margin, nats a token", "pairs", "token_margin", "change"),
    ("Margin gained on the base, nats a token", "pairs", "token_margin_gain", "change"),
    ("KL on chosen answers, nats a token", "chosen", "kl", "number"),
    ("KL on neutral text", "neutral", "kl", "number"),
    ("Loss on neutral text, nats a token", "neutral", "loss", "number"),
    ("its change", "neutral", "loss_change", "change"),
    ("Same likeliest token on neutral text", "neutral", "agreement", "rate"),
    ("KL on the base's own answers", "instructions", "kl", "number"),
    ("Change of the loss on them", "instructions", "loss_change", "change"),
    ("Change of the entropy on them", "instructions", "entropy_change", "change"),
)
# The narrow choice for tables with a row a column.
NARROW = (
    ("accuracy %", "pairs", "accuracy", "rate"),
    ("equal length %", "pairs", "accuracy_at_equal_length", "rate"),
    ("margin gain", "pairs", "token_margin_gain", "change"),
    ("KL chosen", "chosen", "kl", "number"),
    ("KL neutral", "neutral", "kl", "number"),
    ("loss change", "neutral", "loss_change", "change"),
    ("KL instructions", "instructions", "kl", "number"),
)

# What the base has by definition.
OF_THE_BASE = {
    "accuracy": "50%",
    "accuracy_at_equal_length": "50%",
    "token_margin_gain": "0",
    "kl": "0",
    "loss_change": "0",
    "entropy_change": "0",
    "agreement": "100%",
}

# The axes of the trade-off's plots.
DRIFT_AXIS = "KL(policy ‖ base) on chosen answers, nats a token"
GAIN_AXIS = "margin gained, nats a token"

# The share of the terminal's width, as 1/n, that names of rows may take.
NAME_SHARE = 10
# Halves of an interval that differ by less than this share of the longer one are written as one ±.
HALVES_DIFFER = 0.1

Row = tuple[str, ...]


def interval(results: Mapping[str, Any], part: str, column: str, figure: str) -> dict[str, Any]:
    """An interval of the results."""
    return figures_of(results, part)["columns"][column][figure]


def cell(results: Mapping[str, Any], part: str, column: str, figure: str, kind: str) -> str:
    """A figure of a column as text; what the base has by definition without an interval."""
    if column == BASE and figure in OF_THE_BASE:
        return OF_THE_BASE[figure]
    return written(interval(results, part, column, figure), kind)


def written(interval: Mapping[str, Any], kind: str) -> str:
    """An interval as text: "77.0% [70.1, 82.9]", "+7.0 [-1.2, +15.3]" (points) or "0.0532 [0.0491, 0.0573]"."""
    if interval["value"] is None:
        return "–"
    value, low, high = interval["value"], interval["low"], interval["high"]
    if kind == "rate":
        bounds = "" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{100 * value:.1f}%{bounds}"
    if kind == "points":
        bounds = "" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        return f"{100 * value:+.1f}{bounds}"
    form = "+.4f" if kind == "change" else ".4f"
    bounds = "" if low is None else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{bounds}"


def short(interval: Mapping[str, Any], kind: str) -> str:
    """An interval for narrow tables: "0.053 ± 0.004", or "97.0 [70.1, 98.9]" (percent) where its halves differ."""
    if interval["value"] is None:
        return "–"
    scale, digits = (100, 1) if kind in ("rate", "points") else (1, 3)
    form = f"{'+' if kind in ('change', 'points') else ''}.{digits}f"
    value, low, high = (None if interval[key] is None else interval[key] * scale for key in ("value", "low", "high"))
    if low is None or high is None:
        return f"{value:{form}}"
    halves = sorted((value - low, high - value))
    if halves[1] - halves[0] <= HALVES_DIFFER * halves[1]:
        return f"{value:{form}} ± {halves[1]:.{digits}f}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _calibration(found: Mapping[str, Any] | None) -> str:
    """The error, and what it would be by chance: of few pairs it is large whatever the model."""
    if found is None or found["ece"] is None:
        return written_number(None)
    return f"{written_number(found['ece'])} ({written_number(found['expected'])} if calibrated)"


def headline(results: Mapping[str, Any], columns: Sequence[str]) -> list[Row]:
    """Rows of (what, the base, each column): preferences, drift, judges, benchmarks."""
    rows: list[Row] = [
        (title, *(cell(results, part, name, figure, kind) for name in (BASE, *columns)))
        for title, part, figure, kind in HEADLINE
    ]
    calibration = results["pairs"]["calibration"]
    rows.append(
        ("Calibration error of σ(reward margin)", "–", *(_calibration(calibration.get(name)) for name in columns))
    )
    rows += _judge_rows(results["judged"], columns)
    for task, figures in results["tasks"].items():
        kind = "rate" if is_rate(figures) else "number"
        cells = [figures["columns"][name] for name in (BASE, *columns)]
        rows.append((f"{task} ({figures['metric']}, n = {figures['n']})", *(written(cell, kind) for cell in cells)))
        rows.append(("its change", "–", *(_difference(figures["differences"][name], kind) for name in columns)))
    return rows


def whole_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The benchmarks that are no part of another one: a group stands for its tasks where room is small."""
    parts = {name: set(figures.get("subtasks") or [name]) for name, figures in tasks.items()}
    return [name for name, own in parts.items() if not any(own < others for others in parts.values())]


def marked(text: str, finished: bool) -> str:
    """An answer as pages show it: one that the model did not end is marked."""
    return text if finished else f"{text} […cut]"


def marked_answer(answer: Mapping[str, Any]) -> str:
    """A stored answer as pages show it."""
    return marked(answer["text"], answer["finished"])


def _difference(difference: Mapping[str, Any], kind: str) -> str:
    if difference["value"] is None:
        return "–"
    scale = 100 if kind == "rate" else 1
    value, low, high = (
        None if difference[key] is None else scale * difference[key] for key in ("value", "low", "high")
    )
    bounds = "" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]"
    p = difference["mcnemar_p"]
    return f"{value:+.2f}{bounds}" + (" points" if kind == "rate" else "") + ("" if p is None else f", p = {p:.3g}")


def _judge_rows(judged: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[Row]:
    """A row a judge."""
    cells: dict[str, dict[str, str]] = {}
    for entry in judged:
        cells.setdefault(entry["judge"], {})[entry["column"]] = _win_rate(entry)
    return [
        (f"Win rate against the base, {judge}", "50%", *(own.get(name, "–") for name in columns))
        for judge, own in cells.items()
    ]


def _win_rate(judged: Mapping[str, Any]) -> str:
    counts = f"{judged['wins']} won, {judged['ties']} tied, {judged['losses']} lost, {judged['missing']} missing"
    bias = judged["order_bias"]
    if bias is not None:
        counts += f"; order changed {written(bias, 'rate')}"
    return f"{written(judged['rate'], 'rate')} ({counts})"


def written_number(value: float | None) -> str:
    """A number with four digits behind the point; a dash for none."""
    return "–" if value is None else f"{value:.4f}"


def narrow(results: Mapping[str, Any], columns: Sequence[str]) -> tuple[Row, list[Row]]:
    """Header and rows of a table with a row a column, the base first."""
    tasks = {name: results["tasks"][name] for name in whole_tasks(results["tasks"])}
    header = ("column", *(title for title, *_ in NARROW), *tasks)
    rows = []
    for name in (BASE, *columns):
        cells = [
            OF_THE_BASE[figure] if name == BASE else short(interval(results, part, name, figure), kind)
            for _, part, figure, kind in NARROW
        ]
        for figures in tasks.values():
            cells.append(short(figures["columns"][name], "rate" if is_rate(figures) else "number"))
        rows.append((name, *cells))
    return header, rows


def print_table(console: Console, title: str, header: Sequence[str], rows: Sequence[Row]) -> None:
    """A table in the terminal."""
    table = Table(title=title, title_justify="left")
    for heading in header:
        table.add_column(escape(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Lines of plain text in the terminal, broken between words only."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


def print_columns(console: Console, title: str, header: Sequence[str], rows: Sequence[Row]) -> None:
    """A table in the terminal; columns for which there is no room go into further tables, below, of the same rows.

    Headings are broken between words, cells not at all.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(max(map(len, heading.split()), default=0), *map(len, cells)) for heading, *cells in columns]
    first, *others = range(len(columns))
    while others:
        fitting, room = 0, console.width - 1 - (widths[first] + 3)  # 3: a border, and a space on both sides
        while fitting < len(others) and (room := room - widths[others[fitting]] - 3) >= 0:
            fitting += 1
        block, others = [first, *others[: max(1, fitting)]], others[max(1, fitting) :]
        table = Table(title=escape(title), title_justify="left")
        for index in block:
            table.add_column(escape(header[index]), overflow="fold", width=widths[index])
        for row in rows:
            table.add_row(*(escape(row[index]) for index in block))
        console.print(table)
        title = ""


def numbered(console: Console, names: Sequence[str]) -> dict[str, str]:
    """What rows of these names are called: numbers, told in a line each, where a name takes too much room."""
    if max(map(len, names), default=0) <= console.width // NAME_SHARE:
        return {name: name for name in names}
    for number, name in enumerate(names, 1):
        console.print(f"column {number}: {name}", highlight=False, markup=False, soft_wrap=True)
    return {name: str(number) for number, name in enumerate(names, 1)}


def markdown_table(header: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in (header, ["---"] * len(header), *rows)
    ]
