"""Show a CheckReport in a terminal."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qadapter.data.check_report import CheckReport, Example

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHOWN = 10  # rows listed of each kind of finding
LONGEST_TEXT = 600  # characters shown of a prompt or an answer


def render(report: CheckReport, console: "Console") -> None:
    """Print the report; the trained part of an example stands in [[...]] and in bold green."""
    kind = "chat" if report.chat else "plain text"
    print_line(console, f"{report.source}: layout {report.layout} ({kind})", "bold")
    print_line(console, f"{report.rows:,} rows, {report.pairs:,} pairs, {report.prompts:,} different prompts")
    print_line(console, f"read: {', '.join(report.columns_read)}; not read: {', '.join(report.columns_unread) or '-'}")
    render_findings(report, console)
    if report.lengths:
        console.print(length_table(report))
    if report.chosen_longer is not None:
        print_line(console, f"The chosen answer is the longer one in {report.chosen_longer:.0%} of the pairs.")
    for example in report.examples:
        render_example(example, console)
    verdict = ("ok: the data can be trained on", "green") if report.ok else ("not ok: see above", "bold red")
    print_line(console, *verdict)


def print_line(console: "Console", text: str, style: str = "") -> None:
    """Data is printed without markup, because its own brackets are no styles of ours."""
    console.print(text, style=style, markup=False, highlight=False)


def render_findings(report: CheckReport, console: "Console") -> None:
    for reason, count in Counter(problem.reason for problem in report.errors).most_common():
        print_line(console, f"error: {reason}: {count:,} rows ({listed(report.rows_with(reason))})", "red")
    for problem in report.errors[:SHOWN]:
        print_line(console, f"  {problem.message}", "red")
    repetitions = (("duplicate", report.duplicates), ("contradicts an earlier row", report.contradictions))
    for name, rows in repetitions:
        if rows:
            pairs = listed(f"{row} and {earlier}" for row, earlier in rows)
            print_line(console, f"warning: {name}: {len(rows):,} rows ({pairs})", "yellow")
    if report.tokenisation is not None:
        print_line(console, f"tokenised: {report.tokenisation.summary()}")
        for reason, numbers in report.tokenisation.dropped.items():
            print_line(console, f"warning: {reason}: dropped rows {listed(numbers)}", "yellow")
            print_line(console, f"  row {numbers[0]}: {report.tokenisation.why[reason]}", "yellow")
        if report.tokenisation.unspaced_warning is not None:
            print_line(console, f"warning: {report.tokenisation.unspaced_warning}", "yellow")
    if report.context_warning is not None:
        print_line(console, f"warning: {report.context_warning}", "yellow")
    if report.tokenisation_error is not None:
        print_line(console, f"error: {report.tokenisation_error}", "red")


def listed(values: Iterable[object]) -> str:
    """The first values, and how many more there are."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - SHOWN:,} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def length_table(report: CheckReport) -> "Table":
    from rich.table import Table

    table = Table("length", "min", "median", "p95", "max", title=f"Lengths in {report.unit}")
    for side, lengths in report.lengths.items():
        values = (lengths.minimum, lengths.median, lengths.p95, lengths.maximum)
        table.add_row(side, *(f"{value:g}" for value in values))
    return table


def render_example(example: Example, console: "Console") -> None:
    console.rule(f"row {example.row}", align="left")
    for name, trained in (("chosen", example.chosen), ("rejected", example.rejected)):
        console.print(example_text(name, example.prompt, trained))


def example_text(name: str, prompt: str, trained: str) -> "Text":
    """Prompt and answer as they follow each other, the trained part marked; long texts lose their middle."""
    from rich.text import Text

    marked = (f"[[{shortened(trained)}]]", "bold green")
    return Text.assemble((f"{name}: ", "bold"), shortened(prompt), marked)


def shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
