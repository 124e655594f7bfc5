"""Tables of figures in terminals of any width."""

import re

import pytest
from rich.console import Console

from qadapter.evaluation.comparison_report import print_comparison
from qadapter.evaluation.tables import short

NAMES = [f"smollm2-135m-instruct-concise-r16{suffix}" for suffix in ("@0.25", "@0.5", "")]


def figure(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 10}


@pytest.mark.parametrize(
    ("interval", "kind", "text"),
    [
        (figure(0.053, 0.049, 0.057), "number", "0.053 ± 0.004"),
        (figure(0.053, 0.049, 0.0572), "change", "+0.053 ± 0.004"),  # nearly even: the longer half
        (figure(1.0, 0.722, 1.0), "rate", "100.0 [72.2, 100.0]"),
        (figure(-0.02, -0.05, 0.0), "points", "-2.0 [-5.0, +0.0]"),
        (figure(0.0, 0.0, 0.0), "number", "0.000 ± 0.000"),
        (figure(0.5, None, None), "rate", "50.0"),
        (figure(None, None, None), "rate", "–"),
    ],
)
def test_intervals_are_written_as_long_as_they_are_on_both_sides(interval, kind, text):
    assert short(interval, kind) == text


@pytest.fixture
def comparison():
    """Of three columns with long names and a benchmark with one."""
    drift = {"kl": figure(0.5, 0.4, 0.9), "loss_change": figure(0.123, -0.2, 0.3)}
    pairs = {"accuracy": figure(1.0, 0.722, 1.0), "accuracy_at_equal_length": figure(0.9, 0.1, 0.99),
             "token_margin_gain": figure(1.5, 1.2, 1.6)}  # fmt: skip
    tasks = {"lambada_openai": {"columns": {name: figure(0.6, 0.3, 0.7) for name in ("base", *NAMES)}}}
    measured = {"columns": dict.fromkeys(("base", *NAMES), drift)}
    results = {
        "pairs": {"columns": dict.fromkeys(("base", *NAMES), pairs), "chosen": measured},
        "neutral": measured,
        "instructions": measured,
        "judged": [],
        "tasks": tasks,
    }
    keys = ("accuracy", "prefers_chosen", "token_margin", "kl_chosen", "kl_neutral", "loss_neutral", "kl_instructions")
    change = figure(-0.9, -1.0, -0.521)
    differences = [
        {"column": later, "minus": earlier, "figures": dict.fromkeys(keys, change), "judged": {"rule:json": change},
         "tasks": {"lambada_openai": change}}
        for earlier, later in [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2])]
    ]  # fmt: skip
    columns = [{"name": name, "strength": 1.0} for name in NAMES]
    return {"columns": columns, "results": results, "differences": differences}


@pytest.mark.parametrize("width", [60, 80, 100, 120, 500])
def test_no_cell_and_no_word_is_broken_at_any_width(comparison, capsys, width):
    print_comparison(comparison, Console(width=width))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    headings = " ".join(re.findall(r"(?<=┃)[^┃]+(?=┃)", printed)).split()
    assert {"accuracy", "equal", "margin", "neutral", "instructions", "lambada_openai", "rule:json"} <= set(headings)
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert all(all(row) for row in rows)  # no row goes on in a second line
    assert "100.0 [72.2, 100.0]" in {cell for row in rows for cell in row}
    named = [name for name in NAMES if f"column {NAMES.index(name) + 1}: {name}\n" in printed]
    assert named == ([] if width == 500 else NAMES)
    expected = {f"{NAMES[1]} − {NAMES[0]}"} if width == 500 else {"2 − 1"}
    assert expected < {row[0] for row in rows}
