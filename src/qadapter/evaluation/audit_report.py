"""audit.html: the audit as one self-contained page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as plain

from qadapter.data.texts import excerpt
from qadapter.evaluation.audit import curve
from qadapter.evaluation.card import base_title, finding_line, finding_lines, gate_cells, missing_lines, verdict_line
from qadapter.evaluation.columns import BASE, dial_title
from qadapter.evaluation.gate import figures_of
from qadapter.evaluation.page import document, folded, json_block, side_by_side, table
from qadapter.evaluation.tables import (
    DRIFT_AXIS,
    GAIN_AXIS,
    headline,
    marked,
    marked_answer,
    print_lines,
    print_table,
    written,
    written_number,
)
from qadapter.new_folders import write_ordered_json, write_whole
from qadapter.plots import line_chart
from qadapter.run_folder import AUDIT_FILES

JSON_NAME, HTML_NAME = AUDIT_FILES
SHOWN_ANSWERS = 10
GROUP_TITLES = {"category": "By category", "token": "By kind of token", "position": "By position in the text"}
SET_TITLES = {
    "neutral": "Neutral text",
    "instructions": "The base's own answers to general instructions",
    "chosen": "Chosen answers of the held-out pairs",
}


def write_audit(audit: Mapping[str, Any], folder: Path) -> None:
    """audit.json and audit.html in `folder`."""
    write_ordered_json(folder / JSON_NAME, audit)
    write_whole(folder / HTML_NAME, page(audit))


def print_audit(audit: Mapping[str, Any], console: Console) -> None:
    """The audit in the terminal."""
    column = audit["column"]
    rows = headline(audit["results"], [column])
    print_table(console, "What it gained and what it cost (95% intervals)", ("", BASE, column), rows)
    print_lines(console, missing_lines(audit["results"]["judged"]))
    if audit["findings"]:
        console.print("[bold]What got worse[/bold]")
        for line in finding_lines(audit["findings"]):
            console.print(f"  {plain(line)}", highlight=False)
    if audit["gate"]:
        gate = [gate_cells(entry) for entry in audit["gate"]]
        print_table(console, "Gate", ("limit", "measured", "verdict"), gate)
    colour = {"passes": "green", "fails": "red"}.get(audit["verdict"], "yellow")
    console.print(f"[bold {colour}]{plain(verdict_line(audit))}[/bold {colour}]", highlight=False)


def page(audit: Mapping[str, Any]) -> str:
    """The whole page."""
    return document(f"Audit of {audit['adapter']['name']}", "\n".join(_sections(audit)))


def _sections(audit: Mapping[str, Any]) -> Iterator[str]:
    results, column = audit["results"], audit["column"]
    style = {"passes": "good", "fails": "bad"}.get(audit["verdict"], "close")
    yield f'<p class="{style}">{escape(verdict_line(audit))}</p>'
    measured = f"{audit['adapter']['name']} at strength {dial_title(audit['settings'])}"
    against = f"against its frozen base {base_title(audit)}. Brackets are 95% intervals."
    yield f"<p>{escape(f'{measured} {against}')}</p>"
    if audit["gate"]:
        yield "<h2>Gate</h2>" + table(("limit", "measured", "verdict"), [gate_cells(e) for e in audit["gate"]])
    yield "<h2>Gain and cost</h2>" + table(("", BASE, column), headline(results, [column]))
    yield "".join(f"<p>{escape(line)}</p>" for line in missing_lines(results["judged"]))
    yield "<h2>Trade-off along the dial</h2>" + _plots(audit)
    yield "<h2>What got worse</h2>" + _findings(audit)
    yield "<h2>Worst cases</h2>" + "".join(_worst(results, column))
    yield "<h2>Breakdown</h2>" + "".join(_breakdowns(results, column))
    yield "<h2>Answers</h2>" + "".join(_answers(results, column))
    yield "<h2>Settings and environment</h2>"
    yield folded("Settings, seeds, limits", json_block(audit["settings"]))
    yield folded("Adapter and base", json_block({"adapter": audit["adapter"], "base": audit["base"]}))
    yield folded("Environment: date, hardware, versions", json_block(audit["environment"]))


def _plots(audit: Mapping[str, Any]) -> str:
    points = curve(audit)
    accuracy, audited = curve(audit, "prefers_chosen"), audit["settings"]["strength"]
    plots = [
        line_chart(
            {f"strengths {points[0][0]:g} to {points[-1][0]:g}": [(kl, gain) for _, kl, gain in points]},
            "Preference gained against drift",
            DRIFT_AXIS,
            GAIN_AXIS,
            {f"strength {strength:g}": (kl, gain) for strength, kl, gain in points if strength == audited},
        ),
        line_chart(
            {"per token": [(strength, share) for strength, _, share in accuracy]},
            "Share of pairs whose chosen answer is likelier",
            "strength",
        ),
    ]  # fmt: skip
    bins = audit["results"]["pairs"]["calibration"][audit["column"]]["bins"]
    if bins:
        plots.append(
            line_chart(
                {"measured": [(row["confidence"], row["accuracy"]) for row in bins], "ideal": [(0.5, 0.5), (1.0, 1.0)]},
                "Calibration of σ(reward margin)",
                "confidence",
                "accuracy",
            )
        )
    return "".join(plots)


def _findings(audit: Mapping[str, Any]) -> str:
    if not audit["findings"]:
        return "<p>Nothing of what was measured got worse with a whole interval.</p>"
    items = "".join(f"<li>{escape(finding_line(entry))}</li>" for entry in audit["findings"])
    return (
        f"<ul>{items}</ul><p>Named are groups whose whole interval shows harm. Many groups are looked at: of those "
        "where nothing changed, about one in forty is named by chance.</p>"
    )


def _worst(results: Mapping[str, Any], column: str) -> Iterator[str]:
    examples = {example["prompt"]: example for example in results["behaviour"]["examples"]}
    # Of prompts that begin alike a row cannot tell which one it is of: they are not shown.
    begins = Counter(map(excerpt, examples))
    alone = {start: example for prompt, example in examples.items() if begins[start := excerpt(prompt)] == 1}
    worst = {row["text"]: row for row in results["instructions"]["worst"][column]}
    shown = [(row, alone[text]) for text, row in worst.items() if text in alone]
    if shown:
        yield (
            "<p>General instructions whose base answer the policy finds least likely, relative to the base. "
            "[…cut] marks an answer that reached the longest length measured.</p>"
        )
    for row, example in shown:
        note = f"loss {row['loss_change']:+.3f} nats a token, KL {row['kl']:.3f}"
        if row["category"]:
            note = f"{row['category']}: {note}"
        answers = {name: marked_answer(example["answers"][name]) for name in (BASE, column)}
        yield side_by_side(example["prompt"], answers, note)
    rows = [
        (row["text"], row["category"] or "–", f"{row['loss_change']:+.4f}", f"{row['kl']:.4f}")
        for row in results["neutral"]["worst"][column]
    ]
    if rows:
        header = ("neutral text", "category", "change of the loss", "KL")
        yield folded("Neutral texts whose loss rose most", table(header, rows))
    pairs = [
        (row["prompt"], row["category"] or "–", row["chosen"], row["rejected"], f"{row['log_ratio_margin']:+.3f}")
        for row in results["pairs"]["worst"][column]
    ]
    if pairs:
        columns = ("prompt", "category", "chosen", "rejected", "margin, nats")
        yield folded("Held-out pairs ranked most wrongly", table(columns, pairs))


def _breakdowns(results: Mapping[str, Any], column: str) -> Iterator[str]:
    categories = results["pairs"]["categories"].get(column)
    if categories:
        rows = [
            (name, str(own["accuracy"]["n"]), written(own["accuracy"], "rate"), written(own["prefers_chosen"], "rate"))
            for name, own in categories.items()
        ]
        header = ("category", "pairs", "accuracy", "chosen likelier, per token")
        yield folded("Held-out pairs by category", table(header, rows))
    for part, title in SET_TITLES.items():
        tables = "".join(_groups(figures_of(results, part)["breakdown"][column]))
        yield folded(f"{title}: drift by category, kind of token, position", tables)


def _groups(breakdown: Mapping[str, Any]) -> Iterator[str]:
    for kind, groups in breakdown.items():
        rows = [
            (
                name,
                str(figures["kl"]["n"]),
                written(figures["loss_change"], "change"),
                written(figures["kl"], "number"),
                written(figures["agreement"], "rate"),
            )
            for name, figures in groups.items()
        ]
        yield table((GROUP_TITLES[kind], "texts", "change of the loss", "KL", "same likeliest token"), rows)


def _answers(results: Mapping[str, Any], column: str) -> Iterator[str]:
    columns = results["behaviour"]["columns"]
    traits = list(columns[BASE]["traits"])
    rows = [(trait, *(written(columns[name]["traits"][trait], "rate") for name in (BASE, column))) for trait in traits]
    rows.append(("language of most", *(columns[name]["language"] or "–" for name in (BASE, column))))
    rows.append(("words an answer", *(written_number(columns[name]["words"]) for name in (BASE, column))))
    yield table(("answers to general instructions", BASE, column), rows)
    examples: Sequence[Mapping[str, Any]] = results["behaviour"]["examples"][:SHOWN_ANSWERS]
    shown = "".join(
        side_by_side(example["prompt"], {name: marked_answer(example["answers"][name]) for name in (BASE, column)})
        for example in examples
    )
    yield folded("General instructions, answered by both", shown)
    for judged in results["judged"]:
        if judged["column"] == column:
            ordered = sorted(judged["verdicts"], key=lambda verdict: verdict["winner"] != "base")
            body = "".join(_verdict(verdict) for verdict in ordered[: 2 * SHOWN_ANSWERS])
            yield folded(f"Held-out prompts, judge {judged['judge']}, what the base won first", body)


def _verdict(verdict: Mapping[str, Any]) -> str:
    winner = verdict["winner"] or "no verdict"
    note = f"{winner}: {verdict['reason']}" if verdict["reason"] else winner
    answers = {name: marked(verdict[name], verdict[f"{name}_finished"]) for name in (BASE, "policy")}
    return side_by_side(verdict["prompt"], answers, note)
