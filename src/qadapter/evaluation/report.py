"""The quickstart's findings for people: terminal, Markdown and a self-contained HTML page, from one set of rows."""

import json
import shlex
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from qadapter.evaluation.drift_figures import Figures
from qadapter.evaluation.intervals import Interval
from qadapter.evaluation.page import document, json_block, side_by_side, table
from qadapter.evaluation.part_store import jsonable
from qadapter.evaluation.tables import markdown_table, marked, print_table
from qadapter.generation import Answer
from qadapter.new_folders import write_ordered_json
from qadapter.program import called_as
from qadapter.training_log import CURVE_NAME

REPORT_FILES = ("report.md", "report.html", "results.json")
HEADER = ("", "base", "policy")
SHOWN_ANSWERS = 3
SVG_NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'  # a file needs it, a page does not


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart measured; written to results.json and rendered as the report.

    Args:
        pairs: figures of the held-out pairs by column: base, policy.
        chosen: drift on their chosen answers, likewise.
        neutral: drift on neutral text by column: base, policy, and "plain", the policy without the threshold.
        house_style: share of answers in the house style by column: base, policy.
    """

    settings: dict[str, Any]
    pairs: dict[str, Figures]
    chosen: dict[str, Figures]
    neutral: dict[str, Figures]
    house_style: dict[str, Interval]
    prompts: list[str]
    answers: dict[str, list[Answer]]
    seconds: dict[str, float]


def rows(result: QuickstartResult) -> list[tuple[str, str, str]]:
    """(what, base, policy) of the headline table."""
    pairs = result.pairs
    base, policy, plain = (result.neutral[column] for column in ("base", "policy", "plain"))
    return [
        ("Answers in the house style (rule judge)", *_rates(result.house_style["base"], result.house_style["policy"])),
        (
            "Held-out pairs: chosen answer preferred, per token",
            *_rates(pairs["base"]["prefers_chosen"], pairs["policy"]["prefers_chosen"]),
        ),
        ("Held-out pairs: accuracy against the base", "50% (by definition)", _rate(pairs["policy"]["accuracy"])),
        ("KL from the base on chosen answers, nats a token", "0", _number(result.chosen["policy"]["kl"])),
        ("Loss on neutral text, nats a token", f"{base['loss'].value:.3f}", f"{policy['loss'].value:.3f}"),
        ("Change of the loss on neutral text", "0", _number(policy["loss_change"], signed=True)),
        ("The same without the threshold", "0", _number(plain["loss_change"], signed=True)),
        ("KL from the base on neutral text, nats a token", "0", _number(policy["kl"])),
    ]


def _rates(base: Interval, policy: Interval) -> tuple[str, str]:
    return _rate(base), _rate(policy)


def _rate(interval: Interval) -> str:
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}] of {interval.n}"


def _number(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.4f} [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]"


def print_report(result: QuickstartResult, folder: Path, console: Console) -> None:
    """The findings in the terminal."""
    for index, prompt in enumerate(result.prompts[:SHOWN_ANSWERS]):
        console.print(Text(f"\n{prompt}", style="bold"))
        for name, colour in (("base", "yellow"), ("policy", "green")):
            answer = result.answers[name][index]
            text = marked(answer.text, answer.finished)
            console.print(Panel(Text(text), title=name, title_align="left", border_style=colour))
    print_table(console, "What it gained and what it cost (95% intervals)", HEADER, rows(result))
    seconds = result.seconds
    chat = f"{called_as()} chat {shlex.quote(str(folder / 'adapter'))}"
    console.print(
        f"{seconds['total']:.0f} s in all: {seconds['train']:.0f} s training, {seconds['measure']:.0f} s measuring."
    )
    for name, text in (
        ("adapter", f"try: {chat} --threshold {result.settings['threshold']:g}"),
        (f"adapter/{CURVE_NAME}", "training curve"),
        ("report.md", "this report"),
        ("report.html", "the same with the curve and all judged answers"),
        ("results.json", "all numbers"),
    ):
        console.print(f"  {folder / name}  {text}", highlight=False, markup=False)


def write_report(result: QuickstartResult, folder: Path) -> None:
    """report.md, report.html and results.json in `folder`."""
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")
    curve = (folder / "adapter" / CURVE_NAME).read_text(encoding="utf-8")
    (folder / "report.html").write_text(html(result, curve), encoding="utf-8")
    write_ordered_json(folder / "results.json", jsonable(asdict(result)))


def markdown(result: QuickstartResult) -> str:
    """The report as Markdown."""
    lines = ["# Quickstart report", "", *markdown_table(HEADER, rows(result)), ""]
    lines += [_summary(result), "", "## The same prompts, answered by both", ""]
    for index, prompt in enumerate(result.prompts[:SHOWN_ANSWERS]):
        lines += [f"### {prompt}", ""]
        for name in ("base", "policy"):
            quoted = result.answers[name][index].text.replace("\n", "\n> ")
            lines += [f"**{name}**", "", f"> {quoted}", ""]
    lines += ["## Training curve", "", f"![training curve](adapter/{CURVE_NAME})", ""]
    lines += ["## Settings", "", "```json", json.dumps(result.settings, indent=2), "```", ""]
    return "\n".join(lines)


def _summary(result: QuickstartResult) -> str:
    return (
        "House style: one or two plain sentences, then stop; judged by rule on greedy answers to held-out prompts. "
        f"The policy has a threshold of {result.settings['threshold']:g} nats: tokens that the adapter would hardly "
        "move stay the base's. Rates carry Wilson intervals, means bootstrap intervals. "
        f"Took {result.seconds['total']:.0f} s, of which {result.seconds['train']:.0f} s were training."
    )


def html(result: QuickstartResult, curve: str) -> str:
    """The report as one page without outside resources."""
    shown = {
        name: [marked(answer.text, answer.finished) for answer in result.answers[name]] for name in ("base", "policy")
    }
    answers = "".join(
        side_by_side(prompt, {name: texts[index] for name, texts in shown.items()})
        for index, prompt in enumerate(result.prompts)
    )
    body = f"""<p>{escape(_summary(result))}</p>
{table(HEADER, rows(result))}
<h2>Training curve</h2>{curve.replace(SVG_NAMESPACE, "")}
<h2>The same prompts, answered by both</h2>{answers}
<h2>Settings</h2>{json_block(result.settings)}"""
    return document("Quickstart report", body)
