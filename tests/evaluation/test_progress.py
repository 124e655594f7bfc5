"""Progress where nobody watches: few lines, with the time left."""

import io

from rich.console import Console

from qadapter.evaluation.progress import lines, progress_bar, tracked


def test_a_line_every_half_minute_and_one_at_the_end():
    stream, now = io.StringIO(), [0.0]
    advance = lines(stream, lambda: now[0])("Neutral text", 10)
    for _ in range(10):
        now[0] += 12
        advance(1)
    assert stream.getvalue().splitlines() == [
        "Neutral text: 3 of 10, 0:01:24 left",
        "Neutral text: 6 of 10, 0:00:48 left",
        "Neutral text: 9 of 10, 0:00:12 left",
        "Neutral text: 10 of 10 in 0:02:00",
    ]


def test_what_is_soon_done_is_not_worth_a_line():
    stream, now = io.StringIO(), [0.0]
    advance = lines(stream, lambda: now[0])("quick", 2)
    now[0] = 4.0
    advance(2)
    assert stream.getvalue() == ""


def test_commands_write_lines_unless_standard_error_is_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("qadapter.evaluation.progress.SECONDS_WORTH_A_LINE", -1.0)
    with tracked() as track:
        track("Judge", 3)(3)
    assert capsys.readouterr().err == "Judge: 3 of 3 in 0:00:00\n"


def test_names_with_brackets_are_shown_as_they_are():
    stream = io.StringIO()
    with progress_bar(Console(file=stream, force_terminal=True, width=120, no_color=True)) as progress:
        progress.add_task("Judge rule:regex=[/] of runs[new]", total=1)
    assert "Judge rule:regex=[/] of runs[new]" in stream.getvalue()
