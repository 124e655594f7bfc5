"""compare.json and compare.html, and the comparison in the terminal."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from qadapter.evaluation.card import finding_line, missing_lines
from qadapter.evaluation.columns import BASE
from qadapter.evaluation.findings import findings
from qadapter.evaluation.gate import is_rate
from qadapter.evaluation.page import document, folded, json_block, side_by_side, table
from qadapter.evaluation.tables import (
    DRIFT_AXIS,
    GAIN_AXIS,
    Row,
    headline,
    marked_answer,
    narrow,
    numbered,
    print_columns,
    print_lines,
    short,
    whole_tasks,
    written,
)
from qadapter.new_folders import write_ordered_json, write_whole
from qadapter.plots import line_chart

JSON_NAME, HTML_NAME = "compare.json", "compare.html"
SHOWN_ANSWERS = 10


def names_of(comparison: Mapping[str, Any]) -> list[str]:
    """The columns without the base."""
    return [column["name"] for column in comparison["columns"]]


# (key, title, how it is written) of the differences that are shown.
DIFFERENCES = (
    ("accuracy", "accuracy", "points"),
    ("prefers_chosen", "chosen likelier", "points"),
    ("token_margin", "margin", "change"),
    ("kl_chosen", "KL chosen", "change"),
    ("kl_neutral", "KL neutral", "change"),
    ("loss_neutral", "loss neutral", "change"),
    ("kl_instructions", "KL instructions", "change"),
)
NARROW_DIFFERENCES = ("accuracy", "token_margin", "kl_chosen", "kl_neutral", "loss_neutral")
DIFFERENCES_NOTE = (
    "Over the same items, with paired 95% intervals: shares in percentage points, everything else in nats a token. "
    "Where the brackets hold 0, these items do not tell the two apart."
)
# Rows in the terminal; the page has all.
SHOWN_DIFFERENCES = 15


def difference_rows(
    comparison: Mapping[str, Any], narrow: bool = False, names: Mapping[str, str] | None = None
) -> tuple[Row, list[Row]]:
    """Header and rows of the differences of each two columns: shares in percentage points, the rest in nats a token.

    Args:
        narrow: for a terminal: the main figures, with fewer digits.
        names: what the columns are called; None for their own names.
    """
    names = names or {name: name for name in names_of(comparison)}
    entries, write = comparison["differences"], short if narrow else written
    shown = [row for row in DIFFERENCES if not narrow or row[0] in NARROW_DIFFERENCES]
    judges, tasks = (list(entries[0][part]) if entries else [] for part in ("judged", "tasks"))
    tasks = whole_tasks(comparison["results"]["tasks"]) if narrow and entries else tasks
    header = ("", *(title for _, title, _ in shown), *(f"win rate, {name}" for name in judges), *tasks)
    rates = {task: is_rate(comparison["results"]["tasks"][task]) for task in tasks}
    rows = []
    for entry in entries:
        cells = [write(entry["figures"][key], kind) for key, _, kind in shown]
        cells += [write(entry["judged"][judge], "points") for judge in judges]
        cells += [write(entry["tasks"][task], "points" if rates[task] else "change") for task in tasks]
        rows.append((f"{names[entry['column']]} − {names[entry['minus']]}", *cells))
    return header, rows


def print_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """A row a column: preferences, drift, benchmarks; then the judges' rates."""
    names = numbered(console, names_of(comparison))
    header, rows = narrow(comparison["results"], list(names))
    rows = [(names.get(name, name), *cells) for name, *cells in rows]
    print_columns(console, "Gain and cost (95% intervals)", header, rows)
    header, rows = difference_rows(comparison, narrow=True, names=names)
    if rows:
        title = "Differences (paired 95% intervals; shares in points, the rest in nats a token)"
        print_columns(console, title, header, rows[:SHOWN_DIFFERENCES])
        if len(rows) > SHOWN_DIFFERENCES:
            console.print(f"{len(rows) - SHOWN_DIFFERENCES} more in compare.html and compare.json (--output-dir).")
    for judged in comparison["results"]["judged"]:
        verdicts = f"{written(judged['rate'], 'rate')}, {judged['missing']} of {judged_count(judged)} missing"
        console.print(f"{judged['column']}: win rate by {judged['judge']} {verdicts}", highlight=False, markup=False)
    print_lines(console, missing_lines(comparison["results"]["judged"]))


def judged_count(judged: Mapping[str, Any]) -> int:
    """How many prompts were to be judged."""
    return sum(judged[outcome] for outcome in ("wins", "losses", "ties", "missing"))


def write_comparison(comparison: Mapping[str, Any], folder: Path) -> None:
    """The JSON and the page in `folder`."""
    write_ordered_json(folder / JSON_NAME, comparison)
    write_whole(folder / HTML_NAME, page(comparison))


def page(comparison: Mapping[str, Any]) -> str:
    """The comparison as one self-contained page."""
    names, results = names_of(comparison), comparison["results"]
    parts = [table(("", BASE, *names), headline(results, names)), chart(comparison)]
    parts += [f"<p>{escape(line)}</p>" for line in missing_lines(results["judged"])]
    header, rows = difference_rows(comparison)
    if rows:
        parts.append("<h2>Differences of each two</h2>" + table(header, rows) + f"<p>{DIFFERENCES_NOTE}</p>")
    parts.append("<h2>What got worse</h2>")
    for name in names:
        lines = "".join(f"<li>{escape(finding_line(entry))}</li>" for entry in findings(results, name))
        parts.append(f"<h3>{escape(name)}</h3>" + (f"<ul>{lines}</ul>" if lines else "<p>Nothing, for certain.</p>"))
    shown = "".join(
        side_by_side(example["prompt"], {name: marked_answer(answer) for name, answer in example["answers"].items()})
        for example in results["behaviour"]["examples"][:SHOWN_ANSWERS]
    )
    parts.append(folded("General instructions, answered by all", shown))
    settings = {key: comparison[key] for key in ("columns", "workload", "adapters", "base", "environment")}
    parts.append(folded("Settings", json_block(settings)))
    return document("Comparison of adapters", "\n".join(parts))


def chart(comparison: Mapping[str, Any]) -> str:
    """Margin gained against drift: a line for each adapter, from the base on."""
    pairs = comparison["results"]["pairs"]
    series: dict[str, list[tuple[float, float, float]]] = {}
    for column in comparison["columns"]:
        name = column["name"]
        kl = pairs["chosen"]["columns"][name]["kl"]["value"]
        adapter = name if column["strength"] == 1.0 else name.removesuffix(f"@{column['strength']:g}")
        line = series.setdefault(adapter, [(0.0, 0.0, 0.0)])  # by strength, the base at 0
        line.append((column["strength"], kl, pairs["columns"][name]["token_margin_gain"]["value"]))
    lines = {adapter: [point[1:] for point in sorted(points)] for adapter, points in series.items()}
    return line_chart(lines, "Preference gained against drift", DRIFT_AXIS, GAIN_AXIS)
